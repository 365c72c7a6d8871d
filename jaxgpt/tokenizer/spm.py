"""SentencePiece models (arXiv:1808.06226): other people's, and those that are trained here."""

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece

from jaxgpt.config import TokenizerConfig
from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.tokenizer.base import SPACE, Settings, Tokenizer, surrogate_error

_PROBE = f" a  b\r\n\t{SPACE}\n   \x00\ufeffe\u0301 \U0001f642</s><0x41> "


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    file_name = "tokenizer.model"

    def __init__(self, model_bytes: bytes, where: str = "tokenizer", settings: Settings | None = None) -> None:
        """Raises BadFileError when `model_bytes` is not a model that round-trips; `where` names it in the message."""
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes or b"empty")  # it logs about b""
            pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
        except (RuntimeError, UnicodeDecodeError):
            raise BadFileError(f"{where} is not a SentencePiece model; train a new one or restore the file") from None
        self._model = model
        self.bos_id, self.eos_id = model.bos_id(), model.eos_id()
        self.pad_id = model.pad_id() if model.pad_id() >= 0 else self.eos_id
        self.bos_ids = [self.bos_id]
        silent = {i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)}
        super().__init__(model_bytes, where, pieces, {i for i in silent if model.is_control(i)})
        for i in silent:
            self.token_bytes[i] = b""
        self._byte_ids = {self.token_bytes[i][0]: i for i in range(self.vocab_size) if model.is_byte(i)}
        self._take(settings or {})
        if self.decode_bytes(model.encode("a")) == b" a":
            # Every call would add the dummy prefix, also in the middle of a text that is encoded in parts.
            self._prefix, self._model = " ", _without_prefix(model_bytes)
        if (
            min(self.bos_id, self.eos_id) < 0
            or len(self._byte_ids) != 256
            or self.decode(self.encode(_PROBE)) != _PROBE
        ):
            raise BadFileError(
                f"{where} cannot reproduce every text: it needs bos, eos, byte fallback and identity normalisation; "
                f"leave tokenizer.path empty to train one that has them"
            )

    def _bytes_of(self, token: int) -> bytes:
        piece = self._pieces[token]
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0xE2>
        return piece.replace(SPACE, " ").encode()

    def _encode_plain(self, text: str, alpha: float = 0.0, *, first: bool = True) -> list[int]:
        ids: list[int] = []
        text = self._prefix + text if first and text else text
        for i, part in enumerate(text.split(SPACE)):
            if i:
                ids += (self._byte_ids[byte] for byte in SPACE.encode())
            try:
                ids += self._model.encode(part, enable_sampling=alpha > 0, nbest_size=-1, alpha=alpha)
            except RuntimeError:
                raise surrogate_error(text.removeprefix(self._prefix if first else "")) from None
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on all cores unless `threads` says otherwise."""
        plain = ["" if SPACE in text else self._prefix + text if text else "" for text in texts]
        try:
            ids = self._model.encode(plain, num_threads=threads or os.cpu_count() or 1)
        except (RuntimeError, TypeError):  # a lone surrogate: the slow way names its place
            return [self._encode_plain(text) for text in texts]
        return [
            self._encode_plain(text) if SPACE in text else of_text for text, of_text in zip(texts, ids, strict=True)
        ]


def _without_prefix(model_bytes: bytes) -> sentencepiece.SentencePieceProcessor:
    from sentencepiece import sentencepiece_model_pb2

    spm: Any = sentencepiece_model_pb2  # its classes are made when it is imported

    proto = spm.ModelProto.FromString(model_bytes)
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


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
    return SentencePieceTokenizer(model.getvalue())


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
