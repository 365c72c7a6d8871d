"""Does this model compute the same on every path, on this device? What `jaxgpt verify` measures.

Letters: B batch, T length, V vocabulary.
"""

import copy
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.model import Transformer, new_cache
from jaxgpt.sharding import batch_parts, shard

_LENGTH = 48
_WINDOW = 64
"""Longer windows are checked at this length: a layer's scores for 4096 tokens take gigabytes."""


class Check(NamedTuple):
    """One property, and the worst difference from it that was seen."""

    name: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit  # False for NaN


def verify(model: Transformer) -> list[Check]:
    """Every check, on random tokens. Differences of logits are relative to the largest logit.

    Their limit is 1e-4 in float32 and 0.05 in bfloat16, whose steps are 2^16 times as large; leaks must be exactly 0.
    """
    limit = 1e-4 if model.config.dtype == "float32" else 0.05
    rows = 2 * batch_parts()
    length = min(_LENGTH, model.config.context_length)
    random = np.random.default_rng(0).integers(0, model.config.vocab_size or 0, (rows, length))
    tokens_BT = shard(jnp.asarray(random, jnp.int32), "BT")
    whole_BTV = _logits(model, tokens_BT)
    scale = float(np.abs(whole_BTV).max())

    def near(name: str, logits_BTV: np.ndarray, wanted_BTV: np.ndarray = whole_BTV) -> Check:
        return Check(name, float(np.abs(logits_BTV - wanted_BTV).max()) / scale, limit)

    third = max(length // 3, 1)
    checks = [
        near("cached decode == full forward", _cached(model, tokens_BT, [third] + [1] * (length - third))),
        near("prefill in chunks == whole", _cached(model, tokens_BT, [third, third, length - 2 * third])),
        near("batched == alone", _alone(model, tokens_BT)),
        near("packed documents do not leak", *_packed(model, tokens_BT)),
        Check("the future is not seen", *_seen(model, 0)),
    ]
    for window in sorted({w for w in model.config.layer_windows if w}):
        size = min(window, _WINDOW, model.config.context_length - 1)
        name = f"window of {window} is honoured" + (f" (at {size})" if size < window else "")
        checks.append(Check(name, *_seen(model, size)))
    return checks


@jax.jit
def _forward(model: Transformer, tokens_BT: jax.Array, positions_BT: Any = None, segments_BT: Any = None) -> jax.Array:
    return model.logits(model(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)[0])


def _logits(model: Transformer, *inputs: Any) -> np.ndarray:
    return np.asarray(_forward(model, *inputs))


@jax.jit
def _step(model: Transformer, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    x_BTD, cache = model(tokens_BT, positions_BT=positions_BT, cache=cache)
    return model.logits(x_BTD), cache


def _cached(model: Transformer, tokens_BT: jax.Array, sizes: list[int]) -> np.ndarray:
    """Logits of the same tokens, so many at a time."""
    cache = jax.jit(new_cache, static_argnums=(0, 1, 2))(model.config, *tokens_BT.shape)
    parts, start = [], 0
    for size in filter(None, sizes):
        positions = np.broadcast_to(np.arange(start, start + size, dtype=np.int32), (len(tokens_BT), size))
        chunk = shard(jnp.asarray(np.asarray(tokens_BT)[:, start : start + size]), "BT")
        logits, cache = _step(model, chunk, shard(jnp.asarray(positions), "BT"), cache)
        parts.append(np.asarray(logits))
        start += size
    return np.concatenate(parts, axis=1)


def _alone(model: Transformer, tokens_BT: jax.Array) -> np.ndarray:
    """Logits of each row where all others are other tokens."""
    tokens = np.asarray(tokens_BT)
    alone = []
    for row in range(len(tokens)):
        others = (tokens + 1) % (model.config.vocab_size or 1)
        others[row] = tokens[row]
        alone.append(_logits(model, shard(jnp.asarray(others), "BT"))[row])
    return np.stack(alone)


def _packed(model: Transformer, tokens_BT: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Logits of rows that hold two documents, and of each document where the other is other tokens."""
    tokens, cut = np.asarray(tokens_BT), tokens_BT.shape[1] // 2
    segments = np.broadcast_to(np.arange(tokens.shape[1]) >= cut, tokens.shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1]) - cut * segments[0], tokens.shape).astype(np.int32)
    layout = [shard(jnp.asarray(array), "BT") for array in (positions, segments)]
    second = _logits(model, shard(jnp.asarray(tokens[:, cut:]), "BT"))
    return _logits(model, tokens_BT, *layout)[:, cut:], second


def _seen(model: Transformer, window: int) -> tuple[float, float]:
    """What one layer's last query sees of keys outside its window (of its future, for 0), and the limit 0.

    A layer that does not see the last key inside the window either gives infinity: it would pass for the wrong reason.
    """
    config = model.config
    at = next((i for i, w in enumerate(config.layer_windows) if w), 0) if window else 0
    one = copy.copy(model)
    one.layers = (model.unstacked().layers[at],)  # type: ignore[index]
    rotates = (config.layers_rotate[at],)
    one.config = dataclasses.replace(config, n_layers=1, windows=(window,), rotary_layers=rotates)
    length = window + 2 if window else 4
    tokens = np.arange(batch_parts() * length).reshape(-1, length) % (config.vocab_size or 1)
    query, outside, inside = (length - 1, 1, 2) if window else (1, 2, 0)

    def changed(position: int) -> float:
        other = tokens.copy()
        other[:, position] = (other[:, position] + 7) % (config.vocab_size or 1)
        a, b = (_logits(one, shard(jnp.asarray(t, jnp.int32), "BT"))[:, query] for t in (tokens, other))
        return float(np.abs(a - b).max())

    return (changed(outside) if changed(inside) > 0 else np.inf), 0.0
