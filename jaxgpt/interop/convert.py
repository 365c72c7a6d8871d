"""Models from one format to another, and the proof that they are the same.

A target appears whole or not at all: it is written beside and renamed when it is complete."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import CheckpointConfig, TokenizerConfig, TrainConfig, TrainingConfig
from jaxgpt.errors import ConfigError, JaxgptError, note
from jaxgpt.files import sync, write_atomically
from jaxgpt.interop.configs import write_config, write_gguf_config
from jaxgpt.interop.gguf import write_gguf
from jaxgpt.interop.load import load_model
from jaxgpt.interop.safetensors_dir import write_safetensors
from jaxgpt.interop.verify import logits_of
from jaxgpt.interop.vocabulary import gguf_metadata, write_tokenizer
from jaxgpt.interop.weights import Layout, stored_tensors
from jaxgpt.run import TrainedModel, write_run

Format = Literal["jaxgpt", "hf", "gguf"]
Precision = Literal["float32", "bfloat16", "q8_0"]
_KIND = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}
_Q8_BLOCK = 32
_PROMPT = "The quick brown fox jumps over the lazy dog. 1, 2, 3, 5, 8, 13: def f(x):\n    return x + 1\n"


def convert(source: Path, target: Path, to: Format, dtype: Precision) -> None:
    """Write the model at `source` (any that `load_model` takes) to `target` in another format. Raises ConfigError when
    the target exists or the format cannot hold the model, BadFileError for a bad source."""
    if target.exists():
        raise ConfigError(f"convert: {target} exists; remove it or choose another name")
    held = {"jaxgpt": ("float32",), "hf": ("float32", "bfloat16")}.get(to, (dtype,))
    if dtype not in held:
        raise ConfigError(f"convert: {to} holds {' or '.join(held)} parameters, not {dtype}; choose another --dtype")
    trained = load_model(source, for_training=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    _remove(partial)
    try:
        {"jaxgpt": _write_run, "hf": _write_hf, "gguf": _write_gguf}[to](trained, partial, dtype)
        partial.rename(target)
        sync(target.parent)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _write_run(trained: TrainedModel, directory: Path, dtype: Precision) -> None:
    chunks = next(chunks for chunks in (8, 4, 2, 1) if trained.config.context_length % chunks == 0)
    final = directory.with_suffix("")  # without .partial
    tokenizer = TokenizerConfig(path=str(final / trained.tokenizer.file_name))
    config = TrainConfig("gpt", str(final), (), trained.config, tokenizer, training=TrainingConfig(loss_chunks=chunks))
    metadata = {"seed": 0, "tokenizer_sha256": trained.tokenizer.sha256, "data": []}
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        checkpoints.save(0, trained.model, {"step": jnp.zeros((), jnp.int32)}, metadata)
    write_run(config, trained.tokenizer, directory)


def _write_hf(trained: TrainedModel, directory: Path, dtype: Precision) -> None:
    family, hf = write_config(trained.config, trained.family)
    tokenizer = trained.tokenizer
    hf |= {"dtype": dtype, "torch_dtype": dtype, "pad_token_id": tokenizer.pad_id}
    hf |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    directory.mkdir()
    tensors = stored_tensors(trained.model, Layout(family, trained.config, gguf=False))
    write_safetensors(directory, {name: replace(each, kind=_KIND[dtype]) for name, each in tensors.items()})
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.end_ids)}
    for name, content in {"config.json": hf, "generation_config.json": ends}.items():
        write_atomically(directory / name, json.dumps(content, indent=2).encode() + b"\n")
    write_tokenizer(tokenizer, directory)


def _write_gguf(trained: TrainedModel, path: Path, dtype: Precision) -> None:
    family, _ = write_config(trained.config, trained.family)
    tensors = stored_tensors(trained.model, Layout(family, trained.config, gguf=True))
    metadata, tensors = write_gguf_config(trained.config, family, tensors)
    metadata |= gguf_metadata(trained.tokenizer, trained.config.vocab_size or 0)
    matrices = {name: replace(each, kind=_KIND[dtype]) for name, each in tensors.items() if len(each.shape) > 1}
    kept = [name for name, each in matrices.items() if dtype == "q8_0" and each.shape[-1] % _Q8_BLOCK]
    matrices |= {name: replace(tensors[name], kind="BF16") for name in kept}
    write_gguf(path, metadata, tensors | matrices)
    if kept:
        note(f"{len(kept)} tensors, such as {kept[0]}, are bfloat16: their rows divide by no {_Q8_BLOCK}")


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
