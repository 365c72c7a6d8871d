"""The families of models that are read and written: one declaration each, used in both directions.

A family says which fields of ModelConfig are fixed, which key of config.json each of the others has, and where each
parameter lies. In GGUF the settings have the names of `GGUF_KEYS`, and gpt2 stores its matrices as the others do,
[out, in], where its safetensors hold [in, out]. Letters of axes are those of `jaxgpt/sharding.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One parameter and where it is stored. `{}` is the number of the layer, `{e}` that of an expert.

    Rows with the same stored name share that tensor, one behind the other along the axis that is not D.
    """

    name: str
    """The parameter, as `parameter_name` gives it, without `layers.`."""
    axes: str
    """The letters of our axes."""
    stored: str
    """Those of the stored tensor; letters without a space between them are merged into one axis."""
    hf: str
    gguf: str


@dataclass(frozen=True)
class Family:
    """One entry of the table."""

    model_type: str
    architecture: str
    gguf: str
    """`general.architecture` of its GGUF files."""
    rows: tuple[Row, ...]
    fixed: dict[str, Any]
    """Fields of ModelConfig that are the same in all models of the family."""
    keys: dict[str, str] = field(default_factory=dict)
    """Field of ModelConfig -> key of config.json, beside or instead of `KEYS`; A|B reads either, writes A."""
    gguf_keys: dict[str, str] = field(default_factory=dict)
    """Instead of `GGUF_KEYS`."""
    requires: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json that must have this value where they appear: nothing else is implemented."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Values of keys that an older config.json leaves out."""
    slides: Callable[[int, dict[str, Any]], bool] | None = None
    """Whether a layer has the window where there is no `layer_types`: (layer, config.json). None: no layer has one."""
    prefix: str = ""
    """Tensors may be stored without this prefix."""
    buffers: str = r".*\.rotary_emb\.inv_freq"
    """A pattern of tensors that older files hold although they are computed; they are counted and left out."""
    transposed: bool = False
    """Safetensors hold matrices [in, out]."""
    interleaved: bool = False
    """In GGUF, the rows of each head of q and k are in the order of pairs (0, K/2, 1, K/2 + 1 ...)."""


KEYS = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
}

GGUF_KEYS = {  # field of ModelConfig -> key after the architecture's name; A|B reads either and writes the first
    "n_layers": "block_count",
    "d_model": "embedding_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "d_ff": "feed_forward_length",
    "context_length": "context_length",
    "norm_epsilon": "attention.layer_norm_rms_epsilon|attention.layer_norm_epsilon",
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
    "n_experts": "expert_count",
    "experts_per_token": "expert_used_count",
}


def _norms(*places: tuple[str, str, str], bias: bool = False) -> tuple[Row, ...]:
    """Scales (and biases) of norms over D: (ours, safetensors, GGUF)."""
    rows = [Row(f"{ours}.scale", "D", "D", f"{hf}.weight", f"{gguf}.weight") for ours, hf, gguf in places]
    if bias:
        rows += [Row(f"{ours}.bias", "D", "D", f"{hf}.bias", f"{gguf}.bias") for ours, hf, gguf in places]
    return tuple(rows)


def _matrix(name: str, axes: str, stored: str, hf: str, gguf: str) -> tuple[Row, Row]:
    """A projection's kernel, and its bias, which is absent where the configuration has none."""
    out = stored.split()[0]
    return (
        Row(f"{name}.kernel", axes, stored, f"{hf}.weight", f"{gguf}.weight"),
        Row(f"{name}.bias", out, out, f"{hf}.bias", f"{gguf}.bias"),
    )


