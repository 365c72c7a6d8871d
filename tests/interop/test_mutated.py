"""Thousands of mutated model files: each loads with the right shapes or is refused in one line."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crafted import LLAMA, SETTINGS, at_most, gguf_file, gguf_parts, write_directory, write_gguf_file
from safetensors import safe_open

from jaxgpt.errors import BadFileError
from jaxgpt.interop.load import check_tensors, load_weights, open_model

EXTREMES = (0, 1, 2, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
"""What the fields of a file's numbers are set to."""
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 4, 8, 32, 64, 1000, 10**6, 2**31, 2**70, 0.5, 5.5, 1e-300, 1e300, "", "x",
    "llama", "linear", "llama3", "longrope", [], {}, [[]], [1], [0.0] * 4, ["sliding_attention"], {"a": 1},
    "../x.safetensors",
]  # fmt: skip


def mutated_bytes(raw: bytes, head: int, draw: random.Random) -> bytes:
    """Flipped bits, numbers set to extremes, pieces gone, doubled or moved, an end cut off; mostly within `head`."""
    out = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(min(head, len(out)) if draw.random() < 0.8 else len(out)) if out else 0
        size = draw.randint(1, 40)
        match draw.randrange(6):
            case 0:
                out[at : at + 1] = bytes([out[at] ^ 1 << draw.randrange(8)]) if out else b""
            case 1:
                width = draw.choice((4, 8))
                out[at : at + width] = (draw.choice(EXTREMES) % 2 ** (8 * width)).to_bytes(width, "little")
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[draw.randrange(len(out) + 1) :][:size]
            case 4:
                out[at : at + size] = out[draw.randrange(len(out) + 1) :][:size]
            case 5:
                del out[draw.choice((at, len(out) - draw.randint(0, min(len(out), 40)))) :]
    return bytes(out)


def mutated_json(value: Any, draw: random.Random) -> Any:
    """A copy where one or two values, at any depth, are gone or are something else."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 2)):
        inner, depth = value, draw.randint(0, 3)
        while isinstance(inner, dict | list) and inner:
            key = draw.choice(list(inner)) if isinstance(inner, dict) else draw.randrange(len(inner))
            if depth == 0 or not isinstance(inner[key], dict | list) or not inner[key]:
                if draw.random() < 0.25:
                    del inner[key]
                else:
                    inner[key] = json.loads(json.dumps(draw.choice(VALUES)))
                break
            inner, depth = inner[key], depth - 1
    return value


def use(path: Path, *, load: bool) -> None:
    """Do with a model file what loading does; all of it only if `load`, since that takes longest."""
    layout, found, _ = open_model(path)
    check_tensors(layout, found)
    assert all(tensor.read().shape == tensor.shape for tensor in found.values())
    if (path / "model.safetensors").exists():
        with safe_open(path / "model.safetensors", "numpy") as opened:  # what the library refuses is refused
            assert set(opened.keys()) == found.keys()
    if load:
        model = load_weights(layout, found)
        assert len(model.layers) == layout.config.n_layers


CONFIGS: list[dict[str, Any]] = [
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7},
    {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", ["gguf", "gguf settings", "safetensors", "index", "config", "config bytes"])
def test_a_mutated_file_loads_or_is_refused(what: str, tmp_path: Path, mesh_of: Callable) -> None:
    """3,000 in all: each has the right shapes or is refused in one line, without a warning or another exception."""
    draw, counts = random.Random(what), {"ok": 0, "refused": 0}
    directory = write_directory(tmp_path / "model", shards=3 if what == "index" else 1)
    file = write_gguf_file(tmp_path / "m.gguf")
    changed = {"safetensors": "model.safetensors", "index": "model.safetensors.index.json"}.get(what, "config.json")
    path = file if "gguf" in what else directory / changed
    whole = path.read_bytes()
    head = struct.unpack("<Q", whole[:8])[0] + 8 if what == "safetensors" else len(gguf_file(*gguf_parts()[:2]))
    for i in range(500):
        if what == "gguf settings":
            write_gguf_file(file, mutated_json(SETTINGS, draw))
        elif what == "config":
            path.write_text(json.dumps(mutated_json(LLAMA | draw.choice(CONFIGS), draw)))
        elif what == "index" and i % 2:
            path.write_text(json.dumps(mutated_json(json.loads(whole), draw)))
        else:
            path.write_bytes(mutated_bytes(whole, head, draw))
        try:
            with mesh_of(), at_most(10):
                use(file if "gguf" in what else directory, load=i % 8 == 0)
            counts["ok"] += 1
        except BadFileError as error:
            assert "\n" not in str(error), error
            counts["refused"] += 1
    assert min(counts.values()) > 20, counts
