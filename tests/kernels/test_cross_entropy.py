"""The chunked loss equals the plain one in values and gradients, and never holds all the logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.kernels.cross_entropy import LossOptions, linear_cross_entropy
from jaxgpt.sharding import shard

B, T, D, V, ROWS = 2, 8, 16, 50, 64


def plain(
    x_BTD: jax.Array, w_VD: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array, options: LossOptions
) -> tuple[jax.Array, jax.Array]:
    """The textbook form, differentiated by JAX: all the logits of the true vocabulary, then log_softmax."""
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD[: options.vocab_size])
    if options.softcap is not None:
        logits_BTV = options.softcap * jnp.tanh(logits_BTV / options.softcap)
    picked_BT1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), jnp.maximum(labels_BT, 0)[:, :, None], -1)
    losses_BT = jnp.where(labels_BT < 0, 0, -picked_BT1[:, :, 0])
    penalty_BT = options.z_loss * jax.nn.logsumexp(logits_BTV, -1) ** 2
    return (weights_BT * (losses_BT + penalty_BT)).sum(), losses_BT


def inputs(rows: int = ROWS, scale: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x, w, labels (a quarter of them -1) and uneven weights."""
    rng = np.random.default_rng(0)
    x_BTD, w_VD = rng.standard_normal((B, T, D)), rng.standard_normal((rows, D)) * scale
    labels_BT = np.where(rng.random((B, T)) < 0.25, -1, rng.integers(0, V, (B, T)))
    weights_BT = np.where(labels_BT < 0, 0, rng.random((B, T)))
    assert 0 < (labels_BT < 0).sum() < B * T
    floats = [jnp.asarray(a, jnp.float32) for a in (x_BTD, w_VD, weights_BT)]
    return floats[0], floats[1], jnp.asarray(labels_BT, jnp.int32), floats[2]


def gradients(loss: Callable, *arguments: object) -> tuple:
    """((3 * total, losses), (dx, dw)): three times, since a cotangent of one would hide a forgotten factor."""

    def tripled(x_BTD: jax.Array, w_VD: jax.Array, *rest: object) -> tuple[jax.Array, jax.Array]:
        total, losses_BT = loss(x_BTD, w_VD, *rest)
        return 3 * total, losses_BT

    compiled = jax.jit(jax.value_and_grad(tripled, argnums=(0, 1), has_aux=True), static_argnums=4)
    return compiled(*arguments)


@pytest.mark.parametrize(
    ("chunks", "rows", "softcap", "z_loss"),
    [
        (1, ROWS, None, 0.0),
        (2, ROWS, None, 0.1),
        (4, ROWS, 3.0, 0.0),
        (1, V, 3.0, 0.1),
        (2, ROWS, 3.0, 0.1),
        (8, ROWS, 3.0, 0.1),
    ],
)
def test_chunks_match_the_plain_loss(chunks: int, rows: int, softcap: float | None, z_loss: float) -> None:
    arrays = inputs(rows)
    options = LossOptions(V, softcap, z_loss, chunks)
    got, expected = gradients(linear_cross_entropy, *arrays, options), gradients(plain, *arrays, options)
    forward = linear_cross_entropy(*arrays, options)  # another pass: the one without gradients
    np.testing.assert_allclose(forward[0] * 3, got[0][0], rtol=1e-6)
    np.testing.assert_allclose(forward[1], got[0][1], rtol=1e-6)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)
    assert not got[1][1][V:].any(), "rows that round the vocabulary up have gradients"


def test_a_label_of_minus_one_counts_for_nothing() -> None:
    x_BTD, w_VD, labels_BT, weights_BT = inputs()
    options = LossOptions(V, z_loss=0.1, chunks=2)
    (_, losses_BT), (dx_BTD, _) = gradients(linear_cross_entropy, x_BTD, w_VD, labels_BT, weights_BT, options)
    ignored = np.asarray(labels_BT) < 0
    assert not losses_BT[ignored].any() and not dx_BTD[ignored].any()
    assert (losses_BT[~ignored] > 0).all() and dx_BTD[~ignored].any(-1).all()


def test_nothing_but_ignored_labels_gives_zero_and_no_gradient() -> None:
    x_BTD, w_VD, labels_BT, weights_BT = inputs()
    options = LossOptions(V, 3.0, 0.1, 2)
    nothing = (jnp.full_like(labels_BT, -1), jnp.zeros_like(weights_BT))
    for leaf in jax.tree.leaves(gradients(linear_cross_entropy, x_BTD, w_VD, *nothing, options)):
        assert not leaf.any()  # NaN would be true


def test_logits_in_the_thousands_stay_finite() -> None:
    arrays = inputs(scale=1000.0)
    options = LossOptions(V, chunks=2)
    got, expected = gradients(linear_cross_entropy, *arrays, options), gradients(plain, *arrays, options)
    assert expected[0][0] > 1000
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bfloat16_computes_the_loss_in_float32(softcap: float | None) -> None:
    """Against float32 on the same rounded inputs; gradients are as exact as bfloat16 can say (2^-8)."""
    x_BTD, w_VD, labels_BT, weights_BT = inputs()
    options = LossOptions(V, softcap, chunks=2)
    halves = (x_BTD.astype(jnp.bfloat16), w_VD.astype(jnp.bfloat16))
    got = gradients(linear_cross_entropy, *halves, labels_BT, weights_BT, options)
    expected = gradients(plain, *(a.astype(jnp.float32) for a in halves), labels_BT, weights_BT, options)
    assert [leaf.dtype for leaf in jax.tree.leaves(got)] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-5)
    np.testing.assert_allclose(got[0][1], expected[0][1], rtol=1e-5, atol=1e-5)
    for one, other in zip(got[1], expected[1], strict=True):
        error = np.linalg.norm(np.asarray(one, np.float32) - other) / np.linalg.norm(other)
        assert error < 2**-7


def test_memory_stays_far_below_the_logits() -> None:
    """Loss and gradients of 2048 tokens over 8192 pieces, whose float32 logits are 64 MiB."""
    tokens, pieces, chunks = 2048, 8192, 8
    logits_bytes = tokens * pieces * 4
    shapes = [((1, tokens, D), jnp.float32), ((pieces, D), jnp.float32), ((1, tokens), jnp.int32)]
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in [*shapes, ((1, tokens), jnp.float32)]]

    def temporary_bytes(loss: Callable) -> int:
        gradient = jax.grad(lambda *inputs: loss(*inputs, LossOptions(pieces, chunks=chunks))[0], argnums=(0, 1))
        return jax.jit(gradient).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(plain) > logits_bytes, "the measure does not see the logits"
    assert temporary_bytes(linear_cross_entropy) < 0.5 * logits_bytes


def test_a_vocabulary_cut_over_devices_changes_nothing(mesh_of: Callable) -> None:
    arrays = inputs()
    options = LossOptions(V, 3.0, 0.1, 2)
    expected = gradients(linear_cross_entropy, *arrays, options)

    def cut(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array, options: LossOptions) -> tuple:
        places = zip((x, w, labels, weights), ("BTD", "VD", "BT", "BT"), strict=True)
        return linear_cross_entropy(*(shard(a, axes) for a, axes in places), options)

    with mesh_of(data=2, tensor=4):
        got = gradients(cut, *map(np.asarray, arrays), options)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)
