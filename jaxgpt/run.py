"""A run directory: everything about one run, and all that generation needs.

config.json       the resolved configuration
tokenizer.model   the SentencePiece model (or tokenizer.json), and tokenizer_config.json, what begins and ends a text
checkpoints/      steps, see checkpoint.py
metrics.jsonl     one record a line; tensorboard/ holds the same
LOCK              held by the process that trains"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax

from jaxgpt.config import ModelConfig, TrainConfig, differences, to_json, validated
from jaxgpt.errors import BadFileError, ConfigError, require
from jaxgpt.files import read_json, write_atomically
from jaxgpt.model import Transformer
from jaxgpt.sharding import check_divides
from jaxgpt.tokenizer import Tokenizer, load_tokenizer

MAY_DIFFER = (
    "name", "run_dir", "allow_change", "mesh.", "checkpoint.", "data.cache_dir", "model.scan_layers", "model.remat",
    "training.log_", "training.eval_", "training.loss_chunks", "training.sample_", "training.wandb", "model.kernels",
)  # fmt: skip
"""Settings that a resumed run may change freely: they leave what is computed alone, up to rounding."""


def read_config(run_dir: Path) -> TrainConfig:
    """The configuration of a run. Raises BadFileError when there is none or it is damaged."""
    return validated(TrainConfig, read_json(run_dir / "config.json", limit=2**20), f"{run_dir}/config.json")


def refuse_other_config(old: TrainConfig, new: TrainConfig) -> None:
    """Raise ConfigError, naming each field, when a run would be resumed with settings that change what it computes."""
    changed = differences(old, new)
    if new.model.vocab_size is None:  # not yet taken from the tokenizer
        changed.pop("model.vocab_size", None)
    bad = [key for key in changed if not key.startswith(MAY_DIFFER) and key not in new.allow_change]
    if bad:
        listed = ", ".join(f"{key} was {changed[key][0]!r} and is now {changed[key][1]!r}" for key in bad)
        remedy = f"choose another --run-dir, or pass --allow-change {' '.join(bad)}"
        raise ConfigError(f"run directory {new.run_path} holds another configuration: {listed}; {remedy}")


def with_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The configuration with the vocabulary of the tokenizer, unless it names a larger one."""
    size, least = config.model.vocab_size or tokenizer.vocab_size, tokenizer.vocab_size
    require(size >= least, f"model.vocab_size {size} is smaller than the tokenizer's {least}; leave it out")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def write_run(config: TrainConfig, tokenizer: Tokenizer, run_dir: Path) -> None:
    tokenizer.write(run_dir)
    write_atomically(run_dir / "config.json", to_json(config).encode())


class TrainedModel(NamedTuple):
    """A model and its tokenizer, ready for use on the current mesh."""

    config: ModelConfig
    tokenizer: Tokenizer
    model: Transformer
    family: str | None = None  # the model_type that other people's files declare


def load_run(run_dir: Path, step: int | None = None) -> TrainedModel:
    """The newest intact checkpoint of a run, or that of `step`, on the current mesh. Raises BadFileError when the
    directory is no run, is damaged or holds no checkpoint, ConfigError where the mesh cannot cut the model."""
    config = read_config(run_dir).model
    check_divides(jax.sharding.get_mesh(), config)
    from jaxgpt.checkpoint import restore_model  # Orbax takes 0.2 s, which other people's models do without

    tokenizer = load_tokenizer(run_dir)
    _, model, metadata = restore_model(run_dir, jax.eval_shape(lambda: Transformer(config, jax.random.key(0))), step)
    if metadata["tokenizer_sha256"] != tokenizer.sha256:
        raise BadFileError(f"tokenizer {run_dir / tokenizer.file_name}: it is not the one of the training; restore it")
    return TrainedModel(config, tokenizer, model)
