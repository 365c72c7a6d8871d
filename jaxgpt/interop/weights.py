"""Parameters out of stored tensors and back into them, as the rows of a family declare.

Every name and shape is compared with the configuration before anything is read. A parameter is read when its turn comes
and goes to its devices in parts, so the host holds one at a time and no device holds a whole that is cut over several.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxgpt.errors import BadFileError, note
from jaxgpt.interop.families import Family, Row
from jaxgpt.interop.stored import StoredTensor, aligned
from jaxgpt.model import Transformer, axis_sizes, parameter_name
from jaxgpt.model_config import ModelConfig
from jaxgpt.sharding import place_shapes

_FLOATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Layout:
    """Where the parameters of one model lie in files of one kind."""

    family: Family
    config: ModelConfig
    gguf: bool

    def stored_name(self, row: Row) -> str:
        return row.gguf if self.gguf else row.hf

    def tensors(self, names: set[str]) -> dict[str, list[Row]]:
        """Stored name -> the rows that share it, for the parameters called `names` (those of one layer)."""
        found: dict[str, list[Row]] = {}
        for row in self.family.rows:
            if row.name in names:
                found.setdefault(self.stored_name(row), []).append(row)
        return found

    def axes(self, row: Row) -> list[str]:
        """The letters of each axis of the stored tensor; that of one expert where each has its own."""
        axes = row.stored.split()
        if not self.gguf and self.family.transposed and row.name.endswith("kernel"):
            axes = axes[::-1]
        return axes[1:] if "{e}" in self.stored_name(row) else axes

    def sizes(self) -> dict[str, int]:
        return axis_sizes(self.config) | {"V": self.config.vocab_size or 0}

    def shape(self, row: Row) -> tuple[int, ...]:
        sizes = self.sizes()
        return tuple(math.prod(sizes[letter] for letter in axis) for axis in self.axes(row))

    def joined_axis(self, row: Row) -> int:
        """The axis along which the rows of one tensor lie behind each other: the one that is not D."""
        return next(i for i, axis in enumerate(self.axes(row)) if axis != "D")

    def whole_shape(self, rows: list[Row]) -> tuple[int, ...]:
        shape = list(self.shape(rows[0]))
        if len(rows) > 1:
            axis = self.joined_axis(rows[0])
            shape[axis] = sum(self.shape(row)[axis] for row in rows)
        return tuple(shape)

    def each(self, template: str) -> Iterator[tuple[str, int | None, int | None]]:
        layers = range(self.config.n_layers) if "{}" in template else [None]
        experts = range(self.config.n_experts) if "{e}" in template else [None]
        return ((template.format(layer, e=expert), layer, expert) for layer in layers for expert in experts)

    def read(self, tensors: Mapping[str, StoredTensor], row: Row, rows: list[Row], layer: int | None) -> np.ndarray:
        """The parameter of one layer, in our axes; a view of what was read where that is possible."""
        template = self.stored_name(row)
        if "{e}" in template:
            experts = range(self.config.n_experts)
            stored = np.stack([tensors[template.format(layer, e=expert)].read() for expert in experts])
        else:
            stored = tensors[template.format(layer)].read()
        if len(rows) > 1:
            axis = self.joined_axis(row)
            start = sum(self.shape(other)[axis] for other in rows[: rows.index(row)])
            stored = stored[(slice(None),) * axis + (slice(start, start + self.shape(row)[axis]),)]
        axes = ("E" if "{e}" in template else "") + "".join(self.axes(row))
        array = self._order(stored.reshape([self.sizes()[letter] for letter in axes]), row, axes, reading=True)
        return np.einsum(f"{axes}->{row.axes}", array)

    def write(self, parameters: Callable[[str], np.ndarray], rows: list[Row], expert: int | None) -> np.ndarray:
        """A stored tensor of one layer, from `parameters(name)`."""
        parts = []
        for row in rows:
            axes = ("E" if expert is not None else "") + "".join(self.axes(row))
            array = parameters(row.name)
            if row.axes[0] == "V":
                array = array[: self.config.vocab_size]
            array = self._order(np.einsum(f"{row.axes}->{axes}", array), row, axes, reading=False)
            parts.append((array if expert is None else array[expert]).reshape(self.shape(row)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.joined_axis(rows[0]))

    def _order(self, array: np.ndarray, row: Row, axes: str, *, reading: bool) -> np.ndarray:
        """GGUF's order of the rows of q and k, and its norms, which hold 1 + scale."""
        if self.gguf and self.config.norm_plus_one and row.name.endswith("norm.scale"):
            return array - np.float32(1) if reading else array + np.float32(1)
        if self.gguf and self.family.interleaved and row.name.startswith(("attention.query.", "attention.key.")):
            half = self.config.key_dim // 2
            pairs = np.arange(2 * half).reshape((half, 2) if reading else (2, half)).T.ravel()
            return np.take(array, pairs, axes.index("K"))
        return array


