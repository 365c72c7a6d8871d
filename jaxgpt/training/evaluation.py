"""How well a model predicts held-out text: loss a token, and bits per byte, which no tokenizer can flatter."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax import Array

from jaxgpt.data.loader import EvalWindows
from jaxgpt.data.shards import Corpus
from jaxgpt.model import Transformer
from jaxgpt.sharding import place_batch
from jaxgpt.tokenizer import Tokenizer


def evaluate(
    eval_step: jax.stages.Wrapped,
    model: Transformer,
    windows: EvalWindows,
    tokenizer: Tokenizer,
    stop: Callable[[], bool],
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
        nats.append(eval_step(model, place_batch(batch)))
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


def gzip_bits_per_byte(corpora: list[Corpus]) -> float | None:
    """What `gzip -9` needs for the same held-out text; None when it is not known."""
    if not all(corpus.val_bytes for corpus in corpora):
        return None
    return 8 * sum(corpus.val_gzip_bytes for corpus in corpora) / sum(corpus.val_bytes for corpus in corpora)
