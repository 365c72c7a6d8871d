"""config.json and the settings of GGUF: published ones are read right, both spellings alike, the rest is refused."""

import dataclasses
import json
import math
import time
from typing import Any

import jax
import made_gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import ModelConfig
from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.interop.configs import FAMILIES, canonical, read_config, read_gguf_config, write_config
from jaxgpt.interop.load import Layout, check_tensors
from jaxgpt.interop.tensors import StoredTensor
from jaxgpt.model import Transformer, parameter_count

Json = dict[str, Any]

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def sizes(layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocab: int, context: int) -> Json:
    return dict(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=hidden, vocab_size=vocab, max_position_embeddings=context,
    )  # fmt: skip


# What the config.json of published models says, the parameters that they are known to have, and fields of ours.
PUBLISHED: dict[str, tuple[Json, int, Json]] = {
    "GPT-2": (
        dict(
            model_type="gpt2", architectures=["GPT2LMHeadModel"], activation_function="gelu_new", n_ctx=1024,
            n_embd=768, n_head=12, n_layer=12, n_positions=1024, layer_norm_epsilon=1e-5, vocab_size=50257,
        ),
        124_439_808,
        dict(activation="gelu_tanh", d_ff=3072, attention_output_bias=True),
    ),
    "Llama 3.1 8B": (
        sizes(32, 4096, 32, 8, 14336, 128256, 131072)
        | dict(model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=LLAMA3,
               tie_word_embeddings=False, attention_bias=False, pretraining_tp=1, torch_dtype="bfloat16"),
        8_030_261_248,
        dict(rope_scaling="llama3", rope_factor=8.0, rope_original_context=8192, rope_theta=5e5, n_kv_heads=8),
    ),
    "SmolLM2 135M": (
        sizes(30, 576, 9, 3, 1536, 49152, 8192)
        | dict(model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=100000, rope_scaling=None,
               tie_word_embeddings=True),
        134_515_008,
        dict(rope_scaling="none", rope_theta=1e5, tie_embeddings=True),
    ),
    "SmolLM3 3B": (
        sizes(36, 2048, 16, 4, 11008, 128256, 65536)
        | dict(model_type="smollm3", rms_norm_eps=1e-6, rope_theta=5e6, no_rope_layer_interval=4,
               use_sliding_window=False, sliding_window=None, max_window_layers=28),
        3_075_098_624,
        dict(rotary_layers=(True, True, True, False) * 9, windows=(), tie_embeddings=True),
    ),
    "Mistral 7B": (
        sizes(32, 4096, 32, 8, 14336, 32000, 32768)
        | dict(model_type="mistral", rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096),
        7_241_732_096,
        dict(windows=(4096,) * 32, tie_embeddings=False),
    ),
    "Qwen2.5 7B": (
        sizes(28, 3584, 28, 4, 18944, 152064, 131072)
        | dict(model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1e6, sliding_window=131072, use_sliding_window=False,
               max_window_layers=28, tie_word_embeddings=False),
        7_615_616_512,
        dict(windows=(), attention_bias=True, attention_output_bias=False),
    ),
    "Qwen3 0.6B": (
        sizes(28, 1024, 16, 8, 3072, 151936, 40960)
        | dict(model_type="qwen3", head_dim=128, rms_norm_eps=1e-6, rope_theta=1000000, attention_bias=False,
               tie_word_embeddings=True, sliding_window=None, use_sliding_window=False, max_window_layers=28),
        596_049_920,
        dict(qk_norm="head", head_dim=128, attention_bias=False),
    ),
    "Gemma 2B": (
        sizes(18, 2048, 8, 1, 16384, 256000, 8192)
        | dict(model_type="gemma", head_dim=256, hidden_act="gelu", hidden_activation=None, rms_norm_eps=1e-6,
               rope_theta=10000.0, attention_bias=False),
        2_506_172_416,
        dict(activation="gelu_tanh", norm_plus_one=True, scale_embeddings=True, n_kv_heads=1),
    ),
    "Gemma 2 2B": (
        sizes(26, 2304, 8, 4, 9216, 256000, 8192)
        | dict(model_type="gemma2", head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
               rms_norm_eps=1e-6, rope_theta=10000.0, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
               query_pre_attn_scalar=256, sliding_window=4096, cache_implementation="hybrid"),
        2_614_341_888,
        dict(windows=(4096, 0) * 13, attention_softcap=50.0, logit_softcap=30.0, query_scalar=256.0),
    ),
    "Gemma 3 270M": (
        sizes(18, 640, 4, 1, 2048, 262144, 32768)
        | dict(model_type="gemma3_text", head_dim=256, hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
               rope_theta=1000000.0, rope_local_base_freq=10000.0, rope_scaling=None, query_pre_attn_scalar=256,
               attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=512, _sliding_window_pattern=6,
               layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3, use_bidirectional_attention=False),
        268_098_176,
        dict(windows=(512, 512, 512, 512, 512, 0) * 3, rope_theta=1e6, local_rope_theta=1e4, attention_softcap=None),
    ),
    "OLMo 2 7B": (
        sizes(32, 4096, 32, 32, 11008, 100352, 4096)
        | dict(model_type="olmo2", rms_norm_eps=1e-6, rope_theta=500000, tie_word_embeddings=False),
        7_298_617_344,
        dict(norm_position="output", qk_norm="all"),
    ),
    "Phi-3 mini 4k": (
        sizes(32, 3072, 32, 32, 8192, 32064, 4096)
        | dict(model_type="phi3", rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, sliding_window=2047,
               original_max_position_embeddings=4096),
        3_821_079_552,
        dict(windows=(2047,) * 32, rope_scaling="none"),
    ),
    "Phi-4 mini": (
        sizes(32, 3072, 24, 8, 8192, 200064, 131072)
        | dict(model_type="phi3", rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True,
               sliding_window=262144, partial_rotary_factor=0.75, original_max_position_embeddings=4096,
               rope_scaling=dict(type="longrope", long_factor=[2.0] * 48, short_factor=[1.0] * 48)),
        3_836_021_760,
        dict(rope_scaling="longrope", rope_fraction=0.75, rope_attention_factor=math.sqrt(1 + math.log(32, 4096))),
    ),
    "Mixtral 8x7B": (
        sizes(32, 4096, 32, 8, 14336, 32000, 32768)
        | dict(model_type="mixtral", rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2,
               sliding_window=None, tie_word_embeddings=False),
        46_702_792_704,
        dict(n_experts=8, experts_per_token=2, normalize_experts=True),
    ),
    "Qwen3 30B A3B": (
        sizes(48, 2048, 32, 4, 6144, 151936, 40960)
        | dict(model_type="qwen3_moe", head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, num_experts=128,
               num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1,
               mlp_only_layers=[], use_sliding_window=False, sliding_window=None, max_window_layers=48,
               tie_word_embeddings=False),
        30_532_122_624,
        dict(n_experts=128, experts_per_token=8, d_ff=768, normalize_experts=True),
    ),
}  # fmt: skip
assert {hf["model_type"] for hf, _, _ in PUBLISHED.values()} == FAMILIES.keys()
CLASSES = {name: f"{name.title()}ForCausalLM" for name in FAMILIES}
CLASSES |= {"gpt2": "GPT2LMHeadModel", "smollm3": "SmolLM3ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
CLASSES |= {"qwen3_moe": "Qwen3MoeForCausalLM"}  # as transformers calls them


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_as_what_they_are(name: str) -> None:
    hf, parameters, fields = PUBLISHED[name]
    _, config = read_config(hf, name)
    assert {field: getattr(config, field) for field in fields} == fields
    assert parameter_count(jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_is_read_back_equal(name: str) -> None:
    family, config = read_config(PUBLISHED[name][0], name)
    again, hf = write_config(config, family.model_type)
    assert again is family and read_config(json.loads(json.dumps(hf)), name) == (family, config)
    assert hf["architectures"] == [CLASSES[family.model_type]] and hf["model_type"] == family.model_type


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings_mean_the_same(name: str) -> None:
    """The older keys alone, the newer alone, and `torch_dtype` or `dtype` or neither."""
    hf = PUBLISHED[name][0]
    _, config = read_config(hf, name)
    _, written = write_config(config, hf["model_type"])
    older, newer = written, dict(written)
    assert "rope_parameters" not in older
    if config.positions == "rotary":
        rope = {"rope_type": "default"} | (newer.pop("rope_scaling", None) or {})
        rope |= {k: newer.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in newer}
        if "rope_local_base_freq" in newer:
            local = {"rope_type": "default", "rope_theta": newer.pop("rope_local_base_freq")}
            rope = {"full_attention": rope, "sliding_attention": local}
        newer["rope_parameters"] = rope
    for spelling in (newer, older):
        for dtype in ({"torch_dtype": "float16"}, {"dtype": "float16"}, {}):
            assert read_config(spelling | dtype, name)[1] == config
    if config.positions == "rotary":
        changed = json.loads(json.dumps(newer).replace(f'"rope_theta": {config.rope_theta}', '"rope_theta": 77.0'))
        assert read_config(changed, name)[1].rope_theta == 77, "the newer keys are read indeed"
        assert read_config(older | {"rope_theta": 77}, name)[1].rope_theta == 77


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_older_kinds_of_scaling(spelling: str) -> None:
    hf = PUBLISHED["SmolLM2 135M"][0]
    _, config = read_config(hf | {"rope_scaling": {spelling: "linear", "factor": 4}}, "")
    assert (config.rope_scaling, config.rope_factor) == ("linear", 4)
    phi = PUBLISHED["Phi-4 mini"][0]
    scaling = {key: value for key, value in phi["rope_scaling"].items() if key != "type"}
    for kind in ("su", "longrope"):  # as the first versions of Phi-3 had it, and as it is now
        assert read_config(phi | {"rope_scaling": scaling | {spelling: kind}}, "") == read_config(phi, "")
    said = phi | {"rope_scaling": scaling | {spelling: "su", "attention_factor": 1.5, "factor": None}}
    assert read_config(said, "")[1].rope_attention_factor == 1.5


def test_which_layers_have_a_window() -> None:
    def windows(name: str, **changed: Any) -> list[int]:
        hf = {key: value for key, value in (PUBLISHED[name][0] | changed).items() if value != "absent"}
        return list(read_config(hf, name)[1].layer_windows)

    assert windows("Gemma 3 270M", layer_types="absent") == [512, 512, 512, 512, 512, 0] * 3
    assert windows("Gemma 3 270M", layer_types="absent", sliding_window_pattern=3) == [512, 512, 0] * 6
    assert windows("Gemma 2 2B", layer_types=["full_attention"] * 25 + ["sliding_attention"]) == [0] * 25 + [4096]
    qwen = dict(sliding_window=64, use_sliding_window=True)
    assert windows("Qwen2.5 7B", **qwen, max_window_layers=20) == [0] * 20 + [64] * 8
    assert windows("Qwen2.5 7B", **qwen, max_window_layers="absent") == [0] * 28  # transformers' default
    assert windows("Qwen2.5 7B", **qwen | dict(use_sliding_window=False)) == [0] * 28
    assert (
        windows("SmolLM3 3B", sliding_window=8, use_sliding_window=True, layer_types=["sliding_attention"] * 36)
        == [8] * 36
    )
    assert windows("Phi-3 mini 4k", layer_types=["full_attention"] * 32) == [2047] * 32  # which Phi-3 does not have


def test_a_file_may_leave_out_what_its_class_has() -> None:
    """The defaults of transformers' classes, where they are not those of all others."""

    def read(name: str, *absent: str) -> ModelConfig:
        return read_config({key: value for key, value in PUBLISHED[name][0].items() if key not in absent}, name)[1]

    assert read("Gemma 2 2B", "attn_logit_softcapping").attention_softcap == 50
    assert read("Gemma 3 270M", "attn_logit_softcapping").attention_softcap is None
    gemma = read("Gemma 3 270M", "rope_theta", "rope_local_base_freq", "hidden_activation", "tie_word_embeddings")
    assert (gemma.rope_theta, gemma.local_rope_theta, gemma.activation, gemma.tie_embeddings) == (
        1e6,
        1e4,
        "gelu_tanh",
        True,
    )
    assert read("SmolLM3 3B", "rope_theta").rope_theta == 2e6 and read("Mixtral 8x7B", "rope_theta").rope_theta == 1e6
    assert read("Mistral 7B", "rope_theta", "hidden_act").rope_theta == 1e4
    assert read("Qwen3 30B A3B", "norm_topk_prob").normalize_experts is False
    assert read("SmolLM2 135M", "num_key_value_heads").kv_heads == 9
    alike = dict(PUBLISHED["Qwen3 30B A3B"][0], num_local_experts=128)
    del alike["num_experts"]
    assert read_config(alike, "")[1] == read("Qwen3 30B A3B"), "num_local_experts is num_experts"


REFUSED: dict[str, tuple[str, Json, str]] = {
    "an unknown family": ("SmolLM2 135M", dict(model_type="lama"), "model_type 'lama' is not implemented; did you"),
    "no family": ("SmolLM2 135M", dict(model_type=None), "model_type None is not implemented; there are gpt2, llama"),
    "another task": ("SmolLM2 135M", dict(architectures=["LlamaForTokens"]), "architectures is ['LlamaForTokens'], a"),
    "another class": ("SmolLM2 135M", dict(architectures=["MistralForCausalLM"]), "only ['LlamaForCausalLM'] is impl"),
    "quantised": ("SmolLM2 135M", dict(quantization_config={"bits": 4}), "quantization_config is not implemented"),
    "yarn": ("SmolLM2 135M", dict(rope_scaling=dict(type="yarn", factor=2)), "rope_type is 'yarn', which is"),
    "an activation": ("SmolLM2 135M", dict(hidden_act="mish"), "hidden_act is 'mish', which is not implemented"),
    "no vocabulary": ("SmolLM2 135M", dict(vocab_size=...), "there is no vocab_size"),
    "an empty vocabulary": ("SmolLM2 135M", dict(vocab_size=None), "there is no vocab_size"),
    "no layers": ("SmolLM2 135M", dict(num_hidden_layers=...), "there is no num_hidden_layers; restore the file"),
    "no scale": ("Llama 3.1 8B", dict(rope_scaling=dict(rope_type="llama3", factor=8)), "there is no low_freq_factor"),
    "no original": ("Phi-4 mini", dict(original_max_position_embeddings=...), "'original_max_position_embeddings'"),
    "text for a number": ("SmolLM2 135M", dict(hidden_size="576"), "d_model: Input should be a valid integer"),
    "true for a number": ("SmolLM2 135M", dict(hidden_size=True), "d_model: Input should be a valid integer"),
    "a number for true": ("SmolLM2 135M", dict(tie_word_embeddings=1), "tie_embeddings: Input should be a valid bool"),
    "null": ("SmolLM2 135M", dict(rms_norm_eps=None), "there is no rms_norm_eps; restore the file"),
    "a list": ("SmolLM2 135M", dict(rope_scaling=[1]), "a setting is missing or of the wrong kind"),
    "absurd layers": ("SmolLM2 135M", dict(num_hidden_layers=10**9), "model.n_layers is 1000000000: it must be"),
    "absurd width": ("SmolLM2 135M", dict(hidden_size=2**60), "model.d_model is 1152921504606846976"),
    "nothing": ("SmolLM2 135M", dict(hidden_size=0), "model.d_model is 0"),
    "seven heads": ("SmolLM2 135M", dict(num_attention_heads=7), "model.d_model 576 does not divide by model.n_heads"),
    "both directions": ("Gemma 3 270M", dict(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
    "linear attention": ("Gemma 3 270M", dict(layer_types=["linear_attention"] * 18), "'linear_attention'"),
    "too few kinds": ("Gemma 3 270M", dict(layer_types=["full_attention"] * 17), "list index out of range"),
    "no kinds": ("SmolLM3 3B", dict(use_sliding_window=True, sliding_window=9), "there is no layer_types"),
    "local scaling": (
        "Gemma 3 270M",
        dict(rope_parameters=dict(full_attention={}, sliding_attention=dict(rope_type="linear", factor=2.0))),
        "rope_type 'linear' of sliding_attention is not implemented",
    ),
    "dense layers": ("Qwen3 30B A3B", dict(mlp_only_layers=[0]), "mlp_only_layers is [0], and only [] is implemented"),
    "more than there are": ("Mixtral 8x7B", dict(num_experts_per_tok=9), "experts_per_token <= n_experts"),
    "an odd part": ("Phi-4 mini", dict(rope_scaling=None, partial_rotary_factor=0.04), "must be even"),
    "too few factors": (
        "Phi-4 mini",
        dict(rope_scaling=dict(type="longrope", long_factor=[1.0], short_factor=[1.0])),
        "longrope needs 48",
    ),
    "by nothing": (
        "Phi-4 mini",
        dict(original_max_position_embeddings=0, max_position_embeddings=0),
        "a setting is missing or of the wrong kind",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_or_damaged_is_refused_by_name(name: str) -> None:
    model, changed, message = REFUSED[name]
    hf = {key: value for key, value in (PUBLISHED[model][0] | changed).items() if value is not ...}
    began = time.perf_counter()
    with pytest.raises(BadFileError) as error:
        read_config(hf, "model x/config.json")
    assert message in str(error.value) and str(error.value).startswith("model x/config.json: ")
    assert "\n" not in str(error.value) and time.perf_counter() - began < 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=250, deadline=2000)
def test_no_value_anywhere_is_a_traceback(data: st.DataObject) -> None:
    """Some values replaced by others of any kind, at the top or within rotary positions."""
    family, config = read_config(PUBLISHED[data.draw(st.sampled_from(sorted(PUBLISHED)))][0], "")
    _, hf = write_config(config, family.model_type)
    hf = json.loads(json.dumps(hf))
    for _ in range(data.draw(st.integers(1, 3))):
        place = hf
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        place[key] = data.draw(JSON)
    try:
        family, config = read_config(hf, "w")
        check_tensors(Layout(family, config, where="w"), {})
    except BadFileError as error:
        assert str(error).startswith("w: ")


# Writing


def test_a_model_is_written_as_the_first_family_that_can_hold_it() -> None:
    plain = dict(n_layers=2, d_model=32, n_heads=4, vocab_size=50)
    rotary = plain | dict(
        positions="rotary", norm="rmsnorm", activation="silu", gated_mlp=True, attention_bias=False, mlp_bias=False
    )
    written = {
        "gpt2": plain, "llama": rotary, "smollm3": rotary | dict(rotary_layers=(True, False)),
        "qwen2": rotary | dict(attention_bias=True, attention_output_bias=False, windows=(0, 8)),
        "qwen3": rotary | dict(qk_norm="head"), "olmo2": rotary | dict(norm_position="output", qk_norm="all"),
        "mixtral": rotary | dict(n_experts=3),
    }  # fmt: skip
    for name, fields in written.items():
        config = ModelConfig(**fields, dropout=0.1, remat="full")  # type: ignore[arg-type]
        family, hf = write_config(config)
        assert family.model_type == name and read_config(hf, "")[1] == canonical(config)
    for name, (hf, _, _) in PUBLISHED.items():  # and without a preferred family, as a run has it
        config = read_config(hf, name)[1]
        assert read_config(write_config(config)[1], name)[1] == config
    both = rotary | dict(windows=(8, 8))
    assert write_config(ModelConfig(**both), "mistral")[1].keys().isdisjoint({"layer_types", "use_sliding_window"})
    assert write_config(ModelConfig(**rotary | dict(windows=(8, 0))), "phi3")[0].model_type != "phi3"


def test_what_no_family_holds_is_refused_by_its_fields() -> None:
    odd = ModelConfig(n_layers=1, d_model=32, n_heads=4, vocab_size=50, positions="sinusoidal", logit_softcap=3.0)
    with pytest.raises(ConfigError, match="the nearest, gpt2, differs in positions, logit_softcap; only --to jaxgpt"):
        write_config(odd)


# GGUF


def settings_of(config: ModelConfig, name: str) -> tuple[Json, dict[str, StoredTensor]]:
    """The settings and names of tensors of a GGUF file."""
    family, _ = write_config(config, name)
    names = {"token_embd.weight": True, "output.weight": not config.tie_embeddings}
    names |= {"blk.0.attn_q.bias": config.attention_bias, "blk.0.ffn_up.bias": config.mlp_bias}
    array = np.empty((config.vocab_size or 0, 0), np.float32)
    metadata, arrays = made_gguf.settings_of(config, family)
    arrays |= {name: array for name, is_there in names.items() if is_there}
    return metadata, {name: StoredTensor(array.shape, "F32", array.copy) for name, array in arrays.items()}


HELD = ["GPT-2", "Llama 3.1 8B", "SmolLM2 135M", "SmolLM3 3B", "Qwen2.5 7B", "Qwen3 0.6B", "Gemma 2B", "Gemma 2 2B",
        "Gemma 3 270M", "OLMo 2 7B", "Phi-3 mini 4k", "Mixtral 8x7B", "Qwen3 30B A3B"]  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_gguf_holds_the_configuration(name: str) -> None:
    family, config = read_config(PUBLISHED[name][0], name)
    metadata, tensors = settings_of(config, family.model_type)
    again, read = read_gguf_config(metadata, tensors, "x.gguf")
    assert read == config and again.gguf == family.gguf


def test_the_settings_of_llama_cpp_are_read() -> None:
    _, config = read_config(PUBLISHED["Llama 3.1 8B"][0], "")
    own = {
        "block_count": 32, "embedding_length": 4096, "attention.head_count": 32, "attention.head_count_kv": 8,
        "attention.key_length": 128, "attention.value_length": 128, "feed_forward_length": 14336,
        "context_length": 131072, "vocab_size": 128256, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5e5, "rope.dimension_count": 128,
    }  # fmt: skip
    metadata = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in own.items()}
    assert read_gguf_config(metadata, settings_of(config, "llama")[1], "")[1] == config


def test_the_scalar_of_the_two_widest_gemmas_is_known() -> None:
    """GGUF does not hold it: 4608 / 32 and 5376 / 32 instead of the head's width 128."""
    for name, layers, width, scalar in (("Gemma 2 2B", 46, 4608, 144), ("Gemma 3 270M", 62, 5376, 168)):
        hf = PUBLISHED[name][0] | dict(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=32, head_dim=128
        )
        family, config = read_config({**hf, "query_pre_attn_scalar": scalar, "layer_types": None}, name)
        metadata, tensors = settings_of(config, family.model_type)
        assert read_gguf_config(metadata, tensors, "")[1].query_scalar == scalar


@pytest.mark.parametrize("bounds", [dict(factor=32.0), dict(factor=3.0), dict(original_max_position_embeddings=4096)])
def test_gguf_holds_any_scaling_of_llama_3_with_its_usual_bounds(bounds: Json) -> None:
    _, config = read_config(PUBLISHED["Llama 3.1 8B"][0] | {"rope_scaling": LLAMA3 | bounds}, "")
    _, read = read_gguf_config(*settings_of(config, "llama"), "")
    assert read.rope_factor == pytest.approx(config.rope_factor, rel=1e-6)
    assert dataclasses.replace(read, rope_factor=config.rope_factor) == config


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_frequencies_of_other_peoples_files_are_recognised(factor: float) -> None:
    """As tools write them, one at a time in doubles, and without a word about the original context."""
    divisors = []
    for i in range(64):
        wavelength = 2 * math.pi * 5e5 ** (i / 64)
        smooth = min(max((8192 / wavelength - 1) / 3, 0), 1)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    _, config = read_config(PUBLISHED["Llama 3.1 8B"][0] | {"rope_scaling": None}, "")
    metadata, tensors = settings_of(config, "llama")
    tensors["rope_freqs.weight"] = StoredTensor((64,), "F32", lambda: np.array(divisors, np.float32))
    _, read = read_gguf_config(metadata, tensors, "")
    assert (read.rope_scaling, read.rope_factor, read.rope_original_context) == ("llama3", factor, 8192)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture 'mamba' is not implemented; there are gemma, gemma2"),
        ({"general.architecture": 7}, "general.architecture 7 is not implemented"),
        ({"llama.expert_count": 8}, "there is no num_experts_per_tok"),
        ({"llama.block_count": None}, "there is no num_hidden_layers"),
        ({"llama.block_count": 2**40}, "model.n_layers is 1099511627776"),
        ({"llama.attention.head_count": 0}, "model.n_heads is 0"),
        ({"llama.attention.head_count": [9] * 30}, "n_heads: Input should be a valid integer"),
        ({"llama.attention.key_length": "x"}, "a setting is missing or of the wrong kind"),
        ({"llama.rope.dimension_count": 2**40}, "model.rope_fraction is "),
        ({"llama.rope.dimension_count": 7}, "must be even"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "rope_type is 'yarn'"),
        ({"llama.rope.scaling.type": "linear"}, "there is no factor"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "model.norm_epsilon is nan"),
    ],
)
def test_settings_that_are_damaged_or_not_implemented_are_refused(changed: Json, message: str) -> None:
    _, config = read_config(PUBLISHED["SmolLM2 135M"][0], "")
    metadata, tensors = settings_of(config, "llama")
    read_gguf_config(metadata, tensors, "x.gguf")
    with pytest.raises(BadFileError) as error:
        read_gguf_config(metadata | changed, tensors, "x.gguf")
    assert message in str(error.value) and str(error.value).startswith("x.gguf: ")


@pytest.mark.parametrize("factors", [np.ones(7), np.full(32, math.nan), np.linspace(1, 8, 32), np.ones((32, 1))])
def test_frequencies_that_are_no_known_scaling_are_refused(factors: np.ndarray) -> None:
    _, config = read_config(PUBLISHED["SmolLM2 135M"][0], "")
    metadata, tensors = settings_of(config, "llama")
    tensors["rope_freqs.weight"] = StoredTensor(factors.shape, "F32", lambda: factors.astype(np.float32))
    with pytest.raises(BadFileError):
        read_gguf_config(metadata, tensors, "x.gguf")
