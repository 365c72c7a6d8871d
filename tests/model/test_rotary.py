"""Rotary positions against the published formulas, written out one frequency at a time in Python's floats."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import ModelConfig
from jaxgpt.model import Transformer
from jaxgpt.model.rotary import frequencies, rotary_kinds, rotate, rotations_of

ORIGINAL = 512
LLAMA3 = dict(
    rope_scaling="llama3", rope_theta=50_000.0, rope_factor=8.0, rope_low_frequency=1.0, rope_high_frequency=4.0,
    rope_original_context=ORIGINAL,
)  # fmt: skip
LONG = dict(
    rope_scaling="longrope", rope_original_context=ORIGINAL, rope_attention_factor=1.25,
    rope_short_factors=tuple(1 + 0.1 * i for i in range(16)), rope_long_factors=tuple(2.0 + i for i in range(16)),
)  # fmt: skip


def config_of(**options: Any) -> ModelConfig:
    sizes = dict(n_layers=4, d_model=64, n_heads=2, context_length=32, vocab_size=50, positions="rotary")
    return ModelConfig(**(sizes | options))  # type: ignore[arg-type]


def plain(width: int, theta: float) -> list[float]:
    """arXiv:2104.09864, section 3.2.2."""
    return [theta ** (-2 * i / width) for i in range(width // 2)]


def llama3(frequency: float, factor: float, low: float, high: float) -> float:
    """As Meta published it with Llama 3.1: by wavelength, with a smooth step between the two bounds."""
    wavelength = 2 * math.pi / frequency
    if wavelength < ORIGINAL / high:
        return frequency
    if wavelength > ORIGINAL / low:
        return frequency / factor
    smooth = (ORIGINAL / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def of(config: ModelConfig, length: int = 0) -> np.ndarray:
    return frequencies(config, config.rope_theta, config.rope_scaling, length)


def test_plain_and_linear_frequencies() -> None:
    np.testing.assert_allclose(of(config_of(rope_theta=500.0)), plain(32, 500.0), rtol=1e-5)
    scaled = of(config_of(rope_scaling="linear", rope_factor=3.0))  # arXiv:2306.15595: positions divided by the factor
    np.testing.assert_allclose(scaled, [f / 3 for f in plain(32, 1e4)], rtol=1e-5)


@pytest.mark.parametrize("bounds", [(1.0, 4.0), (2.0, 20.0)])
def test_the_scaling_of_llama_3(bounds: tuple[float, float]) -> None:
    low, high = bounds
    config = config_of(**LLAMA3 | dict(rope_low_frequency=low, rope_high_frequency=high))
    expected = [llama3(f, 8.0, low, high) for f in plain(32, 50_000.0)]
    ratios = np.array(plain(32, 50_000.0)) / expected
    assert ratios.min() == 1 and ratios.max() == 8 and ((ratios > 1) & (ratios < 8)).any(), "all three kinds are there"
    np.testing.assert_allclose(of(config), expected, rtol=1e-5)


@pytest.mark.parametrize("length", [1, ORIGINAL, ORIGINAL + 1, 10 * ORIGINAL])
def test_longrope_divides_each_frequency_by_its_own_factor(length: int) -> None:
    config = config_of(**LONG)
    factors = config.rope_long_factors if length > ORIGINAL else config.rope_short_factors
    expected = [f / factor for f, factor in zip(plain(32, 1e4), factors, strict=True)]
    np.testing.assert_allclose(of(config, length), expected, rtol=1e-5)


def test_longrope_multiplies_queries_and_keys() -> None:
    config = config_of(**LONG)
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    (cos, sin), _ = rotations_of(config, positions, 5)
    np.testing.assert_allclose(jnp.square(cos) + jnp.square(sin), np.full(cos.shape, 1.25**2), rtol=1e-5)


# How far which part of a head turns


def turned(x: np.ndarray, table: list[float]) -> np.ndarray:
    """x [T, K] at positions 0, 1 ...: pairs (i, i + n/2) of the first n dimensions as complex numbers."""
    n = len(table)
    out = x.copy()
    for t in range(len(x)):
        for i, frequency in enumerate(table):
            pair = (x[t, i] + 1j * x[t, i + n]) * np.exp(1j * t * frequency)
            out[t, i], out[t, i + n] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("fraction", [1.0, 0.75, 0.25])
def test_only_the_first_dimensions_of_a_head_turn(fraction: float) -> None:
    config = config_of(rope_fraction=fraction, rope_theta=100.0)
    x = np.random.default_rng(0).standard_normal((7, 32))
    (cos, sin), _ = rotations_of(config, jnp.arange(7, dtype=jnp.int32)[None], 7)
    out = rotate(jnp.asarray(x, jnp.float32)[None, :, None], (cos[0], sin[0]))
    width = int(32 * fraction)
    assert config.rotary_dim == width
    np.testing.assert_allclose(out[0, :, 0], turned(x, plain(width, 100.0)), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(out[0, :, 0, width:], x[:, width:].astype(np.float32))


def test_far_positions_keep_float32_angles_in_bfloat16() -> None:
    """At position 4,000 a bfloat16 angle would be off by 16 radians."""
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 32))
    (cos, sin), _ = rotations_of(config_of(), jnp.array([[4001]], jnp.int32), 1)
    near = rotate(jnp.asarray(x, jnp.bfloat16), (cos[0], sin[0]))
    angles = [4001 * f for f in plain(32, 1e4)]
    first, second = x[0, 0, 0, :16], x[0, 0, 0, 16:]
    expected = np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )
    assert near.dtype == jnp.bfloat16
    np.testing.assert_allclose(near[0, 0, 0].astype(jnp.float32), expected, rtol=0, atol=0.03)


# Layers that differ


def test_each_layer_has_the_rotation_of_its_kind() -> None:
    """As Gemma 3: layers with a window turn by a base of their own, unscaled, and some layers do not turn."""
    config = config_of(
        windows=(8, 8, 0, 0), rotary_layers=(True, False, True, True), rope_theta=1e6, local_rope_theta=1e4,
        rope_scaling="linear", rope_factor=8.0,
    )  # fmt: skip
    tables, kinds = rotary_kinds(config, 32)
    assert kinds == (0, 1, 2, 2), "equal layers share a table"
    np.testing.assert_allclose(tables[0], plain(32, 1e4), rtol=1e-5)
    np.testing.assert_array_equal(tables[1], np.zeros(16))
    np.testing.assert_allclose(tables[2], [f / 8 for f in plain(32, 1e6)], rtol=1e-5)


def test_without_a_base_of_their_own_layers_with_a_window_turn_as_the_others() -> None:
    tables, kinds = rotary_kinds(config_of(windows=(8, 0), rope_scaling="linear", rope_factor=2.0), 32)
    assert len(tables) == 1 and kinds == (0, 0, 0, 0)


def hidden(config: ModelConfig, tokens: jax.Array, **options: Any) -> np.ndarray:
    """What the model makes of tokens, with the same parameters whatever rotates."""
    model = Transformer(config, jax.random.key(0))
    model = jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, model)  # so that attention is not all but even
    return np.asarray(jax.jit(lambda m, t: m(t, **options)[0])(model, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_model_without_rotating_layers_knows_no_positions(scan_layers: bool, mesh_of: Callable) -> None:
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 50)
    one = dict(rotary_layers=(False, False, True, False))
    with mesh_of():
        still, none, all_turn, one_turns = (
            hidden(config_of(scan_layers=scan_layers, **options), tokens)
            for options in (dict(rotary_layers=(False,)), dict(positions="none"), {}, one)
        )
    np.testing.assert_allclose(still, none, rtol=0, atol=1e-6)
    assert np.abs(all_turn - none).max() > 0.01 and np.abs(one_turns - none).max() > 0.01
    assert np.abs(one_turns - all_turn).max() > 0.01


def test_the_base_of_a_layer_matters_only_on_that_layer(mesh_of: Callable) -> None:
    """The local base changes what layers with a window compute, and nothing where no layer has one."""
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 50)
    with mesh_of():
        near = {theta: hidden(config_of(windows=(64, 0), local_rope_theta=theta), tokens) for theta in (1e4, 10.0)}
        far = {theta: hidden(config_of(windows=(), local_rope_theta=theta), tokens) for theta in (1e4, 10.0)}
    assert np.abs(near[1e4] - near[10.0]).max() > 0.01
    np.testing.assert_array_equal(far[1e4], far[10.0])
    np.testing.assert_allclose(near[1e4], far[1e4], rtol=0, atol=1e-5)  # the window is wider than the text


def test_only_the_distance_of_two_tokens_matters(mesh_of: Callable) -> None:
    """The same text 1,000 positions later, with each kind of scaling: the same, up to rounding of the angles."""
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 50)
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    kinds = [{}, LLAMA3, LONG, dict(rope_fraction=0.5), dict(rotary_layers=(True, False))]
    with mesh_of():
        for options in kinds:
            here, there = (hidden(config_of(**options), tokens, positions_BT=positions + n) for n in (0, 1000))
            np.testing.assert_allclose(there, here, rtol=0, atol=2e-3)
