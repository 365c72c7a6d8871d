"""Token shards on disk: how they are written so that a kill loses at most one, and how they are opened.

A prepared directory holds, for each split, `train_00000.bin` (little-endian uint16 or uint32 tokens, no header),
`train_00000.offsets.npy` (int64 places where documents begin) and `train_00000.json` (counts and SHA-256; written last,
it marks the shard as finished), then `tokenizer.model` and last `meta.json`. A document is [bos] text [eos]."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from jaxgpt.errors import BadFileError
from jaxgpt.files import read_json, write_atomically
from jaxgpt.tokenizer import Tokenizer

FORMAT = 2
VERIFIED_BYTES = 2**30  # checksums of this many bytes are verified on opening: about a second
LONGEST_JSON = 2**24  # bytes


class TokenStream:
    """All shards of one split as one sequence of tokens, memory-mapped; starts: where documents begin, int64."""

    def __init__(self, shards: Sequence[np.ndarray], starts: np.ndarray) -> None:
        self._tokens, self.starts = pyarrow.chunked_array(shards or [np.empty(0, np.uint16)]), starts

    def __len__(self) -> int:
        return len(self._tokens)

    def window(self, begin: int, length: int) -> np.ndarray:
        """tokens[begin : begin + length], fewer at the end of the stream."""
        return self._tokens.slice(begin, length).to_numpy()


class Corpus(NamedTuple):
    """One tokenized corpus: what the loader reads from."""

    name: str
    directory: Path
    vocab_size: int
    train: TokenStream
    val: TokenStream
    val_bytes: int  # UTF-8 bytes of the held-out text
    val_gzip_bytes: int  # the same text after `gzip -9`: what any compressor gets without learning
    fingerprint: str  # changes when any token does; a resumed run compares it


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def write_shard(stem: Path, encoded: Iterator[tuple[str, np.ndarray]], shard_tokens: int) -> dict[str, Any] | None:
    """Write tokens of documents until `shard_tokens` is reached; returns counts and hashes, None without documents.
    Nothing counts before the side-car is there: after a kill the shard is written again from its first document."""
    content, starts, tokens, text_bytes = io.BytesIO(), [], 0, 0
    for text, ids in encoded:
        starts.append(tokens)
        content.write(ids.tobytes())
        tokens, text_bytes = tokens + len(ids), text_bytes + len(text.encode())
        if tokens >= shard_tokens:
            break
    if not starts:
        return None
    offsets = io.BytesIO()
    np.save(offsets, np.array(starts, np.int64), allow_pickle=False)
    shard: dict[str, Any] = {"tokens": tokens, "documents": len(starts), "bytes": text_bytes}
    for ending, key, written in (("bin", "sha256", content), ("offsets.npy", "offsets_sha256", offsets)):
        write_atomically(Path(f"{stem}.{ending}"), written.getvalue())
        shard[key] = hashlib.sha256(written.getvalue()).hexdigest()
    write_atomically(Path(f"{stem}.json"), json.dumps(shard).encode())
    return shard


def open_tokenized(directory: Path, tokenizer: Tokenizer) -> Corpus:
    """Open a prepared directory and check it: format, tokenizer, sizes, and SHA-256 of the first VERIFIED_BYTES. Raises
    BadFileError when a file is missing, truncated or changed, or belongs to another tokenizer."""
    path = directory / "meta.json"
    meta = read_json(path, LONGEST_JSON)
    if meta.get("format") != FORMAT:
        raise _bad(path, f"is of format {meta.get('format')}, and this version reads {FORMAT}")
    try:
        if meta["tokenizer_sha256"] != tokenizer.sha256:
            theirs, ours = meta["tokenizer_sha256"][:12], tokenizer.sha256[:12]
            remedy = f"set tokenizer.path to {directory / 'tokenizer.model'} or prepare the text again"
            raise BadFileError(f"data {directory}: its tokens come from tokenizer {theirs}, not from {ours}; {remedy}")
        splits, dtype = meta["splits"], token_dtype(tokenizer)
        train, val = (_open_split(directory, split, splits[split]["shards"], dtype) for split in ("train", "val"))
        val_sizes = splits["val"]["bytes"], splits["val"]["gzip_bytes"]
        fingerprint = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
        return Corpus(meta["name"], directory, tokenizer.vocab_size, train, val, *val_sizes, fingerprint)
    except FileNotFoundError as error:
        raise _bad(error.filename, "is missing") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _bad(path, f"has no usable field {error}") from None


def _open_split(directory: Path, split: str, shards: list[dict[str, Any]], dtype: np.dtype) -> TokenStream:
    opened, starts, base = [], [np.empty(0, np.int64)], 0
    for number, shard in enumerate(shards):
        stem = directory / f"{split}_{number:05}"
        path, offsets_path = stem.with_suffix(".bin"), stem.with_suffix(".offsets.npy")
        if path.stat().st_size != shard["tokens"] * dtype.itemsize:
            raise _bad(path, f"has {path.stat().st_size} bytes where meta.json says {shard['tokens']} {dtype} tokens")
        tokens = np.asarray(np.memmap(path, dtype, "r"))  # slices of np.memmap itself are 20 times slower
        offsets = offsets_path.read_bytes()
        if base * dtype.itemsize < VERIFIED_BYTES:
            _verify(path, tokens.data, shard["sha256"])
        _verify(offsets_path, offsets, shard["offsets_sha256"])
        opened.append(tokens)
        starts.append(np.load(io.BytesIO(offsets), allow_pickle=False) + base)
        base += len(tokens)
    return TokenStream(opened, np.concatenate(starts))


def _verify(path: Path, content: bytes | memoryview, sha256: str) -> None:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _bad(path, "its SHA-256 is not the one in meta.json")


def _bad(path: Path, why: str) -> BadFileError:
    return BadFileError(f"data {path}: {why}; restore the directory, or remove it and prepare the text again")
