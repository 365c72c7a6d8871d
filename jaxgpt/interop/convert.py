"""Models from one format to another, and the proof that they are the same.

A target appears whole or not at all: it is written beside and renamed when it is complete."""

import json
import shutil
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import CheckpointConfig, TokenizerConfig, TrainConfig, TrainingConfig
from jaxgpt.errors import JaxgptError, require
from jaxgpt.files import publish, write_atomically
from jaxgpt.interop.configs import write_config
from jaxgpt.interop.load import Dtype, load_model, stored_tensors
from jaxgpt.interop.tensors import write_safetensors
from jaxgpt.interop.verify import logits_of
from jaxgpt.interop.vocabulary import write_tokenizer
from jaxgpt.run import TrainedModel, write_run

_PROMPT = "The quick brown fox jumps over the lazy dog. 1, 2, 3, 5, 8, 13: def f(x):\n    return x + 1\n"


def convert(source: Path, target: Path, to: Literal["jaxgpt", "hf"], dtype: Dtype) -> None:
    """Write the model at `source` (any that `load_model` takes) to the directory `target` in another format. Raises
    ConfigError when the target exists or the format cannot hold the model, BadFileError for a bad source."""
    require(not target.exists(), f"convert: {target} exists; remove it or choose another name")
    possible = to == "hf" or dtype == "float32"
    require(possible, f"convert: jaxgpt holds float32 parameters, not {dtype}; leave --dtype out")
    trained = load_model(source, for_training=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a kill left
    try:
        if to == "jaxgpt":
            _write_run(trained, partial)
        else:
            _write_hf(trained, partial, dtype)
        publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_run(trained: TrainedModel, directory: Path) -> None:
    chunks = next(chunks for chunks in (8, 4, 2, 1) if trained.config.context_length % chunks == 0)
    final = directory.with_suffix("")  # without .partial
    tokenizer = TokenizerConfig(path=str(final / trained.tokenizer.file_name))
    config = TrainConfig("gpt", str(final), (), trained.config, tokenizer, training=TrainingConfig(loss_chunks=chunks))
    metadata = {"tokenizer_sha256": trained.tokenizer.sha256, "data": []}
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        checkpoints.save(0, trained.model, {"step": jnp.zeros((), jnp.int32)}, metadata)
    write_run(config, trained.tokenizer, directory)


def _write_hf(trained: TrainedModel, directory: Path, dtype: Dtype) -> None:
    (family, hf), tokenizer = write_config(trained.config, trained.family), trained.tokenizer
    hf |= {"dtype": dtype, "torch_dtype": dtype, "pad_token_id": tokenizer.pad_id}
    hf |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    directory.mkdir()
    write_safetensors(directory, stored_tensors(trained.model, family, "F32" if dtype == "float32" else "BF16"))
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.end_ids)}
    for name, content in {"config.json": hf, "generation_config.json": ends}.items():
        write_atomically(directory / name, json.dumps(content, indent=2).encode() + b"\n")
    write_tokenizer(tokenizer, directory)


def compare(source: Path, target: Path) -> tuple[float, float, float]:
    """Run both on a prompt, one after the other: the largest difference of logits, the mean Kullback-Leibler divergence
    of the target's next-token distributions in nats, and the share of positions where both find the same token most
    probable. Raises JaxgptError when their tokenizers cut the prompt differently."""
    first, second = load_model(source), load_model(target)
    ids = first.tokenizer.encode(_PROMPT, bos=True)
    if second.tokenizer.encode(_PROMPT, bos=True) != ids:
        raise JaxgptError(f"convert: the tokenizers of {source} and {target} cut the same text differently")
    tokens_BT = np.array([ids[: first.config.context_length]])
    a_TV, b_TV = (logits_of(each.model, tokens_BT)[0].astype(np.float64) for each in (first, second))
    log_p_TV, log_q_TV = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (a_TV, b_TV))
    divergence = (np.exp(log_p_TV) * (log_p_TV - log_q_TV)).sum(-1).mean()
    same = (a_TV.argmax(-1) == b_TV.argmax(-1)).mean()
    return float(np.abs(a_TV - b_TV).max()), float(divergence), float(same)
