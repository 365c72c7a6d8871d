"""GGUF files (version 2 and 3, little endian), read within bounds.

Layout: magic, version, number of tensors and of settings; the settings; name, dimensions (innermost first), type and
offset of each tensor; the tensors' data, aligned. Every length is compared with the bytes that are left before
anything is made of it. The sizes and the arithmetic of types are those of the `gguf` package."""

import itertools
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from jaxgpt.errors import BadFileError
from jaxgpt.interop.tensors import FLOATS, MAX_TENSORS, PLAIN, StoredTensor, aligned, in_parts, plain_tensor

_TYPES = {kind.value: kind for kind in GGMLQuantizationType if kind.name in FLOATS}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _STRING, _ARRAY, _U64 = 4, 8, 9, 10
_MAX_HEADER, _MAX_NUMBERS = 2**25, 2**22
"""Bytes, and numbers and lengths of texts, each of which may take 40 times its bytes in memory. The 262,144 tokens of
Gemma 3 make 7 MB with 786,432 of them; with half a million merges it would be 17 MB with 1.3 million."""


class _Reader:
    """A position in a header that never passes its end."""

    def __init__(self, path: Path, header: bytes) -> None:
        self.path, self.header, self.at, self.n_numbers, self.what = path, header, 4, 0, "the header"

    def fail(self, why: str) -> BadFileError:
        return BadFileError(f"model {self.path}: {self.what}: {why}; fetch the file again")

    def take(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        if size > len(self.header) - self.at:
            end = f"the {len(self.header)} bytes of the file" if len(self.header) < _MAX_HEADER else "32 MiB of header"
            raise self.fail(f"{size} bytes at byte {self.at} pass the end of {end}")
        self.at += size
        return self.at - size

    def numbers(self, kind: int, count: int = 1) -> tuple:
        if kind not in _NUMBERS:
            raise self.fail(f"values of type {kind} are not implemented")
        self.n_numbers += count
        start = self.take(count * struct.calcsize(f"<{_NUMBERS[kind]}"))
        if self.n_numbers > _MAX_NUMBERS:
            raise self.fail(f"more than {_MAX_NUMBERS} numbers and texts come before it")
        return struct.unpack_from(f"<{count}{_NUMBERS[kind]}", self.header, start)

    def texts(self, count: int) -> list[str]:
        """Each behind its length. In one loop, since a vocabulary and its merges are 100,000 texts and more."""
        found, end, header, most = [], self.at, self.header, _MAX_NUMBERS - self.n_numbers
        for i in range(count):
            start = end + 8
            end = start + int.from_bytes(header[end:start], "little")
            if end > len(header) or i == most:
                self.at, self.n_numbers = start - 8, self.n_numbers + i
                self.take(*self.numbers(_U64))  # says which limit was passed
            try:
                found.append(header[start:end].decode())
            except UnicodeDecodeError:
                raise self.fail(f"the text at byte {start} is not UTF-8") from None
        self.at, self.n_numbers = end, self.n_numbers + count
        return found

    def value(self, kind: int) -> Any:
        if kind == _ARRAY:
            kind, count = self.value(_U32), self.value(_U64)
            return self.texts(count) if kind == _STRING else list(self.numbers(kind, count))
        return self.texts(1)[0] if kind == _STRING else self.numbers(kind)[0]

    def names(self, what: str, count: int) -> Iterator[str]:
        """The name of each setting or tensor, behind which the caller reads what it has."""
        seen: set[str] = set()
        for i in range(count):
            self.what = f"{what} {i + 1} of {count}"
            name = self.value(_STRING)
            self.what = f"{what} {name!r}"
            if name in seen:
                raise self.fail("it occurs twice")
            seen.add(name)
            yield name


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The settings of a file, as plain values and lists, and its tensors, in row-major order, read when they are asked
    for. Raises BadFileError, naming the key or tensor, for whatever is damaged, hostile, or not implemented."""
    with open(path, "rb") as file:
        header, size = file.read(_MAX_HEADER), os.fstat(file.fileno()).st_size
    if header[:4] != b"GGUF":
        raise BadFileError(f"model {path}: it is no GGUF file; fetch the file again")
    reader = _Reader(path, header)
    if (version := reader.value(_U32)) not in (2, 3):
        raise reader.fail(f"version {version} is not implemented (versions 2 and 3 are, in little endian)")
    n_tensors, n_settings = reader.numbers(_U64, 2)
    if max(n_tensors, n_settings) > MAX_TENSORS:
        raise reader.fail(f"it claims {n_tensors} tensors and {n_settings} settings, and {MAX_TENSORS} may be there")
    metadata = {key: reader.value(reader.value(_U32)) for key in reader.names("setting", n_settings)}
    return metadata, _read_tensors(reader, n_tensors, metadata.get("general.alignment", 32), size)


def _read_tensors(reader: _Reader, count: int, alignment: Any, file_size: int) -> dict[str, StoredTensor]:
    reader.what = "setting 'general.alignment'"
    if type(alignment) is not int or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise reader.fail(f"{alignment!r} is no power of two up to 65536")
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for name in reader.names("tensor", count):
        if not 1 <= (dims := reader.value(_U32)) <= 4:
            raise reader.fail(f"it has {dims} dimensions")
        found[name] = reader.numbers(_U64, dims)[::-1], reader.value(_U32), reader.value(_U64)
    start = -(-reader.at // alignment) * alignment
    tensors, ranges = {}, []
    for name, (shape, kind, offset) in found.items():
        reader.what = f"tensor {name!r}"
        if kind not in _TYPES:
            raise reader.fail(f"its type {kind} is not one of {', '.join(FLOATS)}")
        block, block_bytes = GGML_QUANT_SIZES[_TYPES[kind]]
        elements = math.prod(shape)
        size = elements // block * block_bytes
        if elements == 0 or shape[-1] % block or offset % alignment or start + offset + size > file_size:
            raise reader.fail(f"{_TYPES[kind].name}{list(shape)} at offset {offset} does not fit into the file")
        ranges.append((offset, offset + size, name))
        tensors[name] = _tensor(reader.path, start + offset, shape, _TYPES[kind])
    for (_, end, name), (begin, _, other) in itertools.pairwise(sorted(ranges)):
        if begin < end:
            reader.what = f"tensor {other!r}"
            raise reader.fail(f"it overlaps {name!r}")
    return tensors


def _tensor(path: Path, start: int, shape: tuple[int, ...], kind: GGMLQuantizationType) -> StoredTensor:
    if kind.name in PLAIN:
        return plain_tensor(path, start, shape, kind.name)
    block, block_bytes = GGML_QUANT_SIZES[kind]

    def expand(values: np.ndarray, stored: np.ndarray) -> None:
        with np.errstate(all="ignore"):  # a damaged scale may be infinite: who loads the tensor looks
            # As one row: `gguf` would loop over groups of 16 in Python.
            values[...] = quants.dequantize(stored.reshape(1, -1), kind).reshape(-1, block)

    def read() -> np.ndarray:
        stored = np.fromfile(path, (np.uint8, block_bytes), math.prod(shape) // block, offset=start)
        values = aligned((len(stored), block), np.float32)
        in_parts(expand, values, stored)
        return values.reshape(shape)

    return StoredTensor(shape, kind.name, read)
