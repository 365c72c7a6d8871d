"""tokenizer.json files, through the `tokenizers` library, and how one is made of tokens and merges."""

import json
import tomllib
from pathlib import Path
from typing import Any

import tokenizers

from jaxgpt.errors import BadFileError, note
from jaxgpt.tokenizer.base import BYTE_PIECES, Kind, Settings, Tokenizer

MAX_BYTES = 256 * 2**20
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(i): bytes([i]) for i in _PRINTABLE} | {chr(256 + i): bytes([byte]) for i, byte in enumerate(_OTHERS)}
"""The printable character that byte-level BPE writes for each byte (GPT-2): itself, or one from U+0100 on."""
CUTTINGS: dict[str, Settings] = tomllib.loads(Path(__file__).with_name("cuttings.toml").read_text("utf-8"))
"""How byte-level BPE cuts a text before the bytes of each part are merged, in the terms of tokenizer.json."""


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
        self.byte_level = "ByteLevel" in repr(self._model.decoder)  # whether pieces are in that alphabet of bytes
        pieces, kinds = [""] * size, [Kind.UNUSED] * size
        for piece, token in vocabulary.items():
            pieces[token] = piece
            kinds[token] = Kind.BYTE if piece in BYTE_PIECES and not self.byte_level else Kind.NORMAL
        for token, added in self._model.get_added_tokens_decoder().items():
            kinds[token] = Kind.CONTROL if added.special else Kind.USER_DEFINED
        super().__init__(model_bytes, where, pieces, kinds)
        self._spelt_or_special = {}  # the library finds special tokens, and what they do with spaces around them
        bytes_of_utf8 = set(range(0xF5)) - {0xC0, 0xC1} if self.byte_level else set()
        self._missing = bytes_of_utf8 - {raw[0] for raw in self.token_bytes if len(raw) == 1}
        self._take(settings or {})
        alone, framed = (self._model.encode("a", add_special_tokens=frame).ids for frame in (False, True))
        start = next((i for i in range(len(framed)) if framed[i : i + len(alone)] == alone), 0)
        self.bos_ids = framed[:start]  # which the file decides, not the settings beside it
        if self.decode_bytes(alone) == b" a":  # the library would put the dummy prefix before each part
            self.prefix, self._spelt = " ", {}
        self._check()
        self.bos_id = self.bos_id if self.bos_id >= 0 else [*self.bos_ids, self.eos_id][0]
        self.pad_id = self.pad_id if self.pad_id >= 0 else self.eos_id

    def _spell(self, piece: str, kind: int) -> bytes:
        if not self.byte_level:
            return super()._spell(piece, kind)
        if kind == Kind.USER_DEFINED:
            return piece.encode()
        return b"".join([_BYTE_OF.get(c) or c.encode() for c in piece])

    def _check(self) -> None:
        if self.eos_id < 0:
            raise BadFileError(f"{self.where}: nothing ends a text; name its eos_token in tokenizer_config.json")
        if forged := [name for name, i in self.special_tokens.items() if i in self.encode(name)]:
            raise BadFileError(f"{self.where} reads {forged[0]!r} in any text as that special token; take another one")
        if not self.byte_level and not self.spells_all:
            note(f"{self.where}: characters that it does not know are lost")

    def _cut(self, texts: list[str], special: bool) -> list[list[int]]:
        if self._missing and (lost := self._missing.intersection("".join(texts).encode())):
            note(f"{self.where} has no token for bytes {bytes(lost).hex(' ')}: left out")
            self._missing -= lost  # said once
        self._model.encode_special_tokens = not special
        found = self._model.encode_batch_fast(texts, add_special_tokens=False)  # on as many cores as the library wants
        return [each.ids for each in found]


def tokenizer_json(pieces: list[str], kinds: list[int], bos: int | None, model: Settings, **parts: Any) -> bytes:
    """A tokenizer.json that begins texts with `bos`; pieces that are special or user-defined are its added tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": token, "content": piece, "special": kinds[token] != Kind.USER_DEFINED, **flags}
        for piece, token in {piece: i for i, piece in enumerate(pieces)}.items()
        if kinds[token] in (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
    ]
    if bos is not None:
        name = pieces[bos]
        begin = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        both = {"single": begin, "pair": [*begin, {"Sequence": {"id": "B", "type_id": 0}}]}
        special = {name: {"id": name, "ids": [bos], "tokens": [name]}}
        parts["post_processor"] = {"type": "TemplateProcessing", "special_tokens": special} | both
    return json.dumps({"version": "1.0", "added_tokens": added, "model": model, **parts}, ensure_ascii=False).encode()
