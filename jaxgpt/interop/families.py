"""The families of models that are read and written, as `families.toml` declares them. Letters: `jaxgpt/sharding.py`."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.errors import BadFileError, nearest


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
    """One entry of the table."""

    model_type: str
    architecture: str  # the class of transformers
    gguf: str  # `general.architecture` of its GGUF files
    rows: tuple[Row, ...]
    fixed: dict[str, Any]  # fields of ModelConfig that are the same in all models of the family
    keys: dict[str, str]  # field of ModelConfig -> key of config.json
    gguf_keys: dict[str, str]  # field of ModelConfig -> key of GGUF, after the architecture
    requires: dict[str, list]  # the only values of keys of config.json that are implemented; the first is written
    defaults: dict[str, Any]  # values of keys that a config.json leaves out
    # Where config.json has no `layer_types`, every so manyth layer has no window; 0: all have one, 1: there must be
    # `layer_types`, -1: all have one, and there is none.
    window_period: int = 0
    prefix: str = ""  # tensors may be stored without this prefix
    # Tensors that older files hold although they are computed; they are counted and left out.
    buffers: str = r".*\.rotary_emb\.inv_freq"
    transposed: bool = False  # safetensors hold matrices [in, out]
    interleaved: bool = False  # in GGUF, the rows of each head of q and k are in the order 0, K/2, 1, K/2 + 1 ...
    # Field of ModelConfig -> tensor that is in a GGUF file where the field is true.
    gguf_tensors: dict[str, str] = field(default_factory=dict)
    # Values of keys of config.json that GGUF does not hold, since its readers know no other.
    gguf_assumes: dict[str, Any] = field(default_factory=dict)
    # Layers of the models whose query scalar is d_model / n_heads: GGUF holds none, and others have head_dim.
    gguf_wide_scalar: tuple[int, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)  # other names of keys of config.json, which are only read


def _families(table: dict[str, Any]) -> tuple[Family, ...]:
    groups = {name: [Row(*row) for row in rows] for name, rows in table["rows"].items()}
    found = []
    for name, entry in table["family"].items():
        if like := entry.pop("like", None):
            base: dict[str, Any] = table["family"][like]
            merged = {key: base[key] | entry.get(key, {}) for key in base if isinstance(base[key], dict)}
            entry = base | entry | merged
        table["family"][name] = dict(entry)
        rows = [row for group in entry.pop("rows") for row in groups[group]]
        rows += [row.bias for row in rows if row.name.endswith(("kernel", "scale"))]
        shared = {key: table[key] | entry.pop(key, {}) for key in ("keys", "gguf_keys", "defaults")}
        requires = {"architectures": [[entry["architecture"]]]} | entry.pop("requires", {})
        found.append(Family(name, rows=tuple(rows), requires=requires, **shared, **entry))
    return tuple(found)


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
FAMILIES = _families(_TABLE)
WORDS: dict[str, dict[str, str]] = _TABLE["words"]
SCALING: dict[str, list[str]] = _TABLE["scaling"]  # kind -> the fields of ModelConfig that it uses


def family_of(model_type: Any, where: str) -> Family:
    """The family of a `model_type`. Raises BadFileError, naming it and the known ones."""
    known = {family.model_type: family for family in FAMILIES}
    if not isinstance(model_type, str) or model_type not in known:
        near = nearest(str(model_type), known)
        raise BadFileError(f"{where}: model_type {model_type!r} is not implemented{near}; there are {', '.join(known)}")
    return known[model_type]
