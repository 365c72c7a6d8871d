"""Any model that jaxgpt can read: a run directory, a Hugging Face directory, or a .gguf file."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from jaxgpt.errors import BadFileError, ConfigError, note
from jaxgpt.files import read_json
from jaxgpt.generation.engine import for_decoding
from jaxgpt.interop.configs import read_config, read_gguf_config
from jaxgpt.interop.gguf import read_gguf
from jaxgpt.interop.safetensors_dir import read_safetensors
from jaxgpt.interop.stored import StoredTensor
from jaxgpt.interop.vocabulary import from_gguf
from jaxgpt.interop.weights import Layout, load_weights
from jaxgpt.run import TrainedModel, load_run
from jaxgpt.tokenizer import Tokenizer, load_tokenizer

Dtype = Literal["float32", "bfloat16"]


def load_model(
    path: Path, *, step: int | None = None, dtype: Dtype | None = None, for_training: bool = False
) -> TrainedModel:
    """The model and tokenizer at `path`, on the current mesh; a run's newest checkpoint, or that of `step`. Parameters
    are ready for decoding: each layer has arrays of its own, matrices in the compute dtype. `for_training` stacks the
    layers and keeps float32. `dtype` is that of the arithmetic; a foreign model has float32 by default. Raises
    BadFileError for files that are damaged, hostile or not implemented, ConfigError where the mesh does not fit."""
    config = path / "config.json"
    if not path.is_file() and not config.exists():
        kinds = "a run directory of train.py, a Hugging Face model's directory, or a .gguf file"
        raise BadFileError(f"checkpoint {path}: there is no config.json; name {kinds}")
    is_run = not path.is_file() and "model_type" not in read_json(config, limit=2**20)
    if (unused := dtype if is_run else step) is not None:
        raise ConfigError(f"{'dtype' if is_run else 'step'} {unused}: {path} has its own; leave it out")
    if is_run:
        trained = load_run(path, step)
        return trained if for_training else replace(trained, model=for_decoding(trained.model))
    layout, tensors, open_tokenizer = open_model(path, dtype or "float32")
    tokenizer, model = open_tokenizer(), load_weights(layout, tensors, for_training=for_training)
    if (more := tokenizer.vocab_size - (model.config.vocab_size or 0)) > 0:
        note(f"{path}: {more} tokens of its tokenizer have no embedding")
    return TrainedModel(model.config, tokenizer, model, layout.family.model_type)


def open_model(path: Path, dtype: Dtype = "float32") -> tuple[Layout, dict[str, StoredTensor], Callable[[], Tokenizer]]:
    """Configuration and layout of a foreign model, its tensors, not yet read, and what makes its tokenizer."""
    where = f"model {path}"
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadFileError(f"{where}: it must be a .gguf file, or a directory with config.json")
        settings, tensors = read_gguf(path)
        family, config = read_gguf_config(settings, tensors, where)
        layout = Layout(family, replace(config, dtype=dtype), gguf=True, where=where)
        return layout, tensors, partial(from_gguf, settings, f"tokenizer {path}")
    family, config = read_config(read_json(path / "config.json", limit=2**20), str(path / "config.json"))
    prefix, tensors = family.prefix, read_safetensors(path)
    named = {n if n.startswith((prefix, "lm_head.")) else prefix + n: t for n, t in tensors.items()}
    if len(named) < len(tensors):
        raise BadFileError(f"{where}: a tensor is there with and without {prefix!r}; restore the file")
    return Layout(family, replace(config, dtype=dtype), where=where), named, partial(load_tokenizer, path)
