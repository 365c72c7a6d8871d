"""Measurements of a run, and their records: `metrics.jsonl`, TensorBoard and W&B for machines, a live bar or plain
lines for people. Held-out text is measured in loss a token, and in bits per byte, which no tokenizer can flatter."""

import contextlib
import json
import math
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import jax
import numpy as np
from jax import Array
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from jaxgpt.config import TrainConfig
from jaxgpt.data.loader import Batch
from jaxgpt.data.shards import Corpus
from jaxgpt.errors import ConfigError
from jaxgpt.files import append, write_atomically
from jaxgpt.model import Transformer
from jaxgpt.sharding import place
from jaxgpt.tokenizer import Tokenizer


class MetricsLog(contextlib.ExitStack):
    """One JSON object a line, never torn, and no step twice: what a killed run wrote after `step` is cut off first."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        """`step`: the step that was restored, 0 for a new run. Raises ConfigError without wandb when it is wanted."""
        super().__init__()
        self._wandb = self.enter_context(_start_wandb(config)) if config.training.wandb else None
        path = config.run_path / "metrics.jsonl"
        kept, self.evaluated = list[bytes](), False  # whether there is a measurement of held-out text at `step`
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a dying machine tore is no record
                record = json.loads(line)
                if record["step"] <= step:
                    kept.append(line + b"\n")
                    self.evaluated |= record["step"] == step and "val_loss" in record
        write_atomically(path, b"".join(kept))
        self.file = self.enter_context(path.open("ab", buffering=0))
        # Not tensorboardX's SummaryWriter: it writes in a thread, which a full disk ends, and training waits for ever.
        (config.run_path / "tensorboard").mkdir(exist_ok=True)
        board = config.run_path / f"tensorboard/events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._board = self.enter_context(board.open("ab", buffering=0))
        append(self._board, _event(step=0, file_version="brain.Event:2"))
        append(self._board, _event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))  # forget the rest

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; it holds `step`, and numbers. A full disk raises OSError and leaves whole lines only."""
        append(self.file, json.dumps(record, allow_nan=False).encode() + b"\n")
        numbers = {name: value for name, value in record.items() if name != "step"}
        scalars = [Summary.Value(tag=name.replace("val_", "val/"), simple_value=x) for name, x in numbers.items()]
        append(self._board, _event(step=record["step"], summary=Summary(value=scalars)))
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])


def _event(**fields: Any) -> bytes:
    """One record of TensorBoard's file: length, its checksum, a protocol buffer, its checksum."""
    content: bytes = Event(wall_time=time.time(), **fields).SerializeToString()
    return b"".join(x + struct.pack("<I", masked_crc32c(x)) for x in (struct.pack("<Q", len(content)), content))


def _start_wandb(config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("training.wandb: wandb is not installed; run: pip install wandb") from None
    return wandb.init(project="jaxgpt", name=config.name, dir=config.run_path, config=asdict(config), resume="allow")


def step_figures(record: dict[str, Any], seconds_left: float) -> str:
    mfu = f"{100 * record['mfu']:.1f} %" if "mfu" in record else "n/a"
    speed = f"{record['tokens_per_second']:,.0f} tokens/s"
    return f"loss {record['loss']:.4f}  {speed}  MFU {mfu}  {timedelta(seconds=round(seconds_left))} left"


def evaluation_figures(record: dict[str, Any], corpora: list[Corpus]) -> str:
    bits, error = record["val_bits_per_byte"], record["val_bits_per_byte_se"]
    gzip = 8 * sum(corpus.val_gzip_bytes for corpus in corpora) / sum(corpus.val_bytes for corpus in corpora)
    return f"held-out loss {record['val_loss']:.4f}  {bits:.3f} ± {error:.3f} bits per byte  (gzip -9: {gzip:.3f})"


def evaluate(
    step: Callable, model: Transformer, held_out: Sequence[Batch], tokenizer: Tokenizer, stop: Callable[[], bool]
) -> dict[str, float] | None:
    """`val_loss` in nats a token, `val_bits_per_byte` and its standard error; None when `stop()` says so. The bits are
    those of all tokens over the UTF-8 bytes that they stand for. The standard error is that of a ratio estimator over
    windows, which are taken as independent (Cochran, Sampling Techniques, 2.11)."""
    lengths = np.array([len(raw) for raw in tokenizer.token_bytes])
    measured: list[tuple[Array | np.ndarray, ...]] = []  # nats, tokens and bytes of each row
    for index in range(len(held_out)):  # Grain's own iterator would read 500 batches ahead, in 16 threads
        if stop():
            return None
        batch = held_out[index]
        real = batch.labels >= 0
        byte_counts = np.where(real, lengths[batch.labels], 0).sum(1)
        jax.block_until_ready(measured[-1:])  # the one before, which ran while this one was read
        measured.append((step(model, place(batch, "BT")), real.sum(1), byte_counts))
    nats, tokens, sizes = (np.concatenate(column).astype(np.float64) for column in zip(*measured, strict=True))
    rows, bits = np.count_nonzero(sizes), nats.sum() / math.log(2) / sizes.sum()
    spread = np.square(nats / math.log(2) - bits * sizes).sum() * rows / max(rows - 1, 1)
    figures = nats.sum() / tokens.sum(), bits, math.sqrt(spread) / sizes.sum()
    return dict(zip(("val_loss", "val_bits_per_byte", "val_bits_per_byte_se"), map(float, figures), strict=True))
