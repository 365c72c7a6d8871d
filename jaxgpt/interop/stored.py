"""A tensor in a model file, whatever the format: known by its shape, read when it is asked for."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

FLOATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
MAX_TENSORS = 100_000  # in a model's files: Qwen3-235B has 37,000, and each takes 2 kB before anything is read

_PART = 2**19  # elements that a core works on at a time
_CORES = ThreadPoolExecutor(_N_CORES := os.cpu_count() or 1)


@dataclass(frozen=True)
class StoredTensor:
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
