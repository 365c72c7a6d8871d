"""Text to token ids and back, with SentencePiece, such that every text survives the round trip exactly.

Three choices make that so: no normalisation (identity, no dummy prefix, all whitespace kept), byte fallback for
characters without a piece, and U+2581, which SentencePiece uses for a space, is spelt by its three bytes.
Special tokens are control symbols: no text, whatever it spells, encodes to one unless `allow_special` asks for it.
Ids: 0 pad, 1 bos, 2 eos, 3 unknown (never used), then the configured special tokens, 256 bytes, learned pieces.
Source: Kudo and Richardson (2018), arXiv:1808.06226.
"""

import codecs
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from jaxgpt.config import TokenizerConfig
from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.files import write_atomically

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_PROBE = f" a  b\r\n\t{SPACE}\n   \x00\ufeffe\u0301 \U0001f642</s><0x41> "


class Tokenizer:
    """A SentencePiece model behind a small interface.

    vocab_size counts all ids; token_bytes[id] is what the id adds to the text (b"" for special tokens); special_tokens
    maps each control symbol to its id; sha256 identifies the model.
    """

    def __init__(self, model_bytes: bytes, where: str = "tokenizer") -> None:
        """Raises BadFileError when `model_bytes` is not a model that round-trips; `where` names it in the message."""
        self.model_bytes = model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes or b"empty")  # it logs about b""
            self.vocab_size: int = model.vocab_size()
            pieces: list[str] = [model.id_to_piece(i) for i in range(self.vocab_size)]
            self.bos_id: int = model.bos_id()
            self.eos_id: int = model.eos_id()
            self.pad_id: int = model.pad_id() if model.pad_id() >= 0 else self.eos_id
        except (RuntimeError, UnicodeDecodeError):
            raise BadFileError(f"{where} is not a SentencePiece model; train a new one or restore the file") from None
        self._model = model
        self._pieces = pieces
        self.special_tokens = {piece: i for i, piece in enumerate(pieces) if model.is_control(i)}
        self.token_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        self._byte_ids = {self.token_bytes[i][0]: i for i in range(self.vocab_size) if model.is_byte(i)}
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        if (
            min(self.bos_id, self.eos_id) < 0
            or len(self._byte_ids) != 256
            or self.decode(self.encode(_PROBE)) != _PROBE
        ):
            raise BadFileError(
                f"{where} cannot reproduce every text: it needs bos, eos, byte fallback, identity normalisation and no "
                f"dummy prefix; leave tokenizer.path empty to train one that has them"
            )

    def _bytes_of(self, token: int) -> bytes:
        piece = self._pieces[token]
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0xE2>
        if self._model.is_control(token) or self._model.is_unknown(token) or self._model.is_unused(token):
            return b""
        return piece.replace(SPACE, " ").encode()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a .model file; raises BadFileError when it is missing or no usable model."""
        try:
            return cls(Path(path).read_bytes(), f"tokenizer {path}")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise BadFileError(f"tokenizer {path}: there is no such file; check tokenizer.path") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the .model file so that a reader sees all of it or nothing."""
        write_atomically(Path(path), self.model_bytes)

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
        Raises ConfigError for a lone surrogate.
        """
        ids = [self.bos_id] if bos else []
        for part in self._special_pattern.split(text) if allow_special else [text]:
            if allow_special and part in self.special_tokens:
                ids.append(self.special_tokens[part])
            else:
                ids += self._encode_plain(part, sampling_alpha)
        return [*ids, self.eos_id] if eos else ids

    def _encode_plain(self, text: str, alpha: float = 0.0) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            if i:
                ids += (self._byte_ids[byte] for byte in SPACE.encode())
            try:
                ids += self._model.encode(part, enable_sampling=alpha > 0, nbest_size=-1, alpha=alpha)
            except RuntimeError:
                raise ConfigError(f"text {_surrogate_place(text)}; remove it or decode the text properly") from None
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on all cores unless `threads` says otherwise."""
        plain = ["" if SPACE in text else text for text in texts]
        try:
            ids = self._model.encode(plain, num_threads=threads or os.cpu_count() or 1)
        except (RuntimeError, TypeError):  # a lone surrogate: the slow way names its place
            return [self._encode_plain(text) for text in texts]
        return [
            self._encode_plain(text) if SPACE in text else of_text for text, of_text in zip(texts, ids, strict=True)
        ]

    def decode_bytes(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The bytes of `ids`; special tokens are written out only when asked. Raises ConfigError for an unknown id."""
        return b"".join(self._piece_bytes(int(token), special) for token in ids)

    def _piece_bytes(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise ConfigError(f"token id {token}: it must be between 0 and {self.vocab_size - 1}, the vocabulary")
        if special and not self.token_bytes[token]:
            return self._pieces[token].encode()
        return self.token_bytes[token]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, special=special).decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        """How the model writes one id, such as `▁return`, `<0x0A>` or `<s>`."""
        self._piece_bytes(token, False)
        return self._pieces[token]

    def rows(self, text: str) -> list[tuple[str, int, bytes]]:
        """(piece, id, bytes) of each token of `text`, for people to look at."""
        return [(self._pieces[token], token, self.token_bytes[token]) for token in self.encode(text)]


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


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learn a tokenizer from the first `config.training_bytes` of the documents; the same text gives the same model.

    A document is one SentencePiece sentence, so that line ends and indentation are learned too (a model trained on
    lines needs 6 % more tokens for Python). Tabs stay single bytes: SentencePiece keeps them for itself.
    Raises ConfigError when the vocabulary does not fit the text, BadFileError when there is no text.
    """
    if reserved := {"<pad>", "<s>", "</s>", "<unk>"}.intersection(config.special_tokens):
        raise ConfigError(f"tokenizer.special_tokens: {', '.join(sorted(reserved))} exists already; leave it out")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_sentences(documents, config.training_bytes),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=list(config.special_tokens),
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,
            num_threads=16,  # fixed: the count is stored in the model, and unigram sums depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), config) from None
    return Tokenizer(model.getvalue())


def _training_sentences(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents up to `limit` bytes, cut at U+2581 so that no piece is learned that the encoder would never use."""
    left = limit
    for text in documents:
        raw = text.encode()
        yield from filter(None, raw[:left].decode("utf-8", "ignore").split(SPACE))
        left -= len(raw)
        if left <= 0:
            return


def _training_error(message: str, config: TokenizerConfig) -> Exception:
    """SentencePiece's failure in one line, with the vocabulary that would fit."""
    size = f"tokenizer.vocab_size {config.vocab_size}"
    if most := re.search(r"value <= (\d+)", message):
        return ConfigError(f"{size}: the text allows at most {most[1]}; lower it to that or add text")
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return ConfigError(f"{size}: the text's characters need more than {least[1]}; raise it above that")
    if "sentences_.empty()" in message:
        return BadFileError("tokenizer: there is no text to train it on; check data.paths")
    return ConfigError(f"tokenizer: training failed for special tokens {config.special_tokens}: {message}")


def _surrogate_place(text: str) -> str:
    at = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), 0)
    return f"at character {at}: {text[at : at + 1]!a} is a lone surrogate, which is not Unicode text"
