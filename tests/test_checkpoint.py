"""Checkpoints under faults: whatever is done to the files, what comes back is bit-exact or refused."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxgpt.checkpoint import Checkpoints, _fingerprint, restore_model
from jaxgpt.config import CheckpointConfig
from jaxgpt.errors import BadFileError, ConfigError, StorageError, TrainingError

CONFIG = CheckpointConfig(keep_last=2)
WIDTH = 256  # enough for Orbax to put arrays in files of their own


class Linear(nnx.Module):
    def __init__(self, key: jax.Array, width: int) -> None:
        self.kernel_DF = nnx.Param(jax.random.normal(key, (8, width), out_sharding=jax.P("fsdp", "tensor")))
        self.bias_F = nnx.Param(jax.random.normal(key, (width,), jnp.bfloat16))


@functools.partial(jax.jit, static_argnums=1)
def make_jit(step: jax.Array, width: int) -> tuple[Linear, dict[str, Any]]:
    key = jax.random.key(step)
    model = Linear(key, width)
    adam = optax.scale_by_adam()
    _, moments = adam.update(model, adam.init(model))
    return model, {"step": step, "opt": moments, "seen": jax.random.bernoulli(key, shape=(3, 5)), "ema": None}


def make(step: int, width: int = WIDTH) -> tuple[Linear, dict[str, Any]]:
    """A model and the rest of a state, made from `step` alone: whoever restores a step can make it again."""
    return make_jit(jnp.int32(step), width)


def abstract(width: int = WIDTH) -> tuple[Linear, dict[str, Any]]:
    return jax.eval_shape(lambda: make(0, width))


def assert_exact(restored: Any, step: int, width: int = WIDTH) -> None:
    expected = make(step, width)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for old, new in zip(jax.tree.leaves(expected), jax.tree.leaves(restored), strict=True):
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


def save(run_dir: Path, steps: list[int], config: CheckpointConfig = CONFIG, width: int = WIDTH) -> None:
    with Checkpoints(run_dir, config) as checkpoints:
        for step in steps:
            checkpoints.save(step, *make(step, width), metadata={"seed": step})


def restore(run_dir: Path, width: int = WIDTH) -> int:
    """Restore as a trainer would, check every bit, and return the step."""
    with Checkpoints(run_dir, CONFIG) as checkpoints:
        found = checkpoints.restore(*abstract(width))
    assert found is not None
    step, model, rest, metadata = found
    assert_exact((model, rest), step, width)
    assert metadata == {"seed": step}
    return step


def listing(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(autouse=True)
def mesh(mesh_of: Callable[..., Any]) -> Iterator[None]:
    with mesh_of():
        yield


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory, mesh_of: Callable[..., Any]) -> Path:
    """A run with the steps 1 and 2, to be copied and damaged."""
    run_dir = tmp_path_factory.mktemp("two_steps")
    with mesh_of():
        save(run_dir, [1, 2])
    return run_dir


# --- the fingerprint


def reference_fingerprint(x: np.ndarray) -> list[int]:
    """The same sums with Python's integers, one element at a time."""
    words = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}").tolist()
    lanes = []
    for constant in (0x9E3779B1, 0x7FEB352D):
        total = 0
        for place, bits in enumerate(words):
            h = bits ^ (place * constant) % 2**32
            h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
            h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
            total += h ^ (h >> 16)
        lanes.append(total % 2**32)
    return lanes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint16", "bool"])
def test_fingerprint_is_the_documented_sum(dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 5, 4)) * 3.7, dtype)
    assert _fingerprint(x)[:2].tolist() == reference_fingerprint(np.asarray(x))


def test_fingerprint_never_changes_between_versions() -> None:
    """If this fails, every checkpoint that exists is refused: raise FORMAT and keep the old sum for the old format."""
    x = jnp.arange(1000, dtype=jnp.float32).reshape(10, 100)
    assert [f"{lane:08x}" for lane in _fingerprint(x)[:2].tolist()] == ["765528ca", "f13823f0"]


