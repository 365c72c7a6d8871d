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
from jaxgpt.interop.gguf import read_gguf
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
    BadFileError for a file that is damaged, hostile, or holds what is not implemented, ConfigError where the mesh
    cannot cut the model."""
    is_run = _is_run(path)
    if (unused := dtype if is_run else step) is not None:
        raise ConfigError(f"{'dtype' if is_run else 'step'} {unused}: {path} has its own; leave it out")
    if is_run:
        trained = load_run(path, step)
        return trained if for_training else replace(trained, model=for_decoding(trained.model))
    tokenizer = open_tokenizer(path)
    family, model = load_weights(path, dtype=dtype, for_training=for_training)
    if (more := tokenizer.vocab_size - (model.config.vocab_size or 0)) > 0:
        if more > 1000:
            raise BadFileError(f"model {path}: {more} tokens of its tokenizer have no embedding; take the one it had")
        note(f"{path}: {more} tokens of its tokenizer have no embedding")
    return TrainedModel(model.config, tokenizer, model, family)


def load_weights(path: Path, *, dtype: Dtype | None = None, for_training: bool = False) -> tuple[str, Transformer]:
    """The family and the parameters of a foreign model, without its tokenizer; as `load_model` otherwise."""
    where = f"model {path}"
    layout, tensors = open_model(path)
    check_tensors(layout, tensors, where)
    config = replace(layout.config, dtype=dtype or "float32")
    check_divides(jax.sharding.get_mesh(), config)
    if config.rope_scaling == "longrope":
        short = f"texts of up to {config.rope_original_context} tokens"
        note(f"{path}: {short} take the short rotary factors, longer ones the long")

    def skeleton() -> Transformer:
        model = Transformer(config, jax.random.key(0))
        return model if for_training else for_decoding(model)

    abstract = jax.eval_shape(skeleton)
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)) / 2**30
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if needed > there and jax.default_backend() == "cpu":
        raise BadFileError(f"{where}: {needed:.0f} GiB of parameters, and {there:.0f} of memory; take a smaller model")
    parameters = load_parameters(abstract, replace(layout, config=config), tensors, where)
    return layout.family.model_type, parameters


def open_model(path: Path) -> tuple[Layout, dict[str, StoredTensor]]:
    """Configuration and layout of a foreign model, and its tensors, not yet read."""
    where = f"model {path}"
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadFileError(f"{where}: it must be a .gguf file, or a directory with config.json")
        gguf = read_gguf(path)
        return Layout(*read_gguf_config(gguf.metadata, gguf.tensors, where), gguf=True), gguf.tensors
    layout = Layout(*read_config(read_json(path / "config.json", limit=2**20), str(path / "config.json")), gguf=False)
    prefix, tensors = layout.family.prefix, read_safetensors(path)
    named = {n if n.startswith((prefix, "lm_head.")) else prefix + n: t for n, t in tensors.items()}
    if len(named) < len(tensors):
        twice = next(name for name in tensors if prefix + name in tensors)
        raise BadFileError(f"{where}: tensor {twice!r} is there with and without {prefix!r}; restore the file")
    return layout, named


def _is_run(path: Path) -> bool:
    if path.is_file():
        return False
    if not (path / "config.json").exists():
        kinds = "a run directory of train.py, a Hugging Face model's directory, or a .gguf file"
        raise BadFileError(f"checkpoint {path}: there is no config.json; name {kinds}")
    return "model_type" not in read_json(path / "config.json", limit=2**20)
