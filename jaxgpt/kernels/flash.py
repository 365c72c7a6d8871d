"""Causal attention on an NVIDIA GPU, by three kernels in Pallas, which Triton compiles.

Scores stay on the chip, a tile at a time, in both passes (arXiv:2205.14135, arXiv:2307.08691). A program has a tile of
queries, or of keys, of its own, and walks over those tiles of the others of which something is seen. Kept for the
backward pass are the result and the logarithm of each query's sum of exponentials.
Letters: `jaxgpt/sharding.py`, R = H / G; in a kernel Q queries and S keys, those of a tile."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxgpt.kernels.attention import Cap, Window

OWN, WIDEST = 128, 256  # tokens of a program's own tile; bytes of a head's numbers for one token
_LEAST = float(jnp.finfo(jnp.float32).min)  # of a key that is not seen; minus infinity less itself would be no number
Place = tuple[Array, Array]  # of a tile's tokens: where they stand, and the numbers of their documents
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(
    q_BTHK: Array, k_BTGK: Array, v_BTGK: Array, segments_BT: Array, window: Window, softcap: Cap, scale: float
) -> Array:
    """As `blocks_attention` has it. Products of float32 are TF32's, as XLA's are, unless JAX is told otherwise."""
    T, K = q_BTHK.shape[1], q_BTHK.shape[3]
    if T % OWN or K * q_BTHK.dtype.itemsize > WIDEST:
        raise ValueError(f"flash takes multiples of {OWN} tokens, heads of up to {WIDEST} bytes; not {T}, {K} numbers")
    more = max(16, pl.next_power_of_2(K)) - K  # zeros: the sides of Triton's tiles are powers of 2
    qkv = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more))) for x in (q_BTHK, k_BTGK, v_BTGK))
    window_1 = jnp.where(window == 0, T, window).astype(jnp.int32).reshape(1)
    return _attention(softcap, scale, *qkv, segments_BT, window_1)[..., :K]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(softcap: Cap, scale: float, *inputs: Array) -> Array:
    return _run(softcap, scale, *inputs)[0]


def _run(softcap: Cap, scale: float, *inputs: Array) -> tuple[Array, tuple]:
    shapes = inputs[0], jax.ShapeDtypeStruct(inputs[0].shape[:3], jnp.float32)
    out_BTHK, lse_BTH = _call(_forward, shapes, inputs, softcap, scale)
    return out_BTHK, (inputs, out_BTHK, lse_BTH)


def _pull_back(softcap: Cap, scale: float, kept: tuple, pull_BTHK: Array) -> tuple:
    inputs, out_BTHK, lse_BTH = kept
    mean_BTH = _product("BTHK,BTHK->BTH", out_BTHK, pull_BTHK)
    inputs = *inputs, pull_BTHK, lse_BTH, mean_BTH
    (dq_BTHK,) = _call(_pull_queries, inputs[:1], inputs, softcap, scale)
    return dq_BTHK, *_call(_pull_keys, inputs[1:3], inputs, softcap, scale), None, None


_attention.defvjp(_run, _pull_back)


def _call(kernel: Callable, shapes: tuple, inputs: tuple, softcap: Cap, scale: float) -> Any:
    """A program for each tile of each head in each row of the first of the shapes. It is given whole arrays, which are
    only pointers. No tile is larger than the fast memory of a small GPU takes (96 KiB), or than registers can hold."""
    (B, T, heads, K), itemsize = shapes[0].shape, shapes[0].dtype.itemsize
    kernel = functools.partial(kernel, 64 if K * itemsize <= WIDEST // 2 else 32, softcap, scale)
    options: Any = dict(grid=(T // OWN, heads, B), compiler_params=triton.CompilerParams(num_warps=8, num_stages=2))
    return pl.pallas_call(kernel, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes], **options)(*inputs)


def _forward(size: int, softcap: Cap, scale: float, *refs: Any) -> None:
    """The weighted mean of values. All so far is scaled down whenever a query's highest score rises."""
    q_BTHK, k_BTGK, v_BTGK, segments_BT, window_1, out_BTHK, lse_BTH = refs
    start, h, b = pl.program_id(0) * OWN, pl.program_id(1), pl.program_id(2)
    window, g = window_1[0], h // (q_BTHK.shape[2] // k_BTGK.shape[2])
    q_place, q_QK = _tile(0, start, OWN, b, h, segments_BT, q_BTHK)

    def step(j: Array, carry: tuple) -> tuple:
        out_QK, top_Q, sum_Q = carry
        k_place, k_SK, v_SK = _tile(1, j * size, size, b, g, segments_BT, k_BTGK, v_BTGK)
        scores_QS = _scores(_product("QK,SK->QS", q_QK, k_SK), q_place, k_place, window, softcap, scale)
        new_Q = jnp.maximum(top_Q, scores_QS.max(1))
        weights_QS, shrink_Q = jnp.exp(scores_QS - new_Q[:, None]), jnp.exp(top_Q - new_Q)
        out_QK = out_QK * shrink_Q[:, None] + _product("QS,SK->QK", weights_QS.astype(v_SK.dtype), v_SK)
        return out_QK, new_Q, sum_Q * shrink_Q + weights_QS.sum(1)

    begin = jnp.zeros(q_QK.shape, jnp.float32), jnp.full(OWN, _LEAST), jnp.zeros(OWN)
    out_QK, top_Q, sum_Q = jax.lax.fori_loop(*_tiles_seen(start, window, size), step, begin)
    out_BTHK[b, pl.ds(start, OWN), h] = (out_QK / sum_Q[:, None]).astype(out_BTHK.dtype)
    lse_BTH[b, pl.ds(start, OWN), h] = top_Q + jnp.log(sum_Q)


