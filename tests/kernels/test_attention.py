"""Attention and its mask against slow loops in float64, in values and gradients."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import SingleDeviceSharding

from jaxgpt.bench.kernels import absent_devices
from jaxgpt.config import ModelConfig
from jaxgpt.kernels.attention import FORMS, attention, attention_mask, causal_attention, chosen_form
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
    out, vjp = jax.vjp(jax.jit(lambda q, k, v: attention(q, k, v, jnp.asarray(mask_BTS), softcap, K**-0.5)), *singles)
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
    out = attention(*halves, jnp.asarray(mask_BTS), None, K**-0.5)
    assert out.dtype == jnp.bfloat16
    exact = slow_attention(*(np.asarray(a, np.float64) for a in halves), mask_BTS, None)
    assert np.abs(np.asarray(out, np.float64) - exact).max() < 2**-8 * np.abs(arrays[2]).max()


def test_huge_scores_stay_finite() -> None:
    arrays, mask_BTS = inputs(4)
    q, k, v = (jnp.asarray(a, jnp.float32) for a in arrays)
    run = jax.jit(jax.value_and_grad(lambda q: attention(q, k, v, jnp.asarray(mask_BTS), None, K**-0.5).sum()))
    value, grads = run(1e6 * q)
    assert np.isfinite(value) and np.isfinite(grads).all()


Given = tuple[list[jax.Array], jax.Array, jax.Array]


def packed(length: int, width: int, dtype: str = "float32") -> Given:
    """Queries of four heads, keys and values of two, the numbers of their documents, and a cotangent."""
    rng = np.random.default_rng(length)
    shapes = [(2, length, heads, width) for heads in (4, 2, 2, 4)]
    *qkv, pull_BTHK = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return qkv, jnp.asarray(rng.integers(0, 9, (2, length))).cumsum(1) // 99, pull_BTHK


def assert_like_the_plain_form(form: Callable, given: Given, settings: dict[str, Any], small: float) -> None:
    """In values and gradients."""
    qkv, segments_BT, pull_BTHK = given
    places_BT = jnp.arange(segments_BT.shape[1])[None]

    def plain(*qkv: jax.Array, segments_BT: jax.Array) -> jax.Array:
        mask_BTT = attention_mask(places_BT, places_BT, (segments_BT, segments_BT), settings["window"])
        return attention(*qkv, mask_BTT, settings["softcap"], settings["scale"])

    def both(form: Callable) -> tuple:
        def run(qkv: list[jax.Array], segments_BT: jax.Array, pull_BTHK: jax.Array) -> tuple:
            out, pull = jax.vjp(functools.partial(form, segments_BT=segments_BT), *qkv)
            return out, *pull(pull_BTHK)

        return jax.jit(run)(qkv, segments_BT, pull_BTHK)

    for one, other in zip(both(functools.partial(form, **settings)), both(plain), strict=True):
        assert one.dtype == other.dtype == qkv[0].dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=small, atol=small)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("length", "blocks"), [(5, 1), (128, 1), (300, 3), (1100, 8)])
def test_blocks_of_queries_match_the_plain_form(length: int, blocks: int, dtype: str) -> None:
    """With packed documents, a window, grouped heads and a soft-cap; lengths that divide into no blocks too. The
    products are as many as there are blocks, and each leaves out the keys behind its end."""
    given, settings = packed(length, 8, dtype), {"window": length // 2, "softcap": 1.5, "scale": 0.3}
    assert_like_the_plain_form(FORMS["blocks"], given, settings, 1e-5 if dtype == "float32" else 0.1)
    program = str(jax.make_jaxpr(lambda *qkv: FORMS["blocks"](*qkv, given[1], **settings))(*given[0]))
    assert program.count("dot_general") == 2 * blocks
    assert (f"[2,2,2,{length},{length}]" in program) == (blocks == 1)


def test_gradients_keep_no_scores() -> None:
    """What is saved for the backward pass are inputs, once for all blocks."""
    given = [jnp.ones((1, 256, 2, 8)) for _ in range(3)]
    _, pull = jax.vjp(lambda *qkv: FORMS["blocks"](*qkv, jnp.zeros((1, 256), int), 0, None, 1.0), *given)
    saved = {id(leaf): leaf.size for leaf in jax.tree.leaves(pull) if leaf.dtype != bool}
    assert max(saved.values()) == 256 * 2 * 8 and sum(saved.values()) <= 4 * 256 * 2 * 8


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splash attention without a TPU: the kernel is JAX's, what we ask it for is ours."""
    monkeypatch.setattr(splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("window", "softcap", "scale"), [(0, None, 0.125), (1, None, 0.125), (200, 1.5, 0.3)])
