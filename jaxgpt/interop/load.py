"""Any model that jaxgpt can read, a run directory, a Hugging Face directory or a .gguf file; and parameters back into
safetensors. Foreign ones lie where the rows of a family declare.

Every name and shape is compared with the configuration before anything is read. A parameter is read when its turn comes
and goes to its devices in parts: the host holds one at a time, and no device a whole that is cut over several."""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax import Array

from jaxgpt.config import ModelConfig
from jaxgpt.errors import BadFileError, ConfigError, note
from jaxgpt.files import read_json
from jaxgpt.generation.engine import for_decoding
from jaxgpt.interop.configs import Family, Row, read_config, read_gguf_config
from jaxgpt.interop.gguf import read_gguf
from jaxgpt.interop.tensors import FLOATS, StoredTensor, aligned, in_parts, read_safetensors
from jaxgpt.interop.vocabulary import from_gguf
from jaxgpt.model import Transformer, axis_sizes, parameter_name
from jaxgpt.run import TrainedModel, load_run
from jaxgpt.sharding import check_divides, place_shapes
from jaxgpt.tokenizer import Tokenizer, load_tokenizer

Dtype = Literal["float32", "bfloat16"]


class Place(NamedTuple):
    """Where a parameter lies in the stored tensor of one layer, or of one of its experts."""

    row: Row
    stored: str  # the letters of the stored axes
    at: tuple[slice, ...]  # its part of the tensor, which others may share


