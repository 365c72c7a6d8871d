"""Attention and its mask against slow loops in float64, in values and gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.kernels.attention import attention, attention_mask, causal_attention
from jaxgpt.sharding import shard

B, T, S, H, K = 2, 5, 7, 4, 6


def slow_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, softcap: float | None) -> np.ndarray:
    """One query of one head at a time, over the keys that it sees and no others."""
    out = np.zeros(q.shape)
    shared = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        scores = np.array([q[b, t, h] @ k[b, s, h // shared] for s in seen]) / np.sqrt(q.shape[3])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = sum(w * v[b, s, h // shared] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return out


def inputs(G: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Queries, keys and values large enough to make attention sharp, and a mask that leaves each query some key."""
    rng = np.random.default_rng(G)
    arrays = [2 * rng.standard_normal(shape) for shape in [(B, T, H, K), (B, S, G, K), (B, S, G, K)]]
    mask_BTS = rng.random((B, T, S)) < 0.5
    mask_BTS[:, :, 3] = True
    return arrays, mask_BTS


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("G", [4, 2, 1])
def test_values_and_gradients_match_a_slow_reference(G: int, softcap: float | None) -> None:
    """Gradients against central differences of the reference along random directions of q, k and v."""
    arrays, mask_BTS = inputs(G)
    rng = np.random.default_rng(9)
    pull_BTHK = rng.standard_normal((B, T, H, K))
    singles = [jnp.asarray(a, jnp.float32) for a in arrays]
    out, vjp = jax.vjp(jax.jit(lambda q, k, v: attention(q, k, v, jnp.asarray(mask_BTS), softcap, None)), *singles)
    np.testing.assert_allclose(out, slow_attention(*arrays, mask_BTS, softcap), rtol=0, atol=2e-6)
    gradients = vjp(jnp.asarray(pull_BTHK, jnp.float32))
    for which in range(3):
        way = rng.standard_normal(arrays[which].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(arrays)
            moved[which] = arrays[which] + step * way
            ends.append((pull_BTHK * slow_attention(*moved, mask_BTS, softcap)).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(slope) > 0.1
        assert np.vdot(gradients[which], way) == pytest.approx(slope, rel=1e-5, abs=1e-5)


def test_bfloat16_rounds_only_what_it_must() -> None:
    """Scores and softmax are float32: what is left is one rounding of the weights and one of the result."""
    arrays, mask_BTS = inputs(2)
    halves = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    out = attention(*halves, jnp.asarray(mask_BTS), None, None)
    assert out.dtype == jnp.bfloat16
    exact = slow_attention(*(np.asarray(a, np.float64) for a in halves), mask_BTS, None)
    assert np.abs(np.asarray(out, np.float64) - exact).max() < 2**-8 * np.abs(arrays[2]).max()


def test_huge_scores_stay_finite() -> None:
    arrays, mask_BTS = inputs(4)
    q, k, v = (jnp.asarray(a, jnp.float32) for a in arrays)
    run = jax.jit(jax.value_and_grad(lambda q: attention(q, k, v, jnp.asarray(mask_BTS), None, None).sum()))
    value, grads = run(1e6 * q)
    assert np.isfinite(value) and np.isfinite(grads).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("length", "blocks"), [(5, 1), (128, 1), (300, 3), (1100, 8)])
def test_blocks_of_queries_match_the_plain_form(length: int, blocks: int, dtype: str) -> None:
    """In values and gradients, with packed documents, a window, grouped heads and a soft-cap; lengths that divide into
    no blocks too. The products are as many as there are blocks, and each leaves out the keys behind its end."""
    rng = np.random.default_rng(length)
    shapes = [(2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8), (2, length, 4, 8)]
    *given, pull_BTHK = (jnp.asarray(2 * rng.standard_normal(shape), dtype) for shape in shapes)
    places, documents = (
        jnp.arange(length)[None].repeat(2, 0),
        jnp.asarray(rng.integers(0, 9, (2, length))).cumsum(1) // 99,
    )
    mask_BTT = attention_mask(places, places, (documents, documents), length // 2)

    def run(form: Callable) -> Callable:
        return jax.jit(lambda *qkv: jax.vjp(lambda *qkv: form(*qkv, mask_BTT, 1.5, 0.3), *qkv)[1](pull_BTHK))

    small = 1e-5 if dtype == "float32" else 0.1
    for form in (lambda form: jax.jit(lambda *qkv: form(*qkv, mask_BTT, 1.5, 0.3)), run):
        for one, other in zip(
            *map(jax.tree.leaves, (form(causal_attention)(*given), form(attention)(*given))), strict=True
        ):
            assert one.dtype == jnp.dtype(dtype)
            np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=0, atol=small)
    program = str(jax.make_jaxpr(lambda *qkv: causal_attention(*qkv, mask_BTT, None, None))(*given))
    assert program.count("dot_general") == 2 * blocks
    assert (f"[2,2,2,{length},{length}]" in program) == (blocks == 1)


def test_gradients_keep_no_scores() -> None:
    """What is saved for the backward pass are inputs."""
    given = [jnp.ones((1, 256, 2, 8)) for _ in range(3)]
    mask_BTT = jnp.tril(jnp.ones((1, 256, 256), bool))
    _, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, mask_BTT, None, None), *given)
    assert max(leaf.size for leaf in jax.tree.leaves(pull) if leaf.dtype != bool) == 256 * 2 * 8


