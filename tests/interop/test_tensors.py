"""Directories of safetensors against the `safetensors` library, in both directions."""

import json
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxgpt.interop.tensors import StoredTensor, read_safetensors, write_safetensors

SHAPES: dict[str, tuple[int, ...]] = {
    "a": (7,),
    "model.b.weight": (3, 5),
    "ü \U0001f642": (2, 3, 4),
    "one": (),
    "e": (300, 40),
}
KINDS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def arrays(kind: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {name: np.asarray(draw.normal(size=shape)).astype(KINDS[kind]) for name, shape in SHAPES.items()}


def as_written(given: dict[str, np.ndarray], kind: str, order: list[str]) -> dict[str, StoredTensor]:
    def read(name: str) -> np.ndarray:
        order.append(name)
        return given[name].astype(np.float32)

    return {name: StoredTensor(array.shape, kind, partial(read, name)) for name, array in given.items()}


def assert_read(directory: Path, given: dict[str, np.ndarray], kind: str) -> None:
    found = read_safetensors(directory)
    assert found.keys() == given.keys()
    for name, array in given.items():
        values = found[name].read()
        assert (found[name].shape, found[name].kind, values.dtype) == (array.shape, kind, KINDS[kind])
        np.testing.assert_array_equal(values, array)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_library_writes_is_read(kind: str, tmp_path: Path) -> None:
    given = arrays(kind)
    save_file(given, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_read(tmp_path, given, kind)
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(given)}
    for place in set(places.values()):
        save_file({name: array for name, array in given.items() if places[name] == place}, tmp_path / place)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_read(tmp_path, given, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_reads_what_is_written(kind: str, tmp_path: Path) -> None:
    given, order = arrays(kind), list[str]()
    write_safetensors(tmp_path, as_written(given, kind, order))
    assert order == list(given)  # each once, when its turn comes
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}  # without which transformers refuses a file
    assert read.keys() == given.keys()
    for name, array in given.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name], array)
    assert_read(tmp_path, given, kind)


def test_numbers_of_other_types_have_a_shape(tmp_path: Path) -> None:
    given = {f"t{i}": np.zeros((2, 3), kind) for i, kind in enumerate("?bBhHiIqQd")}
    save_file(given, tmp_path / "model.safetensors")
    found = read_safetensors(tmp_path)
    assert {name: tensor.shape for name, tensor in found.items()} == dict.fromkeys(given, (2, 3))
    assert sorted(tensor.kind for tensor in found.values()) == sorted(
        ["BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F64"]
    )
