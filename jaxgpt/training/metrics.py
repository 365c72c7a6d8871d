"""Measurements of a run, and their records: `metrics.jsonl`, TensorBoard and W&B for machines, a live bar or plain
lines for people. Held-out text is measured in loss a token, and in bits per byte, which no tokenizer can flatter."""

import contextlib
import json
import math
import os
import struct
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from jaxgpt.config import TrainConfig
from jaxgpt.data.loader import EvalWindows
from jaxgpt.data.shards import Corpus
from jaxgpt.errors import ConfigError
from jaxgpt.files import append, write_atomically
from jaxgpt.model import Transformer
from jaxgpt.progress import Bar, clock
from jaxgpt.sharding import place_batch
from jaxgpt.tokenizer import Tokenizer

Record = dict[str, Any]


class MetricsLog:
    """One JSON object a line, never torn, and no step twice: what a killed run wrote after `step` is cut off first."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        """`step`: the step that was restored, 0 for a new run. Raises ConfigError without wandb when it is wanted."""
        self._wandb = _start_wandb(config) if config.training.wandb else None
        path = config.run_path / "metrics.jsonl"
        kept = _records_until(path, step)
        write_atomically(path, b"".join(_line(record) for record in kept))
        self.evaluated = {record["step"] for record in kept if "val_loss" in record}
        self._file = path.open("ab", buffering=0)
        # Not tensorboardX's SummaryWriter: it writes in a thread, which a full disk ends, and training waits for ever.
        (config.run_path / "tensorboard").mkdir(exist_ok=True)
        board = config.run_path / f"tensorboard/events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._board = board.open("ab", buffering=0)
        append(self._board, _event(step=0, file_version="brain.Event:2"))
        append(self._board, _event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))  # forget the rest

    def write(self, record: Record) -> None:
        """Append a record; it holds `step`, and numbers. A full disk raises OSError and leaves whole lines only."""
        append(self._file, _line(record))
        if "val_loss" in record:
            self.evaluated.add(record["step"])
        numbers = {name: value for name, value in record.items() if name != "step"}
        scalars = [Summary.Value(tag=name.replace("val_", "val/"), simple_value=x) for name, x in numbers.items()]
        append(self._board, _event(step=record["step"], summary=Summary(value=scalars)))
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def sync(self) -> None:
        """Return when all records are on the disk: before a checkpoint that follows them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _event(**fields: Any) -> bytes:
    """One record of TensorBoard's file: length, its checksum, a protocol buffer, its checksum."""
    content: bytes = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, content))


def _line(record: Record) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _records_until(path: Path, step: int) -> list[Record]:
    """The whole records up to a step, in order; a line that a dying machine tore is not one."""
    records: list[Record] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if record["step"] <= step:
                records.append(record)
    return records


def _start_wandb(config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("training.wandb: wandb is not installed; run: pip install wandb") from None
    return wandb.init(project="jaxgpt", name=config.name, dir=config.run_path, config=asdict(config), resume="allow")


class Display(Bar):
    """What a person sees of a training run."""

    def __init__(self, steps: int, start_step: int) -> None:
        super().__init__("step", steps, start_step)

    def step(self, record: Record, seconds_per_step: float, *, due: bool) -> None:
        left = clock((self._total - record["step"]) * seconds_per_step)
        mfu = "n/a" if (share := record.get("mfu")) is None else f"{100 * share:.1f} %"
        figures = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  MFU {mfu}  {left} left"
        self.update(record["step"], figures, due=due)

    def evaluation(self, record: Record, gzip_bits: float) -> None:
        bits, error = record["val_bits_per_byte"], record["val_bits_per_byte_se"]
        loss = f"held-out loss {record['val_loss']:.4f}  {bits:.3f} ± {error:.3f} bits per byte"
        self.say(f"step {record['step']}/{self._total}  {loss}  (gzip -9: {gzip_bits:.3f})")


def evaluate(
    step: jax.stages.Wrapped, model: Transformer, windows: EvalWindows, tokenizer: Tokenizer, stop: Callable[[], bool]
) -> dict[str, float] | None:
    """`val_loss` in nats a token, `val_bits_per_byte` and its standard error; None when `stop()` says so. The bits are
    those of all tokens over the UTF-8 bytes that they stand for. The standard error is that of a ratio estimator over
    windows, which are taken as independent (Cochran, Sampling Techniques, 2.11)."""
    lengths = np.array([len(raw) for raw in tokenizer.token_bytes])
    nats: list[Array | np.ndarray] = []
    token_counts, byte_counts = [], []
    for index in range(len(windows)):
        if stop():
            return None
        batch = windows[index]
        real = batch.labels >= 0
        token_counts.append(real.sum(1))
        byte_counts.append(np.where(real, lengths[batch.labels], 0).sum(1))
        if nats:
            nats[-1] = np.asarray(nats[-1], np.float64)  # the one before, while this one runs
        nats.append(step(model, place_batch(batch)))
    nats_of_row = np.concatenate([np.asarray(row, np.float64) for row in nats])
    bytes_of_row = np.concatenate(byte_counts)
    rows = np.count_nonzero(bytes_of_row)
    bits = nats_of_row.sum() / math.log(2) / bytes_of_row.sum()
    spread = np.square(nats_of_row / math.log(2) - bits * bytes_of_row).sum() * rows / max(rows - 1, 1)
    return {
        "val_loss": float(nats_of_row.sum() / np.concatenate(token_counts).sum()),
        "val_bits_per_byte": float(bits),
        "val_bits_per_byte_se": float(math.sqrt(spread) / bytes_of_row.sum()),
    }


def gzip_bits_per_byte(corpora: list[Corpus]) -> float:
    """What `gzip -9` needs for the same held-out text."""
    return 8 * sum(corpus.val_gzip_bytes for corpus in corpora) / sum(corpus.val_bytes for corpus in corpora)