def test_the_kernel_of_a_tpu_matches_the_plain_form(
    window: int, softcap: float | None, scale: float, dtype: str, interpreted: None
) -> None:
    settings, small = dict(window=window, softcap=softcap, scale=scale), 1e-4 if dtype == "float32" else 0.2
    assert_like_the_plain_form(FORMS["splash"], packed(384, 64, dtype), settings, small)


def test_the_kernel_of_a_tpu_is_given_each_device_s_part(mesh_of: Callable, interpreted: None) -> None:
    """Rows over data = 2 and heads over tensor = 2: the same values and gradients as on one device."""
    qkv, documents_BT, _ = packed(128, 32)
    settings: dict[str, Any] = {"window": 0, "softcap": None, "scale": 0.2}

    def run(form: str, *qkv: jax.Array) -> tuple:
        q, k, v = (shard(x, axes) for x, axes in zip(qkv, ("BTHK", "BTGK", "BTGK"), strict=True))
        segments_BT = shard(documents_BT, "BT")
        out, pull = jax.vjp(lambda *qkv: causal_attention(form, *qkv, segments_BT, **settings)[0], q, k, v)
        return out, *pull(out)

    expected = jax.jit(functools.partial(run, "blocks"))(*qkv)
    with mesh_of(data=2, tensor=2):
        found = jax.jit(functools.partial(run, "splash"))(*map(np.asarray, qkv))
        assert jax.typeof(found[0]).sharding.spec == jax.P(("data", "fsdp"), None, "tensor", None)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def interpreted_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own kernels without a GPU."""
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("width", "window", "softcap", "scale"),
    [(24, 0, None, 0.125), (64, 1, None, 0.125), (24, 150, 1.5, 0.3), (6, 0, 1.5, 0.3)],
)
def test_the_kernels_of_a_gpu_match_the_plain_form(
    width: int, window: int, softcap: float | None, scale: float, dtype: str, interpreted_flash: None
) -> None:
    """Three tiles of queries, and heads of widths that are no powers of 2 or, in float32, make tiles shorter."""
    settings, small = dict(window=window, softcap=softcap, scale=scale), 2e-5 if dtype == "float32" else 0.05
    assert_like_the_plain_form(FORMS["flash"], packed(384, width, dtype), settings, small)


@pytest.mark.parametrize(
    ("hole", "queries", "keys"),
    [
        (slice(256, 384), [True, True, False], [True, False, False]),
        (slice(128), [False, False, True], [False, True, True]),
    ],
)
def test_tiles_of_which_nothing_is_seen_are_not_read(
    hole: slice, queries: list[bool], keys: list[bool], interpreted_flash: None
) -> None:
    """What is no number there would reach the result: zero times it is none either. A query sees 100 keys."""
    (q, k, v), segments_BT, pull_BTHK = packed(384, 8)
    settings: dict[str, Any] = dict(segments_BT=0 * segments_BT, window=100, softcap=None, scale=0.3)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, pull_BTHK: jax.Array) -> tuple:
        out, pull = jax.vjp(functools.partial(FORMS["flash"], **settings), q, k, v)
        return out, *pull(pull_BTHK)

    def numbers(x: jax.Array) -> list[bool]:
        return np.isfinite(x).reshape(2, 3, -1).all((0, 2)).tolist()

    def holed(x: jax.Array) -> jax.Array:
        return x.at[:, hole].set(jnp.nan)

    out, dq, _, _ = run(q, holed(k), holed(v), pull_BTHK)
    assert numbers(out) == numbers(dq) == queries
    _, _, dk, dv = run(holed(q), k, v, holed(pull_BTHK))
    assert numbers(dk) == numbers(dv) == keys


def test_the_kernels_of_a_gpu_are_given_each_device_s_part(mesh_of: Callable, interpreted_flash: None) -> None:
    """Rows over data = 2 and heads over tensor = 2, in a scan over layers whose windows differ."""
    qkv, documents_BT, _ = packed(256, 16)

    def run(form: str, *qkv: jax.Array) -> tuple:
        q, k, v = (shard(x, axes) for x, axes in zip(qkv, ("BTHK", "BTGK", "BTGK"), strict=True))
        settings: dict[str, Any] = dict(segments_BT=shard(documents_BT, "BT"), softcap=2.0, scale=0.4)

        def layers(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            layer = lambda q, window: causal_attention(form, q, k, v, window=window, **settings)  # noqa: E731
            return jax.lax.scan(layer, q, jnp.array([0, 60]))[0]

        out, pull = jax.vjp(layers, q, k, v)
        return out, *pull(out)

    expected = jax.jit(functools.partial(run, "blocks"))(*qkv)
    with mesh_of(data=2, tensor=2):
        found = jax.jit(functools.partial(run, "flash"))(*map(np.asarray, qkv))
        assert jax.typeof(found[0]).sharding.spec == jax.P(("data", "fsdp"), None, "tensor", None)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("length", "width"), [(200, 16), (128, 65)])
def test_the_kernels_of_a_gpu_refuse_what_they_cannot_do(length: int, width: int) -> None:
    qkv, segments_BT, _ = packed(length, width)
    with pytest.raises(ValueError, match=f"128 tokens, heads of up to 256 bytes; not {length}, {width} numbers"):
        FORMS["flash"](*qkv, segments_BT, window=0, softcap=None, scale=0.1)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("length", "H", "G", "K"), [(1024, 12, 12, 64), (512, 4, 1, 40)])
def test_the_kernels_of_a_gpu_compile_for_an_h100(length: int, H: int, G: int, K: int, dtype: str) -> None:
    """As three calls of Triton, which fit; what takes memory between them are two numbers for each query."""
    where = SingleDeviceSharding(absent_devices("h100:1")[0])
    shapes = [(2, length, heads, K) for heads in (H, G, G, H)]
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape in shapes]
    numbers = [jax.ShapeDtypeStruct(shape, "int32", sharding=where) for shape in ((2, length), ())]

    def run(q: jax.Array, k: jax.Array, v: jax.Array, pull_BTHK: jax.Array, segments_BT: jax.Array, window: Any) -> Any:
        settings: dict[str, Any] = dict(segments_BT=segments_BT, window=window, softcap=30.0, scale=0.1)
        out, pull = jax.vjp(functools.partial(FORMS["flash"], **settings), q, k, v)
        return out, *pull(pull_BTHK)

    compiled = jax.jit(run).lower(*given, *numbers).compile()
    assert compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    padded = 0 if K == 64 else 12 * 2 * length * H * 64 * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * 4 * 2 * length * H + padded + 4096


GPT: dict[str, Any] = dict(n_layers=2, d_model=256, n_heads=4, vocab_size=64, context_length=256, dtype="bfloat16")


@pytest.mark.parametrize(
    ("kind", "changes", "form"),
    [
        ("cpu", {}, "blocks"),
        ("NVIDIA H100 80GB HBM3", {}, "flash"),
        ("NVIDIA H200", {"kernels": "xla"}, "blocks"),
        ("NVIDIA H200", {"windows": (64, 0), "attention_softcap": 50.0, "head_dim": 128}, "flash"),
        ("NVIDIA H200", {"head_dim": 130}, "blocks (flash"),
        ("NVIDIA H200", {"head_dim": 66, "dtype": "float32"}, "blocks (flash"),
        ("NVIDIA H200", {"context_length": 200}, "blocks (flash"),
        ("TPU v5 lite", {}, "splash"),
        ("TPU v5 lite", {"kernels": "xla"}, "blocks"),
        ("TPU v5 lite", {"dtype": "float32", "attention_softcap": 50.0, "windows": (64, 64)}, "splash"),
        ("TPU v5 lite", {"windows": (64, 0), "scan_layers": False}, "splash"),
        ("TPU v5 lite", {"windows": (64, 0)}, "blocks (splash"),
        ("TPU v5 lite", {"context_length": 200}, "blocks (splash"),
    ],
)
def test_a_device_s_own_kernel_is_taken_where_it_can_do_all(
    kind: str, changes: dict[str, Any], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = SimpleNamespace(abstract_device=SimpleNamespace(device_kind=kind))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: there)
    config = ModelConfig(**GPT | changes)
    name, said = chosen_form(config, config.context_length)
    assert name == form.split()[0] and said.startswith(form) and (" takes " in said) == ("(" in form)


def test_without_a_mesh_there_is_no_device_to_choose_for() -> None:
    assert chosen_form(ModelConfig(**GPT), 256) == ("blocks", "blocks")


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


@pytest.mark.parametrize("form", [attention, FORMS["blocks"]])
def test_heads_cut_over_devices_change_nothing(form: Callable, mesh_of: Callable) -> None:
    """Four query heads and two key/value heads over tensor = 2, the batch over data = 2."""
    if form is attention:
        arrays, mask_BTS = inputs(2)
        settings: dict[str, Any] = {"softcap": 1.5, "scale": 0.4}
    else:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal((2, 200, heads, K)) for heads in (4, 2, 2)]
        settings = {"segments_BT": np.zeros((2, 200), int), "window": 0, "softcap": 1.5, "scale": 0.4}

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        q, k, v = shard(q, "BTHK"), shard(k, "BSGK"), shard(v, "BSGK")
        more = {"mask_BTS": shard(jnp.asarray(mask_BTS), "BTS")} if form is attention else {}
        out, vjp = jax.vjp(lambda q, k, v: form(q, k, v, **settings, **more), q, k, v)
        return out, vjp(out)

    given = [jnp.asarray(a, jnp.float32) for a in arrays]
    expected = jax.jit(run)(*given)
    with mesh_of(data=2, tensor=2):
        got = jax.jit(run)(*map(np.asarray, given))
        assert jax.typeof(got[0]).sharding.spec == jax.P(("data", "fsdp"), None, "tensor", None)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