_L, _B = "model.layers.{}.", "blk.{}."
_EMBEDDINGS = (
    Row("token_embedding", "VD", "V D", "model.embed_tokens.weight", "token_embd.weight"),
    Row("unembedding", "VD", "V D", "lm_head.weight", "output.weight"),
    *_norms(("final_norm", "model.norm", "output_norm")),
)
_OUTPUT = _matrix("attention.output", "HKD", "D HK", _L + "self_attn.o_proj", _B + "attn_output")
_ATTENTION = (
    *_matrix("attention.query", "DHK", "HK D", _L + "self_attn.q_proj", _B + "attn_q"),
    *_matrix("attention.key", "DGK", "GK D", _L + "self_attn.k_proj", _B + "attn_k"),
    *_matrix("attention.value", "DGK", "GK D", _L + "self_attn.v_proj", _B + "attn_v"),
    *_OUTPUT,
)
_QK_NORM = (
    Row("attention.query_norm.scale", "K", "K", _L + "self_attn.q_norm.weight", _B + "attn_q_norm.weight"),
    Row("attention.key_norm.scale", "K", "K", _L + "self_attn.k_norm.weight", _B + "attn_k_norm.weight"),
)
_QK_NORM_ALL = (
    _QK_NORM[0]._replace(axes="HK", stored="HK"),
    _QK_NORM[1]._replace(axes="GK", stored="GK"),
)
_DOWN = _matrix("mlp.down", "FD", "D F", _L + "mlp.down_proj", _B + "ffn_down")
_MLP = (
    *_matrix("mlp.gate", "DF", "F D", _L + "mlp.gate_proj", _B + "ffn_gate"),
    *_matrix("mlp.up", "DF", "F D", _L + "mlp.up_proj", _B + "ffn_up"),
    *_DOWN,
)
_PRE_NORMS = _norms(
    ("attention_norm", _L + "input_layernorm", _B + "attn_norm"),
    ("mlp_norm", _L + "post_attention_layernorm", _B + "ffn_norm"),
)
_SANDWICH_NORMS = _norms(
    ("attention_norm", _L + "input_layernorm", _B + "attn_norm"),
    ("attention_output_norm", _L + "post_attention_layernorm", _B + "post_attention_norm"),
    ("mlp_norm", _L + "pre_feedforward_layernorm", _B + "ffn_norm"),
    ("mlp_output_norm", _L + "post_feedforward_layernorm", _B + "post_ffw_norm"),
)
_OUTPUT_NORMS = _norms(
    ("attention_norm", _L + "post_attention_layernorm", _B + "post_attention_norm"),
    ("mlp_norm", _L + "post_feedforward_layernorm", _B + "post_ffw_norm"),
)