def test_fingerprint_sees_each_bit_and_each_place() -> None:
    x = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    seen = {tuple(_fingerprint(x).tolist())}
    for place in range(x.size):
        for bit in range(32):
            flipped = x.copy()
            flipped.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
            lanes = _fingerprint(flipped).tolist()
            assert not any(lane in {known[i] for known in seen} for i, lane in enumerate(lanes[:2]))
        swapped = x.copy().reshape(-1)
        swapped[[place, place - 1]] = swapped[[place - 1, place]]
        seen.add(tuple(_fingerprint(swapped.reshape(x.shape)).tolist()))
    assert len(seen) == x.size + 1


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_fingerprint_does_not_depend_on_sharding(shape: tuple[int, ...], mesh_of: Callable[..., Any]) -> None:
    x = np.random.default_rng(2).normal(size=(8, 16, 4)).astype(np.float32)
    alone = _fingerprint(x).tolist()
    with mesh_of(*shape):
        for spec in (jax.P(), jax.P("fsdp", "tensor"), jax.P(None, ("data", "fsdp", "tensor"))):
            assert _fingerprint(jax.device_put(x, spec)).tolist() == alone


# --- saving and restoring


def test_what_is_restored_is_what_was_saved(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(run_dir, [1, 2])
    assert restore(run_dir) == 2
    assert "".join(capfd.readouterr()) == "", "Orbax must not print"


def test_other_meshes_restore_the_same_bits(run_dir: Path, mesh_of: Callable[..., Any]) -> None:
    with mesh_of(data=8):
        save(run_dir, [1])
    for step, shape in enumerate([(2, 2, 2), (1, 4, 2), (1, 1, 1), (8, 1, 1)], start=1):
        with mesh_of(*shape) as mesh:
            assert restore(run_dir) == step
            with Checkpoints(run_dir, CONFIG) as checkpoints:
                found = checkpoints.restore(*abstract())
                assert found is not None
                kernel_DF = found[1].kernel_DF[...]
                assert kernel_DF.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P("fsdp", "tensor")), 2)
            save(run_dir, [step + 1])


def test_buffers_that_are_donated_after_save_reach_the_disk_unchanged(run_dir: Path) -> None:
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    with Checkpoints(run_dir, CONFIG) as checkpoints:
        for step in range(1, 4):
            model, rest = make(step, 1 << 16)
            checkpoints.save(step, model, rest, {"seed": step})
            jax.block_until_ready(overwrite((model, rest)))
            checkpoints.wait()
            assert restore_model(run_dir, abstract(1 << 16)[0])[0] == step
    assert restore(run_dir, 1 << 16) == 3


def test_generation_reads_the_model_while_training_holds_the_lock(run_dir: Path) -> None:
    with Checkpoints(run_dir, CONFIG) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, *make(step), metadata=["any", {"json": None}])
        checkpoints.wait()
        before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
        for wanted, step in ((None, 2), (1, 1)):
            found, model, metadata = restore_model(run_dir, abstract()[0], wanted)
            assert (found, metadata) == (step, ["any", {"json": None}])
            assert np.array_equal(model.kernel_DF[...], make(step)[0].kernel_DF[...])
        assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    with pytest.raises(BadFileError, match=r"no checkpoint of step 7 .* one of steps \[1, 2\]"):
        restore_model(run_dir, abstract()[0], 7)


