"""Directories of .safetensors files: one, or several with an index.

The `safetensors` library refuses damaged headers. What it lets pass is looked at here: a key that occurs twice, counts
that are absurd, names in an index that leave the directory."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgpt.errors import BadFileError
from jaxgpt.files import parse_json, read_json, sync, write_atomically
from jaxgpt.interop.stored import PLAIN, StoredTensor, TensorWriter, plain_reader

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER, _MAX_TENSORS, _MAX_DIMS = 100 * 2**20, 100_000, 8


def read_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory, read when it is asked for.

    Raises BadFileError for a damaged or hostile file, an index that does not agree with its files, or pickle files."""
    if not (directory / _INDEX).exists():
        if not (directory / _ONE).exists():
            pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
            why = f"{pickles[0]} may run code when it is read, so it never is" if pickles else f"there is no {_ONE}"
            raise BadFileError(f"model {directory}: {why}; take or make {_ONE}")
        return _read_file(directory / _ONE)
    index = read_json(directory / _INDEX, limit=64 * 2**20).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise BadFileError(f"model {directory / _INDEX}: its weight_map is no table of names; fetch the file again")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(index.values())):
        if file != os.path.basename(file) or not file.endswith(".safetensors") or "\0" in file:
            raise BadFileError(f"model {directory / _INDEX}: {file!r} is no .safetensors file of this directory")
        found = _read_file(directory / file)
        listed = {name for name, place in index.items() if place == file}
        if listed != found.keys():
            odd = sorted(listed ^ found.keys())[0]
            raise BadFileError(f"model {directory}: {file} and the index disagree on tensor {odd}; fetch both again")
        tensors |= found
    return tensors


def _read_file(path: Path) -> dict[str, StoredTensor]:
    try:
        start, header = _header(path)
        with safe_open(path, "numpy") as file:  # refuses overlaps, holes, wrong sizes and types
            names = set(file.keys())
    except FileNotFoundError:
        raise BadFileError(f"model {path}: there is no such file; fetch it") from None
    except SafetensorError as error:
        raise BadFileError(f"model {path}: {' '.join(str(error).split())[:160]}; fetch the file again") from None
    if len(names) > _MAX_TENSORS:
        raise BadFileError(f"model {path}: {len(names)} tensors are more than {_MAX_TENSORS}")
    tensors = {}
    for name in names:
        shape, kind, (begin, end) = (header[name][key] for key in ("shape", "dtype", "data_offsets"))
        if len(shape) > _MAX_DIMS or 0 in shape:
            raise BadFileError(f"model {path}: tensor {name!r} has the shape {shape}")
        tensors[name] = StoredTensor(
            tuple(shape), kind, plain_reader(path, start + begin, end - begin, tuple(shape), kind)
        )
    return tensors


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the header. Raises BadFileError when it is too large or names a tensor twice."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(size - 8, _MAX_HEADER):
            raise BadFileError(f"model {path}: its header claims {length} bytes; fetch the file again")
        return 8 + length, parse_json(file.read(length), f"the header of model {path}")


def write_safetensors(directory: Path, tensors: TensorWriter, max_shard_bytes: float = 5e9) -> None:
    """Write tensors of the kinds F32 and BF16, one in memory at a time.

    More than `max_shard_bytes` go to several files and an index, in the names that other tools expect."""
    shards: list[list[tuple]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        size = int(np.prod(tensor[1])) * PLAIN[tensor[2]].itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        room -= size
        shards[-1].append((*tensor, size))
    names = (
        [_ONE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard)
    if len(shards) > 1:
        places = {tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor[-1] for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_atomically(directory / _INDEX, json.dumps(index, indent=2).encode())
    sync(directory)


def _write_file(path: Path, tensors: list[tuple]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, kind, _, size in tensors:
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        for _, _, kind, read, _ in tensors:
            file.write(np.ascontiguousarray(read(), PLAIN[kind]).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
