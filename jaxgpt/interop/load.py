"""Any model that jaxgpt can read: a run directory, a Hugging Face directory, or a .gguf file."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax

from jaxgpt.errors import BadFileError, ConfigError, note
from jaxgpt.files import read_json
from jaxgpt.generation.engine import for_decoding
from jaxgpt.interop.configs import read_config, read_gguf_config
from jaxgpt.interop.safetensors_dir import read_safetensors
from jaxgpt.interop.stored import StoredTensor
from jaxgpt.interop.vocabulary import open_tokenizer
from jaxgpt.interop.weights import Layout, check_tensors, load_parameters
from jaxgpt.model import Transformer
from jaxgpt.run import TrainedModel, load_run
from jaxgpt.sharding import check_divides

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
    tokenizer = open_tokenizer(path)
    family, model = load_weights(path, dtype=dtype, for_training=for_training)
    if (more := tokenizer.vocab_size - (model.config.vocab_size or 0)) > 0:
        note(f"{path}: {more} tokens of its tokenizer have no embedding")
    return TrainedModel(model.config, tokenizer, model, family)


def load_weights(path: Path, *, dtype: Dtype | None = None, for_training: bool = False) -> tuple[str, Transformer]:
    """The family and the parameters of a foreign model, without its tokenizer; as `load_model` otherwise."""
    where = f"model {path}"
    layout, tensors = open_model(path)
    config = replace(layout.config, dtype=dtype or "float32")
    check_tensors(layout, tensors, where)
    check_divides(jax.sharding.get_mesh(), config)
    as_used = (lambda model: model) if for_training else for_decoding
    abstract = jax.eval_shape(lambda: as_used(Transformer(config, jax.random.key(0))))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)) / 2**30
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if needed > there and jax.default_backend() == "cpu":
        raise BadFileError(f"{where}: {needed:.0f} GiB of parameters, and {there:.0f} of memory; take a smaller model")
    return layout.family.model_type, load_parameters(abstract, layout, tensors, where)


def open_model(path: Path) -> tuple[Layout, dict[str, StoredTensor]]:
    """Configuration and layout of a foreign model, and its tensors, not yet read."""
    where = f"model {path}"
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadFileError(f"{where}: it must be a .gguf file, or a directory with config.json")
        from jaxgpt.interop.gguf import read_gguf  # 0.1 s, for nothing where there is no GGUF

        metadata, tensors = read_gguf(path)
        return Layout(*read_gguf_config(metadata, tensors, where), gguf=True), tensors
    layout = Layout(*read_config(read_json(path / "config.json", limit=2**20), str(path / "config.json")), gguf=False)
    prefix, tensors = layout.family.prefix, read_safetensors(path)
    named = {n if n.startswith((prefix, "lm_head.")) else prefix + n: t for n, t in tensors.items()}
    if len(named) < len(tensors):
        raise BadFileError(f"{where}: a tensor is there with and without {prefix!r}; restore the file")
    return layout, named
