"""tokenizer.json files, through the `tokenizers` library, and how one is made of tokens and merges."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.files import read_json
from jaxgpt.tokenizer.base import Settings, Tokenizer, spelt, surrogate_error

MAX_BYTES = 256 * 2**20


class JsonTokenizer(Tokenizer):
    """A tokenizer.json: byte-level BPE (GPT-2, Llama 3, Qwen), or BPE with byte fallback (Llama 2, Gemma)."""

    file_name = "tokenizer.json"

    def __init__(self, model_bytes: bytes, where: str = "tokenizer", settings: Settings | None = None) -> None:
        """Raises BadFileError when `model_bytes` is no tokenizer of these kinds."""
        try:
            self._model = tokenizers.Tokenizer.from_buffer(model_bytes)
        except Exception as error:  # `tokenizers` raises nothing narrower
            why = f"{type(error).__name__}: {error}"[:120]
            raise BadFileError(f"{where} is not a tokenizer.json ({why}); restore the file") from None
        self._model.no_truncation()  # which some files have from their training
        self._model.no_padding()
        kind, vocabulary = type(self._model.model).__name__, self._model.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        if kind not in ("BPE", "Unigram") or not len(vocabulary) <= size <= 2 * len(vocabulary):
            raise BadFileError(f"{where}: {kind} with ids up to {size} is not implemented; only BPE and Unigram are")
        if kind == "BPE":
            self._model.model.dropout = None
        pieces = [""] * size
        for piece, token in vocabulary.items():
            pieces[token] = piece
        added = self._model.get_added_tokens_decoder()
        special = {token for token, piece in added.items() if piece.special}
        self.byte_level = "ByteLevel" in repr(self._model.decoder)
        read = _from_alphabet if self.byte_level else spelt
        token_bytes = [
            b"" if i in special else piece.encode() if i in added and self.byte_level else read(piece)
            for i, piece in enumerate(pieces)
        ]
        super().__init__(model_bytes, where, pieces, token_bytes, special)
        bytes_of_utf8 = set(range(0xF5)) - {0xC0, 0xC1} if self.byte_level else set()
        self._missing = bytes_of_utf8 - {raw[0] for raw in token_bytes if len(raw) == 1}
        alone, framed = (self._model.encode("a", add_special_tokens=frame).ids for frame in (False, True))
        start = next((i for i in range(len(framed)) if framed[i : i + len(alone)] == alone), 0)
        self.bos_ids = framed[:start]
        self.bos_id = self.bos_ids[0] if self.bos_ids else -1
        self.eos_id = self.pad_id = -1
        self.prefix = " " if self.decode_bytes(alone) == b" a" else ""
        # The library would put a dummy prefix before each part.
        self._spells_space = self._spells_space and not self.byte_level and not self.prefix
        self._take({k: v for k, v in (settings or {}).items() if k != "add_bos_token"})
        self._check()
        self.bos_id, self.pad_id = (self.eos_id if token < 0 else token for token in (self.bos_id, self.pad_id))

    def _check(self) -> None:
        if self.eos_id < 0:
            raise BadFileError(f"{self.where}: nothing ends a text; name its eos_token in tokenizer_config.json")
        if forged := [name for name, i in self.special_tokens.items() if i in self._encode_plain(name)]:
            raise BadFileError(f"{self.where} reads {forged[0]!r} in any text as that special token; take another one")
        if not self.byte_level and len(self.byte_ids) < 256:
            print(f"jaxgpt: {self.where}: characters that it does not know are lost", file=sys.stderr)

    def parsed(self) -> Settings:
        """The tokenizer.json with every setting written out, also those that the file leaves to the library."""
        found: Settings = json.loads(self._model.to_str())
        return found

    def _encode_part(self, text: str, alpha: float) -> list[int]:
        if alpha > 0:
            raise ConfigError(f"{self.where}: sampling_alpha is only for SentencePiece models; leave it at 0")
        self._model.encode_special_tokens = True
        self._report_lost(text)
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_many(self, texts: list[str], threads: int | None) -> list[list[int]]:
        self._model.encode_special_tokens = True
        found = self._model.encode_batch(texts, add_special_tokens=False)  # on as many cores as the library decides
        self._report_lost("".join(texts))
        return [each.ids for each in found]

    def _encode_special(self, text: str) -> list[int]:
        self._model.encode_special_tokens = False
        try:
            self._report_lost(text)
            ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            raise surrogate_error(text) from None
        return ids

    def _report_lost(self, text: str) -> None:
        if self._missing and (lost := self._missing.intersection(text.encode())):
            print(f"jaxgpt: {self.where} has no token for bytes {bytes(lost).hex(' ')}: left out", file=sys.stderr)
            self._missing -= lost  # said once


def _from_alphabet(piece: str) -> bytes:
    return b"".join(_BYTE_OF.get(character, character.encode()) for character in piece)


def _byte_alphabet() -> dict[str, bytes]:
    """The printable character that byte-level BPE writes for each byte (GPT-2): itself, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {character: bytes([byte]) for byte, character in characters.items()}


_BYTE_OF = _byte_alphabet()


def byte_level_json(
    tokens: dict[str, int], merges: list[Any], *, splits: Sequence[Settings] = (), words: bool = True,
    normalizer: Settings | None = None, ignore_merges: bool = False,
) -> Settings:  # fmt: skip
    """A tokenizer.json of byte-level BPE.

    `splits` are the pre-tokenizers that cut a text before it becomes bytes; with `words` GPT-2's pattern does too."""
    flags = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pre_tokenizers = [*splits, flags | {"use_regex": words}]
    model = {"type": "BPE", "vocab": tokens, "merges": merges, "fuse_unk": False, "byte_fallback": False}
    return {
        "version": "1.0", "added_tokens": [], "normalizer": normalizer, "post_processor": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "decoder": flags | {"use_regex": True}, "model": model | {"ignore_merges": ignore_merges},
    }  # fmt: skip


def gpt2_json(vocab: Path) -> bytes:
    """vocab.json and merges.txt, as GPT-2 has them, in one tokenizer.json."""
    tokens = read_json(vocab, MAX_BYTES)
    try:
        lines = vocab.with_name("merges.txt").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(f"tokenizer {vocab}: merges.txt beside it is unreadable ({error}); restore it") from None
    merges = [line for line in lines if line and not line.startswith("#version")]
    built = byte_level_json(tokens, merges)
    if (end := "<|endoftext|>") in tokens:
        built["added_tokens"] = [added_token(tokens[end], end, special=True)]
    return json.dumps(built, ensure_ascii=False).encode()


def added_token(token: int, content: str, *, special: bool) -> Settings:
    """An entry of `added_tokens` in tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": special}