def test_generation_skips_a_damaged_step_and_renames_nothing(
    run_dir: Path, two_steps: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(two_steps, run_dir)
    (run_dir / "checkpoints/2/model/manifest.ocdbt").unlink()
    assert restore_model(run_dir, abstract()[0])[0] == 1
    assert "checkpoint step 2" in capfd.readouterr().err
    assert listing(run_dir) == ["1", "2"]


def test_nothing_saved_is_no_error_for_training_but_for_generation(run_dir: Path) -> None:
    with Checkpoints(run_dir, CONFIG) as checkpoints:
        assert checkpoints.restore(*abstract()) is None
    with pytest.raises(BadFileError, match="no checkpoint"):
        restore_model(run_dir, abstract()[0])


def test_retention(run_dir: Path) -> None:
    save(run_dir, [1, 2, 3, 4, 5, 6, 7], CheckpointConfig(keep_last=2, keep_every=3))
    assert listing(run_dir) == ["3", "6", "7"]
    save(run_dir, [5], CheckpointConfig(keep_last=1))  # older than others: still it is the one just saved
    assert listing(run_dir) == ["5", "7"]


def test_a_damaged_step_can_be_saved_again_but_not_an_intact_one(run_dir: Path) -> None:
    save(run_dir, [1, 2])
    (run_dir / "checkpoints/2/manifest/metadata").write_bytes(b"")
    assert restore(run_dir) == 1
    save(run_dir, [2])  # after its damaged namesake was set aside
    (run_dir / "checkpoints/2/manifest/metadata").write_bytes(b"")
    assert restore(run_dir) == 1
    save(run_dir, [2])
    with pytest.raises(StorageError, match=r"cannot save step 2 in .* already exists"):
        save(run_dir, [2])
    assert restore(run_dir) == 2
    assert listing(run_dir) == ["1", "2", "2.corrupt", "2.corrupt1"]


def test_what_a_killed_process_left_is_deleted(run_dir: Path, two_steps: Path) -> None:
    shutil.copytree(two_steps, run_dir)
    directory = run_dir / "checkpoints"
    (directory / "1").rename(directory / "1.discarded")
    (directory / "3.orbax-checkpoint-tmp").mkdir()
    assert restore(run_dir) == 2
    assert listing(run_dir) == ["2"]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_non_finite_state_is_never_saved(run_dir: Path, value: jax.Array) -> None:
    model, rest = make(2)
    rest["opt"].mu.bias_F[...] = rest["opt"].mu.bias_F[...].at[3].set(value)
    with Checkpoints(run_dir, CONFIG) as checkpoints:
        checkpoints.save(1, *make(1), metadata={"seed": 1})
        with pytest.raises(TrainingError, match=r"step 2 was not saved: leaf .*mu\.bias_F\S* is not finite"):
            checkpoints.save(2, model, rest, {})
    assert restore(run_dir) == 1


# --- damage


def damage_outcome(two_steps: Path, run_dir: Path, damage: Callable[[Path], None], file: Path) -> int:
    """Restore a damaged copy; either step may come back, but exactly, and a step that was passed over is set aside."""
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(two_steps, run_dir)
    damage(run_dir / file)
    step = restore(run_dir)
    assert listing(run_dir) == (["1", "2"] if step == 2 else ["1", "2.corrupt"])
    return step


def files_of_step_2(run_dir: Path) -> list[Path]:
    return sorted(path.relative_to(run_dir) for path in (run_dir / "checkpoints/2").rglob("*") if path.is_file())


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_never_restored(two_steps: Path, run_dir: Path, seed: int) -> None:
    choose = random.Random(seed)
    files = files_of_step_2(two_steps)
    weights = [(two_steps / file).stat().st_size for file in files]

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        path.write_bytes(data)

    outcomes = [damage_outcome(two_steps, run_dir, flip, choose.choices(files, weights)[0]) for _ in range(10)]
    assert 1 in outcomes, "no flip did any harm: nothing was tested"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [truncate, zero, Path.unlink], ids=["truncate", "zero", "delete"])
