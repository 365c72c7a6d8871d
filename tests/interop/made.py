"""Small random models of every family, as directories of Hugging Face, without transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxgpt.config import ModelConfig, TokenizerConfig
from jaxgpt.interop import load as load_module
from jaxgpt.interop.configs import family_of, read_config, write_config
from jaxgpt.interop.load import load_weights, stored_tensors
from jaxgpt.interop.tensors import write_safetensors
from jaxgpt.interop.vocabulary import write_tokenizer
from jaxgpt.model import Transformer, parameter_name
from jaxgpt.sharding import place_shapes
from jaxgpt.tokenizer import Tokenizer, train_tokenizer

Json = dict[str, Any]
SIZES = dict(
    num_hidden_layers=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
    vocab_size=350, max_position_embeddings=128, rms_norm_eps=1e-6,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.5, 2.0], long_factor=[1.0, 3.0, 5.0])
GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
FAMILIES: dict[str, Json] = {
    "gpt2": dict(model_type="gpt2", n_layer=4, n_embd=32, n_head=4, n_positions=128, vocab_size=350),
    "llama": dict(model_type="llama"),
    "llama 3": dict(model_type="llama", rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "llama, biases": dict(model_type="llama", attention_bias=True, mlp_bias=True, head_dim=16),
    "llama, linear": dict(model_type="llama", rope_scaling=dict(rope_type="linear", factor=3.0)),
    "smollm3": dict(model_type="smollm3"),
    "mistral": dict(model_type="mistral", sliding_window=None, head_dim=16),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "gemma": dict(model_type="gemma", head_dim=16, num_key_value_heads=1),
    "gemma2": dict(model_type="gemma2", **GEMMA),
    "gemma3": dict(model_type="gemma3_text", **GEMMA),
    "gemma3, linear": dict(model_type="gemma3_text", **GEMMA, rope_scaling=dict(rope_type="linear", factor=8.0)),
    "olmo2": dict(model_type="olmo2"),
    "phi3": dict(model_type="phi3", sliding_window=8),
    "phi3, partly": dict(model_type="phi3", partial_rotary_factor=0.75),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": dict(model_type="qwen3_moe", norm_topk_prob=True, **EXPERTS),
}  # fmt: skip
MORE: dict[str, Json] = {  # which GGUF has no settings for
    "mistral, window": dict(model_type="mistral", sliding_window=8),
    "phi3, long": dict(
        model_type="phi3", partial_rotary_factor=0.75, rope_scaling=LONG, original_max_position_embeddings=64
    ),
    "qwen3_moe, plain": dict(model_type="qwen3_moe", norm_topk_prob=False, **EXPERTS),
}
TEXT = "The quick brown fox jumps over the lazy dog 0123456789 again and again, and then it sleeps in the sun. " * 20


def config_of(name: str, **changed: Any) -> ModelConfig:
    hf = (FAMILIES | MORE)[name]
    return read_config((SIZES if hf["model_type"] != "gpt2" else {}) | hf | changed, name)[1]


def tokenizer_of() -> Tokenizer:
    """340 tokens, fewer than the models have, as is usual."""
    return train_tokenizer([TEXT], TokenizerConfig(vocab_size=340))


def random_model(config: ModelConfig) -> Transformer:
    """No bias is 0, no norm is 1, and attention is not all but even. Nothing is compiled for it."""
    abstract = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = parameter_name(path)
        noise = np.random.default_rng(list(name.encode())).standard_normal(leaf.shape).astype(np.float32)
        array = 0.3 * noise if name.endswith(("scale", "bias")) else 0.2 * noise
        if name.endswith("scale") and not config.norm_plus_one:
            array += 1
        if name in ("token_embedding", "unembedding"):
            array[config.vocab_size :] = 0
        return jax.device_put(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, place_shapes(abstract))


def _split(directory: Path, count: int) -> None:
    """Several files and an index in place of one, as large models come."""
    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    places = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, directory / file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()


def write_hf(
    directory: Path, name: str, tokenizer: Tokenizer | None = None, files: int = 1, **changed: Any
) -> Transformer:
    """A directory as its family's owner would give it; the mesh must be set. Returns the model."""
    config = config_of(name, **changed)
    model_type = (FAMILIES | MORE)[name]["model_type"]
    model = random_model(dataclasses.replace(config, dtype="float32"))
    directory.mkdir(parents=True, exist_ok=True)
    family, hf = write_config(config, model_type)
    assert family is family_of(model_type, name)
    (directory / "config.json").write_text(json.dumps(hf))
    write_safetensors(directory, stored_tensors(model, family))
    if files > 1:
        _split(directory, files)
    if tokenizer:
        write_tokenizer(tokenizer, directory)
    return model


@jax.jit
def _logits(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    return model.logits(model(tokens_BT)[0])


def logits_of(model: Transformer, length: int = 40) -> np.ndarray:
    tokens_BT = np.random.default_rng(0).integers(0, 300, (2, length))
    return np.asarray(_logits(model, jnp.asarray(tokens_BT, jnp.int32)))


def load(path: Path, *, for_training: bool = False) -> Transformer:
    """The weights of a foreign model, without its tokenizer."""
    layout, tensors, _ = load_module.open_model(path)  # by its module: a test watches what it opens
    return load_weights(layout, tensors, for_training=for_training)
