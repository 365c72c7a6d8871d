"""GGUF against the `gguf` package: what each type of number means, and files of every kind."""

import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from crafted import gguf_file, info, setting, text
from gguf import GGMLQuantizationType, quants

from jaxgpt.interop.gguf import read_gguf

QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
SHAPES = [(256,), (3, 512), (2, 3, 256), (2, 1, 3, 512), (1025, 256), (1024, 256), (1, 600_064)]
"""Of one dimension to four; above, at and below the 262,144 numbers that are expanded at a time."""


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_numbers_are_those_of_the_gguf_package(name: str, tmp_path: Path) -> None:
    draw, kind = np.random.default_rng(0), GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    blocks = {}
    for i, shape in enumerate(SHAPES):
        blocks[f"t{i}"] = draw.integers(0, 256, quants.quant_shape_to_byte_shape(shape, kind), np.uint8)
        writer.add_tensor(f"t{i}", blocks[f"t{i}"], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_gguf(tmp_path / "m.gguf")[1]
    assert list(tensors) == list(blocks)
    for shape, (tensor, raw) in zip(SHAPES, blocks.items(), strict=True):
        found = tensors[tensor]
        values = found.read()
        assert (found.shape, found.kind, values.shape, values.dtype) == (shape, name, shape, np.float32)
        assert values.ctypes.data % 64 == 0  # or JAX would copy it
        with np.errstate(all="ignore"):  # of random scales some are infinite or NaN
            np.testing.assert_array_equal(values, quants.dequantize(raw, kind))
        assert np.isfinite(values).any() and len(np.unique(values)) > 15


@pytest.mark.parametrize(("name", "kind"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_plain_numbers_come_as_they_are(name: str, kind: Any, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=shape).astype(kind) for shape in ((7,), (3, 5), (2, 3, 5), (2, 1, 3, 5), (1,))]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for i, array in enumerate(arrays):
        raw = array if kind != ml_dtypes.bfloat16 else array.view(np.uint8)
        writer.add_tensor(f"t{i}", raw, raw_dtype=GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for array, found in zip(arrays, read_gguf(tmp_path / "m.gguf")[1].values(), strict=True):
        values = found.read()
        assert (found.kind, values.dtype) == (name, kind)
        np.testing.assert_array_equal(values, array)


def test_settings_of_every_type_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    wanted: dict[str, Any] = {"general.architecture": "llama"}
    numbers = {
        "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.125, "float64": 1e300, "bool": True,
    }  # fmt: skip
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(f"one.{name}", value)
        kind = gguf.GGUFValueType[name.upper()]
        writer.add_key_value(f"two.{name}", [value, 0, value], gguf.GGUFValueType.ARRAY, sub_type=kind)
        wanted |= {f"one.{name}": value, f"two.{name}": [value, 0, value]}
    writer.add_string("text", "é\n")
    writer.add_array("texts", ["a", "", "é\n"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    found = read_gguf(tmp_path / "m.gguf")[0]
    assert found == wanted | {"text": "é\n", "texts": ["a", "", "é\n"]}
    assert [type(found[key]) for key in wanted] == [type(value) for value in wanted.values()]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
def test_versions_and_alignments(version: int, alignment: int, tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32)
    pad = -4 * 5 % alignment
    data = values[:5].tobytes() + b"\xff" * pad + values[5:].tobytes()
    infos = [info("a", (5,)), info("b", (7,), offset=20 + pad)]
    settings = [setting("general.alignment", alignment)] * (alignment != 32)
    (tmp_path / "m.gguf").write_bytes(gguf_file(settings, infos, data, version=version, alignment=alignment))
    found = read_gguf(tmp_path / "m.gguf")[1]
    np.testing.assert_array_equal(found["a"].read(), values[:5])
    np.testing.assert_array_equal(found["b"].read(), values[5:])


def test_the_largest_vocabulary_that_is_known_fits(tmp_path: Path) -> None:
    tokens, merges = [f"token{i}" for i in range(262_144)], [f"to{i} ken" for i in range(514_906)]
    scores, types = struct.pack("<262144f", *[0.5] * 262_144), struct.pack("<262144i", *[1] * 262_144)
    settings = [
        setting("tokens", struct.pack("<IIQ", 9, 8, len(tokens)) + b"".join(map(text, tokens))),
        setting("scores", struct.pack("<IIQ", 9, 6, len(tokens)) + scores),
        setting("types", struct.pack("<IIQ", 9, 5, len(tokens)) + types),
        setting("merges", struct.pack("<IIQ", 9, 8, len(merges)) + b"".join(map(text, merges))),
    ]
    (tmp_path / "m.gguf").write_bytes(gguf_file(settings, []))
    found = read_gguf(tmp_path / "m.gguf")[0]
    assert found["tokens"] == tokens and found["merges"] == merges and set(found["types"]) == {1}


def test_a_file_that_is_dropped_is_closed(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_file([], [info("a", (2,))], b"\0" * 8))
    opened = len(list(Path("/proc/self/fd").iterdir()))
    _, found = read_gguf(tmp_path / "m.gguf")
    found["a"].read()
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
