"""Checkpoints that are restored bit for bit or not at all; the only module that imports Orbax.

Orbax writes a step to a temporary directory in the background and renames it when it is complete, so a killed process
leaves no half step. It does not see damage that comes later: array files have no checksum, and of 195 flipped bits
all 195 were restored without a word. So each step carries a manifest with a 64-bit fingerprint of every leaf,
computed on the devices before saving and again after restoring. `<run_dir>/checkpoints` holds

    N/            step N: the Orbax items model (all that generation reads), rest and manifest
    N.corrupt     a damaged step, set aside because an older one could be restored; never deleted here
    N.discarded   step N on its way to be deleted"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array

from jaxgpt.config import CheckpointConfig
from jaxgpt.errors import BadFileError, ConfigError, StorageError, TrainingError, note
from jaxgpt.files import locked, sync
from jaxgpt.sharding import place_shapes

FORMAT = 1
_PARTS = ("model", "rest", "manifest", "commit_success.txt")  # Orbax writes the last, but never looks at it

Json = dict[str, Any]  # also arrays by their paths


def _one_line(error: BaseException) -> str:
    """The end of the message, as the array store names the cause last and then repeats its settings."""
    return " ".join(str(error.__cause__ or error).partition(" [tensorstore_spec")[0].split())[-160:]


@functools.cache
def _set_up_orbax() -> None:
    """Keep Orbax from printing a traceback for each damaged file, and from cutting each replicated array into a part
    for each replica: compiling that took 4 s at the first save of 30 arrays on 8 devices."""
    logging.getLogger("absl").setLevel(logging.CRITICAL + 1)
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)
    ocp.type_handlers.register_type_handler(Array, arrays, override=True)
    # Reads and writes that are in flight when the first one fails have nobody to report to.
    late = re.compile("Event loop is closed|never awaited|serialize|orbax|tensorstore|ocdbt", re.IGNORECASE)
    logging.getLogger("asyncio").addFilter(lambda record: not late.search(record.getMessage()))
    warnings.filterwarnings("ignore", "coroutine .*serialize.* was never awaited", RuntimeWarning)
    usual = sys.unraisablehook
    # By its object too: a named tuple's constructor, in which it may be collected, lets nobody import to say so.
    sys.unraisablehook = lambda event: None if late.search(f"{event.exc_value} {event.object}") else usual(event)


def _flatten(tree: Any) -> Json:
    """Plain names: a class that is renamed here or in a library then breaks no checkpoint."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.jit
def _fingerprint(x: Array) -> Array:
    """uint32[3]: two lanes that depend on every bit of `x` and on its place, and the number of non-finite elements. A
    lane is the sum modulo 2^32 of mix(bits ^ place * constant): the same however `x` is sharded. The mix (murmur3's
    finalizer) is a bijection, so a change of one element always shows. It guards against faults, not attackers."""
    if x.dtype.itemsize > 4:
        raise TypeError(f"checkpoints hold types of at most 4 bytes, not {x.dtype}")
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    place = jnp.uint32(0)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)

    def mix(constant: int) -> Array:
        h = bits.astype(jnp.uint32) ^ (place * jnp.uint32(constant))
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    lanes = [mix(0x9E3779B1), mix(0x7FEB352D), (~jnp.isfinite(x)).astype(jnp.uint32)]
    # One reduction of three operands: three reductions take twice as long to compile, 0.2 s for each shape.
    sums = jax.lax.reduce(lanes, [jnp.uint32(0)] * 3, lambda xs, ys: jax.tree.map(jnp.add, xs, ys), range(x.ndim))
    return jnp.stack(sums)


def _describe(leaves: Json) -> Json:
    # One at a time: sums over several CPU devices wait for each other for ever when many are under way.
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "fingerprint": jax.device_get(_fingerprint(x)).tolist()}
        for name, x in leaves.items()
    }


def fingerprint(tree: Any) -> str:
    """Changes when any bit of any array does; the same however they are sharded."""
    return hashlib.sha256(json.dumps(_describe(_flatten(tree))).encode()).hexdigest()


def _steps(directory: Path) -> list[int]:
    """Steps that have a directory, complete or not, oldest first. (Orbax's latest_step() believes empty ones.)"""
    return sorted(int(path.name) for path in directory.glob("[0-9]*") if path.name.isdecimal())


def _missing(path: Path) -> list[str]:
    return [part for part in _PARTS if not (path / part).exists()]


