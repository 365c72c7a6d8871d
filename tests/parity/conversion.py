"""Parameters of transformers' GPT-2 and Llama as jaxgpt's, and jaxgpt's gradients under transformers' names.

Numpy only. A row of the tables reads: a tensor of transformers; its axes, those that it merges written together; the
axes of jaxgpt's parameter; and the parameters that the tensor joins along its last axis. `{}` is the layer's number.
The letters are those of `jaxgpt/sharding.py`.
"""

from collections.abc import Mapping

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.model_config import VOCAB_MULTIPLE

Arrays = dict[str, np.ndarray]
Table = dict[str, tuple[str, str, tuple[str, ...]]]

_QKV = ("layers.attention.query", "layers.attention.key", "layers.attention.value")

GPT2: Table = {
    "transformer.wte.weight": ("V D", "VD", ("token_embedding",)),
    "transformer.wpe.weight": ("S D", "SD", ("position_embedding",)),
    "transformer.h.{}.ln_1.weight": ("D", "D", ("layers.attention_norm.scale",)),
    "transformer.h.{}.ln_1.bias": ("D", "D", ("layers.attention_norm.bias",)),
    "transformer.h.{}.attn.c_attn.weight": ("D HK", "DHK", tuple(f"{name}.kernel" for name in _QKV)),
    "transformer.h.{}.attn.c_attn.bias": ("HK", "HK", tuple(f"{name}.bias" for name in _QKV)),
    "transformer.h.{}.attn.c_proj.weight": ("HK D", "HKD", ("layers.attention.output.kernel",)),
    "transformer.h.{}.attn.c_proj.bias": ("D", "D", ("layers.attention.output.bias",)),
    "transformer.h.{}.ln_2.weight": ("D", "D", ("layers.mlp_norm.scale",)),
    "transformer.h.{}.ln_2.bias": ("D", "D", ("layers.mlp_norm.bias",)),
    "transformer.h.{}.mlp.c_fc.weight": ("D F", "DF", ("layers.mlp.up.kernel",)),
    "transformer.h.{}.mlp.c_fc.bias": ("F", "F", ("layers.mlp.up.bias",)),
    "transformer.h.{}.mlp.c_proj.weight": ("F D", "FD", ("layers.mlp.down.kernel",)),
    "transformer.h.{}.mlp.c_proj.bias": ("D", "D", ("layers.mlp.down.bias",)),
    "transformer.ln_f.weight": ("D", "D", ("final_norm.scale",)),
    "transformer.ln_f.bias": ("D", "D", ("final_norm.bias",)),
    "lm_head.weight": ("V D", "VD", ("unembedding",)),
}

LLAMA: Table = {
    "model.embed_tokens.weight": ("V D", "VD", ("token_embedding",)),
    "model.layers.{}.input_layernorm.weight": ("D", "D", ("layers.attention_norm.scale",)),
    "model.layers.{}.self_attn.q_proj.weight": ("HK D", "DHK", ("layers.attention.query.kernel",)),
    "model.layers.{}.self_attn.q_proj.bias": ("HK", "HK", ("layers.attention.query.bias",)),
    "model.layers.{}.self_attn.k_proj.weight": ("GK D", "DGK", ("layers.attention.key.kernel",)),
    "model.layers.{}.self_attn.k_proj.bias": ("GK", "GK", ("layers.attention.key.bias",)),
    "model.layers.{}.self_attn.v_proj.weight": ("GK D", "DGK", ("layers.attention.value.kernel",)),
    "model.layers.{}.self_attn.v_proj.bias": ("GK", "GK", ("layers.attention.value.bias",)),
    "model.layers.{}.self_attn.o_proj.weight": ("D HK", "HKD", ("layers.attention.output.kernel",)),
    "model.layers.{}.self_attn.o_proj.bias": ("D", "D", ("layers.attention.output.bias",)),
    "model.layers.{}.post_attention_layernorm.weight": ("D", "D", ("layers.mlp_norm.scale",)),
    "model.layers.{}.mlp.gate_proj.weight": ("F D", "DF", ("layers.mlp.gate.kernel",)),
    "model.layers.{}.mlp.gate_proj.bias": ("F", "F", ("layers.mlp.gate.bias",)),
    "model.layers.{}.mlp.up_proj.weight": ("F D", "DF", ("layers.mlp.up.kernel",)),
    "model.layers.{}.mlp.up_proj.bias": ("F", "F", ("layers.mlp.up.bias",)),
    "model.layers.{}.mlp.down_proj.weight": ("D F", "FD", ("layers.mlp.down.kernel",)),
    "model.layers.{}.mlp.down_proj.bias": ("D", "D", ("layers.mlp.down.bias",)),
    "model.norm.weight": ("D", "D", ("final_norm.scale",)),
    "lm_head.weight": ("V D", "VD", ("unembedding",)),
}


def table_of(config: ModelConfig) -> Table:
    return GPT2 if config.positions == "learned" else LLAMA


def _sizes(config: ModelConfig) -> dict[str, int]:
    assert config.vocab_size is not None
    return dict(
        L=config.n_layers, V=config.vocab_size, S=config.context_length, D=config.d_model,
        H=config.n_heads, G=config.kv_heads, K=config.key_dim, F=config.ff_dim,
    )  # fmt: skip


def to_jaxgpt(weights: Mapping[str, np.ndarray], config: ModelConfig) -> Arrays:
    """jaxgpt's parameters by name: layers stacked, embeddings with rows of zeros up to a multiple of 128."""
    size, parameters, used = _sizes(config), {}, set()
    for name, (theirs, ours, targets) in table_of(config).items():
        layers = "L" if "{}" in name else ""
        names = [name.format(i) for i in range(config.n_layers)] if layers else [name]
        if names[0] not in weights:  # an absent bias, a tied output projection
            continue
        used |= set(names)
        tensor = np.concatenate([weights[n][None] for n in names]) if layers else weights[name]
        axes = layers + theirs.replace(" ", "")
        for target, part in zip(targets, np.split(tensor, len(targets), axis=-1), strict=True):
            part = np.einsum(f"{axes}->{layers}{ours}", part.reshape([size[axis] for axis in axes]))
            if ours.startswith("V"):
                part = np.pad(part, ((0, -len(part) % VOCAB_MULTIPLE), (0, 0)))
            parameters[target] = part
    assert used == set(weights), f"not converted: {set(weights) - used}"
    return parameters


def to_transformers(parameters: Mapping[str, np.ndarray], config: ModelConfig) -> Arrays:
    """The way back, for gradients too; the embeddings' padding rows are dropped."""
    size, tensors, used = _sizes(config), {}, set()
    for name, (theirs, ours, sources) in table_of(config).items():
        if sources[0] not in parameters:
            continue
        used |= set(sources)
        layers = "L" if "{}" in name else ""
        shape = [np.prod([size[axis] for axis in merged], dtype=int) for merged in [*layers, *theirs.split()]]
        axes = f"{layers}{ours}->{layers}{theirs.replace(' ', '')}"
        parts = [parameters[source] for source in sources]
        parts = [part[: size["V"]] if ours.startswith("V") else part for part in parts]
        tensor = np.concatenate([np.einsum(axes, part).reshape(shape) for part in parts], axis=-1)
        tensors |= {name.format(i): tensor[i] for i in range(config.n_layers)} if layers else {name: tensor}
    assert used == set(parameters), f"not converted: {set(parameters) - used}"
    return tensors
