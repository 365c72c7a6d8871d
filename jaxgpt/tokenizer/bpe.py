"""tokenizer.json files, through the `tokenizers` library, and how one is made of tokens and merges."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.files import read_json
from jaxgpt.tokenizer.base import SPACE, Settings, Tokenizer, has_surrogate, surrogate_error

MAX_BYTES, _MAX_VOCABULARY = 256 * 2**20, 2**24


class JsonTokenizer(Tokenizer):
    """A tokenizer.json: byte-level BPE (GPT-2, Llama 3, Qwen), or BPE with byte fallback (Llama 2, Gemma)."""

    file_name = "tokenizer.json"

    def __init__(self, model_bytes: bytes, where: str = "tokenizer", settings: Settings | None = None) -> None:
        """Raises BadFileError when `model_bytes` is no tokenizer of these kinds."""
        try:
            parsed = json.loads(model_bytes)
            kind, decoder = parsed["model"]["type"], json.dumps(parsed["decoder"])
            self._model = tokenizers.Tokenizer.from_str(model_bytes.decode())
        except Exception as error:  # `tokenizers` raises nothing narrower
            why = f"{type(error).__name__}: {error}"[:120]
            raise BadFileError(f"{where} is not a tokenizer.json ({why}); restore the file") from None
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        if (
            kind not in ("BPE", "Unigram")
            or not 0 < size <= _MAX_VOCABULARY
            or len(set(vocabulary.values())) < size // 2
        ):
            raise BadFileError(f"{where}: {kind} with ids up to {size} is not implemented; only BPE and Unigram are")
        pieces = [""] * size
        for piece, token in vocabulary.items():
            pieces[token] = piece
        added = self._model.get_added_tokens_decoder()
        self._literal = {token for token, piece in added.items() if not piece.special}
        self.byte_level = "ByteLevel" in decoder
        super().__init__(model_bytes, where, pieces, {token for token, piece in added.items() if piece.special})
        self._byte_ids = {self.token_bytes[i][0]: i for i, p in enumerate(pieces) if re.fullmatch("<0x[0-9A-F]{2}>", p)}
        self._missing = set(range(0xF5)) - {0xC0, 0xC1} - {b[0] for b in self.token_bytes if len(b) == 1}
        self._missing = self._missing if self.byte_level else set()  # of the bytes that UTF-8 has
        alone, framed = (self._model.encode("a", add_special_tokens=special).ids for special in (False, True))
        start = next((i for i in range(len(framed)) if framed[i : i + len(alone)] == alone), 0)
        self.bos_ids = framed[:start]
        self.bos_id = self.bos_ids[0] if self.bos_ids else -1
        self.eos_id = self.pad_id = -1
        self._prefix = " " if self.decode_bytes(alone) == b" a" else ""
        self._take({key: value for key, value in (settings or {}).items() if key != "add_bos_token"})
        self.bos_id, self.pad_id = (self.eos_id if token < 0 else token for token in (self.bos_id, self.pad_id))

    def _bytes_of(self, token: int) -> bytes:
        piece = self._pieces[token]
        if self.byte_level and token in self._literal:
            return piece.encode()
        if self.byte_level:
            return b"".join(_BYTE_OF.get(character, character.encode()) for character in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def _encode_plain(self, text: str, alpha: float = 0.0, *, first: bool = True) -> list[int]:
        if alpha > 0:
            raise ConfigError(f"{self.where}: sampling_alpha is only for SentencePiece models; leave it at 0")
        # U+2581 would come back as a space; with a dummy prefix each part would get one, so there it does.
        apart = not self.byte_level and not self._prefix and len(self._byte_ids) == 256
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE) if apart else [text]):
            if i:
                ids += (self._byte_ids[byte] for byte in SPACE.encode())
            ids += self._encode_as(part, special=False)
        return ids

    def _encode_special(self, text: str) -> list[int]:
        return self._encode_as(text, special=True)

    def _encode_as(self, text: str, *, special: bool) -> list[int]:
        self._model.encode_special_tokens = not special
        try:
            lost = self._missing and self._missing.intersection(text.encode())
            ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            raise surrogate_error(text) from None
        if lost:
            print(f"jaxgpt: {self.where} has no token for bytes {bytes(lost).hex(' ')}: left out", file=sys.stderr)
            self._missing -= lost  # said once
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on all cores (the library decides how many)."""
        self._model.encode_special_tokens = True
        if any(SPACE in text or (not text.isprintable() and has_surrogate(text)) for text in texts):
            return [self._encode_plain(text) for text in texts]
        return [found.ids for found in self._model.encode_batch(list(texts), add_special_tokens=False)]


def _byte_alphabet() -> dict[str, bytes]:
    """The printable character that byte-level BPE writes for each byte (GPT-2): itself, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {character: bytes([byte]) for byte, character in characters.items()}


_BYTE_OF = _byte_alphabet()


def byte_level_json(
    tokens: dict[str, int], merges: list[Any], *, splits: list[Settings], words: bool, **more: Any
) -> Settings:
    """A tokenizer.json of byte-level BPE.

    `splits` are the pre-tokenizers that cut a text before it becomes bytes; with `words` GPT-2's pattern cuts it too.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}
    built: Settings = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": tokens, "merges": merges, "fuse_unk": False, "byte_fallback": False},
    }
    return built | more


def gpt2_json(vocab: Path) -> bytes:
    """vocab.json and merges.txt, as GPT-2 has them, in one tokenizer.json."""
    tokens = read_json(vocab, MAX_BYTES)
    try:
        lines = vocab.with_name("merges.txt").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(f"tokenizer {vocab}: merges.txt beside it is unreadable ({error}); restore it") from None
    merges = [line for line in lines if line and not line.startswith("#version")]
    built = byte_level_json(tokens, merges, splits=[], words=True)
    if (end := "<|endoftext|>") in tokens:
        built["added_tokens"] = [added_token(tokens[end], end, special=True)]
    return json.dumps(built, ensure_ascii=False).encode()


def added_token(token: int, content: str, *, special: bool) -> Settings:
    """An entry of `added_tokens` in tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": special}
