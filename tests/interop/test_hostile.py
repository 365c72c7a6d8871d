"""Damaged and hostile model files: each ends in one line that names what is wrong, in little time and memory."""

import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made
import made_gguf
import numpy as np
import pytest
from crafted import (
    LLAMA,
    at_most,
    declared,
    gguf_file,
    gguf_parts,
    info,
    safetensors_file,
    setting,
    tensors,
    text,
    write_directory,
    write_gguf_file,
)

from jaxgpt.config import TokenizerConfig
from jaxgpt.errors import BadFileError
from jaxgpt.interop.gguf import read_gguf
from jaxgpt.interop.load import load_model
from jaxgpt.interop.tensors import read_safetensors
from jaxgpt.tokenizer import train_tokenizer

HUGE = 2**60


@pytest.fixture(autouse=True)
def one_device_mesh(mesh_of: Callable) -> Iterator[None]:
    with mesh_of():
        yield


def assert_refused(path: Path, message: str) -> None:
    began = time.process_time()
    with pytest.raises(BadFileError, match=message) as caught:
        made.load(path)
    assert time.process_time() - began < 5
    said = str(caught.value)
    assert said.isprintable() and any(sign in said for sign in ("; ", ": model.", "config.json: "))
    assert str(path.parent if path.suffix == ".gguf" else path) in said


# GGUF


def array_of(kind: int, count: int, raw: bytes = b"") -> bytes:
    """The type and the value of a setting that is an array."""
    return struct.pack("<IIQ", 9, kind, count) + raw


def one(data: bytes = b"\0" * 64, **of_info: Any) -> bytes:
    """A file with one tensor, of which something is wrong."""
    return gguf_file([], [info(**({"name": "t", "shape": (2, 8)} | of_info))], data)


def set_to(key: str, value: Any) -> bytes:
    return gguf_file([setting(key, value)], [], alignment=1)


