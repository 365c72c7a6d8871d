"""The arithmetic that a model needs, against other ways to count it, and what a device can do."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import roofline
from jaxgpt.config import ModelConfig
from jaxgpt.kernels.attention import attention_mask
from jaxgpt.model import Transformer, parameter_count
from jaxgpt.roofline import forward_flops_per_token, peak_flops

GPT2 = ModelConfig(n_layers=12, d_model=768, n_heads=12, context_length=1024, vocab_size=50257)
SMALL = ModelConfig(n_layers=2, d_model=256, n_heads=4, context_length=256, vocab_size=1024, scan_layers=False)
MODERN = dataclasses.replace(
    SMALL, n_kv_heads=2, head_dim=48, d_ff=640, gated_mlp=True, norm="rmsnorm", activation="silu", windows=(64, 0),
    tie_embeddings=False, positions="rotary",
)  # fmt: skip


def visible_keys(config: ModelConfig) -> float:
    """Keys that a token sees, a mean over a sequence and a sum over the layers, counted in the model's own masks."""
    positions = jnp.arange(config.context_length)[None]
    masks = [attention_mask(positions, positions, None, window) for window in config.layer_windows]
    return sum(float(jnp.sum(mask)) for mask in masks) / config.context_length


@pytest.mark.parametrize("config", [SMALL, MODERN], ids=["gpt2", "modern"])
def test_the_count_is_that_of_the_compiler(mesh_of: Callable[..., Any], config: ModelConfig) -> None:
    """XLA's count of an unrolled forward pass, which computes all scores and masks those that may not be seen."""
    B, T = 2, config.context_length
    with mesh_of():
        model = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
        forward = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))
        analysis = forward.lower(model, jax.ShapeDtypeStruct((B, T), jnp.int32)).compile().cost_analysis()
    hidden = config.n_layers * T - visible_keys(config)
    expected = forward_flops_per_token(config) + 2 * 2 * config.n_heads * config.key_dim * hidden
    assert analysis["flops"] / (B * T) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("windows", [(), (1,), (7,), (64, 0), (5000,)])
def test_attention_counts_what_the_masks_leave(windows: tuple[int, ...]) -> None:
    config = dataclasses.replace(SMALL, windows=windows, context_length=100)
    without = forward_flops_per_token(config) - 4 * config.n_heads * config.key_dim * visible_keys(config)
    D = config.d_model
    assert without == pytest.approx(2 * (config.n_layers * 12 * D * D + D * 1024))


def test_gpt2_needs_two_operations_for_each_parameter_and_attention() -> None:
    """Tables for positions are looked up, not multiplied; biases and norms are not counted."""
    shapes = jax.eval_shape(lambda: Transformer(GPT2, jax.random.key(0)))
    assert parameter_count(shapes) == 124_439_808
    small_ones = sum(leaf.size for leaf in jax.tree.leaves(shapes.layers) if leaf.ndim < 3)
    attention = 12 * 4 * 768 * 1025 / 2
    expected = 2 * (124_439_808 - 1024 * 768) + attention
    assert forward_flops_per_token(GPT2) == pytest.approx(expected, rel=0.001)
    assert small_ones < 0.001 * 124_439_808
    assert forward_flops_per_token(dataclasses.replace(GPT2, windows=(128, 0))) < forward_flops_per_token(GPT2)


@pytest.mark.parametrize("windows", [(), (7, 0)])
def test_a_prompt_needs_no_scores_and_of_the_last_layer_keys_and_values(windows: tuple[int, ...]) -> None:
    """Else a short prompt of a small model with many words would be filled in at more than the peak."""
    config = dataclasses.replace(SMALL, windows=windows, context_length=100, vocab_size=10**6)
    shorter = dataclasses.replace(config, n_layers=config.n_layers - 1, context_length=30)
    D = config.d_model
    without_scores = forward_flops_per_token(shorter) - 2 * D * 10**6
    assert forward_flops_per_token(config, 30) == pytest.approx(without_scores + 2 * D * 2 * D)


def test_the_peak_of_this_machine_is_measured_once_whatever_the_mesh(
    mesh_of: Callable[..., Any],
) -> None:
    """Simulated devices share the cores: eight together do as much as one alone."""
    peaks = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        roofline.measured_flops.cache_clear()
        with mesh_of(*sizes) as mesh:
            peaks.append(peak_flops(mesh) or 0)
    with mesh_of() as mesh:
        assert peak_flops(mesh) == peaks[-1]
    assert 1e8 < peaks[0] < 1e15
    assert 1 / 4 < peaks[1] / peaks[0] < 4


@pytest.mark.parametrize(("kind", "one"), [("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12), ("Abacus 3000", None)])
def test_the_peak_of_an_accelerator_is_in_the_table_or_unknown(kind: str, one: float | None) -> None:
    device = SimpleNamespace(platform="gpu", device_kind=kind)
    mesh: Any = SimpleNamespace(devices=np.array([device] * 4), size=4)
    assert peak_flops(mesh) == (None if one is None else 4 * one)