def _experts(moe: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    one = f"{_L}{moe}.experts.{{e}}."
    return (
        Row("mlp.router.kernel", "DE", "E D", f"{_L}{moe}.gate.weight", _B + "ffn_gate_inp.weight"),
        Row("mlp.gate.kernel", "EDF", "E F D", f"{one}{gate}.weight", _B + "ffn_gate_exps.weight"),
        Row("mlp.up.kernel", "EDF", "E F D", f"{one}{up}.weight", _B + "ffn_up_exps.weight"),
        Row("mlp.down.kernel", "EFD", "E D F", f"{one}{down}.weight", _B + "ffn_down_exps.weight"),
    )


_H = "transformer.h.{}."
_GPT2_ROWS = (
    Row("token_embedding", "VD", "V D", "transformer.wte.weight", "token_embd.weight"),
    Row("position_embedding", "SD", "S D", "transformer.wpe.weight", "position_embd.weight"),
    Row("unembedding", "VD", "V D", "lm_head.weight", "output.weight"),
    *_norms(("final_norm", "transformer.ln_f", "output_norm"), bias=True),
    *_norms(("attention_norm", _H + "ln_1", _B + "attn_norm"), ("mlp_norm", _H + "ln_2", _B + "ffn_norm"), bias=True),
    *_matrix("attention.query", "DHK", "HK D", _H + "attn.c_attn", _B + "attn_qkv"),
    *_matrix("attention.key", "DGK", "GK D", _H + "attn.c_attn", _B + "attn_qkv"),
    *_matrix("attention.value", "DGK", "GK D", _H + "attn.c_attn", _B + "attn_qkv"),
    *_matrix("attention.output", "HKD", "D HK", _H + "attn.c_proj", _B + "attn_output"),
    *_matrix("mlp.up", "DF", "F D", _H + "mlp.c_fc", _B + "ffn_up"),
    *_matrix("mlp.down", "FD", "D F", _H + "mlp.c_proj", _B + "ffn_down"),
)
_PHI3_ROWS = (
    *_EMBEDDINGS, *_PRE_NORMS, *_OUTPUT, *_DOWN,
    *_matrix("attention.query", "DHK", "HK D", _L + "self_attn.qkv_proj", _B + "attn_qkv"),
    *_matrix("attention.key", "DGK", "GK D", _L + "self_attn.qkv_proj", _B + "attn_qkv"),
    *_matrix("attention.value", "DGK", "GK D", _L + "self_attn.qkv_proj", _B + "attn_qkv"),
    *_matrix("mlp.gate", "DF", "F D", _L + "mlp.gate_up_proj", _B + "ffn_up"),
    *_matrix("mlp.up", "DF", "F D", _L + "mlp.gate_up_proj", _B + "ffn_up"),
)  # fmt: skip

_LLAMA_ROWS = (*_EMBEDDINGS, *_ATTENTION, *_MLP, *_PRE_NORMS)
_QWEN3_MOE_ROWS = (*_EMBEDDINGS, *_ATTENTION, *_QK_NORM, *_PRE_NORMS)
_LLAMA = dict(
    positions="rotary", norm="rmsnorm", gated_mlp=True, attention_bias=False, attention_output_bias=False,
    mlp_bias=False, norm_bias=False,
)  # fmt: skip
_GEMMA = _LLAMA | dict(norm_plus_one=True, scale_embeddings=True)
_GEMMA_2 = _GEMMA | dict(norm_position="both")
_GEMMA_2_KEYS = {
    "activation": "hidden_activation",
    "query_scalar": "query_pre_attn_scalar",
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}
_GEMMA_REQUIRES = {"use_bidirectional_attention": (None, False), "attention_bias": (False,)}
_TIED = {"tie_word_embeddings": True}
_GEMMA_2_DEFAULTS = _TIED | {"hidden_activation": "gelu_pytorch_tanh"}
_GEMMA_3_DEFAULTS = _GEMMA_2_DEFAULTS | {
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_local_base_freq": 10_000.0,
}  # fmt: skip
_UNTIED = {"tie_word_embeddings": False}


def _after_max_window_layers(layer: int, hf: dict[str, Any]) -> bool:
    return bool(hf.get("use_sliding_window")) and layer >= hf.get("max_window_layers", 28)


FAMILIES = (
    Family(
        "gpt2", "GPT2LMHeadModel", "gpt2", _GPT2_ROWS,
        fixed=dict(
            positions="learned", norm="layernorm", attention_bias=True, attention_output_bias=True, mlp_bias=True,
            norm_bias=True,
        ),
        keys={
            "n_layers": "n_layer", "d_model": "n_embd", "n_heads": "n_head", "n_kv_heads": "", "head_dim": "",
            "d_ff": "n_inner", "context_length": "n_positions", "norm_epsilon": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        gguf_keys={"norm_epsilon": "attention.layer_norm_epsilon"},
        requires={
            "scale_attn_by_inverse_layer_idx": (False,), "scale_attn_weights": (True,), "add_cross_attention": (False,),
        },
        defaults=_TIED | {"n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
        prefix="transformer.", buffers=r".*\.attn\.(masked_)?bias", transposed=True,
    ),
    Family(
        "llama", "LlamaForCausalLM", "llama", _LLAMA_ROWS,
        fixed={k: v for k, v in _LLAMA.items() if k not in ("attention_bias", "attention_output_bias", "mlp_bias")},
        keys={"attention_bias": "attention_bias", "attention_output_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        requires={"pretraining_tp": (1,)},
        defaults=_UNTIED | {"attention_bias": False, "mlp_bias": False},
        interleaved=True,
    ),
    Family(
        "smollm3", "SmolLM3ForCausalLM", "smollm3", _LLAMA_ROWS, _LLAMA,
        keys={"rotary_layers": "no_rope_layers"},
        requires={"attention_bias": (False,), "mlp_bias": (False,)},
        defaults=_TIED, slides=lambda layer, hf: bool(hf.get("use_sliding_window")), interleaved=True,
    ),
    Family(
        "mistral", "MistralForCausalLM", "llama", _LLAMA_ROWS, _LLAMA,
        defaults=_UNTIED, slides=lambda layer, hf: True, interleaved=True,
    ),
    Family(
        "qwen2", "Qwen2ForCausalLM", "qwen2", _LLAMA_ROWS, _LLAMA | dict(attention_bias=True),
        defaults=_UNTIED, slides=_after_max_window_layers,
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM", "qwen3", (*_LLAMA_ROWS, *_QK_NORM), _LLAMA | dict(qk_norm="head"),
        requires={"attention_bias": (False,)}, defaults=_UNTIED, slides=_after_max_window_layers,
    ),
    Family(
        "gemma", "GemmaForCausalLM", "gemma", _LLAMA_ROWS, _GEMMA | dict(activation="gelu_tanh"),
        keys={"activation": ""}, requires=_GEMMA_REQUIRES | {"hidden_act": ("gelu", "gelu_pytorch_tanh")},
        defaults=_TIED,
    ),
    Family(
        "gemma2", "Gemma2ForCausalLM", "gemma2", (*_EMBEDDINGS, *_ATTENTION, *_MLP, *_SANDWICH_NORMS), _GEMMA_2,
        keys=_GEMMA_2_KEYS, requires=_GEMMA_REQUIRES, defaults=_GEMMA_2_DEFAULTS,
        slides=lambda layer, hf: layer % 2 == 0,
    ),
    Family(
        "gemma3_text", "Gemma3ForCausalLM", "gemma3",
        (*_EMBEDDINGS, *_ATTENTION, *_MLP, *_SANDWICH_NORMS, *_QK_NORM), _GEMMA_2 | dict(qk_norm="head"),
        keys=_GEMMA_2_KEYS, requires=_GEMMA_REQUIRES, defaults=_GEMMA_3_DEFAULTS,
        slides=lambda layer, hf: (layer + 1) % (hf.get("sliding_window_pattern") or 6) != 0,
    ),
    Family(
        "olmo2", "Olmo2ForCausalLM", "olmo2", (*_EMBEDDINGS, *_ATTENTION, *_MLP, *_OUTPUT_NORMS, *_QK_NORM_ALL),
        _LLAMA | dict(norm_position="output", qk_norm="all"),
        requires={"attention_bias": (False,)}, defaults=_UNTIED,
    ),
    Family(
        "phi3", "Phi3ForCausalLM", "phi3", _PHI3_ROWS, _LLAMA,
        keys={"head_dim": ""}, defaults=_UNTIED, slides=lambda layer, hf: True,
    ),
    Family(
        "mixtral", "MixtralForCausalLM", "llama",
        (*_EMBEDDINGS, *_ATTENTION, *_PRE_NORMS, *_experts("block_sparse_moe", "w1", "w3", "w2")), _LLAMA,
        keys={"n_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
        defaults=_UNTIED, slides=lambda layer, hf: True, interleaved=True,
    ),
    Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe",
        (*_QWEN3_MOE_ROWS, *_experts("mlp", "gate_proj", "up_proj", "down_proj")), _LLAMA | dict(qk_norm="head"),
        keys={
            "n_experts": "num_experts|num_local_experts", "experts_per_token": "num_experts_per_tok",
            "d_ff": "moe_intermediate_size", "normalize_experts": "norm_topk_prob",
        },
        gguf_keys={"d_ff": "expert_feed_forward_length"},
        requires={"attention_bias": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
        defaults=_UNTIED | {"norm_topk_prob": False}, slides=_after_max_window_layers,
    ),
)  # fmt: skip
