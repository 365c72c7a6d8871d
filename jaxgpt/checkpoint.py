"""Checkpoints that are restored bit for bit or not at all; the only module that imports Orbax.

Orbax writes a step to a temporary directory in the background and renames it when it is complete, so a killed process
leaves no half step. It does not see damage that comes later: array files have no checksum, and of 195 flipped bits
all 195 were restored without a word. So each step carries a manifest with a 64-bit fingerprint of every leaf,
computed on the devices before saving and again after restoring. `<run_dir>/checkpoints` holds

    N/            step N: the Orbax items model (all that generation reads), rest and manifest
    N.corrupt     a damaged step, set aside because an older one could be restored; never deleted here
    N.replaced    step N while it is saved again;  N.discarded: step N on its way to be deleted
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxgpt.config import CheckpointConfig
from jaxgpt.errors import BadFileError, ConfigError, StorageError, TrainingError

FORMAT = 1
_PARTS = ("model", "rest", "manifest", "commit_success.txt")  # Orbax writes the last, but never looks at it

Json = dict[str, Any]
Leaves = dict[str, Any]  # jax.Array or jax.ShapeDtypeStruct by path


class _BadStep(Exception):
    """Why a step cannot be restored."""


def _warn(message: str) -> None:
    print("jaxgpt: " + " ".join(message.split()), file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def _quiet_orbax() -> None:
    """Orbax logs every failure with a traceback before it raises it."""
    logging.getLogger("absl").setLevel(logging.CRITICAL + 1)


def _flatten(tree: Any) -> Leaves:
    """Plain names: a class that is renamed here or in a library then breaks no checkpoint."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --- fingerprints ---------------------------------------------------------------------------------------------------


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    """uint32[3]: two lanes that depend on every bit of `x` and on its place, and the number of non-finite elements.

    A lane is the sum modulo 2^32 of mix(bits ^ place * constant): the same however `x` is sharded. The mix (murmur3's
    finalizer) is a bijection, so a change of one element always shows. It guards against faults, not attackers.
    """
    if x.dtype.itemsize > 4:
        raise TypeError(f"checkpoints hold types of at most 4 bytes, not {x.dtype}")
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    place = jnp.uint32(0)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)

    def lane(constant: int) -> jax.Array:
        h = bits.astype(jnp.uint32) ^ (place * jnp.uint32(constant))
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)

    floating = jnp.issubdtype(x.dtype, jnp.floating)
    nonfinite = jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32) if floating else jnp.uint32(0)
    return jnp.stack([lane(0x9E3779B1), lane(0x7FEB352D), nonfinite])


def _describe(leaves: Leaves) -> tuple[Json, list[str]]:
    """Shape, dtype and fingerprint of each leaf, and the names of the leaves that are not all finite."""
    prints = jax.device_get({name: _fingerprint(x) for name, x in leaves.items()})  # one wait for all
    described = {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "fingerprint": "{:08x}{:08x}".format(*prints[name])}
        for name, x in leaves.items()
    }
    return described, [name for name in leaves if prints[name][2]]


def _digest(manifest: Json) -> str:
    as_read = json.loads(json.dumps(manifest))  # JSON turns tuples into lists and numbers that are keys into text
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------


def _steps(directory: Path) -> list[int]:
    """Steps that have a directory, complete or not, oldest first. (Orbax's latest_step() believes empty ones.)"""
    return sorted(int(path.name) for path in directory.glob("[0-9]*") if path.name.isdigit())


def _missing(path: Path) -> list[str]:
    return [part for part in _PARTS if not (path / part).exists()]


def _read_manifest(path: Path) -> Json:
    if missing := _missing(path):
        raise _BadStep(f"incomplete, there is no {' and no '.join(missing)}")
    try:
        stored = json.loads((path / "manifest" / "metadata").read_bytes())
        manifest, digest = stored["manifest"], stored["sha256"]
        intact = _digest(manifest) == digest and manifest["step"] == int(path.name)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _BadStep(f"the manifest is unreadable ({_one_line(error)})") from error
    if not intact:
        raise _BadStep("the manifest has changed since it was saved")
    if manifest["format"] != FORMAT:
        raise BadFileError(f"checkpoint {path} has format {manifest['format']}, not {FORMAT}; use a newer jaxgpt")
    return manifest


