"""GGUF files as the tools of llama.cpp write them, for the tests of reading: made of a Hugging Face directory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.interop.configs import Family, read_config, write_config
from jaxgpt.interop.load import Layout
from jaxgpt.interop.tensors import read_safetensors
from jaxgpt.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.tokenizer.base import SPACE, Kind, model_pb2
from jaxgpt.tokenizer.spm import SentencePieceTokenizer

Json = dict[str, Any]


def convert(directory: Path, path: Path) -> None:
    """The file at `path` of the model in `directory`, which has a tokenizer.model."""
    family, config = read_config(json.loads((directory / "config.json").read_text()), str(directory))
    settings, arrays = settings_of(config, family)
    settings |= tokenizer_settings(load_tokenizer(directory / "tokenizer.model"), config.vocab_size)
    hf = {name: tensor.read() for name, tensor in read_safetensors(directory).items()}
    writer = gguf.GGUFWriter(path, settings.pop("general.architecture"))
    for key, value in settings.items():
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    for name, array in (arrays | tensors_of(hf, config, family)).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def settings_of(config: ModelConfig, family: Family) -> tuple[Json, dict[str, np.ndarray]]:
    """The settings that describe a model, and the tensor that does so where its rotation is that of Llama 3."""
    hf = write_config(config, family.model_type)[1]
    hf |= hf.get("rope_scaling") or {}
    if config.rope_scaling != "linear":  # for the others there is no name
        hf |= {"rope_type": None, "factor": None}
    own = {key: hf[family.keys[name]] for name, key in family.gguf_keys.items() if hf.get(family.keys[name])}
    own |= {"attention.value_length": config.key_dim, "vocab_size": config.vocab_size}
    if config.positions == "rotary":
        own["rope.dimension_count"] = config.rotary_dim
    metadata = {"general.architecture": family.gguf} | {f"{family.gguf}.{key}": value for key, value in own.items()}
    return metadata, {"rope_freqs.weight": _divisors(config)} if config.rope_scaling == "llama3" else {}


def _divisors(config: ModelConfig) -> np.ndarray:
    """One at a time in doubles, as llama.cpp's converter has them."""
    low, high, found = config.rope_low_frequency, config.rope_high_frequency, []
    for i in range(config.rotary_dim // 2):
        wavelength = 2 * math.pi * config.rope_theta ** (2 * i / config.rotary_dim)
        smooth = min(max((config.rope_original_context / wavelength - low) / (high - low), 0), 1)
        found.append(1 / ((1 - smooth) / config.rope_factor + smooth))
    return np.array(found, np.float32)


def tensors_of(hf: Mapping[str, np.ndarray], config: ModelConfig, family: Family) -> dict[str, np.ndarray]:
    """Tensors of safetensors in the names, shapes and orders of GGUF."""
    found = {}
    for stored_name, places in Layout(family, config).tensors.items():
        row = places[0].row
        for i in range(config.n_layers) if "{}" in stored_name else [0]:
            array = hf[stored_name.format(i, e=0)]
            if "{e}" in stored_name:
                array = np.stack([hf[stored_name.format(i, e=expert)] for expert in range(config.n_experts)])
            if family.transposed and row.name.endswith("kernel"):
                array = np.ascontiguousarray(array.T)
            if family.interleaved and row.name.startswith(("attention.query.", "attention.key.")):
                array = permuted(array, config.n_heads if "query" in row.name else config.kv_heads)
            if config.norm_plus_one and row.name.endswith("norm.scale"):
                array = array + np.float32(1)
            found[row.gguf.format(i)] = array
    return found


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """How llama.cpp's converter orders the rows of q and k, so that pairs lie side by side."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tokenizer_settings(tokenizer: Tokenizer, vocab_size: int | None = None, pre: str = "gpt-2") -> Json:
    """The settings that describe a SentencePiece model or a byte-level tokenizer.json, which cuts a text as `pre` says,
    with unused tokens up to `vocab_size`."""
    missing = (vocab_size or tokenizer.vocab_size) - tokenizer.vocab_size
    tokens = [piece or f"[unused{i}]" for i, piece in enumerate(tokenizer.pieces + [""] * missing)]
    kinds = tokenizer.kinds + [Kind.UNUSED] * missing
    own: Json = {"model": "gpt2", "pre": pre, "token_type": kinds, "add_bos_token": bool(tokenizer.bos_ids)}
    if isinstance(tokenizer, SentencePieceTokenizer):
        own |= {"model": "llama", "pre": "default", "add_space_prefix": bool(tokenizer.prefix)}
        scores = [piece.score for piece in model_pb2.ModelProto.FromString(tokenizer.model_bytes).pieces]
        own |= {"scores": scores + [-1e6] * missing, "unknown_token_id": kinds.index(Kind.UNKNOWN)}
        defined = [i for i, kind in enumerate(kinds) if kind == Kind.USER_DEFINED]
        for i in defined:
            tokens[i] = tokens[i].replace(SPACE, " ")
    else:
        merges = json.loads(tokenizer.model_bytes)["model"]["merges"]
        own["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    ids |= dict(zip(("eot", "eom"), tokenizer.end_ids[1:], strict=False))
    own |= {"tokens": tokens, **{f"{name}_token_id": token for name, token in ids.items()}}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    return metadata | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})
