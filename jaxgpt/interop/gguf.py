"""GGUF files (version 2 and 3, little endian), read within bounds and written so that other readers take them.

Layout: magic, version, number of tensors and of settings; the settings; name, dimensions (innermost first), type and
offset of each tensor; the tensors' data, aligned. Every count and length in a file is compared with the bytes that are
left before anything is made of it. The arithmetic of quantised types is that of the `gguf` package."""

import itertools
import math
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import BadFileError
from jaxgpt.interop.stored import PLAIN, StoredTensor, TensorWriter, aligned, plain_reader

_TYPES = {  # number in the file -> name, elements in a block, bytes of a block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_GROUP_ELEMENTS = 2**18
"""Quantised numbers that are expanded at a time: what is made on the way then fits into a cache."""


@dataclass(frozen=True)
class Gguf:
    """Settings, as plain values and lists, and tensors, with shapes in row-major order."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Reader:
    """A position in a file that never passes its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.what = path, data, 0, "the header"

    def fail(self, why: str) -> BadFileError:
        return BadFileError(f"model {self.path}: {self.what}: {why}; fetch the file again")

    def room(self, count: int, size: int) -> None:
        if count * size > len(self.data) - self.at:
            raise self.fail(f"{count} items at byte {self.at} pass the end of the file")

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.room(1, size)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.room(length, 1)
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode()
        except UnicodeDecodeError:
            raise self.fail(f"the text at byte {self.at - length} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            if kind == _STRING:
                self.room(count, 8)
                return [self.string() for _ in range(count)]
            if kind not in _SCALARS:
                raise self.fail(f"arrays of type {kind} are not implemented")
            code = f"<{_SCALARS[kind]}"
            self.room(count, struct.calcsize(code))
            values = np.frombuffer(self.data, np.dtype(code), count, self.at).tolist()
            self.at += count * struct.calcsize(code)
            return values
        if kind not in _SCALARS:
            raise self.fail(f"type {kind} is unknown")
        return self.scalar(_SCALARS[kind])


def read_gguf(path: Path) -> Gguf:
    """Settings and tensors of a file; tensors are read when they are asked for.

    Raises BadFileError, naming the key or tensor, for whatever is damaged, hostile, or not implemented."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise BadFileError(f"model {path}: it is no GGUF file; fetch the file again")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(path, data)
    if data[:4] != b"GGUF":
        raise BadFileError(f"model {path}: it is no GGUF file; fetch the file again")
    reader.at = 4
    if (version := reader.scalar("I")) not in (2, 3):
        raise reader.fail(f"version {version} is not implemented (versions 2 and 3 are, in little endian)")
    n_tensors, n_settings = reader.scalar("Q"), reader.scalar("Q")
    reader.room(n_settings, 13)
    metadata: dict[str, Any] = {}
    for _ in range(n_settings):
        reader.what = "the settings"
        key = reader.string()
        reader.what = f"setting {key!r}"
        if key in metadata:
            raise reader.fail("it occurs twice")
        metadata[key] = reader.value(reader.scalar("I"))
    return Gguf(metadata, _read_tensors(reader, n_tensors, metadata.get("general.alignment", 32)))


def _read_tensors(reader: _Reader, count: int, alignment: Any) -> dict[str, StoredTensor]:
    reader.what = "setting 'general.alignment'"
    if type(alignment) is not int or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise reader.fail(f"{alignment!r} is no power of two up to 65536")
    reader.what = "the list of tensors"
    reader.room(count, 32)
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = reader.string()
        reader.what = f"tensor {name!r}"
        if name in found:
            raise reader.fail("it occurs twice")
        dims = reader.scalar("I")
        if not 1 <= dims <= 4:
            raise reader.fail(f"it has {dims} dimensions")
        shape = tuple(reader.scalar("Q") for _ in range(dims))[::-1]
        found[name] = shape, reader.scalar("I"), reader.scalar("Q")
    start = -(-reader.at // alignment) * alignment
    tensors, ranges = {}, []
    for name, (shape, kind, offset) in found.items():
        reader.what = f"tensor {name!r}"
        if kind not in _TYPES:
            raise reader.fail(f"its type {kind} is not one of {', '.join(t[0] for t in _TYPES.values())}")
        type_name, block, block_bytes = _TYPES[kind]
        elements = math.prod(shape)
        size = elements // block * block_bytes
        if elements == 0 or shape[-1] % block or offset % alignment or start + offset + size > len(reader.data):
            raise reader.fail(f"{type_name}{list(shape)} at offset {offset} does not fit into the file")
        ranges.append((offset, offset + size, name))
        tensors[name] = StoredTensor(shape, type_name, _tensor_reader(reader.path, start + offset, size, shape, kind))
    ranges.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(ranges):
        if begin < end:
            reader.what = f"tensor {other!r}"
            raise reader.fail(f"it overlaps {name!r}")
    return tensors


def _tensor_reader(path: Path, start: int, size: int, shape: tuple[int, ...], kind: int) -> Callable[[], np.ndarray]:
    name, block, block_bytes = _TYPES[kind]
    if name in PLAIN:
        return plain_reader(path, start, size, shape, name)

    def read() -> np.ndarray:
        from gguf import GGMLQuantizationType, quants  # 0.1 s, for nothing where there is no GGUF

        blocks, group = size // block_bytes, _GROUP_ELEMENTS // block
        values = aligned((blocks, block), np.float32)
        # A damaged scale may be infinite: who loads the tensor looks.
        with open(path, "rb") as file, np.errstate(all="ignore"):
            file.seek(start)
            for i in range(0, blocks, group):
                row = np.fromfile(
                    file, np.uint8, group * block_bytes if i + group < blocks else (blocks - i) * block_bytes
                )
                # As one row: `gguf` would loop over groups of 16 in Python.
                values[i : i + group] = quants.dequantize(row[None], GGMLQuantizationType[name]).reshape(-1, block)
        return values.reshape(shape)

    return read


def write_gguf(path: Path, metadata: dict[str, Any], tensors: TensorWriter) -> None:
    """Write settings and tensors of the kinds F32, F16, BF16 and Q8_0, one in memory at a time.

    The caller renames: a file that is not complete has no name of its own."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants

    listed = list(tensors)
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            of_value = GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value)
            writer.add_key_value(key, value, of_value)
    for name, shape, kind, _ in listed:
        quantised, plain = GGMLQuantizationType[kind], kind in PLAIN
        stored = shape if plain else quants.quant_shape_to_byte_shape(shape, quantised)
        size = math.prod(shape) // _TYPES[quantised.value][1] * _TYPES[quantised.value][2]
        writer.add_tensor_info(name, stored, np.dtype(np.float32 if plain else np.uint8), size, quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, kind, read in listed:
        values = np.ascontiguousarray(read(), np.float32)
        if kind in PLAIN:
            writer.write_tensor_data(values.astype(PLAIN[kind]).view(np.uint8))
        else:
            writer.write_tensor_data(quants.quantize(values, GGMLQuantizationType[kind]))
    writer.flush()
    for file in writer.fout or ():
        os.fsync(file.fileno())
    writer.close()
