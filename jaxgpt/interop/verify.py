"""Does this model compute the same on every path, on this device? What `jaxgpt verify` measures.
Letters: B batch, T length, V vocabulary."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jaxgpt.model import Transformer, new_cache
from jaxgpt.sharding import batch_parts, shard

LENGTH = 128  # the least for which a TPU takes the kernel that it has for training
_WINDOW = 64  # longer windows are checked at this length: a layer's scores for 4096 tokens take gigabytes


class Check(NamedTuple):
    """One property, and the worst difference from it that was seen."""

    name: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit  # False for NaN


def verify(model: Transformer) -> list[Check]:
    """Every check, on random tokens. Differences of logits are relative to the largest logit. Their limit is 1e-4 in
    float32 and 0.05 in bfloat16, with its steps 2^16 times as large; leaks must be exactly 0."""
    config, limit = model.config, 1e-4 if model.config.dtype == "float32" else 0.05
    length, vocabulary = min(LENGTH, config.context_length), config.vocab_size or 0
    tokens_BT = np.random.default_rng(0).integers(0, vocabulary, (2 * batch_parts(), length), np.int32)
    whole_BTV = logits_of(model, tokens_BT)

    def near(name: str, logits_BTV: np.ndarray, wanted_BTV: np.ndarray = whole_BTV) -> Check:
        return Check(name, float(np.abs(logits_BTV - wanted_BTV).max() / np.abs(whole_BTV).max()), limit)

    third = max(length // 3, 1)
    checks = [
        near("cached decode == full forward", _cached(model, tokens_BT, range(third, length))),
        near("prefill in chunks == whole", _cached(model, tokens_BT, [third, 2 * third])),
        near("batched == alone", _alone(model, tokens_BT)),
        near("packed documents do not leak", *_packed(model, tokens_BT)),
        Check("the future is not seen", _leak(model, 0), 0.0),
    ]
    for window in sorted({w for w in config.layer_windows if w}):
        size = min(window, _WINDOW, config.context_length - 1)
        name = f"window of {window} is honoured" + (f" (at {size})" if size < window else "")
        checks.append(Check(name, _leak(model, size), 0.0))
    return checks


@jax.jit
def _forward(model: Transformer, tokens_BT: Array, cache: Any = None, **layout: Array) -> tuple[Array, Any]:
    tokens_BT, layout = jax.tree.map(lambda x_BT: shard(x_BT, "BT"), (tokens_BT, layout))
    x_BTD, cache, _ = model(tokens_BT, cache=cache, **layout)
    return model.logits(x_BTD), cache


def logits_of(model: Transformer, tokens_BT: np.ndarray, **layout: np.ndarray) -> np.ndarray:
    """Those of a forward pass over whole texts [B, T, V]; `layout` is positions_BT and segments_BT."""
    return np.asarray(_forward(model, tokens_BT, **layout)[0])


def _cached(model: Transformer, tokens_BT: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """Logits of the texts, computed with a cache in parts that begin at 0 and at the `cuts`."""
    cache = jax.jit(new_cache, static_argnums=(0, 1, 2))(model.config, *tokens_BT.shape)
    parts, positions_BT = [], np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    for tokens, positions in zip(*(np.split(a, cuts, axis=1) for a in (tokens_BT, positions_BT)), strict=True):
        logits, cache = _forward(model, tokens, cache, positions_BT=positions)
        parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1)


def _alone(model: Transformer, tokens_BT: np.ndarray) -> np.ndarray:
    others_BT, mine_B = (tokens_BT + 1) % (model.config.vocab_size or 1), np.eye(len(tokens_BT), dtype=bool)
    return np.stack([logits_of(model, np.where(me[:, None], tokens_BT, others_BT))[me][0] for me in mine_B])


def _packed(model: Transformer, tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the second document of rows that hold two, and of that document by itself."""
    cut, places = tokens_BT.shape[1] // 2, np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    packed = logits_of(model, tokens_BT, positions_BT=places - cut * (places >= cut), segments_BT=1 * (places >= cut))
    return packed[:, cut:], logits_of(model, tokens_BT[:, cut:])


def _leak(model: Transformer, window: int) -> float:
    """How much one layer's query sees of a key outside its window (or in its future, for 0). A layer that does not see
    the last key inside the window either gives infinity: it would pass for a wrong reason."""
    config, one = model.config, copy.copy(model)
    at = next((i for i, w in enumerate(config.layer_windows) if w), 0) if window else 0
    one.layers = model.unstacked().layers[at : at + 1]  # type: ignore[index]
    rotates = (config.layers_rotate[at],)
    one.config = dataclasses.replace(config, n_layers=1, windows=(window,), rotary_layers=rotates)
    length, vocabulary = max(window + 2, min(LENGTH, config.context_length)), config.vocab_size or 1
    tokens_BT = np.arange(batch_parts() * length, dtype=np.int32).reshape(-1, length) % vocabulary
    query, outside, inside = (window + 1, 1, 2) if window else (1, 2, 0)

    def seen(key: int) -> float:
        other_BT = np.where(np.arange(length) == key, (tokens_BT + 7) % vocabulary, tokens_BT)
        return float(np.abs(logits_of(one, tokens_BT) - logits_of(one, other_BT))[:, query].max())

    return seen(outside) if seen(inside) > 0 else np.inf
