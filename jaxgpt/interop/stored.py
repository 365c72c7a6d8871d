"""A tensor in a model file, whatever the format: known by its shape, read when it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StoredTensor:
    """`read()` gives an array of `shape` in row-major order: float32 or float16 or bfloat16 as stored, float32 for
    quantised data. It reads only then, and nothing stays in memory when the array is dropped.
    """

    shape: tuple[int, ...]
    kind: str
    """The type in the file: F32, F16, BF16, Q4_K ..."""
    read: Callable[[], np.ndarray]


def aligned(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Zeros at a multiple of 64 bytes: JAX takes such an array over on a CPU, and copies any other."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)
