"""What all tokenizers have in common."""

import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.files import write_atomically

model_pb2: Any = sentencepiece_model_pb2  # its classes are made when it is imported
Kind = model_pb2.ModelProto.SentencePiece  # as in GGUF: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
BYTE_PIECES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
Settings = dict[str, Any]
"""The keys of Hugging Face's tokenizer_config.json: bos_token, eos_token, pad_token, add_bos_token, chat_template; and
`end_tokens`, all that end a text."""


class Tokenizer(ABC):
    """One interface for all kinds. vocab_size counts all ids; pieces[id] is how the model writes an id, such as
    `▁return`, `<0x0A>` or `<s>`, kinds[id] what it is, token_bytes[id] what it adds to the text (b"" for special
    tokens); special_tokens maps each control symbol to its id; sha256 identifies the model. bos_ids is what begins a
    text (nothing for some), end_ids whatever ends one; chat_template is Jinja's source, if there is one."""

    file_name: str
    bos_id = eos_id = pad_id = -1
    bos_ids: list[int]

    def __init__(self, model_bytes: bytes, where: str, pieces: list[str], kinds: list[int]) -> None:
        self.model_bytes, self.sha256 = model_bytes, hashlib.sha256(model_bytes).hexdigest()
        self.where, self.vocab_size = where, len(pieces)
        self.pieces, self.kinds = pieces, kinds
        silent, spelt = (Kind.UNKNOWN, Kind.CONTROL, Kind.UNUSED), map(self._spell, pieces, kinds)
        self.token_bytes = [b"" if kind in silent else raw for raw, kind in zip(spelt, kinds, strict=True)]
        self.special_tokens = {pieces[i]: i for i, kind in enumerate(kinds) if kind == Kind.CONTROL and pieces[i]}
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self.spells_all = kinds.count(Kind.BYTE) == 256
        # What the model is not asked about: U+2581 is spelt by its bytes, as a piece it would come back as a space.
        self._spelt = {SPACE: [self._ids[f"<0x{byte:02X}>"] for byte in SPACE.encode()]} if self.spells_all else {}
        self._spelt_or_special = self._spelt | {name: [token] for name, token in self.special_tokens.items()}
        self.prefix = self._dummy = ""  # what a whole text loses when decoded, and gets here before it is encoded

    def _spell(self, piece: str, kind: int) -> bytes:
        """The bytes of a piece such as `▁return` or `<0x0A>`."""
        return BYTE_PIECES[piece] if kind == Kind.BYTE else piece.replace(SPACE, " ").encode()

    @abstractmethod
    def _cut(self, texts: list[str], special: bool) -> list[list[int]]: ...

    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """The ids of `text`, behind what begins one if `bos`. allow_special reads the text of a special token as that
        token: only for text that the program itself wrote. Raises ConfigError for a lone surrogate."""
        _refuse_surrogates(text)
        known = self._spelt_or_special if allow_special else self._spelt
        longest_first = sorted(map(re.escape, known), key=len, reverse=True)
        if text and not (allow_special and text.startswith(tuple(self.special_tokens))):
            text = self._dummy + text
        parts = re.split(f"({'|'.join(longest_first)})", text) if known else [text]
        ids = [known.get(part) or self._cut([part], allow_special)[0] for part in parts if part]
        return list(itertools.chain(self.bos_ids if bos else [], *ids))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        for text in texts:
            _refuse_surrogates(text)
        found = self._cut([text and self._dummy + text for text in texts], False)
        return [self.encode(t) if SPACE in t and self._spelt else ids for t, ids in zip(texts, found, strict=True)]

    def decode_bytes(self, ids: Sequence[int], *, special: bool = False) -> bytes:
        """The bytes of `ids`; special tokens are written out if `special`. Raises ConfigError for an unknown id."""
        if strange := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise ConfigError(f"token id {strange[0]}: it must be between 0 and {self.vocab_size - 1}, the vocabulary")
        return b"".join(self.token_bytes[token] or (self.pieces[token].encode() if special else b"") for token in ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The whole text that `ids` encode, without a dummy prefix; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, special=special).decode("utf-8", "replace").removeprefix(self.prefix)

    def _take(self, settings: Settings) -> None:
        """Let the settings that stand beside a model decide what begins and ends a text."""
        for kind in ("bos", "eos", "pad"):
            name = settings.get(f"{kind}_token")
            name = name.get("content") if isinstance(name, dict) else name
            if name is not None and (kind != "pad" or name in self._ids or type(name) is int):
                setattr(self, f"{kind}_id", self._id_of(name, f"{kind}_token"))
        if settings.get("add_bos_token") is not None:
            self.bos_ids = [self.bos_id] if settings["add_bos_token"] else []
        ends = [self._id_of(name, "end_tokens") for name in settings.get("end_tokens") or [] if name is not None]
        self.eos_id = ends[0] if self.eos_id < 0 and ends else self.eos_id
        self.end_ids = tuple(dict.fromkeys([self.eos_id, *ends]))
        template = settings.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {each["name"]: each["template"] for each in template}.get("default")
        self.chat_template = template if isinstance(template, str) else None

    def _id_of(self, name: Any, key: str) -> int:
        token = name if type(name) is int else self._ids.get(name, -1)
        if not 0 <= token < self.vocab_size:
            raise BadFileError(f"{self.where}: its {key} {name!r} is not in the vocabulary; restore the files")
        return token

    def settings(self) -> Settings:
        """What `_take` needs to make the same tokenizer of the same model, and the class that transformers needs."""
        found: Settings = {f"{kind}_token": self.pieces[getattr(self, f"{kind}_id")] for kind in ("bos", "eos", "pad")}
        found |= {"add_bos_token": bool(self.bos_ids), "end_tokens": [self.pieces[token] for token in self.end_ids]}
        return found | {"chat_template": self.chat_template, "tokenizer_class": "PreTrainedTokenizerFast"}

    def write(self, directory: Path) -> None:
        """Write the model, and its settings beside it, such that `load(directory)` gives the same tokenizer."""
        write_atomically(directory / self.file_name, self.model_bytes)
        content = json.dumps(self.settings(), indent=2, ensure_ascii=False)
        write_atomically(directory / "tokenizer_config.json", content.encode() + b"\n")


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"text at character {error.start}: {text[error.start]!a} is a lone surrogate, which is not Unicode text"
        raise ConfigError(f"{what}; remove it or decode the text properly") from None
