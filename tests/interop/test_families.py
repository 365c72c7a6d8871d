"""Each family against transformers: small random models, in and out again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import made
import numpy as np
import pytest

from jaxgpt.interop.configs import FAMILIES, family_of, read_config, write_config
from jaxgpt.interop.load import open_model, stored_tensors
from jaxgpt.interop.tensors import write_safetensors

pytestmark = pytest.mark.parity

SIZES = dict(
    num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=61, max_position_embeddings=64,
)  # fmt: skip
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
LONG = dict(
    rope_type="longrope", rope_theta=100.0, short_factor=[1.0, 1.5, 2.0], long_factor=[1.0, 3.0, 5.0],
    partial_rotary_factor=0.75,
)  # fmt: skip
EIGHT_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", dict(n_layer=3, n_embd=32, n_head=4, n_positions=64, vocab_size=61)),
    "llama 2": ("llama", {}),
    "llama 3, scaled, biases, own head width": (
        "llama",
        dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, head_dim=12, tie_word_embeddings=True),
    ),
    "llama, linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0))),
    "smollm2": ("llama", dict(tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=3, hidden_size=24)),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0, 1])),
    "smollm3, windows": (
        "smollm3", dict(no_rope_layers=[1, 1, 0], use_sliding_window=True, sliding_window=5, layer_types=EIGHT_KINDS),
    ),
    "mistral": ("mistral", dict(sliding_window=5, head_dim=8)),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=12)),
    "gemma": ("gemma", dict(head_dim=12, num_key_value_heads=1)),
    "gemma 2": ("gemma2", dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=19)),
    "gemma 3": ("gemma3_text", dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=8, layer_types=EIGHT_KINDS)),
    "gemma 3, scaled": (
        "gemma3_text",
        dict(
            head_dim=8, sliding_window=5, query_pre_attn_scalar=8, layer_types=EIGHT_KINDS,
            rope_parameters={
                "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        ),
    ),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", dict(sliding_window=6)),
    "phi3, long": ("phi3", dict(rope_parameters=LONG, original_max_position_embeddings=16)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8)),
    "qwen3_moe, normalised": (
        "qwen3_moe",
        dict(num_experts=4, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True),
    ),
}  # fmt: skip
LENGTHS = {"phi3, long": [12, 40]}  # on both sides of the original context


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """Name, directory and transformers' own model, with weights that make each part matter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, options = CASES[request.param]
    sizes = {} if model_type == "gpt2" else SIZES
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**IDS, **sizes, **options}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.5) + (0.0 if "bias" in name or p.ndim > 1 else 0.7))
    directory = tmp_path_factory.mktemp("hf")
    model.eval().float().save_pretrained(directory)
    return request.param, directory, model


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, t: m.logits(m(t)[0]))(model, jnp.asarray(tokens)))


def test_logits_are_those_of_transformers(case: tuple, mesh_of: Callable) -> None:
    name, directory, model = case
    for length in LENGTHS.get(name, [24]):
        tokens = np.random.default_rng(length).integers(0, 61, (2, length))
        with mesh_of():
            ours = our_logits(made.load(directory), tokens)
        theirs = their_logits(model, tokens)
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_stacked_for_training_is_the_same_model(case: tuple, mesh_of: Callable) -> None:
    _, directory, _ = case
    tokens = np.random.default_rng(0).integers(0, 61, (2, 12))
    with mesh_of():
        stacked = made.load(directory, for_training=True)
        np.testing.assert_allclose(our_logits(stacked, tokens), our_logits(made.load(directory), tokens), atol=2e-5)


def test_exports_what_transformers_reads_back(case: tuple, mesh_of: Callable, tmp_path: Path) -> None:
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    name, directory, model = case
    with mesh_of():
        family, ours = open_model(directory)[0].family.model_type, made.load(directory, for_training=True)
        _, hf = write_config(ours.config, family)
        (tmp_path / "config.json").write_text(json.dumps(hf | IDS | {"dtype": "float32"}))
        write_safetensors(tmp_path, stored_tensors(ours, family_of(family, name)))
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor in before:
        np.testing.assert_array_equal(after[tensor], before[tensor], tensor)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    for length in LENGTHS.get(name, [24]):
        tokens = np.random.default_rng(length).integers(0, 61, (2, length))
        np.testing.assert_allclose(their_logits(again, tokens), their_logits(model, tokens), rtol=0, atol=1e-5)


def test_older_keys_mean_the_same(case: tuple) -> None:
    _, directory, _ = case
    hf = json.loads((directory / "config.json").read_text())
    family, config = read_config(hf, "new")
    _, written = write_config(config, family.model_type)
    assert "rope_parameters" not in written
    older, again = read_config(written, "old")
    assert again == config and older == family
    written.pop("layer_types", None)
    if family.model_type not in ("gemma3_text", "smollm3", "qwen2"):  # whose pattern here is not the usual one
        assert read_config(written, "older")[1] == config


def test_every_family_is_compared() -> None:
    assert {model_type for model_type, _ in CASES.values()} == FAMILIES.keys()