def _pull_queries(size: int, softcap: Cap, scale: float, *refs: Any) -> None:
    """The gradient of queries, from the keys that they see."""
    q_BTHK, k_BTGK, v_BTGK, segments_BT, window_1, *of_queries, dq_BTHK = refs
    start, h, b = pl.program_id(0) * OWN, pl.program_id(1), pl.program_id(2)
    window, g = window_1[0], h // (q_BTHK.shape[2] // k_BTGK.shape[2])
    q_place, q_QK, pull_QK, *sums_Q1 = _tile(0, start, OWN, b, h, segments_BT, q_BTHK, *of_queries)

    def step(j: Array, dq_QK: Array) -> Array:
        k_place, k_SK, v_SK = _tile(1, j * size, size, b, g, segments_BT, k_BTGK, v_BTGK)
        products = _product("QK,SK->QS", q_QK, k_SK), _product("QK,SK->QS", pull_QK, v_SK)
        _, d_QS = _pull_scores(*products, *sums_Q1, q_place, k_place, window, softcap, scale)
        return dq_QK + _product("QS,SK->QK", d_QS.astype(k_SK.dtype), k_SK)

    dq_QK = jax.lax.fori_loop(*_tiles_seen(start, window, size), step, jnp.zeros(q_QK.shape, jnp.float32))
    dq_BTHK[b, pl.ds(start, OWN), h] = dq_QK.astype(dq_BTHK.dtype)


def _pull_keys(size: int, softcap: Cap, scale: float, *refs: Any) -> None:
    """The gradients of keys and values, from the queries of all R heads that see them. Scores are [S, Q] here: to turn
    weights over before a product would take more registers than there are."""
    q_BTHK, k_BTGK, v_BTGK, segments_BT, window_1, *of_queries, dk_BTGK, dv_BTGK = refs
    start, g, b = pl.program_id(0) * OWN, pl.program_id(1), pl.program_id(2)
    window, R = window_1[0], q_BTHK.shape[2] // k_BTGK.shape[2]
    k_place, k_SK, v_SK = _tile(0, start, OWN, b, g, segments_BT, k_BTGK, v_BTGK)
    end = jnp.minimum(start + OWN - 1 + window, q_BTHK.shape[1])  # behind the last query that sees the last key

    def step(h: Array, i: Array, carry: tuple) -> tuple:
        q_place, q_QK, pull_QK, *sums_1Q = _tile(1, i * size, size, b, h, segments_BT, q_BTHK, *of_queries)
        products = _product("SK,QK->SQ", k_SK, q_QK), _product("SK,QK->SQ", v_SK, pull_QK)
        weights_SQ, d_SQ = _pull_scores(*products, *sums_1Q, q_place, k_place, window, softcap, scale)
        dk_SK = carry[0] + _product("SQ,QK->SK", d_SQ.astype(q_QK.dtype), q_QK)
        return dk_SK, carry[1] + _product("SQ,QK->SK", weights_SQ.astype(q_QK.dtype), pull_QK)

    def head(r: Array, carry: tuple) -> tuple:
        return jax.lax.fori_loop(start // size, pl.cdiv(end, size), functools.partial(step, g * R + r), carry)

    dk_SK, dv_SK = jax.lax.fori_loop(0, R, head, (jnp.zeros(k_SK.shape, jnp.float32),) * 2)
    dk_BTGK[b, pl.ds(start, OWN), g] = dk_SK.astype(dk_BTGK.dtype)
    dv_BTGK[b, pl.ds(start, OWN), g] = dv_SK.astype(dv_BTGK.dtype)


def _tile(axis: int, start: Array, size: int, b: Array, head: Array, segments_BT: Any, *refs: Any) -> tuple:
    """The place of a tile's tokens, and what each array [B, T, heads, ...] has of them. Numbers lie along that axis of
    the scores."""
    rows, along = pl.ds(start, size), functools.partial(jnp.expand_dims, axis=1 - axis)
    place = along(start + jnp.arange(size)), along(segments_BT[b, rows])
    return place, *(x if x.ndim == 2 else along(x) for x in (ref[b, rows, head] for ref in refs))


def _tiles_seen(start: Array, window: Array, size: int) -> tuple[Array, Array]:
    """The first tile of keys that any of OWN queries from `start` on sees, and the end of the last."""
    return jnp.maximum(start + 1 - window, 0) // size, (start + OWN) // size


def _scores(products: Array, q_place: Place, k_place: Place, window: Array, softcap: Cap, scale: float) -> Array:
    distance, scores = q_place[0] - k_place[0], products * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where((distance >= 0) & (distance < window) & (q_place[1] == k_place[1]), scores, _LEAST)


def _pull_scores(products: Array, dweights: Array, lse: Array, mean: Array, *how: Any) -> tuple[Array, Array]:
    """The weights once more, and the gradient of the products of queries and keys: `mean` is that of `dweights`."""
    scores, pull = jax.vjp(lambda products: _scores(products, *how), products)
    weights = jnp.exp(scores - lse)
    return weights, *pull(weights * (dweights - mean))