BAD_GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is no GGUF file"),
    "another format": (b"GGML" + b"\0" * 60, "it is no GGUF file"),
    "only the magic": (b"GGUF", "the header: 4 bytes at byte 4 pass the end of the 4 bytes of the file"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648 is not implemented .* little endian"),
    "version 1": (gguf_file([], [], version=1), "version 1 is not implemented"),
    "version 4": (gguf_file([], [], version=4), "version 4 is not implemented"),
    "49 bytes that claim 2^40 arrays": (
        gguf_file([setting("k", array_of(9, 2**40))], [], alignment=1), "setting 'k': values of type 9 are not",
    ),
    "2^60 settings": (gguf_file([], [], n_settings=HUGE), f"it claims 0 tensors and {HUGE} settings, and 100000 may"),
    "more settings than there are": (gguf_file([], [], n_settings=9, alignment=1), "setting 1 of 9: .* pass the end"),
    "2^60 tensors": (gguf_file([], [], n_tensors=HUGE), f"it claims {HUGE} tensors and 0 settings, and 100000 may"),
    "300,000 tensors": (
        gguf_file([], [info(f"t{i}", (1,), offset=32 * i) for i in range(300_000)], b"\0" * 32 * 300_000),
        "it claims 300000 tensors and 0 settings, and 100000 may",
    ),
    "more tensors than there are": (gguf_file([], [info("t", (1,))], n_tensors=3), "tensor 2 of 3: .* pass the end"),
    "a key of 2^60 bytes": (gguf_file([text("k", HUGE)], []), f"setting 1 of 1: {HUGE} bytes at byte 32 pass the end"),
    "a key of 2^64 - 1 bytes": (gguf_file([text("k", 2**64 - 1)], []), "setting 1 of 1: 18446744073709551615 bytes"),
    "a text of 2^60 bytes": (
        set_to("k", struct.pack("<I", 8) + text("v", HUGE)), f"setting 'k': {HUGE} bytes at byte 45 pass the end"
    ),
    "an array of 2^60 bytes": (set_to("k", array_of(0, HUGE)), f"setting 'k': {HUGE} bytes at byte 49 pass the end"),
    "an array of 2^64 - 1 numbers": (set_to("k", array_of(10, 2**64 - 1)), "setting 'k': 147573952589676412920 bytes"),
    "an array of 2^22 + 1 numbers": (
        set_to("k", array_of(1, 2**22 + 1, b"\x90" * (2**22 + 1))), "setting 'k': more than 4194304 numbers and texts"
    ),
    "an array of 2^60 texts": (set_to("k", array_of(8, HUGE)), "setting 'k': 8 bytes at byte 49 pass the end"),
    "arrays in arrays": (
        set_to("k", array_of(9, 1) + b"".join(struct.pack("<IQ", 9, 1) for _ in range(100_000))),
        "setting 'k': values of type 9 are not implemented",
    ),
    "a value of an unknown type": (set_to("k", struct.pack("<II", 13, 0)), "setting 'k': values of type 13 are not"),
    "an array of an unknown type": (set_to("k", array_of(99, 1, b"\0" * 8)), "setting 'k': values of type 99 are not"),
    "a key that is not UTF-8": (set_to(b"\xff\xfe", 1), "setting 1 of 1: the text at byte 32 is not UTF-8"),  # type: ignore[arg-type]
    "a text that is not UTF-8": (
        set_to("k", struct.pack("<I", 8) + text(b"\xed\xa0\x80")), "setting 'k': the text at byte 45 is not UTF-8"
    ),
    "an array's text that is not UTF-8": (set_to("k", array_of(8, 1, text(b"\xc3"))), "setting 'k': .* is not UTF-8"),
    "a tensor's name that is not UTF-8": (one(name=b"\x80"), "tensor 1 of 1: the text at byte 32 is not UTF-8"),
    "a key twice": (gguf_file([setting("k", 1), setting("k", 1)], []), "setting 'k': it occurs twice"),
    "a tensor twice": (gguf_file([], [info("t", (8,))] * 2, b"\0" * 64), "tensor 't': it occurs twice"),
    **{
        f"an alignment of {value!r}": (set_to("general.alignment", value), "'general.alignment': .* no power of two")
        for value in (0, 3, 2**17, 2**31, True, 32.0, "32", [32])
    },
    **{
        f"{count} dimensions": (one(dimensions=count), f"tensor 't': it has {count} dimensions")
        for count in (0, 5, 1000, 10**6, 2**32 - 1)
    },
    "1000 dimensions that are there": (one(shape=(1,) * 1000), "tensor 't': it has 1000 dimensions"),
    "a dimension of zero": (one(shape=(0, 2**40)), r"tensor 't': F32\[0, 1099511627776\] at offset 0 does not fit"),
    "a product of 2^64": (one(shape=(2**32, 2**32)), r"'t': F32\[4294967296, 4294967296\] at offset 0 does not fit"),
    "a product of 2^256": (one(shape=(2**63,) * 4), "'t': F32.* does not fit into the file"),
    "a row that is no block": (one(shape=(1, 16), kind=8), r"tensor 't': Q8_0\[1, 16\] at offset 0 does not fit"),
    "an offset between": (one(offset=4, data=b"\0" * 128), r"tensor 't': F32\[2, 8\] at offset 4 does not fit"),
    "an offset beyond": (one(offset=64), r"tensor 't': F32\[2, 8\] at offset 64 does not fit"),
    "an offset of 2^64 - 32": (one(offset=2**64 - 32), "tensor 't': F32.* at offset 18446744073709551584 does not fit"),
    "data that is cut off": (one(data=b"\0" * 63), r"tensor 't': F32\[2, 8\] at offset 0 does not fit"),
    "tensors that overlap": (
        gguf_file([], [info("b", (16,), offset=32), info("a", (9,))], b"\0" * 96), "tensor 'b': it overlaps 'a'"
    ),
    "two tensors in one place": (gguf_file([], [info("a", (8,)), info("b", (8,))], b"\0" * 32), "'b': it overlaps 'a'"),
    **{
        f"numbers of type {kind}": (one(kind=kind), f"tensor 't': its type {kind} is not one of F32, F16, BF16, Q4_0")
        for kind in (4, 16, 24, 26, 28, 40, 2**32 - 1)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GGUF)
def test_a_bad_gguf_file(case: str, tmp_path: Path) -> None:
    content, message = BAD_GGUF[case]
    assert len(content) == 49 or not case.startswith("49")
    (tmp_path / "m.gguf").write_bytes(content)
    assert_refused(tmp_path / "m.gguf", message)


def test_a_gguf_file_that_ends_anywhere(tmp_path: Path) -> None:
    settings = [setting("a", 1), setting("b", "text"), setting("c", ["x", "yz"]), setting("d", [1, 2])]
    infos = [info("t", (8,)), info("u", (2, 32), kind=8, offset=32)]
    whole = gguf_file(settings, infos, b"\1" * (32 + 68))
    for size in range(len(whole)):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        with pytest.raises(BadFileError, match=r"GGUF file|pass the end of|does not fit into the file"):
            read_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(whole)
    assert [tensor.read().shape for tensor in read_gguf(tmp_path / "m.gguf")[1].values()] == [(8,), (2, 32)]


def renamed(old: str, new: str | None, **changes: Any) -> bytes:
    """The small model with a tensor that has another name, or is declared otherwise."""
    settings, infos, data = gguf_parts()
    place = next(i for i, raw in enumerate(infos) if raw.startswith(text(old)))
    head = infos[place][len(text(old)) :]
    dims = struct.unpack_from("<I", head)[0]
    shape, (kind, offset) = (
        struct.unpack_from(f"<{dims}Q", head, 4)[::-1],
        struct.unpack_from("<IQ", head, 4 + 8 * dims),
    )
    there = {"name": new or old, "shape": shape, "kind": kind, "offset": offset}
    infos[place] = info(**(there | changes))
    return gguf_file(settings, infos, data)


def poisoned(name: str, raw: bytes) -> bytes:
    """The small model with other bytes at the beginning of a tensor."""
    settings, infos, data = gguf_parts()
    (offset,) = (struct.unpack("<Q", each[-8:])[0] for each in infos if each.startswith(text(name)))
    return gguf_file(settings, infos, data[:offset] + raw + data[offset + len(raw) :])


SETTINGS_THERE, INFOS, DATA = gguf_parts()
NAN, INFINITE_SCALE = struct.pack("<f", np.nan), struct.pack("<e", np.inf)
BAD_MODELS: dict[str, tuple[bytes, str]] = {
    "a tensor is missing": (renamed("blk.1.ffn_up.weight", "x"), "there is no tensor blk.1.ffn_up.weight"),
    "no embedding": (renamed("token_embd.weight", "x"), "KeyError: 'token_embd.weight'"),
    "a tensor too many": (
        gguf_file(SETTINGS_THERE, [*INFOS, info("x\x1b[2J", (8,), offset=2**15)], DATA + b"\0" * 2**16),
        r"1 tensors are unknown to llama, such as 'x\\x1b\[2J'",
    ),
    "another shape": (renamed("blk.0.attn_k.weight", None, shape=(8, 64)), r"attn_k.weight is Q8_0\[8, 64\] and must"),
    "NaN": (poisoned("blk.1.attn_norm.weight", NAN), "parameter layers.1.attention_norm.scale is not finite"),
    "an infinite scale": (poisoned("blk.1.ffn_up.weight", INFINITE_SCALE), "layers.1.mlp.up.kernel is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_gguf_file_whose_tensors_are_not_the_models(case: str, tmp_path: Path) -> None:
    content, message = BAD_MODELS[case]
    (tmp_path / "m.gguf").write_bytes(content)
    assert_refused(tmp_path / "m.gguf", message)


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": None}, "general.architecture None is not implemented"),
    ({"general.architecture": "mamba"}, "general.architecture 'mamba' is not implemented; there are"),
    ({"general.architecture": ["llama"]}, r"general.architecture \['llama'\] is not implemented"),
    *(({"llama.block_count": value}, "num_hidden_layers|n_layers") for value in (0, 10**6, 2**32 - 1, "2", 2.0, [2])),
    *(({"llama.embedding_length": value}, "hidden_size|wrong kind|model.d_model") for value in (0, "32", [32], 2.5)),
    ({"llama.embedding_length": 2**31 - 1}, "wrong kind|must be|does not divide"),
    *(({"llama.attention.head_count": value}, "attention_heads|wrong kind|n_heads|must") for value in (0, "4", 5, [4])),
    *(({"llama.attention.head_count_kv": value}, "key_value|n_kv_heads|must be") for value in (0, 3, 2**31, [2])),
    *(({"llama.rope.freq_base": value}, "rope_theta|wrong kind") for value in (0.0, float("nan"), float("inf"), "x")),
    *(({"llama.rope.dimension_count": value}, "rope_fraction|partial|wrong kind") for value in (0, 3, 9, "8", [8])),
    *(({"llama.attention.layer_norm_rms_epsilon": value}, "eps") for value in (-1.0, float("nan"), "x", [1.0])),
    ({"llama.rope.scaling.type": "yarn"}, "yarn"),
    ({"llama.rope.scaling.type": 3}, "rope|wrong kind"),
    *(
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": factor}, "factor|kind")
        for factor in (0.0, "x", [1.0])
    ),
    ({"llama.expert_count": 2**31}, "expert"),
    ({"llama.expert_count": "x"}, "expert"),
    ({"llama.feed_forward_length": 2**31 - 1}, r"ffn_gate.weight is Q8_0\[64, 32\] and must be .*\[2147483647, 32\]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS, ids=[str(changes) for changes, _ in BAD_SETTINGS])
def test_a_gguf_file_with_an_impossible_setting(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert_refused(write_gguf_file(tmp_path / "m.gguf", changes), message)


@pytest.mark.parametrize("factors", [np.ones((1, 4)), np.ones(3), np.ones(4000), np.full(4, np.nan), np.full(4, 7.0)])
def test_a_gguf_file_with_impossible_factors_of_its_rotation(factors: np.ndarray, tmp_path: Path) -> None:
    settings, infos, data = gguf_parts()
    infos.append(info("rope_freqs.weight", factors.shape, offset=len(data)))
    (tmp_path / "m.gguf").write_bytes(gguf_file(settings, infos, data + factors.astype(np.float32).tobytes()))
    assert_refused(tmp_path / "m.gguf", "rope_freqs.weight|rope_factor|factor")


@pytest.mark.parametrize("rotated", [8, 2**28])
def test_factors_of_another_shape_are_not_read(rotated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, infos, data = gguf_parts({"llama.attention.key_length": 2**28, "llama.rope.dimension_count": rotated})
    content = gguf_file(settings, [*infos, info("rope_freqs.weight", (2**27,), offset=len(data))], data)
    with open(tmp_path / "m.gguf", "wb") as file:
        file.write(content)
        file.truncate(len(content) + 2**29)  # takes no place on the disk
    monkeypatch.setattr(np, "fromfile", None)
    assert_refused(tmp_path / "m.gguf", r"rope_freqs.weight has the shape \[134217728\]")


# Safetensors


def two(**second: Any) -> bytes:
    """A file of two tensors, of which the second is declared otherwise."""
    return safetensors_file({"a": declared([2]), "b": declared([2], 8) | second}, b"\0" * 16)


BAD_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "its header claims 18446744073709551615 bytes"),
    "7 bytes": (b"\0" * 7, "its header claims"),
    "a header of 2^60 bytes": (safetensors_file({}, length=HUGE), f"its header claims {HUGE} bytes"),
    "a header of 2^63 bytes": (safetensors_file({}, length=2**63), "its header claims 9223372036854775808 bytes"),
    "a header larger than the file": (safetensors_file({}, length=3), "its header claims 3 bytes"),
    "a header of 17 MB": (safetensors_file(b" " * 2**24 + b"{}"), "its header claims 16777218 bytes"),
    "no header": (safetensors_file(b""), "the header of .* is not valid JSON"),
    "no JSON": (safetensors_file(b"{'a': 1}"), "the header of .* is not valid JSON"),
    "an array": (safetensors_file([]), "the header of .* is not a JSON object"),
    "not UTF-8": (safetensors_file(b'{"\xff": 1}'), "the header of .* is not valid JSON"),
    "UTF-16": (safetensors_file("{}".encode("utf-16")), "the header of .* is not valid JSON"),
    "deep JSON": (safetensors_file(b'{"a":' * 10**6), "the header of .* is not valid JSON: .*recursion"),
    "NaN": (safetensors_file(b'{"a": NaN}'), "the header of .* is not valid JSON: NaN is no JSON"),
    "a number of 5000 digits": (safetensors_file(b'{"a":' + b"9" * 5000 + b"}"), "the header of .* is not valid JSON"),
    "a name twice, in another place": (
        safetensors_file(b'{"a":%b,"a":%b}' % (b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
                                               b'{"dtype":"F32","shape":[2],"data_offsets":[8,16]}'), b"\0" * 16),
        "a key occurs twice",
    ),
    "a name twice, as another type": (
        safetensors_file(b'{"a":%b,"a":%b}' % (b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
                                               b'{"dtype":"I32","shape":[2],"data_offsets":[0,8]}'), b"\0" * 8),
        "a key occurs twice",
    ),
    "a shape twice": (
        safetensors_file(b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "a key occurs twice",
    ),
    "an overlap": (two(data_offsets=[4, 12]), "tensor 'b' is at byte 4 of the data, not at 8"),
    "the same place": (two(data_offsets=[0, 8]), "tensor 'b' is at byte 0 of the data, not at 8"),
    "a hole": (two(data_offsets=[12, 20]), "tensor 'b' is at byte 12 of the data, not at 8"),
    "bytes behind the last": (safetensors_file({"a": declared([2])}, b"\0" * 12), "the end is at byte 12 .* not at 8"),
    "bytes and no tensor": (safetensors_file({}, b"\0"), "the end is at byte 1 of the data, not at 0"),
    "cut off": (safetensors_file({"a": declared([2])}, b"\0" * 7), "the end is at byte 7 of the data, not at 8"),
    "no data": (safetensors_file({"a": declared([2])}), "the end is at byte 0 of the data, not at 8"),
    "another size": (two(shape=[3]), r"tensor 'b' cannot be .*'shape': \[3\]"),
    "another type": (two(dtype="F16"), "tensor 'b' cannot be .*'dtype': 'F16'"),
    "an unknown type": (two(dtype="F33"), "tensor 'b' cannot be .*'dtype': 'F33'"),
    "a type that is no text": (two(dtype=["F32"]), "tensor 'b' cannot be"),
    "a dimension of zero": (two(shape=[0, 2**40], data_offsets=[8, 8]), r"tensor 'b' cannot be .*'shape': \[0, 10995"),
    "a negative dimension": (two(shape=[-1, -2]), r"tensor 'b' cannot be .*'shape': \[-1, -2\]"),
    "a product of 2^64": (two(shape=[2**32, 2**32, 2]), "tensor 'b' cannot be"),
    "a product that is 0 in 64 bits": (two(shape=[2**32, 2**32], data_offsets=[8, 8]), "tensor 'b' cannot be"),
    "a dimension of 10^4000": (two(shape=[10**4000]), "tensor 'b' cannot be"),
    "a dimension that is true": (two(shape=[True, 2]), "tensor 'b' cannot be"),
    "a dimension with a fraction": (two(shape=[2.0]), "tensor 'b' cannot be"),
    "a shape that is text": (two(shape="2"), "tensor 'b' cannot be"),
    "1000 dimensions": (two(shape=[1] * 999 + [2]), "tensor 'b' cannot be"),
    "10^6 dimensions": (two(shape=[1] * 10**6 + [2]), "tensor 'b' cannot be"),
    "an offset before the data": (
        safetensors_file({"a": declared([2], -8, 0), "b": declared([2], 0)}, b"\0" * 8), "'a' is at byte -8 of the data"
    ),
    "an end before its beginning": (two(data_offsets=[16, 8]), "tensor 'b' cannot be"),
    "an offset of 2^64": (two(data_offsets=[2**64, 2**64 + 8]), "tensor 'b' is at byte 18446744073709551616"),
    "three offsets": (two(data_offsets=[8, 12, 16]), "tensor 'b' cannot be"),
    "offsets that are text": (two(data_offsets=["8", "16"]), "tensor 'b' cannot be"),
    "a tensor that is a list": (safetensors_file({"a": [1, 2]}), r"tensor 'a' cannot be \[1, 2\]"),
    "no type": (safetensors_file({"a": {"shape": [2], "data_offsets": [0, 8]}}), "tensor 'a' cannot be"),
    "300,000 tensors": (
        safetensors_file(b"{%b}" % b",".join(b'"%d":{}' % i for i in range(300_000))),
        "300000 tensors are more than 100000",
    ),
    "names that are paths": (
        safetensors_file({"../../x": declared([2]), "/etc/x": declared([2], 8)}, b"\0" * 16), "there is no tensor"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_a_bad_safetensors_file(case: str, tmp_path: Path) -> None:
    content, message = BAD_SAFETENSORS[case]
    write_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_refused(tmp_path, message)


def test_a_safetensors_file_that_ends_anywhere(tmp_path: Path) -> None:
    whole = two()
    for size in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(BadFileError, match=r"its header claims|is at byte|not valid JSON"):
            read_safetensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    assert [tensor.read().shape for tensor in read_safetensors(tmp_path).values()] == [(2,), (2,)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("stored", "parameter"),
    [
        ("model.embed_tokens.weight", "token_embedding"),
        ("model.layers.1.mlp.down_proj.weight", "layers.1.mlp.down.kernel"),
        ("model.layers.0.input_layernorm.weight", "layers.0.attention_norm.scale"),
    ],
)
def test_weights_that_are_not_finite(stored: str, parameter: str, value: float, tmp_path: Path) -> None:
    write_directory(tmp_path)
    path = tmp_path / "model.safetensors"
    array = tensors()[stored][1]
    place = read_safetensors(tmp_path)[stored]
    assert (place.read() == array).all()
    raw = path.read_bytes()
    at = raw.index(array.tobytes()) + 4 * (array.size // 2)
    path.write_bytes(raw[:at] + struct.pack("<f", value) + raw[at + 4 :])
    assert_refused(tmp_path, f"parameter {parameter} is not finite")
    with pytest.raises(BadFileError, match=f"parameter {parameter.replace('1.', '').replace('0.', '')} is not finite"):
        made.load(tmp_path, for_training=True)


def test_other_tensors_than_the_models(tmp_path: Path) -> None:
    arrays = {name: array for name, (_, array) in tensors().items()}
    name = "model.layers.1.self_attn.k_proj.weight"

    def write(changed: dict[str, np.ndarray], kind: str = "F32") -> None:
        header: dict[str, Any] = {}
        data = b""
        for each, array in changed.items():
            header[each] = declared(list(array.shape), len(data), len(data) + array.nbytes)
            header[each]["dtype"] = kind if each == name else "F32"
            data += array.tobytes()
        write_directory(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(safetensors_file(header, data))

    write(arrays)
    made.load(tmp_path)
    write({each: array for each, array in arrays.items() if each != name})
    assert_refused(tmp_path, f"there is no tensor {name}")
    write(arrays | {"model.layers.2.mlp.up_proj.weight": np.zeros(3, np.float32)})
    assert_refused(tmp_path, "1 tensors are unknown to llama, such as 'model.layers.2.mlp.up_proj.weight'")
    write(arrays | {name: arrays[name].T.copy()})
    assert_refused(tmp_path, rf"tensor {name} is F32\[32, 16\] and must be a float\[16, 32\]")
    write(arrays, "I32")
    assert_refused(tmp_path, rf"tensor {name} is I32\[16, 32\] and must be a float")
    write(arrays | {name: arrays[name].astype(np.float64)}, "F64")
    assert_refused(tmp_path, rf"tensor {name} is F64\[16, 32\] and must be a float")


def test_a_tensor_with_and_without_the_prefix(tmp_path: Path) -> None:
    write_directory(tmp_path, model_type="gpt2", architectures=None, n_layer=1, n_embd=8, n_head=1, n_positions=8)
    header = {"h.0.ln_1.bias": declared([8]), "transformer.h.0.ln_1.bias": declared([8], 32)}
    (tmp_path / "model.safetensors").write_bytes(safetensors_file(header, b"\0" * 64))
    assert_refused(tmp_path, r"a tensor is there with and without 'transformer\.'")


def test_a_model_that_is_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 2**24
    header = {name: declared(list(array.shape)) for name, (_, array) in tensors().items()}
    at = 0
    for name in header:
        shape = [vocabulary, 32] if header[name]["shape"][0] == 40 else header[name]["shape"]
        header[name] = declared(shape, at)
        at = header[name]["data_offsets"][1]
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": vocabulary}))
    content = safetensors_file(header)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(content)
        file.truncate(len(content) + at)  # takes no place on the disk
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 2**19, "SC_PAGE_SIZE": 2**12}[name])
    assert_refused(tmp_path, "4 GiB of parameters, and 2 of memory; take a smaller model")


# The index, and what else lies in a directory


def with_index(index: Any) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        raw = index if isinstance(index, bytes) else json.dumps(index).encode()
        (directory / "model.safetensors.index.json").write_bytes(raw)

    return write


def with_place(file: Any, tensor: str = "model.norm.weight") -> Callable[[Path], None]:
    """An index that says another file of a tensor, or of one more."""

    def write(directory: Path) -> None:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        index["weight_map"][tensor] = file
        with_index(index)(directory)

    return write


def without_place(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    with_index(index)(directory)


def without_file(directory: Path) -> None:
    (directory / SECOND).unlink()


FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
BAD_INDEX: dict[str, tuple[Callable[[Path], None], str]] = {
    "no JSON": (with_index(b"{"), r"index\.json is not valid JSON"),
    "not UTF-8": (with_index(b'{"weight_map": {"\xff": "a"}}'), r"index\.json is not valid JSON"),
    "deep": (with_index(b'{"a":' * 10**6), r"index\.json is not valid JSON"),
    "a list": (with_index([]), r"index\.json is not a JSON object"),
    "17 MB": (with_index(b" " * 2**24 + b"{}"), r"index\.json is larger than 16777216 bytes"),
    "no weight_map": (with_index({"metadata": {}}), r"index\.json: its weight_map is no table of names"),
    "weight_map is a list": (with_index({"weight_map": [FIRST]}), r"index\.json: its weight_map is no table of names"),
    "an empty weight_map": (with_index({"weight_map": {}}), "there is no tensor model.embed_tokens.weight"),
    "200,000 tensors": (
        with_index({"weight_map": {f"t{i}": FIRST for i in range(200_000)}}), "its weight_map is no table of names",
    ),
    "a tensor twice": (
        with_index(b'{"weight_map": {"a": "%b", "a": "%b"}}' % (FIRST.encode(), SECOND.encode())), "a key occurs twice"
    ),
    **{
        f"the file {file!r}": (with_place(file), r"index\.json: .* is no \.safetensors file of this directory")
        for file in (
            "../model.safetensors", "/etc/passwd", "/tmp/x.safetensors", "a/b.safetensors", "..", "", ".safetensors",
            "a\0b.safetensors", "\ud800.safetensors", "a\nb.safetensors", "x" * 300 + ".safetensors", "model.bin",
            "pytorch_model.bin", "model.safetensors/", "C:\\a.safetensors", 3, None, ["a"], {"a": 1},
        )
    },
    "a file that is not there": (with_place("other.safetensors"), "and the index disagree on tensor 'model.norm"),
    "a missing file": (without_file, rf"{SECOND}: there is no such file"),
    "a tensor in another file": (with_place(FIRST), "and the index disagree on tensor 'model.norm.weight'"),
    "a tensor that no file has": (with_place(FIRST, "more"), "and the index disagree on tensor 'more'"),
    "a tensor that the index lacks": (without_place, "and the index disagree on tensor 'model.norm.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INDEX)
def test_a_bad_index(case: str, tmp_path: Path) -> None:
    damage, message = BAD_INDEX[case]
    write_directory(tmp_path / "model", shards=3)
    made.load(tmp_path / "model")
    damage(tmp_path / "model")
    assert_refused(tmp_path / "model", message)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "model.pkl"])
def test_pickles_are_refused_by_name(name: str, tmp_path: Path) -> None:
    write_directory(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    never = r"model\.safetensors: there is no such file; fetch or make it \(files of other kinds, .* never are\)"
    assert_refused(tmp_path, never)
    with pytest.raises(BadFileError, match=r"it must be a \.gguf file, or a directory with config"):
        made.load(tmp_path / name)
    (tmp_path / name).unlink()
    assert_refused(tmp_path, never)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    write_directory(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)  # which would be waited for
    with at_most(20), pytest.raises(BadFileError, match="there is no"):
        load_model(tmp_path)


# config.json


BAD_CONFIGS: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "no JSON": (b"{", r"config\.json is not valid JSON"),
    "empty": (b"", r"config\.json is not valid JSON"),
    "a list": (b"[]", r"config\.json is not a JSON object"),
    "not UTF-8": (b'{"model_type": "\xff"}', r"config\.json is not valid JSON"),
    "deep": (b'{"a":' * 10**5, r"config\.json is not valid JSON: .*recursion"),
    "deep lists": (b'{"a":' + b"[" * 10**5, r"config\.json is not valid JSON: .*recursion"),
    "1 MB": (b" " * 2**20 + b"{}", r"config\.json is larger than 1048576 bytes"),
    "a key twice": (b'{"model_type": "llama", "model_type": "llama"}', "a key occurs twice"),
    "NaN": (b'{"model_type": "llama", "rope_theta": NaN}', "NaN is no JSON"),
    "infinity": (b'{"model_type": "llama", "rope_theta": -Infinity}', "-Infinity is no JSON"),
    "a number of 5000 digits": (b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "an unknown model_type": ({"model_type": "lama"}, "model_type 'lama' is not implemented; did you mean llama"),
    "a model_type that is a list": ({"model_type": ["llama"]}, "model_type .* is not implemented"),
    "a model_type of 1 MB": ({"model_type": "llama" * 150_000}, "model_type .* is not implemented"),
    "an unknown architecture": ({"architectures": ["LlamaForEvil"]}, "architectures .*LlamaForEvil"),
    "a quantised model": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not implemented"),
    "10^6 layers": ({"num_hidden_layers": 10**6}, "n_layers is 1000000: it must be between 1 and 1000"),
    "2^31 layers": ({"num_hidden_layers": 2**31}, "num_hidden_layers|n_layers"),
    "3 layers of 2": ({"num_hidden_layers": 3}, r"there is no tensor model\.layers\.2\."),
    "1 layer of 2": ({"num_hidden_layers": 1}, r"9 tensors are unknown to llama, such as 'model\.layers\.1\."),
    "a vocabulary of 2^31 - 1": ({"vocab_size": 2**31 - 1}, r"F32\[40, 32\] and must be a float\[2147483647, 32\]"),
    "a vocabulary of 2^31": ({"vocab_size": 2**31}, "vocab_size"),
    "another vocabulary": ({"vocab_size": 41}, r"embed_tokens.weight is F32\[40, 32\] and must be a float\[41, 32\]"),
    **{
        f"{key} is {value!r:.20}": ({key: value}, f"{key}|{field}|wrong kind")
        for key, field in {
            "num_hidden_layers": "n_layers", "hidden_size": "d_model", "num_attention_heads": "n_heads",
            "num_key_value_heads": "n_kv_heads", "intermediate_size": "d_ff", "vocab_size": "vocab_size",
            "max_position_embeddings": "context_length",
        }.items()
        for value in (0, -1, 2**70, 10**4000, 32.5, "32", True, [], {}, [32])
    },
    "a width of 2^31 - 1": ({"hidden_size": 2**31 - 1, "head_dim": 8}, r"and must be a float\[40, 2147483647\]"),
    **{
        f"rope_theta is {value!r}": ({"rope_theta": value}, "rope_theta|wrong kind")
        for value in (0, -1.0, 1e300, 10**4000, "x", [], {"a": 1})
    },
    "rope_theta is infinite": (json.dumps(LLAMA).replace("10000.0", "1e999").encode(), "rope_theta"),
    **{
        f"the scaling {scaling}": ({"rope_scaling": scaling}, message)
        for scaling, message in (
            ({"rope_type": "yarn", "factor": 2.0}, "yarn"),
            ({"rope_type": ["linear"], "factor": 2.0}, "rope|kind"),
            ({"rope_type": "linear"}, "factor"),
            ({"rope_type": "linear", "factor": 0}, "factor"),
            ({"rope_type": "linear", "factor": 1e300}, "factor"),
            ({"rope_type": "linear", "factor": "2"}, "factor|kind"),
            ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
            (
                {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 64}, "rope_high_frequency 4.0 must be above",
            ),
            ("linear", "kind|rope"),
            ([1], "kind|rope"),
        )
    },
    "an unknown activation": ({"hidden_act": "swoosh"}, "hidden_act.* 'swoosh'"),
    "an activation that is a list": ({"hidden_act": ["silu"]}, "hidden_act|kind"),
    "an epsilon that is text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps|norm_epsilon|kind"),
    "ties that are text": ({"tie_word_embeddings": "false"}, "tie_embeddings"),
    "biases that are not there": ({"attention_bias": True}, r"there is no tensor model.layers.0.self_attn..*bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config(case: str, tmp_path: Path) -> None:
    content, message = BAD_CONFIGS[case]
    write_directory(tmp_path)
    raw = content if isinstance(content, bytes) else json.dumps(LLAMA | content).encode()
    (tmp_path / "config.json").write_bytes(raw)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"sliding_window": value}, "sliding_window|windows|kind") for value in (-1, 5.5, 2**70, "5", [5], {"a": 1})),
        ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, "there is no tensor"),
    ],
)
def test_a_bad_window(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5}
    write_directory(tmp_path, **mistral)
    made.load(tmp_path)
    write_directory(tmp_path, **(mistral | changes))
    assert_refused(tmp_path, message)


# What a user sees


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory and a GGUF file of the small model, complete with a tokenizer."""
    directory = tmp_path_factory.mktemp("complete")
    tokenizer = train_tokenizer(["some words to learn from, " * 50], TokenizerConfig(vocab_size=280))
    write_directory(directory / "hf", vocab_size=280)
    tokenizer.write(directory / "hf")
    write_gguf_file(directory / "m.gguf", made_gguf.tokenizer_settings(tokenizer, 280), 280)
    return directory


def test_the_models_that_are_damaged_below_are_whole(with_tokenizer: Path) -> None:
    for name in ("hf", "m.gguf"):
        assert load_model(with_tokenizer / name).config.n_layers == 2


SAMPLE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "49 bytes": ("m.gguf", lambda raw: BAD_GGUF["49 bytes that claim 2^40 arrays"][0], "setting 'k'"),
    "GGUF cut off": ("m.gguf", lambda raw: raw[: len(raw) // 2], "does not fit into the file"),
    "GGUF not finite": ("m.gguf", lambda raw: raw[:-1100] + b"\xff\x7f" * 500 + raw[-100:], "is not finite"),
    "a name that clears the terminal": (
        "m.gguf", lambda raw: raw.replace(text("llama"), text("\x1b[2J\n"), 1), r"general\.architecture '\\x1b"
    ),
    "safetensors cut off": ("hf/model.safetensors", lambda raw: raw[:-1], "the end is at byte"),
    "safetensors of 2^60": ("hf/model.safetensors", lambda raw: struct.pack("<Q", HUGE) + raw[8:], "its header claims"),
    "safetensors not finite": ("hf/model.safetensors", lambda raw: raw[:-4] + b"\0\0\x80\x7f", "is not finite"),
    "config with 10^6 layers": (
        "hf/config.json", lambda raw: raw.replace(b'layers": 2', b'layers": 1000000'), "n_layers is 1000000"
    ),
    "no config": ("hf/config.json", lambda raw: b"\0", r"config\.json is not valid JSON"),
    "a family of 1 MB": (
        "hf/config.json", lambda raw: raw.replace(b'"llama"', b'"%b"' % (b"x" * 10**6)), "model_type 'xx"
    ),
    "another family": ("hf/config.json", lambda raw: raw.replace(b'"llama"', b'"\\u001b[2J\\n"'), "model_type"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE)
def test_a_user_sees_one_line_and_status_65(case: str, with_tokenizer: Path, command: Callable) -> None:
    name, damage, message = SAMPLE[case]
    path = with_tokenizer / name
    whole = path.read_bytes()
    try:
        assert damage(whole) != whole
        path.write_bytes(damage(whole))
        for verb in ("generate.py", "jaxgpt"):
            model = str(with_tokenizer / name.split("/")[0])
            words = ["--checkpoint", model] if verb == "generate.py" else ["verify", model]
            outcome = command(verb, *words)
            assert outcome.status == 65, outcome
            assert re.search(message, outcome.error) and model in outcome.error
            assert outcome.err.removesuffix("\n").isprintable() and len(outcome.err) < 2100
    finally:
        path.write_bytes(whole)


def test_a_name_cannot_control_the_terminal(command: Callable) -> None:
    outcome = command("generate.py", "--checkpoint", "no\x1b[2Jsuch\u202emodel")
    assert outcome.status == 65 and r"no\x1b[2Jsuch\u202emodel" in outcome.error


def test_a_process_of_its_own_too(run_cli: Callable, with_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(BAD_GGUF["49 bytes that claim 2^40 arrays"][0])
    done = run_cli(["generate.py", "--checkpoint", "m.gguf"])
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith("jaxgpt: error: model m.gguf: setting 'k': ") and done.stderr.count("\n") == 1


# Bounds


MEASURE = """
import json, sys, time
from pathlib import Path
from jaxgpt.errors import BadFileError
from jaxgpt.interop.load import open_model

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = peak(), time.process_time()
    try:
        open_model(Path(path))
        said = "accepted"
    except BadFileError as error:
        said = str(error)[:300]
    print(json.dumps([path, said, time.process_time() - began, before, peak()]))
"""


def sparse(path: Path, content: bytes) -> None:
    """A file that is a terabyte long and takes no place."""
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(2**40)


@pytest.mark.slow
def test_the_worst_files_take_little_time_and_memory(tmp_path: Path) -> None:
    key = struct.Struct("<Q6sIB")
    worst: dict[str, bytes] = {
        "49 bytes": BAD_GGUF["49 bytes that claim 2^40 arrays"][0],
        "numbers": gguf_file([setting("k", array_of(1, 2**24, b"\x90" * 2**24))], []),
        "texts": gguf_file([setting("k", array_of(8, HUGE, text("\u0100") * (2**25 // 10)))], []),
        "settings": gguf_file([key.pack(6, b"%06d" % i, 0, 200) for i in range(100_000)], []),
        "tensors": gguf_file([], [info(f"{i:06}", (1,)) for i in range(100_000)], b"\0" * 64),
    }
    files = [tmp_path / f"{name}.gguf" for name in (*worst, "sparse")]
    for path, content in zip(files, worst.values(), strict=False):
        path.write_bytes(content)
    sparse(files[-1], gguf_file([], [], n_settings=1)[:24] + text(b"", 2**39))
    files += [write_directory(tmp_path / name) for name in ("dictionaries", "sparse")]
    dictionaries = safetensors_file(b'{"a":[' + b'{"":{}},' * (2**24 // 8 - 4) + b"{}]}")
    (files[-2] / "model.safetensors").write_bytes(dictionaries)
    sparse(files[-1] / "model.safetensors", struct.pack("<Q", 2**39))
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, files)], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    for line in out.splitlines():
        path, said, seconds, before, peak = json.loads(line)
        print(f"{Path(path).name}: {seconds:.2f} s, peak {peak:.0f} MB, {before:.0f} before: {said}")
        assert said != "accepted"
        assert seconds < (1 if "49" in path else 10)
        assert peak < 1000
    assert len(out.splitlines()) == len(files)
