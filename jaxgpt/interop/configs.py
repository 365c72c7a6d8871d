"""config.json of Hugging Face and the metadata of GGUF as a ModelConfig, and back.

Both directions follow the declarations in families.py. GGUF metadata is translated to the keys of config.json first,
so that there is one reading of each setting. A configuration is written only as a family that reads it back equal."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.interop.families import FAMILIES, Family, family_of
from jaxgpt.interop.stored import StoredTensor
from jaxgpt.model.rotary import frequencies
from jaxgpt.model_config import ModelConfig

Json = dict[str, Any]

_ACTIVATIONS = {  # the first of a value is the one that is written
    "silu": "silu", "swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu": "gelu", "relu": "relu",
}  # fmt: skip
_MEMORY = ("dropout", "dtype", "scan_layers", "remat", "init")
"""Fields of ModelConfig that say how to train and compute, which no other tool's file holds."""


def canonical(config: ModelConfig) -> ModelConfig:
    """The configuration with every default that depends on another field written out, and one value for one meaning."""
    windows = config.layer_windows if any(config.layer_windows) else ()
    rotates = () if all(config.layers_rotate) else config.layers_rotate
    biased = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
    default = ModelConfig()
    unused = {"none": ["factor", "low_frequency", "high_frequency"], "linear": ["low_frequency", "high_frequency"]}
    fields = [f"rope_{name}" for name in unused.get(config.rope_scaling, [])]
    fields += ["rope_original_context"] if config.rope_scaling in ("none", "linear") else []
    return dataclasses.replace(
        config, n_kv_heads=config.kv_heads, head_dim=config.key_dim, d_ff=config.ff_dim, windows=windows,
        rotary_layers=rotates, attention_output_bias=biased, query_scalar=config.query_scalar or float(config.key_dim),
        local_rope_theta=config.local_rope_theta if windows else None,
        norm_bias=config.norm_bias and config.norm == "layernorm",
        experts_per_token=config.experts_per_token if config.n_experts else default.experts_per_token,
        **{name: getattr(default, name) for name in fields}, **{name: getattr(default, name) for name in _MEMORY},
    )  # fmt: skip


# Reading


def read_config(hf: Json, where: str) -> tuple[Family, ModelConfig]:
    """The family and the configuration of a parsed config.json.

    Raises BadFileError for an unknown family, a missing key, a value of a wrong kind or one that is not implemented."""
    if hf.get("architectures"):
        known = [family.architecture for family in FAMILIES]
        if hf["architectures"] not in [[name] for name in known]:
            raise BadFileError(f"{where}: architectures {hf['architectures']} is not one of {', '.join(known)}")
    if hf.get("quantization_config"):
        raise BadFileError(f"{where}: quantization_config is not implemented; take the unquantised model, or its GGUF")
    family = family_of(hf.get("model_type"), where)
    for key, legal in family.requires.items():
        if hf.get(key) is not None and hf[key] not in legal:
            raise BadFileError(f"{where}: {key} is {hf[key]!r}, and only {legal[0]!r} is implemented for this family")
    hf = {"hidden_act": "silu"} | family.defaults | hf
    try:
        fields = {name: _read_key(hf, name, key, where) for name, key in family.keys.items() if key}
        fields |= family.fixed | _read_rope(hf, where) | _read_windows(hf, family, fields["n_layers"])
        return family, canonical(ModelConfig(**fields))
    except ConfigError as error:
        raise BadFileError(f"{where}: {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError, LookupError) as error:
        raise BadFileError(f"{where}: a setting is of the wrong kind ({error}); restore the file") from None


_KINDS: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "bool": (bool,), "str": (str,)}