@dataclass(frozen=True)
class Layout:
    """Where the parameters of one model lie in files of one kind."""

    family: Family
    config: ModelConfig
    gguf: bool = False
    where: str = "model"  # how errors name it

    @cached_property
    def skeleton(self) -> Transformer:
        """The shapes of the parameters, stacked."""
        return jax.eval_shape(lambda: Transformer(self.config, jax.random.key(0)))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How long the axis of each letter is in files."""
        return axis_sizes(self.config) | {"V": self.config.vocab_size or 0}

    @cached_property
    def tensors(self) -> dict[str, list[Place]]:
        """Stored name ({} layer, {e} expert) -> the parameters in it, one behind the other along what is not D."""
        leaves = jax.tree_util.tree_leaves_with_path(self.skeleton)
        there = {parameter_name(path).removeprefix("layers.") for path, _ in leaves}
        found: dict[str, list[Place]] = {}
        for row in self.family.rows:
            if row.name in there:
                name = row.gguf if self.gguf else row.hf
                before = found.setdefault(name, [])
                axes = row.stored.split()
                if not self.gguf and self.family.transposed and row.name.endswith("kernel"):
                    axes.reverse()
                if "{e}" in name:
                    axes = axes[1:]
                at = [slice(0, math.prod(self.sizes[letter] for letter in axis)) for axis in axes]
                along = next((i for i, axis in enumerate(axes) if axis != "D"), 0)
                start = before[-1].at[along].stop if before else 0
                at[along] = slice(start, start + at[along].stop)
                before.append(Place(row, "".join(axes), tuple(at)))
        return found

    def each(self) -> Iterator[tuple[str, str, int | None, int | None]]:
        """Every stored tensor: its name, that in `tensors`, its layer, its expert."""
        for name in self.tensors:
            layers = range(self.config.n_layers) if "{}" in name else [None]
            experts = range(self.config.n_experts) if "{e}" in name else [None]
            yield from ((name.format(layer, e=expert), name, layer, expert) for layer in layers for expert in experts)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of each tensor of a stored name."""
        return tuple(part.stop for part in self.tensors[name][-1].at)

    def part(self, tensor: np.ndarray, place: Place) -> np.ndarray:
        """A parameter in a stored tensor, as a view of that: to be read or to be written."""
        array = tensor[place.at].reshape([self.sizes[letter] for letter in place.stored])
        ours = "".join(letter for letter in place.row.axes if letter in place.stored)
        return np.einsum(f"{place.stored}->{ours}", array)

    def read(self, tensors: Mapping[str, StoredTensor], name: str, place: Place, layer: int | str | None) -> np.ndarray:
        """The parameter of one layer, in our axes; a view of what was read where that is possible."""
        experts = range(self.config.n_experts) if "{e}" in name else [None]
        parts = [self.part(tensors[name.format(layer, e=expert)].read(), place) for expert in experts]
        array = np.stack(parts) if "{e}" in name else parts[0]
        if self.gguf and self.family.interleaved and place.row.name.startswith(("attention.query.", "attention.key.")):
            array = array.reshape(*array.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(array.shape)  # pairs along K
        stores_one_more = self.gguf and self.config.norm_plus_one and place.row.name.endswith("norm.scale")
        return array - np.float32(1) if stores_one_more else array


def check_tensors(layout: Layout, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise BadFileError, naming the tensor, unless exactly those of the configuration are there in their shapes.
    Tensors that older files hold although they are computed, or tied to another, are counted on standard error."""
    left = dict(tensors)
    for name, stored_name, _, _ in layout.each():
        found, wanted = left.pop(name, None), layout.shape(stored_name)
        if found is None or found.shape != wanted or found.kind not in FLOATS:
            other = found and f"tensor {name} is {found.kind}{list(found.shape)} and must be a float{list(wanted)}"
            what = other or f"there is no tensor {name}"
            raise BadFileError(f"{layout.where}: {what}; restore the file, or mend its configuration")
    tied = {"lm_head.weight", "output.weight"} if layout.config.tie_embeddings else set()
    if unused := [name for name in left if name in tied or re.fullmatch(layout.family.buffers, name)]:
        note(f"{layout.where}: {len(unused)} tensors are computed here, such as {unused[0]!r}")
    if unknown := left.keys() - {*unused, *["rope_freqs.weight"] * layout.gguf}:
        what = f"{len(unknown)} tensors are unknown to {layout.family.model_type}, such as {min(unknown)!r}"
        raise BadFileError(f"{layout.where}: {what}; this model has parts that are not implemented")


def load_weights(layout: Layout, tensors: Mapping[str, StoredTensor], *, for_training: bool = False) -> Transformer:
    """The parameters of a model, on the current mesh, as `load_model` says. Raises BadFileError for those that are not
    the configuration's, not finite, or more than the memory holds, ConfigError where the mesh does not fit."""
    check_tensors(layout, tensors)
    check_divides(jax.sharding.get_mesh(), layout.config)
    abstract = layout.skeleton if for_training else jax.eval_shape(for_decoding, layout.skeleton)
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)) / 2**30
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if needed > there and jax.default_backend() == "cpu":
        what = f"{needed:.0f} GiB of parameters, and {there:.0f} of memory"
        raise BadFileError(f"{layout.where}: {what}; take a smaller model")
    place_of = {place.row.name: (name, place) for name, places in layout.tensors.items() for place in places}
    block = abstract.layers[0] if isinstance(abstract.layers, tuple) else abstract.layers

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        name = parameter_name(path)
        _, number, bare = re.split(r"^(?:layers\.)?(?:(\d+)\.)?", name)
        stored_name, place = place_of[bare]
        stacked = for_training and "{}" in stored_name
        layers = range(layout.config.n_layers) if stacked else [number]
        axes = attrgetter(bare.removesuffix(".kernel"))(block).kernel_axes if "kernel" in bare else place.row.axes
        read = (layout.read(tensors, stored_name, place, layer) for layer in layers)
        values = map(partial(np.einsum, f"{place.row.axes}->{axes}"), read)
        array = next(values)
        if array.shape != leaf.shape or not array.flags.c_contiguous or array.dtype != leaf.dtype:
            first, array = array, aligned(leaf.shape, leaf.dtype)  # rows that round the vocabulary up stay 0
            for target, value in zip(array if stacked else [array], itertools.chain([first], values), strict=True):
                in_parts(np.copyto, target[: len(value)], value)
        if not (np.isfinite(array.min()) and np.isfinite(array.max())):
            raise BadFileError(f"{layout.where}: parameter {name} is not finite; restore the file")
        return jax.device_put(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(fill, place_shapes(abstract))


def load_model(
    path: str | Path, *, step: int | None = None, dtype: Dtype | None = None, for_training: bool = False
) -> TrainedModel:
    """The model and tokenizer at `path`, on the current mesh; a run's newest checkpoint, or that of `step`. Parameters
    are ready for decoding: each layer has arrays of its own, matrices in the compute dtype. `for_training` stacks the
    layers and keeps float32. `dtype` is that of the arithmetic; a foreign model has float32 by default. Raises
    BadFileError for files that are damaged, hostile or not implemented, ConfigError where the mesh does not fit."""
    config = (path := Path(path)) / "config.json"
    if not path.is_file() and not config.exists():
        kinds = "a run directory of train.py, a Hugging Face model's directory, or a .gguf file"
        raise BadFileError(f"checkpoint {path}: there is no config.json; name {kinds}")
    is_run = not path.is_file() and "model_type" not in read_json(config, limit=2**20)
    if (unused := dtype if is_run else step) is not None:
        raise ConfigError(f"{'dtype' if is_run else 'step'} {unused}: {path} has its own; leave it out")
    if is_run:
        trained = load_run(path, step)
        return trained if for_training else trained._replace(model=for_decoding(trained.model))
    layout, tensors, open_tokenizer = open_model(path, dtype or "float32")
    tokenizer, model = open_tokenizer(), load_weights(layout, tensors, for_training=for_training)
    if (more := tokenizer.vocab_size - (model.config.vocab_size or 0)) > 0:
        note(f"{path}: {more} tokens of its tokenizer have no embedding")
    return TrainedModel(model.config, tokenizer, model, layout.family.model_type)


def open_model(path: Path, dtype: Dtype = "float32") -> tuple[Layout, dict[str, StoredTensor], Callable[[], Tokenizer]]:
    """Configuration and layout of a foreign model, its tensors, not yet read, and what makes its tokenizer."""
    where = f"model {path}"
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadFileError(f"{where}: it must be a .gguf file, or a directory with config.json")
        settings, tensors = read_gguf(path)
        family, config = read_gguf_config(settings, tensors, where)
        layout = Layout(family, replace(config, dtype=dtype), gguf=True, where=where)
        return layout, tensors, partial(from_gguf, settings, f"tokenizer {path}")
    family, config = read_config(read_json(path / "config.json", limit=2**20), str(path / "config.json"))
    prefix, tensors = family.prefix, read_safetensors(path)
    named = {n if n.startswith((prefix, "lm_head.")) else prefix + n: t for n, t in tensors.items()}
    if len(named) < len(tensors):
        raise BadFileError(f"{where}: a tensor is there with and without {prefix!r}; restore the file")
    return Layout(family, replace(config, dtype=dtype), where=where), named, partial(load_tokenizer, path)


def stored_tensors(model: Transformer, family: Family, kind: str = "F32") -> dict[str, StoredTensor]:
    """Every tensor of the family's safetensors, as `kind`, of stacked layers, fetched from the devices when read."""
    layout = Layout(family, model.config)
    leaves = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}

    def read(stored_name: str, layer: int | None, expert: int | None) -> np.ndarray:
        tensor = np.empty(layout.shape(stored_name), np.float32)
        at = tuple(i for i in (layer, expert) if i is not None)  # all experts' are not fetched for each one
        for place in layout.tensors[stored_name]:
            target, name = layout.part(tensor, place), place.row.name
            target[...] = np.asarray(leaves[f"layers.{name}" if at else name][at])[: len(target)]  # not padding rows
        return tensor

    return {
        name: StoredTensor(layout.shape(stored_name), kind, partial(read, stored_name, layer, expert))
        for name, stored_name, layer, expert in layout.each()
    }