def _read_manifest(path: Path) -> Json:
    if missing := _missing(path):
        raise BadFileError(f"incomplete, there is no {' and no '.join(missing)}")
    try:
        stored = json.loads((path / "manifest" / "metadata").read_bytes())
        intact = hashlib.sha256(stored["manifest"].encode()).hexdigest() == stored["sha256"]
        manifest: Json = json.loads(stored["manifest"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadFileError(f"the manifest is unreadable ({_one_line(error)})") from error
    if not intact or manifest["step"] != int(path.name):
        raise BadFileError("the manifest has changed since it was saved")
    if manifest["format"] != FORMAT:
        raise ConfigError(f"checkpoint {path} has format {manifest['format']}, not {FORMAT}; use a newer jaxgpt")
    return manifest


def _refuse_other_leaves(path: Path, stored: Json, wanted: Json) -> None:
    """A target that differs is the caller's mistake, not damage. (Orbax casts float32 to int32 without a word.)"""
    for name in {**wanted, **stored}:
        old = f"{stored[name]['dtype']}{stored[name]['shape']}" if name in stored else "absent"
        new = f"{wanted[name].dtype}{list(wanted[name].shape)}" if name in wanted else "absent"
        if old != new:
            why = f"leaf {name} is {old} there and {new} here; use the configuration of that run or another run_dir"
            raise ConfigError(f"checkpoint {path} does not fit this configuration: {why}")


def _load(path: Path, *targets: Any) -> tuple[Any, ...]:
    """As many of model and rest as there are targets, each a pytree like its own, and the metadata. Raises BadFileError
    for damage, ConfigError for another format or a leaf that is not as in the target."""
    manifest = _read_manifest(path)
    wanted = {item: _flatten(place_shapes(tree)) for item, tree in zip(_PARTS, targets, strict=False)}
    for item, leaves in wanted.items():
        _refuse_other_leaves(path, manifest["leaves"][item], leaves)
    arguments = {item: ocp.args.StandardRestore(leaves) for item, leaves in wanted.items()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            restored: Json = reader.restore(path, args=ocp.args.Composite(**arguments))
    except Exception as error:  # a damaged file shows as one of a dozen types
        raise BadFileError(f"unreadable ({_one_line(error)})") from error
    trees = []
    for item, target in zip(wanted, targets, strict=True):
        for name, described in _describe(restored[item]).items():
            if described != manifest["leaves"][item][name]:
                raise BadFileError(f"leaf {name} of {item} has changed since it was saved")
        trees.append(jax.tree.unflatten(jax.tree.structure(target), [restored[item][name] for name in wanted[item]]))
    return *trees, manifest["metadata"]


def _newest_good(directory: Path, *targets: Any, only: int | None = None, set_aside: bool = False) -> Any:
    """The newest step (or `only`) that restores exactly, and what `_load` gives; a line for each that does not. Looks
    again after a failure: a trainer may have deleted that step and saved another. Raises BadFileError without any."""
    bad: dict[int, str] = {}
    while steps := [step for step in _steps(directory) if step not in bad and only in (None, step)]:
        path = directory / str(steps[-1])
        try:
            found = _load(path, *targets)
        except BadFileError as error:
            if path.exists():  # otherwise a trainer has just deleted it
                bad[steps[-1]] = str(error)
            continue
        for damaged, reason in bad.items():
            where = directory / str(damaged)
            if set_aside:
                where = next(name for n in count() if not (name := directory / f"{damaged}.corrupt{n or ''}").exists())
                os.rename(directory / str(damaged), where)
            note(f"checkpoint step {damaged} is damaged: {reason}; it is in {where}, using step {steps[-1]}")
        return steps[-1], *found
    if not bad:
        wanted = "checkpoint" if only is None else f"checkpoint of step {only}"
        raise BadFileError(f"no {wanted} in {directory}; train first or choose one of steps {_steps(directory)}")
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in bad.items())
    raise BadFileError(f"no intact checkpoint in {directory}: {reasons}; repair one, or choose another run_dir")


def restore_model(run_dir: Path, abstract_model: Any, step: int | None = None) -> tuple[int, Any, Any]:
    """Step, model and metadata of the newest intact step, or of `step`. Needs no lock and changes no file.
    `abstract_model` is a pytree with shapes, dtypes and shardings (`jax.eval_shape`); it lands on the current mesh.
    Raises BadFileError when nothing can be restored, ConfigError when a leaf differs in name, shape or dtype."""
    _set_up_orbax()
    return _newest_good((run_dir / "checkpoints").absolute(), abstract_model, only=step)


class Checkpoints(contextlib.ExitStack):
    """The checkpoints of one run, held by the process that trains it. A context manager:
    leaving it, or `close()`, waits for the last save like `wait` and frees the directory. Raises StorageError when
    `run_dir` cannot be written, ConfigError when another process trains there."""

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        super().__init__()
        _set_up_orbax()
        self.saved_step: int | None = None  # the newest step that is known to be durable
        self._config, self._directory = config, (run_dir / "checkpoints").absolute()  # Orbax takes no other
        self._pending: tuple[int, Future[None]] | None = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self.enter_context(locked(run_dir / "LOCK", wait=False))
            self._clean()
        except OSError as error:
            where = error.filename or self._directory
            raise StorageError(f"cannot write {where}: {_one_line(error)}; choose another run_dir") from error
        self._worker = self.enter_context(ThreadPoolExecutor(1, thread_name_prefix="checkpoint"))
        self.callback(self.wait)

    def steps(self) -> list[int]:
        return _steps(self._directory)

    def save(self, step: int, model: Any, rest: Any, metadata: Any) -> None:
        """Copy two pytrees of arrays to the host, and write them in the background as `step`. `model` is what
        `restore_model` returns (the averaged parameters where there are any), `rest` all else that training needs,
        `metadata` anything that JSON can hold. Waits for the previous save first, and raises what `wait` raises;
        TrainingError when a leaf is not finite: then nothing is written."""
        self.wait()
        items = {"model": _flatten(model), "rest": _flatten(rest)}
        described = {item: _describe(leaves) for item, leaves in items.items()}
        nonfinite = [name for leaves in described.values() for name, leaf in leaves.items() if leaf["fingerprint"][2]]
        if nonfinite:
            raise TrainingError(f"step {step} was not saved: leaf {nonfinite[0]} is not finite; resume the one before")
        manifest = json.dumps({"format": FORMAT, "step": step, "leaves": described, "metadata": metadata})
        checked = {"manifest": manifest, "sha256": hashlib.sha256(manifest.encode()).hexdigest()}
        writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())  # an old one may raise an old error again
        try:
            arrays = {item: ocp.args.StandardSave(leaves) for item, leaves in items.items()}
            everything = ocp.args.Composite(**arrays, manifest=ocp.args.JsonSave(checked))
            writer.save(self._directory / str(step), args=everything)
        except Exception as error:  # whatever Orbax's array store raises, mostly ValueError
            self._report(step, error)
        else:
            self._pending = step, self._worker.submit(self._finish, step, writer)

    def wait(self, *, block: bool = True) -> None:
        """Return when all that was saved is durable, or with `block=False` at once. A save that has failed by then
        raises StorageError, or with on_save_error="continue" prints a line. Older steps are untouched."""
        if self._pending is not None and (block or self._pending[1].done()):
            step, saving = self._pending
            error = saving.exception()
            self._pending = None
            if error is not None:
                self._report(step, error)

    def restore(self, abstract_model: Any, abstract_rest: Any) -> tuple[int, Any, Any, Any] | None:
        """Step, model, rest and metadata of the newest intact step; None when nothing was ever saved. The targets are
        as those of `restore_model` and land on the current mesh, which may be another than that of the saved run.
        Damaged newer steps are renamed to `N.corrupt`, with a line. Raises ConfigError when a leaf differs in name,
        shape or dtype, BadFileError when no step is intact: then none is renamed, so that one can be repaired."""
        if not self.steps():
            return None
        self.saved_step, *found = _newest_good(self._directory, abstract_model, abstract_rest, set_aside=True)
        return self.saved_step, *found

    def _finish(self, step: int, writer: ocp.AsyncCheckpointer) -> None:
        """In the background: make the step durable, then delete what it makes superfluous."""
        writer.close()  # waits for its writes, and raises what they raise
        path = self._directory / str(step)
        for written in (*path.rglob("*"), path, self._directory):  # Orbax syncs only its large files
            sync(written)
        self.saved_step = step
        steps = [s for s in _steps(self._directory) if not _missing(self._directory / str(s))]
        keep = {step, *steps[-self._config.keep_last :]}
        for old in steps:
            if old not in keep and not (self._config.keep_every and old % self._config.keep_every == 0):
                os.rename(self._directory / str(old), self._directory / f"{old}.discarded")
        self._clean()

    def _clean(self) -> None:
        """Finish what a killed process or a failed save left. Needs the lock: it would hit another's save in flight."""
        for path in self._directory.iterdir():
            if path.suffix == ".discarded" or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)  # other parts of a failed save may still be writing

    def _report(self, step: int, error: BaseException) -> None:
        self._clean()
        failed = f"cannot save step {step} in {self._directory}: {_one_line(error)}"
        message = f"{failed}; make room or mend the disk (the newest saved step is {self.saved_step})"
        if self._config.on_save_error == "stop":
            raise StorageError(message) from error
        with contextlib.suppress(OSError):  # the log may be on the same full disk
            note(f"{message}; training goes on")