def test_each_file_can_be_damaged(
    two_steps: Path,
    run_dir: Path,
    damage: Callable[[Path], None],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    outcomes = {file: damage_outcome(two_steps, run_dir, damage, file) for file in files_of_step_2(two_steps)}
    assert 1 in [step for file, step in outcomes.items() if file.match("ocdbt.process_0/d/*")]
    gc.collect()  # asyncio complains of forgotten tasks when they are deleted
    assert not caplog.records
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == list(outcomes.values()).count(1)
    assert all(line.startswith("jaxgpt: checkpoint step 2 is damaged: ") for line in lines)


def test_the_warning_names_the_leaf(two_steps: Path, run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Swap a whole item with another state's of the same shapes: every file is valid, only the content is wrong."""
    shutil.copytree(two_steps, run_dir)
    shutil.rmtree(run_dir / "checkpoints/2/model")
    shutil.copytree(two_steps / "checkpoints/1/model", run_dir / "checkpoints/2/model")
    assert restore(run_dir) == 1
    error = capfd.readouterr().err
    assert error.startswith("jaxgpt: checkpoint step 2 is damaged: leaf .bias_F") and error.count("\n") == 1


def test_metadata_cannot_change_unseen(two_steps: Path, run_dir: Path) -> None:
    def edit(path: Path) -> None:
        text = path.read_text()
        assert text.count("seed") == 1
        path.write_text(text.replace('seed\\": 2', 'seed\\": 3'))

    assert damage_outcome(two_steps, run_dir, edit, Path("checkpoints/2/manifest/metadata")) == 1


@pytest.mark.parametrize("left", [[], ["commit_success.txt"], ["model", "rest", "manifest"]])
def test_a_half_deleted_newest_step_is_passed_over(
    two_steps: Path, run_dir: Path, left: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    def delete(step: Path) -> None:
        for path in step.iterdir():
            if path.name not in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    assert damage_outcome(two_steps, run_dir, delete, Path("checkpoints/2")) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_all_damaged_is_an_error_that_can_be_repaired(two_steps: Path, run_dir: Path) -> None:
    shutil.copytree(two_steps, run_dir)
    for step in (1, 2):
        shutil.move(run_dir / f"checkpoints/{step}/manifest/metadata", run_dir / f"saved{step}")
    with pytest.raises(BadFileError, match=r"step 2: the manifest is unreadable .*; step 1: the manifest"):
        restore(run_dir)
    assert listing(run_dir) == ["1", "2"]
    shutil.move(run_dir / "saved2", run_dir / "checkpoints/2/manifest/metadata")
    assert restore(run_dir) == 2


def test_a_checkpoint_of_a_later_format_is_refused(two_steps: Path, run_dir: Path) -> None:
    shutil.copytree(two_steps, run_dir)
    path = run_dir / "checkpoints/2/manifest/metadata"
    text = json.dumps(json.loads(json.loads(path.read_text())["manifest"]) | {"format": 99})
    path.write_text(json.dumps({"manifest": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    with pytest.raises(ConfigError, match="format 99"):
        restore(run_dir)
    assert listing(run_dir) == ["1", "2"]


def test_a_target_that_differs_is_refused_by_the_name_of_its_leaf(two_steps: Path, run_dir: Path) -> None:
    shutil.copytree(two_steps, run_dir)
    model, rest = abstract()
    other_dtype = rest | {"step": jax.ShapeDtypeStruct((), jnp.float32)}
    without = {name: leaf for name, leaf in rest.items() if name != "seen"}
    with Checkpoints(run_dir, CONFIG) as checkpoints:
        for target, message in (
            ((model, other_dtype), r"leaf \['step'\] is int32\[\] there and float32\[\] here"),
            (abstract(32), r"leaf \.bias_F.* is bfloat16\[256\] there and bfloat16\[32\] here"),
            ((model, without), r"leaf \['seen'\] is bool\[3, 5\] there and absent here"),
            ((model, rest | {"ema": rest["seen"]}), r"leaf \['ema'\] is absent there and bool\[3, 5\] here"),
        ):
            with pytest.raises(ConfigError, match=message):
                checkpoints.restore(*target)
    assert listing(run_dir) == ["1", "2"]


# --- kill -9, locks and disks

TRAINER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import jax
from pathlib import Path
from jaxgpt.config import MeshConfig
from jaxgpt.sharding import make_mesh
from test_checkpoint import CONFIG, Checkpoints, abstract, assert_exact, make
with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])), Checkpoints(Path(sys.argv[2]), CONFIG) as checkpoints:
    found = checkpoints.restore(*abstract())
    step = 0
    if found:
        step = found[0]
        assert_exact(found[1:3], step)
    print("restored", step, flush=True)
    for step in range(step + 1, step + 10_000):
        checkpoints.save(step, *make(step), metadata={"seed": step})
        if step % 2:
            checkpoints.wait()
        print("acknowledged", checkpoints.saved_step, flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(run_dir: Path, tmp_path: Path) -> None:
    random_time = random.Random(0)
    compile_once = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    acknowledged = 0
    for _ in range(3):
        command = [sys.executable, "-c", TRAINER, str(Path(__file__).parent), str(run_dir)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | compile_once) as trainer:
            assert trainer.stdout is not None
            restored = int(trainer.stdout.readline().removeprefix("restored "))
            assert restored >= acknowledged
            trainer.stdout.readline()
            time.sleep(random_time.uniform(0.05, 0.5))
            trainer.kill()
            last = trainer.stdout.read().split()[-1:]
        acknowledged = int(last[0]) if last and last[0].isdigit() else acknowledged
    assert restore(run_dir) >= acknowledged > 0
    assert not [name for name in listing(run_dir) if not name.isdigit()]


def test_a_second_trainer_is_refused_until_the_first_is_gone(run_dir: Path) -> None:
    with Checkpoints(run_dir, CONFIG):
        start = time.monotonic()
        with pytest.raises(ConfigError, match=rf"in use by pid {os.getpid()} on host {os.uname().nodename}"):
            Checkpoints(run_dir, CONFIG)
        assert time.monotonic() - start < 5
    with Checkpoints(run_dir, CONFIG):
        pass


@pytest.fixture(params=["tmpfs", 1 << 18, 100])
def full_disk(request: pytest.FixtureRequest, run_dir: Path) -> Iterator[Callable[[bool], None]]:
    """`full_disk(True)` leaves no room for the array files below `run_dir`, `full_disk(False)` makes room.

    Either a small file system that is really full, or a limit of so many bytes for each file, which anyone may set.
    """
    if request.param != "tmpfs":
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (request.param if full else hard, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return
    run_dir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(run_dir)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    filler = run_dir / "filler"

    def fill(full: bool) -> None:
        filler.unlink(missing_ok=True)
        if full:
            free = shutil.disk_usage(run_dir).free
            filler.write_bytes(bytes(free - (1 << 18)))

    yield fill
    subprocess.run(["umount", "-l", str(run_dir)], check=True)


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_full_disk_is_reported_and_survived(
    full_disk: Callable[[bool], None],
    run_dir: Path,
    on_save_error: Any,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    width = 1 << 14  # 1.6 MB of noise, which does not compress
    config = dataclasses.replace(CONFIG, on_save_error=on_save_error)
    message = r"cannot save step 2 in .*(No space left|File too large).*newest saved step is 1"
    with Checkpoints(run_dir, config) as checkpoints:
        checkpoints.save(1, *make(1, width), metadata={"seed": 1})
        checkpoints.wait()
        full_disk(True)
        expect = contextlib.nullcontext()
        with pytest.raises(StorageError, match=message) if on_save_error == "stop" else expect:
            checkpoints.save(2, *make(2, width), metadata={"seed": 2})
            checkpoints.wait()
        assert checkpoints.saved_step == 1
        full_disk(False)
        gc.collect()
        assert not caplog.records
        assert capfd.readouterr().err.count("jaxgpt: cannot save step 2") == (on_save_error == "continue")
        checkpoints.save(3, *make(3, width), metadata={"seed": 3})
        checkpoints.wait()
        assert checkpoints.saved_step == 3
        assert listing(run_dir) == ["1", "3"], "what the failed save wrote must not fill the disk"
    assert restore(run_dir, width) == 3


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("")
    for run_dir in (file, file / "below", tmp_path / "run"):
        with pytest.raises(StorageError, match=rf"cannot write {run_dir}.*; choose another run_dir"):
            Checkpoints(run_dir, CONFIG)


def test_a_read_only_directory_is_named(run_dir: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write in a read-only directory")
    run_dir.mkdir(mode=0o500)
    with pytest.raises(StorageError, match=f"cannot write {run_dir}"):
        Checkpoints(run_dir, CONFIG)


def test_every_file_is_on_the_disk_before_the_step_counts_as_saved(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        assert checkpoints.saved_step is None
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with Checkpoints(run_dir, CONFIG) as checkpoints:
        checkpoints.save(1, *make(1), metadata={})
    directory = run_dir / "checkpoints"
    assert {path.stat().st_ino for path in (directory, *directory.rglob("*"))} <= synced


def test_a_write_that_nobody_waits_for_is_no_news() -> None:
    """Wherever it is collected: in a named tuple's constructor Python can import nothing that would say so."""
    program = (
        "from jaxgpt.checkpoint import _set_up_orbax; _set_up_orbax()\n"
        "async def async_serialize(): pass\n"
        "async def mine(): pass\n"
        "drop = eval('lambda make: (make(), None)[1]', {'__builtins__': {}})\n"
        "drop(async_serialize), drop(mine)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert "mine" in said and "async_serialize" not in said, said
