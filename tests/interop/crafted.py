"""Model files byte by byte, so that any part of them can be wrong; one small Llama in both formats; a time limit."""

import contextlib
import json
import math
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

U8, U32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = 0, 4, 6, 7, 8, 9, 10, 11, 12  # types of values in GGUF
F32_TENSOR, Q8_0_TENSOR = 0, 8


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# GGUF


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def setting(key: str | bytes, value: Any) -> bytes:
    """A key and its value; bytes are the type and the value as they stand."""
    kind, raw = (None, value) if isinstance(value, bytes) else _value(value)
    return text(key) + (b"" if kind is None else struct.pack("<I", kind)) + raw


def _value(value: Any) -> tuple[int, bytes]:
    match value:
        case None | dict():  # a byte, of which there is none among the settings
            return U8, b"\0"
        case bool():
            return BOOL, struct.pack("<?", value)
        case int() if 0 <= value < 2**32:
            return U32, struct.pack("<I", value)
        case int():
            return (U64, struct.pack("<Q", value % 2**64)) if value > 0 else (I64, struct.pack("<q", value))
        case float():
            return (
                (F32, struct.pack("<f", value)) if not 1e38 < abs(value) < np.inf else (F64, struct.pack("<d", value))
            )
        case str():
            return STRING, text(value)
    values = [_value(each) for each in value]
    kind = values[0][0] if values else U32
    return ARRAY, struct.pack("<IQ", kind, len(values)) + b"".join(raw for _, raw in values)


def info(name: str | bytes, shape: tuple[int, ...], kind: int = F32_TENSOR, offset: int = 0, **other: int) -> bytes:
    """What the list of tensors says of one; `dimensions=` for another number of them than there are."""
    head = text(name) + struct.pack("<I", other.get("dimensions", len(shape)))
    return head + struct.pack(f"<{len(shape)}QIQ", *shape[::-1], kind, offset)


def gguf_file(
    settings: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    **counts: int,
) -> bytes:
    """A file; `n_settings=` and `n_tensors=` for other counts than are true."""
    n_tensors, n_settings = counts.get("n_tensors", len(infos)), counts.get("n_settings", len(settings))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_settings) + b"".join(settings + infos)
    return head + b"\0" * (-len(head) % alignment) + data


# Safetensors


def declared(shape: list[Any], begin: Any = 0, end: Any = None, kind: Any = "F32") -> dict[str, Any]:
    return {
        "dtype": kind,
        "shape": shape,
        "data_offsets": [begin, begin + 4 * math.prod(shape) if end is None else end],
    }


def safetensors_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


# One model


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "vocab_size": 40, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 1e4,
    "eos_token_id": 1,
}  # fmt: skip
METADATA = {"format": "pt", "note": "what no reader looks at " * 9}
SETTINGS: dict[str, Any] = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 32,
    "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.feed_forward_length": 64,
    "llama.context_length": 64, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 8,
}  # fmt: skip
_LAYER = {  # shape, and the names in both formats
    "self_attn.q_proj": ((32, 32), "attn_q"), "self_attn.k_proj": ((16, 32), "attn_k"),
    "self_attn.v_proj": ((16, 32), "attn_v"), "self_attn.o_proj": ((32, 32), "attn_output"),
    "mlp.gate_proj": ((64, 32), "ffn_gate"), "mlp.up_proj": ((64, 32), "ffn_up"),
    "mlp.down_proj": ((32, 64), "ffn_down"), "input_layernorm": ((32,), "attn_norm"),
    "post_attention_layernorm": ((32,), "ffn_norm"),
}  # fmt: skip


def tensors(vocabulary: int = 40) -> dict[str, tuple[str, np.ndarray]]:
    """Name in safetensors -> name in GGUF, and values."""
    shapes = {
        "model.embed_tokens.weight": ((vocabulary, 32), "token_embd.weight"),
        "model.norm.weight": ((32,), "output_norm.weight"),
        "lm_head.weight": ((vocabulary, 32), "output.weight"),
    }
    for i in range(2):
        named = {f"model.layers.{i}.{hf}.weight": (shape, f"blk.{i}.{n}.weight") for hf, (shape, n) in _LAYER.items()}
        shapes |= named
    draw = np.random.default_rng(0)
    return {hf: (name, draw.normal(size=shape).astype(np.float32) * 0.1) for hf, (shape, name) in shapes.items()}


def write_directory(directory: Path, shards: int = 1, **changes: Any) -> Path:
    """config.json and the tensors, in one file or in several with an index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA | changes))
    named = {name: array for name, (_, array) in tensors(changes.get("vocab_size", 40)).items()}
    files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)] if shards > 1 else []
    for i, file in enumerate(files or ["model.safetensors"]):
        header: dict[str, Any] = {"__metadata__": METADATA}
        data = b""
        for name in list(named)[i::shards]:
            header[name] = declared(list(named[name].shape), len(data))
            data += named[name].tobytes()
        (directory / file).write_bytes(safetensors_file(header, data))
    if files:
        places = {name: files[i % shards] for i, name in enumerate(named)}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": METADATA, "weight_map": places})
        )
    return directory


def gguf_parts(changes: dict[str, Any] | None = None, vocabulary: int = 40) -> tuple[list[bytes], list[bytes], bytes]:
    """The settings, the list of tensors and their data: q8_0 where a tensor is a matrix, of random bytes."""
    settings = [setting(key, value) for key, value in (SETTINGS | (changes or {})).items() if value is not None]
    infos, data = [], b""
    for name, array in tensors(vocabulary).values():
        raw = array.tobytes()
        if array.ndim == 2 and "embd" not in name:
            scale = np.full((array.size // 32, 1), 0.001, np.float16).view(np.uint8)
            raw = np.hstack([scale, (array * 100).astype(np.int8).reshape(-1, 32).view(np.uint8)]).tobytes()
        infos.append(info(name, array.shape, F32_TENSOR if len(raw) == 4 * array.size else Q8_0_TENSOR, len(data)))
        data += raw + b"\0" * (-len(raw) % 32)
    return settings, infos, data


def write_gguf_file(path: Path, changes: dict[str, Any] | None = None, vocabulary: int = 40) -> Path:
    path.write_bytes(gguf_file(*gguf_parts(changes, vocabulary)))
    return path
