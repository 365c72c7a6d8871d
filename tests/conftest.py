"""A strict place to test in: 8 simulated CPU devices, no silent broadcasting, no warnings, no home directory.

The settings of JAX must be made before its backend starts, so they stand at the top of this file.
"""

import contextlib
import faulthandler
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu, where it is installed, must not look for a cloud machine
os.environ["XLA_FLAGS"] = os.environ.get("JAXGPT_TEST_XLA_FLAGS", "")  # not those of who runs the tests

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh

from jaxgpt import cli
from jaxgpt.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    TrainingConfig,
    to_json,
)
from jaxgpt.errors import run_command
from jaxgpt.sharding import make_mesh

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).parents[1]
EXTRAS = {"parity": ("torch", "transformers"), "tpu": ("libtpu",)}  # marker and extra -> the packages that it brings


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests of an extra that is not installed; fail them when they were asked for with `-m EXTRA`."""
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing and item.get_closest_marker(extra):
            outcome = pytest.fail if item.config.option.markexpr == extra else pytest.skip
            outcome(f"{' and '.join(missing)} not installed: pip install -e '.[{extra}]'")


@pytest.fixture(scope="session", autouse=True)
def cache_home() -> Iterator[Path]:
    """Keep what jaxgpt caches out of the home directory; subprocesses inherit it and share its prepared data."""
    with tempfile.TemporaryDirectory(prefix="jaxgpt-cache-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", directory)
        yield Path(directory)


@contextlib.contextmanager
def _mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Iterator[Mesh]:
    mesh = make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="session")
def mesh_of() -> Callable[..., contextlib.AbstractContextManager[Mesh]]:
    """`with mesh_of(data=2, fsdp=2, tensor=2) as mesh:` sets an explicit mesh of the first simulated devices."""
    return _mesh_of


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_cli(["train.py", "configs/tiny.py", ...])` runs one of the repository's scripts as a user would.

    The process has one CPU device, no input, no terminal and `tmp_path` as its directory, so that `runs/` lands
    there. The program and the names under `configs/` are taken from the repository. `env` adds to the environment.
    """

    def run(
        arguments: list[str], *, env: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        in_repository = [str(ROOT / word) if word.startswith("configs/") else word for word in arguments[1:]]
        command = [sys.executable, str(ROOT / arguments[0]), *in_repository]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 350 kB of real text: a few modules of the standard library."""
    directory = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse", "ast", "dataclasses", "functools", "heapq", "shutil", "textwrap"):
        shutil.copy(library / f"{name}.py", directory)
    return directory


# Whole runs, small enough for a test


@pytest.fixture(scope="session")
def compile_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of JAX with which the tests of whole runs, here and in other processes, share what they compile."""
    return {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


@pytest.fixture(scope="module")
def compiled_once(compile_settings: dict[str, Any]) -> Iterator[None]:
    """Compiling the same tiny training step for each test would take four times as long as running it."""
    with _configured(compile_settings):
        yield


@contextlib.contextmanager
def _configured(settings: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    yield
    _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # JAX looks at these settings only once


@pytest.fixture(scope="session")
def tiny(text_dir: Path) -> TrainConfig:
    """20 steps of a model that uses what has state: dropout, an average of the parameters, accumulation.

    The learning rate does not depend on the number of steps, so that shorter runs compile nothing new.
    """
    return TrainConfig(
        model=ModelConfig(n_layers=2, d_model=32, n_heads=2, context_length=64, dropout=0.1),
        tokenizer=TokenizerConfig(vocab_size=500),
        data=DataConfig(paths=(str(text_dir),)),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=5, schedule="constant", ema_decay=0.9),
        training=TrainingConfig(
            steps=20, batch_size=4, accumulation_steps=2, log_every=1, eval_every=5, eval_batches=3, loss_chunks=2,
            sample_tokens=0,
        ),
        checkpoint=CheckpointConfig(every=4),
    )  # fmt: skip


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on the first of the simulated devices, unless a mesh is given: compiling takes half as long."""
    monkeypatch.setattr("jaxgpt.training.loop.make_mesh", _on_first_device)


def _on_first_device(config: MeshConfig) -> Mesh:
    return make_mesh(config, jax.devices()[:1] if config == MeshConfig() else None)


@pytest.fixture(scope="session")
def finished(tiny: TrainConfig, compile_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of `tiny` that nothing disturbed: to be read, or copied."""
    from jaxgpt.training.loop import train  # here, since Grain and Orbax take 2 s

    run_dir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch, _configured(compile_settings):
        patch.setattr("jaxgpt.training.loop.make_mesh", _on_first_device)
        train(replace(tiny, run_dir=str(run_dir)))
    return run_dir


@dataclass(frozen=True)
class Outcome:
    """What a program left behind."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a user's mistake ends in; fails when there is none, or more, or a traceback."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("jaxgpt: error: ")]
        assert len(lines) == 1 and self.err.endswith(lines[0] + "\n"), self.err
        return lines[0].removeprefix("jaxgpt: error: ")


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_device: None
) -> Callable[..., Outcome]:
    """`command("train.py", config, "--training.steps", "3")` runs a program as `run_cli` does, but in this process.

    A TrainConfig among the words stands for a file that holds it. Training takes one device unless a mesh is given.
    """
    monkeypatch.setattr(faulthandler, "enable", lambda: None)  # pytest has its own
    given = tmp_path / "given.json"

    def run(program: str, *words: str | TrainConfig) -> Outcome:
        def script(arguments: list[str]) -> None:
            cli.dispatch([program.removesuffix(".py"), *arguments], program)

        for word in words:
            if isinstance(word, TrainConfig):
                given.write_text(to_json(word))
        argv = [program, *(str(given) if isinstance(word, TrainConfig) else word for word in words)]
        monkeypatch.setattr(sys, "argv", argv)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capfd.readouterr()
        status: int | str | None = 0
        try:
            run_command(script if program.endswith(".py") else cli.dispatch)
        except SystemExit as stop:
            status = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert isinstance(status, int)
        out, err = capfd.readouterr()
        # Where it failed nothing is left out: an error is one line.
        compiled = r"jaxgpt: \d+ programs compiled, \d+ read from .*\n"
        return Outcome(status, out, err if status else re.sub(compiled, "", err))

    return run
