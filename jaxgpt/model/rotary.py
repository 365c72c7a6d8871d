"""Rotary positions (arXiv:2104.09864): each pair of a head's dimensions turns by position times its frequency.

Layers may differ: a base for those with a window (Gemma 3), none at all (SmolLM3). Each distinct table of frequencies
is a kind; where nothing rotates they are zero, so that one compiled layer serves all. Letters: `jaxgpt/sharding.py`."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.config import ModelConfig

Rotation = tuple[Array, Array]  # cosines and sines [B, T, 1, rotary_dim / 2] of each position's turn


def frequencies(config: ModelConfig, theta: float, scaling: str, length: int) -> np.ndarray:
    """Radians per position, float32 [rotary_dim / 2], for texts of up to `length` tokens. llama3 slows frequencies that
    turn less than `rope_low_frequency` times in the original context and blends up to `rope_high_frequency`
    (arXiv:2407.21783, section 3.4.2); longrope divides each by a factor of its own (arXiv:2402.13753), for the whole
    text at once: all of it is shorter or longer than the original context."""
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / config.rotary_dim
    turns: np.ndarray = (1 / np.float32(theta) ** exponents).astype(np.float32)
    match scaling:
        case "linear":
            turns = turns / np.float32(config.rope_factor)
        case "llama3":
            low, high = config.rope_low_frequency, config.rope_high_frequency
            in_context = config.rope_original_context * turns / np.float32(2 * math.pi)
            keep = np.clip((in_context - low) / (high - low), 0, 1)
            turns = turns * (keep + (1 - keep) / config.rope_factor)
        case "longrope":
            longer = length > config.rope_original_context
            turns = turns / np.array(config.rope_long_factors if longer else config.rope_short_factors, np.float32)
    return turns.astype(np.float32)


def rotary_kinds(config: ModelConfig, length: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The distinct tables of frequencies [kinds, rotary_dim / 2], and which one each layer uses."""
    usual, local = (config.rope_theta, config.rope_scaling), config.local_rope_theta
    layers = [
        (rotates, *(usual if local is None or not window else (local, "none")))
        for rotates, window in zip(config.layers_rotate, config.layer_windows, strict=True)
    ]
    kinds = list(dict.fromkeys(layers))
    tables = [frequencies(config, theta, scaling, length) * np.float32(rotates) for rotates, theta, scaling in kinds]
    return np.stack(tables), tuple(map(kinds.index, layers))


def rotations_of(config: ModelConfig, positions_BT: Array, length: int | Array) -> tuple[Rotation, tuple[int, ...]]:
    """The rotations of all kinds, along a first axis, and which one each layer uses, in texts of up to `length` tokens:
    one number for all or one for each row. Longrope's attention factor multiplies cosines and sines."""
    (short, layers), (long, _) = (rotary_kinds(config, length) for length in (0, 2**31))
    is_long_1B1 = jnp.reshape(length > config.rope_original_context, (1, -1, 1))
    tables = jnp.where(is_long_1B1, long[:, None], short[:, None])[:, :, None, None]
    angles = positions_BT[None, :, :, None, None].astype(jnp.float32) * tables
    factor = config.rope_attention_factor if config.rope_scaling == "longrope" else 1.0
    return (factor * jnp.cos(angles), factor * jnp.sin(angles)), layers


def rotate(x_BTHK: Array, rotation: Rotation) -> Array:
    """Turn the pairs (x[i], x[i + n/2]) of the first n = rotary_dim dimensions, Llama's order."""
    cos, sin = rotation
    width = 2 * cos.shape[-1]
    turned, rest = x_BTHK[..., :width], x_BTHK[..., width:]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHK.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