def _read_key(hf: Json, name: str, keys: str, where: str) -> Any:
    value = next((hf[key] for key in keys.split("|") if key in hf), ...)
    if name == "rotary_layers":
        interval, layers = hf.get("no_rope_layer_interval") or 4, hf["num_hidden_layers"]
        given = [(i + 1) % interval != 0 for i in range(layers)] if value in (..., None) else value
        return tuple(bool(rotates) for rotates in given[:layers])
    declared = str(next(f.type for f in dataclasses.fields(ModelConfig) if f.name == name))
    if value is ... and "None" in declared:
        return None
    if value is ...:
        raise BadFileError(f"{where}: there is no {keys.split('|')[0]}; restore the file")
    if name == "activation":
        if value not in _ACTIVATIONS:
            raise BadFileError(f"{where}: {keys} {value!r} is not one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]
    kinds = next(kinds for kind, kinds in _KINDS.items() if kind in declared)
    optional = value is None and "None" in declared
    if not optional and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
        raise BadFileError(f"{where}: {keys.split('|')[0]} is {value!r}: it must be of type {declared}")
    if isinstance(value, int) and abs(value) > 2**31:
        raise BadFileError(f"{where}: {keys.split('|')[0]} is {value}: it must be below 2^31")
    return value


def _read_rope(hf: Json, where: str) -> Json:
    """The fields of rotary positions, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    if "n_positions" in hf:
        return {}
    rope: Json = hf.get("rope_parameters") or {}
    local = None
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise BadFileError(f"{where}: rope_parameters of sliding_attention: only rope_type default is implemented")
    elif "rope_local_base_freq" in hf:
        local = {"rope_theta": hf["rope_local_base_freq"]}
    rope = {"rope_theta": hf.get("rope_theta", 10_000.0), **(hf.get("rope_scaling") or {}), **rope}
    fields = {
        "rope_theta": float(rope["rope_theta"]),
        "rope_fraction": rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)),
        "local_rope_theta": None if local is None else float(local["rope_theta"]),
    }
    match rope.get("rope_type", rope.get("type", "default")):
        case "default" | None:
            return fields
        case "linear":
            return fields | {"rope_scaling": "linear", "rope_factor": float(rope["factor"])}
        case "llama3":
            return fields | {
                "rope_scaling": "llama3",
                "rope_factor": float(rope["factor"]),
                "rope_low_frequency": float(rope["low_freq_factor"]),
                "rope_high_frequency": float(rope["high_freq_factor"]),
                "rope_original_context": rope["original_max_position_embeddings"],
            }
        case "longrope" | "su":
            return fields | _read_longrope(rope, hf)
        case other:
            raise BadFileError(f"{where}: rope_type {other!r} is not one of default, linear, llama3, longrope")


def _read_longrope(rope: Json, hf: Json) -> Json:
    original = hf.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]
    factor = rope.get("factor") or hf["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope_scaling": "longrope",
        "rope_factor": float(factor),
        "rope_original_context": original,
        "rope_short_factors": tuple(map(float, rope["short_factor"])),
        "rope_long_factors": tuple(map(float, rope["long_factor"])),
        "rope_attention_factor": float(rope.get("attention_factor") or usual),
    }


def _read_windows(hf: Json, family: Family, layers: int) -> Json:
    window = hf.get("sliding_window")
    if not window or family.window_period == 1 or hf.get("use_sliding_window") is False:
        return {"windows": ()}
    types, period = hf.get("layer_types"), hf.get("sliding_window_pattern") or family.window_period
    if types is None:
        first = hf.get("max_window_layers", 0)
        slides = [i >= first and (period == 0 or (i + 1) % period != 0) for i in range(layers)]
    else:
        slides = [types[i] == "sliding_attention" for i in range(layers)]
    return {"windows": tuple(window if slide else 0 for slide in slides)}


# Writing


def write_config(config: ModelConfig, preferred: str | None = None) -> tuple[Family, Json]:
    """The family `preferred`, or the first that can hold this model, and its config.json.

    Raises ConfigError, naming what differs from the nearest, when there is none."""
    config = canonical(config)
    differs: dict[str, list[str]] = {}
    for family in sorted(FAMILIES, key=lambda family: family.model_type != preferred):
        try:
            hf = _as_family(config, family)
            _, again = read_config(hf, "config.json")
        except (BadFileError, LookupError, TypeError):
            continue
        if again == config:
            return family, hf
        fields = [f.name for f in dataclasses.fields(config)]
        differs[family.model_type] = [name for name in fields if getattr(again, name) != getattr(config, name)]
    nearest_family = min(differs, key=lambda name: len(differs[name]))
    raise ConfigError(
        f"this architecture is none of {', '.join(f.model_type for f in FAMILIES)}: the nearest, {nearest_family}, "
        f"differs in {', '.join(differs[nearest_family])}; only --to jaxgpt can hold it"
    )


def _as_family(config: ModelConfig, family: Family) -> Json:
    spelling = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    values: Json = dataclasses.asdict(config)
    values["activation"] = spelling[config.activation]
    values["rotary_layers"] = [int(rotates) for rotates in config.layers_rotate]
    if "hidden_activation" in family.defaults:  # Gemma's spelling of gelu_new
        values["activation"] = "gelu_pytorch_tanh"
    hf: Json = {"architectures": [family.architecture], "model_type": family.model_type}
    hf |= {key: legal[0] for key, legal in family.requires.items()}
    hf |= {key.split("|")[0]: values[name] for name, key in family.keys.items() if key}
    if config.positions == "rotary":
        hf |= _write_rope(config)
    if family.window_period != 1:
        types = ["sliding_attention" if window else "full_attention" for window in config.layer_windows]
        hf |= {"sliding_window": max(config.layer_windows) or None, "layer_types": types}
        hf |= {"use_sliding_window": any(config.layer_windows), "max_window_layers": 0}
    return hf


def _write_rope(config: ModelConfig) -> Json:
    """Both the newer `rope_parameters` and the older keys, which other tools still read."""
    scaling: Json = {"rope_type": config.rope_scaling if config.rope_scaling != "none" else "default"}
    if config.rope_scaling in ("linear", "llama3", "longrope"):
        scaling["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": config.rope_low_frequency, "high_freq_factor": config.rope_high_frequency}
    if config.rope_scaling == "longrope":
        scaling |= {"short_factor": config.rope_short_factors, "long_factor": config.rope_long_factors}
        scaling["attention_factor"] = config.rope_attention_factor
    old: Json = {"rope_theta": config.rope_theta}
    if config.rope_scaling in ("llama3", "longrope"):
        scaling["original_max_position_embeddings"] = config.rope_original_context
        old["original_max_position_embeddings"] = config.rope_original_context
    rope = scaling | {"rope_theta": config.rope_theta}
    if config.rope_fraction != 1:
        rope["partial_rotary_factor"] = old["partial_rotary_factor"] = config.rope_fraction
    if config.local_rope_theta is not None:
        old["rope_local_base_freq"] = config.local_rope_theta
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        rope = {"full_attention": rope, "sliding_attention": local}
    return old | {"rope_scaling": scaling if config.rope_scaling != "none" else None, "rope_parameters": rope}


# GGUF


def read_gguf_config(metadata: Json, tensors: dict[str, StoredTensor], where: str) -> tuple[Family, ModelConfig]:
    """The family and the configuration of a GGUF file; raises what `read_config` raises."""
    architecture = metadata.get("general.architecture")
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    wanted = {"llama": "mixtral" if own.get("expert_count") else "llama"}.get(str(architecture), architecture)
    families = [family for family in FAMILIES if wanted in (family.gguf, family.model_type)]
    if not families:
        known = ", ".join(sorted({family.gguf for family in FAMILIES}))
        raise BadFileError(f"{where}: general.architecture {architecture!r} is not implemented; there are {known}")
    if "token_embd.weight" not in tensors:
        raise BadFileError(f"{where}: there is no tensor token_embd.weight; restore the file")
    family = families[0] if wanted != "mixtral" else next(f for f in families if f.model_type == "mixtral")
    names = family.keys
    hf: Json = {"model_type": family.model_type, "vocab_size": tensors["token_embd.weight"].shape[0]}
    hf["tie_word_embeddings"] = "output.weight" not in tensors
    if family.model_type == "llama":
        hf |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    for name, keys in family.gguf_keys.items():
        value = next((own[key] for key in keys.split("|") if key in own), None)
        if value is not None and names.get(name):
            hf[names[name].split("|")[0]] = value
    hf |= _read_gguf_rope(own, tensors, hf, where)
    if own.get("attention.sliding_window"):
        hf |= {"sliding_window": own["attention.sliding_window"], "use_sliding_window": True, "max_window_layers": 0}
    if "query_scalar" in names:  # not in the file: the head's width but for the two models of 27 B
        large = hf.get("num_hidden_layers") in (46, 62)
        hf["query_pre_attn_scalar"] = hf["hidden_size"] / hf["num_attention_heads"] if large else hf.get("head_dim")
    if "norm_topk_prob" in names.values():
        hf["norm_topk_prob"] = True  # as every reader of the format assumes
    return read_config(hf, where)


def _read_gguf_rope(own: Json, tensors: dict[str, StoredTensor], hf: Json, where: str) -> Json:
    """The keys of config.json that say how positions are rotated."""
    rope: Json = {"rope_theta": own.get("rope.freq_base", 10_000.0)}
    if "rope.freq_base_swa" in own:
        rope["rope_local_base_freq"] = own["rope.freq_base_swa"]
    head_dim = hf.get("head_dim") or hf.get("hidden_size", 0) // max(hf.get("num_attention_heads", 1), 1)
    rope["partial_rotary_factor"] = own.get("rope.dimension_count", head_dim) / max(head_dim, 1)
    if "rope_freqs.weight" in tensors:
        original = own.get("rope.scaling.original_context_length", 8192)
        return rope | {"rope_scaling": _llama3_scaling(tensors["rope_freqs.weight"].read(), rope, original, where)}
    if (kind := own.get("rope.scaling.type", "none")) != "none":
        rope["rope_scaling"] = {"rope_type": kind, "factor": own.get("rope.scaling.factor", 1.0)}
    return rope


def _llama3_scaling(factors: np.ndarray, rope: Json, original: int, where: str) -> Json:
    """The parameters whose frequencies a file's `rope_freqs` divides by: Llama 3.1 has a factor of 8, 3.2 of 32."""
    for factor in (8.0, 32.0, 16.0, 4.0, 2.0):
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = original
        if np.allclose(llama3_factors(2 * factors.size, rope["rope_theta"], scaling), factors, rtol=1e-5):
            return scaling
    raise BadFileError(f"{where}: rope_freqs.weight is no scaling of Llama 3 that is known; take the safetensors")


def llama3_factors(width: int, theta: float, scaling: Json) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by: `rope_freqs` of GGUF, float32 [width / 2]."""
    config = ModelConfig(
        d_model=width, n_heads=1, positions="rotary", rope_factor=scaling["factor"],
        rope_low_frequency=scaling["low_freq_factor"], rope_high_frequency=scaling["high_freq_factor"],
        rope_original_context=scaling["original_max_position_embeddings"],
    )  # fmt: skip
    return frequencies(config, theta, "none", 0) / frequencies(config, theta, "llama3", 0)


def write_gguf_config(config: ModelConfig, preferred: str | None = None) -> tuple[Family, Json, dict[str, np.ndarray]]:
    """Family, metadata, and the tensors that only describe positions. Raises ConfigError when GGUF cannot hold it."""
    config = canonical(config)
    family, hf = write_config(config, preferred)
    values = dataclasses.asdict(config)
    own: Json = {}
    for name, keys in family.gguf_keys.items():
        if values[name] and (config.n_experts or "expert" not in name):
            own[keys.split("|")[0]] = values[name]
    own |= {"attention.value_length": config.key_dim, "vocab_size": config.vocab_size}
    extra: dict[str, np.ndarray] = {}
    if config.positions == "rotary":
        own |= {"rope.freq_base": config.rope_theta, "rope.dimension_count": config.rotary_dim}
    if any(config.layer_windows):
        own["attention.sliding_window"] = max(config.layer_windows)
    if config.rope_scaling == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        own["rope.scaling.original_context_length"] = config.rope_original_context
        extra["rope_freqs.weight"] = llama3_factors(config.rotary_dim, config.rope_theta, hf["rope_scaling"])
    metadata = {"general.architecture": family.gguf} | {f"{family.gguf}.{key}": value for key, value in own.items()}
    _refuse_what_gguf_changes(config, family, metadata, extra)
    return family, metadata, extra


def _refuse_what_gguf_changes(config: ModelConfig, family: Family, metadata: Json, extra: dict) -> None:
    there = {"token_embd": True, "output": not config.tie_embeddings}
    names = [f"{name}.weight" for name in there if there[name]]
    names += ["blk.0.attn_q.bias"] * config.attention_bias + ["blk.0.ffn_up.bias"] * config.mlp_bias
    arrays = extra | dict.fromkeys(names, np.empty((config.vocab_size or 0, 0)))
    tensors = {name: StoredTensor(array.shape, "F32", array.copy) for name, array in arrays.items()}
    _, again = read_gguf_config(metadata, tensors, "GGUF")
    names = [f.name for f in dataclasses.fields(config)]
    lost = [name for name in names if not _close(getattr(again, name), getattr(config, name))]
    if lost:
        raise ConfigError(f"GGUF cannot hold {', '.join(lost)} of this {family.model_type} model; use --to hf")


def _close(a: Any, b: Any) -> bool:
    """Equal, or as near as the float32 of GGUF."""
    return a == b or (isinstance(a, float | tuple) and bool(a) and bool(np.allclose(a, b, rtol=1e-6, atol=0)))
