"""A strict place to test in: 8 simulated CPU devices, no silent broadcasting, no warnings, no home directory.

The settings of JAX must be made before its backend starts, so they stand at the top of this file.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu, where it is installed, must not look for a cloud machine
os.environ.pop("XLA_FLAGS", None)

import jax
import pytest
from jax.sharding import Mesh

from jaxgpt.config import MeshConfig
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