def _refuse_other_leaves(path: Path, stored: Json, wanted: Leaves) -> None:
    """A target that differs is the caller's mistake, not damage. (Orbax casts float32 to int32 without a word.)"""
    for name in {**wanted, **stored}:
        old = f"{stored[name]['dtype']}{stored[name]['shape']}" if name in stored else "absent"
        new = f"{wanted[name].dtype}{list(wanted[name].shape)}" if name in wanted else "absent"
        if old != new:
            raise ConfigError(
                f"checkpoint {path} does not fit this configuration: leaf {name} is {old} there and {new} here; "
                "use the configuration of that run or another run_dir"
            )


def _on_current_mesh(leaf: Any) -> jax.ShapeDtypeStruct:
    """`jax.eval_shape` gives an abstract mesh, or no sharding at all; Orbax needs the devices."""
    sharding = getattr(leaf, "sharding", None)
    spec = sharding.spec if isinstance(sharding, jax.NamedSharding) else jax.P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(jax.sharding.get_mesh(), spec))


def _load(path: Path, targets: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The items that `targets` names, each a pytree like its target, and the metadata.

    Raises _BadStep for damage, ConfigError when a leaf differs from its target in name, shape or dtype.
    """
    manifest = _read_manifest(path)
    wanted = {item: {name: _on_current_mesh(x) for name, x in _flatten(tree).items()} for item, tree in targets.items()}
    for item, leaves in wanted.items():
        _refuse_other_leaves(path, manifest["leaves"][item], leaves)
    arguments = {item: ocp.args.StandardRestore(leaves) for item, leaves in wanted.items()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(path, args=ocp.args.Composite(**arguments))
    except Exception as error:  # a damaged file shows as one of a dozen types
        raise _BadStep(f"unreadable ({_one_line(error)})") from error
    for item in wanted:
        for name, described in _describe(restored[item])[0].items():
            if described != manifest["leaves"][item][name]:
                raise _BadStep(f"leaf {name} of {item} has changed since it was saved")
    trees = {
        item: jax.tree.unflatten(jax.tree.structure(target), [restored[item][name] for name in wanted[item]])
        for item, target in targets.items()
    }
    return trees, manifest["metadata"]


def _newest_good(directory: Path, targets: dict[str, Any]) -> tuple[int, dict[str, Any], Any, dict[int, str]] | None:
    """The newest step that restores exactly, its trees and metadata, and why each newer step does not.

    Looks at the directory again after a failure: a trainer may meanwhile have deleted that step and saved another.
    """
    bad: dict[int, str] = {}
    while steps := [step for step in _steps(directory) if step not in bad]:
        try:
            trees, metadata = _load(directory / str(steps[-1]), targets)
        except _BadStep as error:
            bad[steps[-1]] = str(error)
        else:
            return steps[-1], trees, metadata, bad
    if not bad:
        return None
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in bad.items())
    raise BadFileError(f"no step in {directory} is intact: {reasons}; repair one, or choose another run_dir")


def restore_model(run_dir: Path, abstract_model: Any, step: int | None = None) -> tuple[int, Any, Any]:
    """Step, model and metadata of the newest intact step, or of `step`. Needs no lock and changes no file.

    `abstract_model` is a pytree with shapes, dtypes and shardings (`jax.eval_shape`); it lands on the current mesh.
    Raises BadFileError when nothing can be restored, ConfigError when a leaf differs in name, shape or dtype.
    """
    _quiet_orbax()
    directory, targets = run_dir / "checkpoints", {"model": abstract_model}
    if step is not None:
        try:
            trees, metadata = _load(directory / str(step), targets)
        except _BadStep as error:
            others = ", ".join(map(str, _steps(directory))) or "none"
            raise BadFileError(f"checkpoint {directory / str(step)}: {error}; choose another of: {others}") from error
        return step, trees["model"], metadata
    found = _newest_good(directory, targets)
    if found is None:
        raise BadFileError(f"no checkpoint in {directory}: nothing was saved there; train first or name another run")
    step, trees, metadata, bad = found
    for damaged, reason in bad.items():
        _warn(f"checkpoint step {damaged} in {directory}: {reason}; using step {step}")
    return step, trees["model"], metadata


# --- writing --------------------------------------------------------------------------------------------------------


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_lock(path: Path) -> int:
    """A descriptor that holds the lock until it is closed; the system frees the lock of a process that dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise ConfigError(
            f"{path.parent} is in use by {holder}; wait for it, stop it, or choose another run_dir"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode())
    return descriptor


class Checkpoints:
    """The checkpoints of one run, held by the process (or the group of processes) that trains it.

    A context manager; leaving it waits for the last save. `saved_step` is the newest step known to be durable.
    Raises StorageError when `run_dir` cannot be written, ConfigError when another process trains there.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        _quiet_orbax()
        self.saved_step: int | None = None
        self._config = config
        self._directory = run_dir / "checkpoints"
        self._primary = jax.process_index() == 0  # alone renames and deletes
        self._lock: int | None = None
        self._pending: Future[None] | None = None
        self._pending_step = 0
        if self._primary:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._lock = _take_lock(run_dir / "LOCK")
                self._clean()
            except OSError as error:
                where = error.filename or self._directory
                raise StorageError(f"cannot write {where}: {_one_line(error)}; choose another run_dir") from error
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the last save and free the directory for others. Raises like `wait`."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._checkpointer.close()
            if self._lock is not None:
                os.close(self._lock)

    def save(self, step: int, model: Any, rest: Any, metadata: Any) -> None:
        """Copy two pytrees of arrays to the host, and write them in the background as `step`.

        `model` is what `restore_model` returns (the averaged parameters where there are any), `rest` all else that
        training needs, `metadata` anything that JSON can hold. Waits for the previous save first, and raises what
        `wait` raises; TrainingError when a leaf is not finite: then nothing is written.
        """
        self.wait()
        items = {"model": _flatten(model), "rest": _flatten(rest)}
        described = {}
        for item, leaves in items.items():
            described[item], nonfinite = _describe(leaves)
            if nonfinite:
                raise TrainingError(f"step {step} was not saved: {nonfinite[0]} of {item} is not finite")
        manifest = {"format": FORMAT, "step": step, "leaves": described, "metadata": metadata}
        self._pending_step = step
        try:
            self._make_way(step)
            self._checkpointer.save(
                self._directory / str(step),
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(items["model"]),
                    rest=ocp.args.StandardSave(items["rest"]),
                    manifest=ocp.args.JsonSave({"manifest": manifest, "sha256": _digest(manifest)}),
                ),
            )
        except Exception as error:  # whatever Orbax's array store raises, mostly ValueError
            self._report(error)
        else:
            self._pending = self._worker.submit(self._finish, step)

    def wait(self) -> None:
        """Return when all that was saved is durable.

        A failed save raises StorageError, or with on_save_error="continue" prints a line. Older steps are untouched.
        """
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:
            self._report(error)

    def restore(self, abstract_model: Any, abstract_rest: Any) -> tuple[int, Any, Any, Any] | None:
        """Step, model, rest and metadata of the newest intact step; None when nothing was ever saved.

        The targets are pytrees with shapes, dtypes and shardings (`jax.eval_shape`). They land on the current mesh,
        which may be another than the one that saved. Damaged newer steps are renamed to `N.corrupt`, with a line.
        Raises BadFileError when there are steps but none is intact (and renames none, so that one can be repaired),
        ConfigError when a leaf differs in name, shape or dtype.
        """
        found = _newest_good(self._directory, {"model": abstract_model, "rest": abstract_rest})
        if found is None:
            return None
        step, trees, metadata, bad = found
        self.saved_step = step
        if self._primary:
            for damaged, reason in bad.items():
                path = self._directory / str(damaged)
                candidates = (path.with_name(f"{damaged}.corrupt{n or ''}") for n in count())
                aside = next(candidate for candidate in candidates if not candidate.exists())
                os.rename(path, aside)
                _warn(f"checkpoint step {damaged}: {reason}; renamed to {aside}, using step {step}")
        return step, trees["model"], trees["rest"], metadata

    def _make_way(self, step: int) -> None:
        """A step is saved again when a damaged newer one has sent training back, or the caller has."""
        path = self._directory / str(step)
        if self._primary and path.exists():
            os.rename(path, path.with_name(f"{step}.discarded" if _missing(path) else f"{step}.replaced"))

    def _finish(self, step: int) -> None:
        """In the background: make the step durable, then delete what it makes superfluous."""
        self._checkpointer.wait_until_finished()
        if not self._primary:
            return
        path = self._directory / str(step)
        for written in (*path.rglob("*"), path, self._directory):  # Orbax syncs only its large files
            _fsync(written)
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
            step, _, suffix = path.name.partition(".")
            if suffix == "replaced" and not (self._directory / step).exists():
                os.rename(path, self._directory / step)  # what should replace it was never finished
            elif suffix in ("replaced", "discarded") or suffix.startswith("orbax-checkpoint-tmp"):
                shutil.rmtree(path)

    def _report(self, error: Exception) -> None:
        if self._primary:
            self._clean()
        message = (
            f"cannot save step {self._pending_step} in {self._directory}: {_one_line(error)}; free some space, "
            f"the newest saved step is {'none' if self.saved_step is None else self.saved_step}"
        )
        if self._config.on_save_error == "stop":
            raise StorageError(message) from error
        _warn(f"{message}; training goes on")
