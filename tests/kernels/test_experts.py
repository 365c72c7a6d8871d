"""Mixtures of experts against a loop over tokens in float64, in values and gradients: no token is ever dropped."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.kernels.experts import mixture, route, router_losses
from jaxgpt.sharding import shard

B, T, D, E, M, F = 8, 6, 10, 5, 3, 16
MESHES = [(1, 1, 1), (2, 2, 2), (1, 1, 8), (8, 1, 1)]
Arrays = list[np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def slow_mixture(x: np.ndarray, weights: np.ndarray, experts: np.ndarray, matrices: Arrays) -> np.ndarray:
    """One expert of one token at a time."""
    gate, up, down = matrices
    out = np.zeros(x.shape)
    for b, t, m in np.ndindex(experts.shape):
        e = experts[b, t, m]
        out[b, t] += weights[b, t, m] * (silu(x[b, t] @ gate[e]) * (x[b, t] @ up[e])) @ down[e]
    return out


def softmax(x: np.ndarray) -> np.ndarray:
    raised = np.exp(x - x.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def inputs(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, Arrays]:
    """x, weights, experts and the three matrices. Tokens choose at random, all the same experts, or one alone."""
    rng = np.random.default_rng(0)
    shapes = [(E, D, F), (E, D, F), (E, F, D)]
    experts = np.argsort(rng.random((B, T, E)), -1)[..., :M]
    if kind == "all the same":
        experts[:] = [3, 0, 4]
    if kind == "one alone":
        experts = np.full((B, T, 1), 2)
    weights = rng.random(experts.shape) + 0.1
    return rng.standard_normal((B, T, D)), weights, experts, [rng.standard_normal(s) / s[1] ** 0.5 for s in shapes]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("kind", ["at random", "all the same", "one alone"])
def test_values_and_gradients_match_a_slow_reference(kind: str, sizes: tuple[int, ...], mesh_of: Callable) -> None:
    """Gradients against central differences of the reference along random directions of each input."""
    x, weights, experts, matrices = inputs(kind)
    pull = np.random.default_rng(1).standard_normal(x.shape)
    with mesh_of(*sizes):
        rows = [shard(jnp.asarray(a, jnp.float32), "BTD") for a in (x, weights, pull)]
        chosen = shard(jnp.asarray(experts, jnp.int32), "BTD")
        cut = [
            shard(jnp.asarray(a, jnp.float32), axes) for a, axes in zip(matrices, ("EDF", "EDF", "EFD"), strict=True)
        ]
        run = jax.jit(lambda x, w, *m: mixture(x, w, chosen, m, jax.nn.silu))
        out, vjp = jax.vjp(run, rows[0], rows[1], *cut)
        gradients = [np.asarray(g, np.float64) for g in vjp(rows[2])]
    np.testing.assert_allclose(out, slow_mixture(x, weights, experts, matrices), rtol=0, atol=1e-5)
    rng, arrays = np.random.default_rng(2), [x, weights, *matrices]
    for which, gradient in enumerate(gradients):
        way = rng.standard_normal(arrays[which].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [a + step * way if i == which else a for i, a in enumerate(arrays)]
            ends.append((pull * slow_mixture(moved[0], moved[1], experts, moved[2:])).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(slope) > 0.1
        assert np.vdot(gradient, way) == pytest.approx(slope, rel=1e-5, abs=1e-5)


def test_no_token_is_dropped_however_many_an_expert_gets() -> None:
    """4,096 tokens of which every one goes to the same expert, and no mesh: each counts as it would alone."""
    _, _, _, matrices = inputs("one alone")
    x_BTD = np.random.default_rng(0).standard_normal((8, 512, D)).astype(np.float32)
    experts_BTM = jnp.full((8, 512, 1), 4, jnp.int32)
    cut = tuple(jnp.asarray(a, jnp.float32) for a in matrices)
    out = mixture(jnp.asarray(x_BTD), jnp.ones((8, 512, 1)), experts_BTM, cut, jax.nn.silu)  # type: ignore[arg-type]
    gate, up, down = (a[4] for a in matrices)
    np.testing.assert_allclose(out, (silu(x_BTD @ gate) * (x_BTD @ up)) @ down, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", MESHES)
def test_the_result_is_the_same_bits_each_time(sizes: tuple[int, ...], mesh_of: Callable) -> None:
    x, weights, experts, matrices = inputs("at random")
    with mesh_of(*sizes):
        rows = [shard(jnp.asarray(a), "BTD") for a in (x.astype(np.float32), weights.astype(np.float32), experts)]
        cut = [
            shard(jnp.asarray(a, jnp.float32), axes) for a, axes in zip(matrices, ("EDF", "EDF", "EFD"), strict=True)
        ]
        run = jax.jit(jax.value_and_grad(lambda m: mixture(*rows, m, jax.nn.silu).sum()))
        first, second = (jax.device_get(run(tuple(cut))) for _ in range(2))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.tobytes() == other.tobytes()


# The router


def test_the_most_probable_experts_are_taken_with_their_probabilities() -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((B, T, E))
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, -1)[..., :M]
    for normalize in (False, True):
        weights, experts = route(jnp.asarray(logits, jnp.float32), M, normalize)
        np.testing.assert_array_equal(experts, order)
        expected = np.take_along_axis(probabilities, order, -1)
        if normalize:
            expected /= expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_of_equals_the_lowest_are_taken() -> None:
    logits = jnp.array([[[0.0, 0, 0, 0, 0], [1, 2, 1, 2, 1], [-1, -1, -1, 0, -1]]])
    assert route(logits, 3, False)[1].tolist() == [[[0, 1, 2], [1, 3, 0], [3, 0, 1]]]


def test_the_router_works_in_float32() -> None:
    """Logits of bfloat16 that differ by 2^-7 of themselves give weights that are not rounded to bfloat16."""
    logits = jnp.array([[[1.0, 1.0078125, 0.5]]], jnp.bfloat16)
    weights, experts = route(logits, 2, True)
    assert weights.dtype == jnp.float32 and experts.tolist() == [[[1, 0]]]
    np.testing.assert_allclose(weights[0, 0], softmax(np.array([1.0078125, 1.0])), rtol=1e-6)


def slow_losses(logits: np.ndarray, experts: np.ndarray) -> tuple[float, float]:
    """Equations 4 to 6 of arXiv:2101.03961 with M choices of each token, and equation 5 of arXiv:2202.08906."""
    count = logits[..., 0].size
    share = [(experts == e).sum() / count for e in range(E)]
    probability = [softmax(logits)[..., e].sum() / count for e in range(E)]
    z = sum(np.log(np.exp(row).sum()) ** 2 for row in logits.reshape(-1, E)) / count
    return E * sum(f * p for f, p in zip(share, probability, strict=True)), z


@pytest.mark.parametrize("sizes", MESHES)
def test_the_losses_of_the_router_are_their_formulas(sizes: tuple[int, ...], mesh_of: Callable) -> None:
    """In values and gradients, over the whole batch on every mesh."""
    logits = 2 * np.random.default_rng(3).standard_normal((B, T, E))
    experts = np.argsort(-logits, -1)[..., :M]
    with mesh_of(*sizes):
        rows, chosen = shard(jnp.asarray(logits, jnp.float32), "BTE"), shard(jnp.asarray(experts), "BTM")
        losses, vjp = jax.vjp(jax.jit(lambda rows: router_losses(rows, chosen)), rows)
        gradients = [np.asarray(vjp(jnp.eye(2)[i])[0], np.float64) for i in range(2)]
    np.testing.assert_allclose(losses, slow_losses(logits, experts), rtol=1e-5)
    way = np.random.default_rng(4).standard_normal(logits.shape)
    ahead, behind = (slow_losses(logits + step * way, experts) for step in (1e-5, -1e-5))
    for i, gradient in enumerate(gradients):
        assert np.vdot(gradient, way) == pytest.approx((ahead[i] - behind[i]) / 2e-5, rel=1e-4, abs=1e-6)


def test_balance_is_least_where_all_experts_get_as_much() -> None:
    """M where shares and probabilities are even, more wherever both lean the same way, E * M at the worst."""
    even = jnp.zeros((1, E, E))
    in_turn = jnp.asarray(np.arange(E)[None, :, None] + np.arange(M)) % E
    assert router_losses(even, in_turn)[0] == pytest.approx(M)
    leaning = jnp.zeros((1, E, E)).at[..., 0].set(2.0)
    assert router_losses(leaning, route(leaning, M, True)[1])[0] > 1.2 * M
    sure = jnp.zeros((1, E, E)).at[..., 0].set(50.0)
    assert router_losses(sure, jnp.zeros((1, E, 1), jnp.int32))[0] == pytest.approx(E)
