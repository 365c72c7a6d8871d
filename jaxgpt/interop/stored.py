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
