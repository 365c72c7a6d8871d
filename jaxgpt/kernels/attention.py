"""Causal attention: which keys a query sees, and the weighted mean of their values.

`attention` is the plain form, for any queries and keys. FORMS give the same for whole sequences, without holding all
scores at once (arXiv:2205.14135); `chosen_form` says which one of them the devices at hand are given.
Letters: `jaxgpt/sharding.py`, and R = H / G query heads for each key/value head."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.config import ModelConfig
from jaxgpt.sharding import out_sharding

Window = int | Array  # 0: all that is before; an array where layers that differ in it are scanned
Cap = float | None
LayerCache = tuple[Array, Array]  # keys and values, both [B, S, G, K]; position p lives in slot p


def attention_mask(
    q_positions_BT: Array, k_positions_BS: Array, segments: tuple[Array, Array] | None = None, window: Window = 0
) -> Array:
    """True where a query sees a key: not in its future, in its document, less than `window` back (0: any). `segments`
    are the document numbers of queries [B, T] and keys [B, S]. Returns [B, T, S]."""
    distance_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    mask_BTS = distance_BTS >= 0
    if segments is not None:
        mask_BTS &= segments[0][:, :, None] == segments[1][:, None, :]
    return mask_BTS & ((distance_BTS < window) | (window == 0))


def attention(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask_BTS: Array, softcap: Cap, scale: float) -> Array:
    """Attention [B, T, H, K] with grouped key/value heads (arXiv:1706.03762, arXiv:2305.13245), in float32 up to the
    weights. `scale` multiplies scores, 1 / sqrt(K) as a rule; `softcap` c then makes them c * tanh(scores / c)."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K, out_sharding=out_sharding("BTGRK"))  # JAX would cut R when G is 1
    scores_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BGRTS *= scale
    if softcap is not None:
        scores_BGRTS = softcap * jnp.tanh(scores_BGRTS / softcap)
    scores_BGRTS = jnp.where(mask_BTS[:, None, None], scores_BGRTS, jnp.finfo(jnp.float32).min)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS).astype(v_BSGK.dtype)
    out_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", weights_BGRTS, v_BSGK)
    return out_BTGRK.reshape(B, T, H, K, out_sharding=out_sharding("BTHK"))


def cached_attention(
    q_BTHK: Array, k_BTGK: Array, v_BTGK: Array, cache: LayerCache, positions_BT: Array, mask_BTS: Array, **scores: Any
) -> tuple[Array, LayerCache]:
    """Attention to a cache, once these keys and values are written into it, at their positions; and the cache."""
    write = jax.vmap(lambda old, positions, new: old.at[positions].set(new, mode="drop"))
    cache = write(cache[0], positions_BT, k_BTGK), write(cache[1], positions_BT, v_BTGK)
    return attention(q_BTHK, *cache, mask_BTS, **scores), cache


def chosen_form(config: ModelConfig, length: int) -> tuple[str, str]:
    """The name in FORMS of what attends in sequences of `length` on the devices of the current mesh; and that name with
    the reason why it is not the devices' own kernel, where they have one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None or config.kernels == "xla" else device.device_kind
    if "TPU" in kind:
        form, takes = "splash", "multiples of 128 tokens, and scanned layers of one window"
        fits = not (config.scan_layers and len(set(config.layer_windows)) > 1)
    elif "NVIDIA" in kind:
        form, takes = "flash", "multiples of 128 tokens, and heads of up to 128 numbers in bfloat16, 64 in float32"
        fits = config.key_dim * jnp.dtype(config.dtype).itemsize <= 256
    else:
        return "blocks", "blocks"
    return (form, form) if fits and length % 128 == 0 else ("blocks", f"blocks ({form} takes {takes})")


def causal_attention(
    form: str, q_BTHK: Array, k_BTGK: Array, v_BTGK: Array, segments_BT: Array, **settings: Any
) -> tuple[Array, None]:
    """`FORMS[form]` on the current mesh, where each device has heads and rows of its own; and no cache."""
    run = functools.partial(FORMS[form], **settings)
    if form != "blocks":
        specs = tuple(map(out_sharding, ("BTHK", "BTGK", "BTGK", "BT")))
        # Without the check of what varies over the mesh, which Pallas' kernels do not say.
        run = jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=False)
    return run(q_BTHK, k_BTGK, v_BTGK, segments_BT), None


def blocks_attention(
    q_BTHK: Array, k_BTGK: Array, v_BTGK: Array, segments_BT: Array, window: Window, softcap: Cap, scale: float
) -> Array:
    """`attention` where a query sees the keys up to its own place, in its document, as `segments_BT` numbers them, and
    less than `window` back (0: any). Blocks of queries, each with the keys up to its end, leave out nearly half of the
    products, and the backward pass computes the weights again: 1.1 times as fast in training, a sixth less memory. More
    than 8 blocks would only take longer to compile."""
    T = q_BTHK.shape[1]
    places_1T, size = jnp.arange(T)[None], max(128, -(-T // 8))

    @functools.partial(jax.checkpoint, static_argnums=0)
    def block(start: int, q_BTHK: Array, k_BTGK: Array, v_BTGK: Array) -> Array:
        rows, keys = slice(start, start + size), slice(0, start + size)
        segments = segments_BT[:, rows], segments_BT[:, keys]
        mask_BTS = attention_mask(places_1T[:, rows], places_1T[:, keys], segments, window)
        return attention(q_BTHK[:, rows], k_BTGK[:, keys], v_BTGK[:, keys], mask_BTS, softcap, scale)

    return jnp.concatenate([block(start, q_BTHK, k_BTGK, v_BTGK) for start in range(0, T, size)], axis=1)


def splash_attention(
    q_BTHK: Array, k_BTGK: Array, v_BTGK: Array, segments_BT: Array, window: int, softcap: Cap, scale: float
) -> Array:
    """The same on a TPU, by JAX's kernel, which also leaves out all blocks that no query sees."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H = q_BTHK.shape[1:3]
    seen = splash.LocalMask((T, T), (window - 1, 0), 0) if window else splash.CausalMask((T, T))
    sizes: Any = [math.gcd(T, 512)] * 8  # by itself it takes 128, too little work for what a block costs
    options: Any = dict(block_sizes=splash.BlockSizes(*sizes), head_shards=1, q_seq_shards=1)
    kernel = splash.make_splash_mha(splash.MultiHeadMask([seen] * H), attn_logits_soft_cap=softcap, **options)
    q_BHTK, k_BGTK, v_BGTK = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK * scale, k_BTGK, v_BTGK))
    return jnp.swapaxes(jax.vmap(kernel)(q_BHTK, k_BGTK, v_BGTK, splash.SegmentIds(segments_BT, segments_BT)), 1, 2)


def flash_attention(*inputs: Any, **more: Any) -> Array:
    """The same on an NVIDIA GPU, by kernels of our own."""
    from jaxgpt.kernels.flash import attention  # only where it is taken: what Pallas has for GPUs is not everywhere

    return attention(*inputs, **more)


FORMS: dict[str, Callable] = {"blocks": blocks_attention, "splash": splash_attention, "flash": flash_attention}
