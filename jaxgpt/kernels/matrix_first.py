"""Products of few rows with a large matrix, on a CPU: the matrix comes first. Letters: `jaxgpt/sharding.py`."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxgpt.sharding import out_sharding


def matrix_first(x: Array, kernel: Array, in_axes: str, kernel_axes: str, out_axes: str) -> Array:
    """Rows [B, T, in] times a kernel [out, in]: float32 [B, T, out]. XLA's library for CPUs repacks the second factor
    of a product: here the rows, so that the matrix is read once. 1.95 times as fast for 8 rows of SmolLM2's products,
    2.2 for 16, 1.8 for 32, 1.0 for 1 and 64. Rows come last: with both axes first the compiler turns it around."""
    outputs, rows_last = f"{out_axes[2:]}BT", jnp.moveaxis(x, (0, 1), (-2, -1))
    options: Any = dict(preferred_element_type=jnp.float32, out_sharding=out_sharding(outputs))
    y = jnp.einsum(f"{kernel_axes},{in_axes[2:]}BT->{outputs}", kernel, rows_last, **options)
    return jnp.moveaxis(y, (-2, -1), (0, 1))
