"""Any model that jaxgpt can read: a run directory, a Hugging Face directory, or a .gguf file."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import jax

from jaxgpt.errors import BadFileError
from jaxgpt.files import read_json
from jaxgpt.generation.engine import for_decoding
from jaxgpt.interop.configs import read_config, read_gguf_config
from jaxgpt.interop.families import Family
from jaxgpt.interop.gguf import read_gguf
from jaxgpt.interop.safetensors_dir import read_safetensors
from jaxgpt.interop.stored import StoredTensor
from jaxgpt.interop.vocabulary import open_tokenizer
from jaxgpt.interop.weights import Layout, check_tensors, load_parameters
from jaxgpt.model import Transformer
from jaxgpt.model_config import ModelConfig
from jaxgpt.run import TrainedModel, load_run

Dtype = Literal["float32", "bfloat16"]
_POSITIONS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


@dataclasses.dataclass(frozen=True)
class LoadedModel(TrainedModel):
    """A model and its tokenizer, ready for use on the current mesh."""

    family: Family | None
    """The one that other people's files declare; None for a run directory."""


def load_model(
    path: Path, *, step: int | None = None, dtype: Dtype | None = None, for_training: bool = False
) -> LoadedModel:
    """The model and tokenizer at `path`, on the current mesh; a run's newest checkpoint, or that of `step`.

    Parameters are ready for decoding: each layer has arrays of its own, matrices in the compute dtype. `for_training`
    stacks the layers and keeps float32. `dtype` is that of the arithmetic; a foreign model has float32 by default.
    Raises BadFileError for a file that is damaged, hostile, or holds what is not implemented.
    """
    if _is_run(path):
        trained = load_run(path, step)
        model = trained.model if for_training else for_decoding(trained.model)
        return LoadedModel(trained.config, trained.tokenizer, model, None)
    tokenizer = open_tokenizer(path)
    family, model = load_weights(path, dtype=dtype, for_training=for_training)
    if (more := tokenizer.vocab_size - (model.config.vocab_size or 0)) > 0:
        if more > 1000:
            raise BadFileError(f"model {path}: {more} tokens of its tokenizer have no embedding; take the one it had")
        print(f"jaxgpt: {path}: {more} tokens of its tokenizer have no embedding", file=sys.stderr)
    return LoadedModel(model.config, tokenizer, model, family)


def load_weights(path: Path, *, dtype: Dtype | None = None, for_training: bool = False) -> tuple[Family, Transformer]:
    """The family and the parameters of a foreign model, without its tokenizer; as `load_model` otherwise."""
    where = f"model {path}"
    layout, tensors, positions = open_model(path)
    check_tensors(layout, tensors, positions, where)
    config = dataclasses.replace(layout.config, dtype=dtype or "float32")
    if config.rope_scaling == "longrope":
        print(
            f"jaxgpt: {path}: texts of up to {config.rope_original_context} tokens take the short rotary factors, "
            f"longer ones the long factors",
            file=sys.stderr,
        )
    abstract = jax.eval_shape(lambda: _abstract(config, for_training))
    return layout.family, load_parameters(abstract, dataclasses.replace(layout, config=config), tensors, where)


def _abstract(config: ModelConfig, for_training: bool) -> Transformer:
    model = Transformer(config, jax.random.key(0))
    return model if for_training else for_decoding(model)


def open_model(path: Path) -> tuple[Layout, dict[str, StoredTensor], set[str]]:
    """Configuration and layout of a foreign model, its tensors, and the names of those that describe positions."""
    where = f"model {path}"
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadFileError(f"{where}: it must be a .gguf file, or a directory with config.json")
        gguf = read_gguf(path)
        family, config = read_gguf_config(gguf.metadata, gguf.tensors, where)
        return Layout(family, config, gguf=True), gguf.tensors, _POSITIONS
    family, config = read_config(_read_hf(path), f"{path / 'config.json'}")
    tensors = read_safetensors(path)
    prefix = family.prefix
    named = {name if name.startswith((prefix, "lm_head.")) else prefix + name: t for name, t in tensors.items()}
    return Layout(family, config, gguf=False), named, set()


def model_config(path: Path) -> ModelConfig:
    """The configuration of any model, without reading its parameters."""
    if _is_run(path):
        from jaxgpt.run import read_config as read_run

        return read_run(path).model
    return open_model(path)[0].config


def _read_hf(path: Path) -> dict[str, Any]:
    return read_json(path / "config.json", limit=16 * 2**20)


def _is_run(path: Path) -> bool:
    if not path.is_dir():
        if path.exists():
            return False
        raise BadFileError(f"model {path}: there is no such file; name a run directory, a model directory or a .gguf")
    return "model_type" not in _read_hf(path)