def slow_mask(
    q_positions: np.ndarray, k_positions: np.ndarray, segments: tuple[np.ndarray, np.ndarray] | None, window: int
) -> np.ndarray:
    mask = np.zeros((*q_positions.shape, k_positions.shape[1]), bool)
    for b, t, s in np.ndindex(mask.shape):
        back = q_positions[b, t] - k_positions[b, s]
        same = segments is None or segments[0][b, t] == segments[1][b, s]
        mask[b, t, s] = back >= 0 and same and (window == 0 or back < window)
    return mask


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_the_mask_matches_a_slow_reference(packed: bool, window: int) -> None:
    """Also where the window is an array, as inside a scan over layers with different windows."""
    rng = np.random.default_rng(window)
    q_positions, k_positions = rng.integers(0, 9, (B, T)), rng.integers(0, 9, (B, S))
    segments = (rng.integers(0, 2, (B, T)), rng.integers(0, 2, (B, S))) if packed else None
    expected = slow_mask(q_positions, k_positions, segments, window)
    assert expected.any() and not expected.all()
    for given in (window, jnp.int32(window)):
        mask_BTS = attention_mask(jnp.asarray(q_positions), jnp.asarray(k_positions), segments, given)
        np.testing.assert_array_equal(mask_BTS, expected)


@pytest.mark.parametrize("form", [attention, causal_attention])
def test_heads_cut_over_devices_change_nothing(form: Callable, mesh_of: Callable) -> None:
    """Four query heads and two key/value heads over tensor = 2, the batch over data = 2."""
    if form is attention:
        arrays, mask_BTS = inputs(2)
    else:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal((2, 200, heads, K)) for heads in (4, 2, 2)]
        mask_BTS = np.tril(np.ones((2, 200, 200), bool))

    def run(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple:
        q, k, v = shard(q, "BTHK"), shard(k, "BSGK"), shard(v, "BSGK")
        out, vjp = jax.vjp(lambda q, k, v: form(q, k, v, shard(mask, "BTS"), 1.5, 0.4), q, k, v)
        return out, vjp(out)

    given = [jnp.asarray(a, jnp.float32) for a in arrays] + [jnp.asarray(mask_BTS)]
    expected = jax.jit(run)(*given)
    with mesh_of(data=2, tensor=2):
        got = jax.jit(run)(*map(np.asarray, given))
        assert jax.typeof(got[0]).sharding.spec == jax.P(("data", "fsdp"), None, "tensor", None)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
