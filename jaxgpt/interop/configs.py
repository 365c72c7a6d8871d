"""config.json of Hugging Face as a ModelConfig, and back; the metadata of GGUF as a ModelConfig.

All follow the declarations in families.toml. GGUF metadata is translated to the keys of config.json first, so that
there is one reading of each setting. A configuration is written only as a family that reads it back equal."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import ModelConfig, differences, validated
from jaxgpt.errors import BadFileError, ConfigError, nearest
from jaxgpt.files import reading
from jaxgpt.interop.tensors import StoredTensor
from jaxgpt.model.rotary import frequencies


class Row(NamedTuple):
    """One parameter and where it is stored. `{}` is the number of the layer, `{e}` that of an expert."""

    name: str  # the parameter, as `parameter_name` gives it, without `layers.`
    axes: str  # the letters of our axes
    stored: str  # those of the stored tensor; letters without a space between them are merged into one axis
    hf: str
    gguf: str

    @property
    def bias(self) -> "Row":
        """The row of the bias that may stand beside this kernel or scale."""
        out = self.stored.split()[0]
        names = (name.removesuffix("weight") + "bias" for name in (self.hf, self.gguf))
        return Row(f"{self.name.rpartition('.')[0]}.bias", out, out, *names)


@dataclass(frozen=True)
class Family:
    """One entry of the table, where the keys without a word here are explained."""

    model_type: str
    gguf: str  # `general.architecture` of its GGUF files
    rows: tuple[Row, ...]
    fixed: dict[str, Any]  # fields of ModelConfig that are the same in all models of the family
    keys: dict[str, str]  # field of ModelConfig -> key of config.json
    gguf_keys: dict[str, str]  # field of ModelConfig -> key of GGUF, after the architecture
    requires: dict[str, list]  # the only values of keys of config.json that are implemented; the first is written
    defaults: dict[str, Any]  # values of keys that a config.json leaves out
    window_period: int = 0
    prefix: str = ""  # tensors may be stored without this prefix
    buffers: str = r".*\.rotary_emb\.inv_freq"
    transposed: bool = False  # safetensors hold matrices [in, out]
    interleaved: bool = False  # in GGUF, the rows of each head of q and k are in the order 0, K/2, 1, K/2 + 1 ...
    gguf_tensors: dict[str, str] = field(default_factory=dict)
    gguf_assumes: dict[str, Any] = field(default_factory=dict)
    gguf_wide_scalar: tuple[int, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)  # other names of keys of config.json, which are only read


def _families(table: dict[str, Any]) -> dict[str, Family]:
    groups, found = {name: [Row(*row) for row in rows] for name, rows in table["rows"].items()}, dict[str, Family]()
    for name, entry in table["family"].items():
        if like := entry.pop("like", None):
            base: dict[str, Any] = table["family"][like]
            entry = base | entry | {key: base[key] | entry.get(key, {}) for key in base if isinstance(base[key], dict)}
        table["family"][name] = dict(entry)
        rows = [row for group in entry.pop("rows") for row in groups[group]]
        rows += [row.bias for row in rows if row.name.endswith(("kernel", "scale"))]
        shared = {key: table[key] | entry.pop(key, {}) for key in ("keys", "gguf_keys", "defaults")}
        requires = {"architectures": [[entry.pop("architecture")]]} | entry.pop("requires", {})
        found[name] = Family(name, rows=tuple(rows), requires=requires, **shared, **entry)
    return found


_TABLE = tomllib.loads(Path(__file__).with_name("families.toml").read_text("utf-8"))
FAMILIES = _families(_TABLE)
WORDS: dict[str, dict[str, str]] = _TABLE["words"]
SCALING: dict[str, list[str]] = _TABLE["scaling"]  # kind -> the fields of ModelConfig that it uses
_SCALED = {name for names in SCALING.values() for name in names}
_MEMORY = ("dropout", "dtype", "scan_layers", "kernels", "remat", "init")  # in no other tool's file
Json = dict[str, Any]


def family_of(model_type: Any, where: str) -> Family:
    """The family of a `model_type`. Raises BadFileError, naming it and the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        what = f"model_type {model_type!r} is not implemented{nearest(str(model_type), FAMILIES)}"
        raise BadFileError(f"{where}: {what}; there are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _unused(config: ModelConfig) -> set[str]:
    """The fields of rotary positions and experts that mean nothing in this model."""
    used = {"rope_theta", "rope_fraction", "rope_scaling", *SCALING[config.rope_scaling]}
    used = used if config.positions == "rotary" else set()
    experts = set() if config.n_experts else {"experts_per_token", "normalize_experts"}
    return experts | {f.name for f in dataclasses.fields(config) if f.name.startswith("rope_")} - used


def canonical(config: ModelConfig) -> ModelConfig:
    """The configuration with every default that depends on another field written out, and one value for one meaning."""
    windows = config.layer_windows if any(config.layer_windows) else ()
    biased = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
    return dataclasses.replace(
        config, n_kv_heads=config.kv_heads, head_dim=config.key_dim, d_ff=config.ff_dim, windows=windows,
        rotary_layers=() if all(config.layers_rotate) else config.layers_rotate, attention_output_bias=biased,
        query_scalar=config.query_scalar or float(config.key_dim),
        local_rope_theta=config.local_rope_theta if windows else None,
        norm_bias=config.norm_bias and config.norm == "layernorm",
        **{name: getattr(ModelConfig, name) for name in (*_unused(config), *_MEMORY)},
    )  # fmt: skip


def read_config(hf: Json, where: str) -> tuple[Family, ModelConfig]:
    """The family and the configuration of a parsed config.json. Raises BadFileError for an unknown family, a missing
    key, a value of a wrong kind or one that is not implemented."""
    if hf.get("quantization_config"):
        raise BadFileError(f"{where}: quantization_config is not implemented; take the unquantised model, or its GGUF")
    family = family_of(hf.get("model_type"), where)
    for key, legal in family.requires.items():
        if hf.get(key) not in [None, [], *legal]:
            raise BadFileError(f"{where}: {key} is {hf[key]!r}, and only {legal[0]!r} is implemented for this family")
    with reading(where):
        hf = family.defaults | {family.aliases.get(key, key): value for key, value in _flat(hf).items()}
        if hf["rope_type"] in ("longrope", "su"):
            original = hf["original_max_position_embeddings"]
            factor = hf.get("factor", hf["max_position_embeddings"] / original)
            usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            hf = {"factor": factor, "attention_factor": usual} | hf
        keys = {name: key for name, key in family.keys.items() if key and name not in ("windows", "rotary_layers")}
        fields = family.fixed | {name: hf[key] for name, key in keys.items() if hf.get(key) is not None}
        for name in WORDS.keys() & keys.keys() & fields.keys():
            if fields[name] not in WORDS[name]:
                odd = f"{keys[name]} is {fields[name]!r:.80}, which is not implemented"
                raise BadFileError(f"{where}: {odd}; take another model")
            fields[name] = WORDS[name][fields[name]]
        unused = _SCALED - {*SCALING.get(fields.get("rope_scaling", "none"), ())}
        for f in dataclasses.fields(ModelConfig):
            if (f.default is not None or f.name == "vocab_size") and f.name in keys.keys() - fields.keys() - unused:
                raise BadFileError(f"{where}: there is no {keys[f.name]}; restore the file")
        config = validated(ModelConfig, fields, "")
        layers: Json = {"windows": _read_windows(hf, family, config)}
        if "rotary_layers" in family.keys:
            interval = hf.get("no_rope_layer_interval") or 4
            given = hf.get("no_rope_layers") or [(i + 1) % interval for i in range(config.n_layers)]
            layers["rotary_layers"] = tuple(bool(given[i]) for i in range(config.n_layers))
        return family, canonical(dataclasses.replace(config, **layers))


def _flat(hf: Json) -> Json:
    """With the settings of rotary positions beside all others: `rope_parameters` is newer than `rope_scaling`."""
    rope: Json = hf.get("rope_parameters") or {}
    local: Json = {}
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"] or {}, rope["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type {local['rope_type']!r} of sliding_attention is not implemented")
    rope = {key: value for key, value in ((hf.get("rope_scaling") or {}) | rope).items() if value is not None}
    if "type" in rope:
        rope = {"rope_type": rope["type"]} | rope
    return hf | rope | ({"rope_local_base_freq": local["rope_theta"]} if local else {})


def _read_windows(hf: Json, family: Family, config: ModelConfig) -> tuple[int, ...]:
    window, period = hf.get("sliding_window"), hf.get("sliding_window_pattern") or family.window_period
    if not family.keys.get("windows") or not window or hf.get("use_sliding_window") is False:
        return ()
    if hf.get("layer_types") is None or period == -1:
        if period == 1:
            raise ValueError("there is no layer_types")
        first = hf.get("max_window_layers", 0)
        slides = [i >= first and (period < 1 or (i + 1) % period != 0) for i in range(config.n_layers)]
        return tuple(window if slide else 0 for slide in slides)
    kinds = {"full_attention": 0, "sliding_attention": window}
    return tuple(kinds[hf["layer_types"][i]] for i in range(config.n_layers))


def write_config(config: ModelConfig, preferred: str | None = None) -> tuple[Family, Json]:
    """The family `preferred`, or the first that can hold this model, and its config.json. ConfigError if none can."""
    config = canonical(config)
    differs: dict[str, list[str]] = {}
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred):
        try:
            hf = _as_family(config, family)
            _, again = read_config(hf, "config.json")
        except BadFileError:
            continue
        if again == config:
            return family, hf
        differs[family.model_type] = list(differences(again, config))
    near = min(differs, key=lambda name: len(differs[name]))
    why = f"the nearest, {near}, differs in {', '.join(differs[near])}; only --to jaxgpt can hold it"
    raise ConfigError(f"this architecture is none of {', '.join(FAMILIES)}: {why}")


