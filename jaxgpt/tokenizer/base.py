"""What all tokenizers have in common, and text that comes token by token."""

import codecs
import contextlib
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.files import write_atomically

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
Settings = dict[str, Any]
"""The keys of Hugging Face's tokenizer_config.json: bos_token, eos_token, pad_token, add_bos_token, chat_template; and
`end_tokens`, all that end a text."""


class Tokenizer(ABC):
    """One interface for all kinds.

    vocab_size counts all ids; token_bytes[id] is what the id adds to the text (b"" for special tokens); special_tokens
    maps each control symbol to its id; sha256 identifies the model. bos_ids is what begins a text (nothing for some),
    end_ids whatever ends one; chat_template is Jinja's source, if there is one."""

    file_name: str
    bos_id: int
    eos_id: int
    pad_id: int
    bos_ids: list[int]

    def __init__(
        self, model_bytes: bytes, where: str, pieces: list[str], token_bytes: list[bytes], special: Iterable[int]
    ) -> None:
        self.model_bytes = model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self.where = where
        self.vocab_size = len(pieces)
        self.token_bytes = token_bytes
        self._pieces = pieces
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self.special_tokens = {pieces[i]: i for i in sorted(special)}
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        self.byte_ids = [self._ids[name] for name in names if name in self._ids]
        self._spells_space = len(self.byte_ids) == 256  # U+2581 by its bytes: as a piece it would come back as a space
        self.prefix = self._dummy = ""  # what a whole text loses when decoded, and gets here before it is encoded

    @abstractmethod
    def _encode_part(self, text: str, alpha: float) -> list[int]: ...

    @abstractmethod
    def _encode_many(self, texts: list[str], threads: int | None) -> list[list[int]]: ...

    def _encode_plain(self, text: str, alpha: float = 0.0, *, first: bool = True) -> list[int]:
        whole = self._dummy + text if first and text else text
        ids: list[int] = []
        try:
            for i, part in enumerate(whole.split(SPACE) if self._spells_space else [whole]):
                ids += [self.byte_ids[byte] for byte in SPACE.encode()] if i else []
                ids += self._encode_part(part, alpha)
        except (RuntimeError, TypeError, UnicodeEncodeError):
            raise surrogate_error(text) from None
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on all cores unless `threads` says otherwise."""
        odd = [self._spells_space and SPACE in text for text in texts]
        try:
            plain = ["" if o or not text else self._dummy + text for text, o in zip(texts, odd, strict=True)]
            found = self._encode_many(plain, threads)
        except (RuntimeError, TypeError):  # a lone surrogate: the slow way names its place
            return [self._encode_plain(text) for text in texts]
        return [self._encode_plain(text) if o else ids for text, ids, o in zip(texts, found, odd, strict=True)]

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
        """What `_take` needs to make the same tokenizer of the same model."""
        name = lambda token: self._pieces[token] if token >= 0 else None  # noqa: E731
        found: Settings = {"bos_token": name(self.bos_id), "eos_token": name(self.eos_id)}
        found |= {"pad_token": name(self.pad_id), "add_bos_token": bool(self.bos_ids)}
        return found | {"end_tokens": [name(token) for token in self.end_ids], "chat_template": self.chat_template}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model file so that a reader sees all of it or nothing."""
        write_atomically(Path(path), self.model_bytes)

    def write(self, directory: Path) -> None:
        """Write the model, and its settings beside it, such that `load(directory)` gives the same tokenizer."""
        self.save(directory / self.file_name)
        content = json.dumps(self.settings(), indent=2, ensure_ascii=False)
        write_atomically(directory / "tokenizer_config.json", content.encode() + b"\n")

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        allow_special: bool = False,
        sampling_alpha: float = 0.0,
    ) -> list[int]:
        """The ids of `text`.

        allow_special reads the text of a special token as that token: only for text that the program itself wrote.
        sampling_alpha > 0 draws a random segmentation (BPE dropout, or unigram sampling with that temperature).
        Raises ConfigError for a lone surrogate."""
        ids = list(self.bos_ids) if bos else []
        ids += self._encode_special(text) if allow_special else self._encode_plain(text, sampling_alpha)
        return [*ids, self.eos_id] if eos else ids

    def _encode_special(self, text: str) -> list[int]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self._encode_plain(part, first=not ids)
        return ids

    def decode_bytes(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The bytes of `ids`, which may go on a text; special tokens are written out only when asked.

        Raises ConfigError for an unknown id."""
        return b"".join(self._piece_bytes(int(token), special) for token in ids)

    def _piece_bytes(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise ConfigError(f"token id {token}: it must be between 0 and {self.vocab_size - 1}, the vocabulary")
        if special and not self.token_bytes[token]:
            return self._pieces[token].encode()
        return self.token_bytes[token]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The whole text that `ids` encode, without a dummy prefix; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, special=special).decode("utf-8", "replace").removeprefix(self.prefix)

    def piece(self, token: int) -> str:
        """How the model writes one id, such as `▁return`, `<0x0A>` or `<s>`."""
        self._piece_bytes(token, False)
        return self._pieces[token]

    def rows(self, text: str) -> list[tuple[str, int, bytes]]:
        """(piece, id, bytes) of each token of `text`, for people to look at."""
        return [(self._pieces[token], token, self.token_bytes[token]) for token in self.encode(text)]


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise BadFileError for whatever comes of values of another kind than a tokenizer's files should hold."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise BadFileError(f"{where} is damaged ({type(error).__name__}: {error}); restore the file") from error


def spelt(piece: str) -> bytes:
    """The bytes of a piece such as `▁return` or `<0x0A>`."""
    is_byte = len(piece) == 6 and re.fullmatch("<0x[0-9A-F]{2}>", piece)
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()


class StreamDecoder:
    """Ids one at a time to text, never splitting a character: its bytes are held back until all are there."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that becomes complete with `token`, possibly none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token], special=self._special))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def surrogate_error(text: str) -> ConfigError:
    at = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), 0)
    what = f"text at character {at}: {text[at : at + 1]!a} is a lone surrogate, which is not Unicode text"
    return ConfigError(f"{what}; remove it or decode the text properly")