def _names(config: ModelConfig) -> set[str]:
    shapes = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    return {parameter_name(path).removeprefix("layers.") for path in paths}


def check_tensors(layout: Layout, tensors: dict[str, StoredTensor], where: str) -> None:
    """Raise BadFileError, naming the tensor, unless exactly those of the configuration are there in their shapes.
    Tensors that older files hold although they are computed, or tied to another, are counted on standard error."""
    left = dict(tensors)
    for template, rows in layout.tensors(_names(layout.config)).items():
        wanted = layout.whole_shape(rows)
        for name, _, _ in layout.each(template):
            found = left.pop(name, None)
            if found is None:
                raise BadFileError(f"{where}: there is no tensor {name}; restore the file, or mend its configuration")
            if found.shape != wanted or found.kind not in _FLOATS:
                what = f"tensor {name} is {found.kind}{list(found.shape)} and must be a float{list(wanted)}"
                raise BadFileError(f"{where}: {what}; restore the file, or mend its configuration")
    tied = {"lm_head.weight", "output.weight"} if layout.config.tie_embeddings else set()
    unused = [name for name in left if name in tied or re.fullmatch(layout.family.buffers, name)]
    if unused:
        note(f"{where}: {len(unused)} tensors are computed here, such as {unused[0]!r}")
    unknown = left.keys() - {*unused, *["rope_freqs.weight"] * layout.gguf}
    if unknown:
        what = f"{len(unknown)} tensors are unknown to {layout.family.model_type}, such as {min(unknown)!r}"
        raise BadFileError(f"{where}: {what}; this model has parts that are not implemented")


def load_parameters(abstract: Any, layout: Layout, tensors: dict[str, StoredTensor], where: str) -> Any:
    """`abstract` (`jax.eval_shape` of a Transformer, stacked or not) with the parameters of a file, on its devices.
    Raises BadFileError for a value that is not finite."""
    rows_of = {row.name: (row, rows) for rows in layout.tensors(_names(layout.config)).values() for row in rows}

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        name = parameter_name(path)
        bare = re.sub(r"^layers\.(\d+\.)?", "", name)
        layer = re.match(r"layers\.(\d+)\.", name)
        row, rows = rows_of[bare]
        layers = [int(layer[1])] if layer else list(range(layout.config.n_layers)) if bare != name else [None]
        array = layout.read(tensors, row, rows, layers[0])
        if array.shape != leaf.shape or not array.flags.c_contiguous or array.dtype != leaf.dtype:
            first, array = array, aligned(leaf.shape, leaf.dtype)  # rows that round the vocabulary up stay 0
            for i, number in enumerate(layers):
                value = layout.read(tensors, row, rows, number) if i else first
                target = array if number is None or layer else array[i]
                target[: len(value)] = value
        if not (np.isfinite(array.min()) and np.isfinite(array.max())):
            raise BadFileError(f"{where}: parameter {name} is not finite; restore the file")
        return jax.device_put(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(fill, place_shapes(abstract))


def stored_tensors(model: Transformer, layout: Layout) -> dict[str, StoredTensor]:
    """Every tensor of the file that `layout` describes, in float32, taken from the devices when it is read."""
    leaves = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    stacked = not isinstance(model.layers, tuple)

    def parameter(layer: int | None, name: str) -> np.ndarray:
        if layer is None:
            return np.asarray(leaves[name])
        return np.asarray(leaves[f"layers.{name}"][layer] if stacked else leaves[f"layers.{layer}.{name}"])

    found = {}
    for template, rows in layout.tensors(_names(layout.config)).items():
        for name, layer, expert in layout.each(template):
            read = functools.partial(layout.write, functools.partial(parameter, layer), rows, expert)
            found[name] = StoredTensor(layout.whole_shape(rows), "F32", read)
    return found