def _as_family(config: ModelConfig, family: Family) -> Json:
    windows = config.layer_windows
    values = dataclasses.asdict(config) | {"windows": max(windows) or None}
    values["rotary_layers"] = [int(rotates) for rotates in config.layers_rotate]
    if values["query_scalar"] % 1 == 0:
        values["query_scalar"] = int(values["query_scalar"])  # transformers takes no float
    for name, words in WORDS.items():
        usual = family.defaults.get(family.keys[name], "")
        values[name] = next(word for word in (usual, *words) if words.get(word) == values[name])
    unused = _unused(config)
    written = {name: key for name, key in family.keys.items() if key and name not in unused}
    hf: Json = {"model_type": family.model_type} | {key: legal[0] for key, legal in family.requires.items()}
    scaled = [name for name in ("rope_scaling", *SCALING[config.rope_scaling]) if name in written]
    scaling = {written.pop(name): values[name] for name in scaled}
    hf |= {key: values[name] for name, key in written.items()}
    if len(scaling) > 1:  # the older spelling, which newer tools read too
        hf["rope_scaling"] = scaling
    if config.rope_scaling == "longrope":
        hf["original_max_position_embeddings"] = config.rope_original_context
    if family.window_period > 0 or len(set(windows)) > 1:
        hf["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    first = next((i for i, window in enumerate(windows) if window), len(windows))
    slides = {"use_sliding_window": any(windows), "max_window_layers": first}
    return hf | {key: value for key, value in slides.items() if key in family.defaults}


def read_gguf_config(metadata: Json, tensors: Mapping[str, StoredTensor], where: str) -> tuple[Family, ModelConfig]:
    """The family and the configuration of a GGUF file; raises what `read_config` raises."""
    architecture = metadata.get("general.architecture")
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): _decimal(value) for key, value in metadata.items() if key.startswith(prefix)}
    experts = bool(own.get("expert_count"))
    ours = (each for each in FAMILIES.values() if each.gguf == architecture and ("n_experts" in each.keys) == experts)
    if (family := next(ours, None)) is None:
        known = ", ".join(sorted({family.gguf for family in FAMILIES.values()}))
        raise BadFileError(f"{where}: general.architecture {architecture!r} is not implemented; there are {known}")
    with reading(where):
        hf: Json = {"model_type": family.model_type, "vocab_size": tensors["token_embd.weight"].shape[0]}
        hf |= family.gguf_assumes | {"tie_word_embeddings": "output.weight" not in tensors}
        keys = family.keys
        hf |= {keys[name]: tensor in tensors for name, tensor in family.gguf_tensors.items()}
        hf |= {keys[name]: own[key] for name, key in family.gguf_keys.items() if key in own and keys[name]}
        width = own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]
        hf["partial_rotary_factor"] = own.get("rope.dimension_count", width) / width
        _, config = read_config(hf, where)
        if factors := tensors.get("rope_freqs.weight"):  # what Llama 3's scaling divides each frequency by
            if factors.shape != (config.rotary_dim // 2,) or config.rotary_dim > 2**16:  # before all else is known
                raise ValueError(f"rope_freqs.weight has the shape {list(factors.shape)}")
            context, largest = hf.get("original_max_position_embeddings", 8192), float(factors.read().max())
            llama3 = {"rope_scaling": "llama3", "rope_factor": largest, "rope_original_context": context}
            config = canonical(dataclasses.replace(config, **llama3))
            plain, scaled = (frequencies(config, config.rope_theta, scaling, 0) for scaling in ("none", "llama3"))
            if not np.allclose(plain / scaled, factors.read(), rtol=1e-5, atol=0):
                raise ValueError("rope_freqs.weight is no scaling of Llama 3 that is known")
    if config.n_layers in family.gguf_wide_scalar:
        config = dataclasses.replace(config, query_scalar=config.d_model / config.n_heads)
    return family, config


def _decimal(value: Any) -> Any:
    """The shortest number that is the same float32: 1e-5 is 9.999999747378752e-06 in a file."""
    return float(str(np.float32(value))) if isinstance(value, float) and abs(value) < 1e38 else value
