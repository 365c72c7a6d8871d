"""Products with the matrix first: the plain ones, in the order that the compiler is told."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.kernels.matrix_first import matrix_first

EQUATIONS = [("BTD", "HKD", "BTHK"), ("BTHK", "DHK", "BTD"), ("BTD", "FD", "BTF"), ("BTD", "VD", "BTV")]
SIZES = dict(T=1, D=96, H=4, K=24, F=192, V=256)


def inputs(axes: str, in_axes: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = SIZES | {"B": rows}
    kernel, x = ([sizes[letter] for letter in letters] for letters in (axes, in_axes))
    return random.standard_normal(kernel, np.float32), random.standard_normal(x, np.float32)


@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_it_is_the_plain_product(equation: tuple[str, str, str], rows: int) -> None:
    in_axes, axes, out_axes = equation
    kernel, x = inputs(axes, in_axes, rows)
    found = jax.jit(matrix_first, static_argnums=(2, 3, 4))(x, kernel, *equation)
    expected = np.einsum(f"{in_axes},{axes}->{out_axes}", x.astype(float), kernel.astype(float))
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_compiled_product_has_the_matrix_first(equation: tuple[str, str, str]) -> None:
    """Else it is half as fast."""
    kernel, x = inputs(equation[1], equation[0], 8)

    def in_a_network(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(matrix_first(jnp.tanh(x), kernel, *equation)) * 2

    text = jax.jit(in_a_network).lower(kernel, x).compile().as_text()
    (shape,) = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    outputs = int(np.prod([SIZES[letter] for letter in equation[2][2:]]))
    assert int(shape.split(",")[0]) == outputs, text


@pytest.mark.parametrize("rows", [5, 8, 13, 24, 33])
def test_a_rows_bits_are_the_same_in_every_place(rows: int) -> None:
    """Also beside other rows: what an engine promises for one number of slots."""
    kernel, x = inputs("FD", "BTD", rows)
    product = jax.jit(matrix_first, static_argnums=(2, 3, 4))
    whole = np.asarray(product(x, kernel, "BTD", "FD", "BTF"))
    for shift in range(1, rows):
        moved = product(np.roll(x, shift, 0), kernel, "BTD", "FD", "BTF")
        np.testing.assert_array_equal(np.roll(moved, -shift, 0), whole)
    alone = product(np.where(np.arange(rows)[:, None, None] == 2, x, 7), kernel, "BTD", "FD", "BTF")
    np.testing.assert_array_equal(alone[2], whole[2])
