"""Tensors in model files, whatever the format: known by their shape, read when they are asked for. And the .safetensors
files of a directory: one, or several with an index.

Such a file is the length of a header, the header in JSON, which says type, shape and place of each tensor, and the
data. Nothing is made of what it says before it is compared with the file's size."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxgpt.errors import BadFileError
from jaxgpt.files import parse_json, read_json, sync

FLOATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
MAX_TENSORS = 100_000  # in a model's files: Qwen3-235B has 37,000, and each takes 2 kB before anything is read

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
_BYTES |= {"I64": 8, "U64": 8, "F64": 8}
_MAX_HEADER, _MAX_DIMS = 2**24, 8  # bytes of JSON, 30 times as many in memory; the index of DeepSeek-V3 has 9 MB
_PART = 2**19  # elements that a core works on at a time
_CORES = ThreadPoolExecutor(_N_CORES := os.cpu_count() or 1)


class StoredTensor(NamedTuple):
    """`read()` gives `shape` in row-major order, F32, F16 and BF16 as stored, all else and what is written float32."""

    shape: tuple[int, ...]
    kind: str  # the type in the file: F32, F16, BF16, Q4_K ...
    read: Callable[[], np.ndarray]


def plain_tensor(path: Path, start: int, shape: tuple[int, ...], kind: str) -> StoredTensor:
    """Numbers as they are stored. Not mapped: the file's pages would count as memory beside what is made of them.
    Raises KeyError, when it reads, for a kind that is not in PLAIN: the caller has compared kinds before."""
    size = math.prod(shape)
    return StoredTensor(shape, kind, lambda: np.fromfile(path, PLAIN[kind], size, offset=start).reshape(shape))


def aligned(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Zeros at a multiple of 64 bytes: JAX takes such an array over on a CPU, and copies any other."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def in_parts(work: Callable[..., None], *arrays: np.ndarray) -> None:
    """`work` on all cores, each call with some rows of every array: what is made on the way fits into a cache."""
    parts = min(len(arrays[0]), _N_CORES * -(-arrays[0].size // (_N_CORES * _PART)))
    cuts = [len(arrays[0]) * i // parts for i in range(parts + 1)]
    list(_CORES.map(lambda i, end: work(*(array[i:end] for array in arrays)), cuts, cuts[1:]))


def read_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory, read when it is asked for. Raises BadFileError for what is damaged or hostile."""
    if not (path := directory / _INDEX).exists():
        return _read_file(directory / _ONE)
    index = read_json(path, limit=_MAX_HEADER).get("weight_map")
    if not isinstance(index, dict) or len(index) > MAX_TENSORS:
        raise BadFileError(f"model {path}: its weight_map is no table of names; fetch the file again")
    files = sorted({str(file) for file in index.values()})
    if bad := [file for file in files if not _SHARD.fullmatch(file)]:
        why = f"{bad[0]!r:.99} is no .safetensors file of this directory"
        raise BadFileError(f"model {path}: {why}; fetch the file again")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found = _read_file(directory / file)
        if odd := {name for name, place in index.items() if place == file} ^ found.keys():
            why = f"{file} and the index disagree on tensor {min(odd)!r}"
            raise BadFileError(f"model {directory}: {why}; fetch both again")
        tensors |= found
    return tensors


def _read_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, whose data must be exactly theirs, without an overlap or a hole."""
    where = f"model {path}"
    if not path.is_file():
        never = "files of other kinds, such as pytorch_model.bin, may run code when they are read, so they never are"
        raise BadFileError(f"{where}: there is no such file; fetch or make it ({never})")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8).ljust(8, b"\xff"), "little")
        room = os.fstat(file.fileno()).st_size - 8 - length
        if room < 0 or length > _MAX_HEADER:
            raise BadFileError(f"{where}: its header claims {length} bytes; fetch the file again")
        header = parse_json(file.read(length), f"the header of {where}")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise BadFileError(f"{where}: {len(header)} tensors are more than {MAX_TENSORS}; take another model")
    tensors, ranges, at = {}, [], 0
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
                0 < _size(kind, shape) == end - begin
            ):
                tensors[name] = plain_tensor(path, 8 + length + begin, tuple(shape), kind)
                ranges.append((begin, end, f"tensor {name!r}"))
            case _:
                raise BadFileError(f"{where}: tensor {name!r} cannot be {entry!r:.200}; fetch the file again")
    for begin, end, name in [*sorted(ranges), (room, room, "the end")]:
        if begin != at:
            raise BadFileError(f"{where}: {name} is at byte {begin} of the data, not at {at}; fetch the file again")
        at = end
    return tensors


def _size(kind: str, shape: Sequence) -> int:
    if len(shape) > _MAX_DIMS or not all(type(n) is int and n > 0 for n in shape):
        return 0
    return math.prod(shape) * _BYTES.get(kind, 0)


def write_safetensors(directory: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write tensors of the kinds F32, F16 and BF16 to one file, one in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + _size(tensor.kind, tensor.shape)
        header[name] = {"dtype": tensor.kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with open(directory / _ONE, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read(), PLAIN[tensor.kind]).view(np.uint8).data)
    sync(directory / _ONE)
