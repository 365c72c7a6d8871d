"""SentencePiece models (arXiv:1808.06226): other people's, and those that are trained here."""

import io
import os
from collections.abc import Iterable

import sentencepiece

from jaxgpt.config import TokenizerConfig
from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.tokenizer.base import SPACE, Settings, Tokenizer, model_pb2

_PROBE = f" a  b\r\n\t{SPACE}\n   \x00\ufeffe\u0301 \U0001f642</s><0x41> "


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    file_name = "tokenizer.model"

    def __init__(self, model_bytes: bytes, where: str = "tokenizer", settings: Settings | None = None) -> None:
        """Raises BadFileError when `model_bytes` is not a model that round-trips; `where` names it in the message."""
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes or b"empty")  # it logs about b""
            proto = model_pb2.ModelProto.FromString(model_bytes)
            pieces = [piece.piece for piece in proto.pieces]
        except (RuntimeError, UnicodeDecodeError):
            raise BadFileError(f"{where} is not a SentencePiece model; train a new one or restore the file") from None
        super().__init__(model_bytes, where, pieces, [piece.type for piece in proto.pieces])
        self._model = model
        self.bos_id, self.eos_id = model.bos_id(), model.eos_id()
        self.pad_id = model.pad_id() if model.pad_id() >= 0 else self.eos_id
        self.bos_ids = [self.bos_id]
        self._take(settings or {})
        if self.decode_bytes(model.encode("a")) == b" a":
            # Every call would add the dummy prefix, also in the middle of a text that is encoded in parts.
            self.prefix = self._dummy = " "
            proto.normalizer_spec.add_dummy_prefix = False
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        if min(self.bos_id, self.eos_id) < 0 or not self.spells_all or self.decode(self.encode(_PROBE)) != _PROBE:
            needs = "it needs bos, eos, byte fallback and identity normalisation"
            remedy = "leave tokenizer.path empty to train one that has them"
            raise BadFileError(f"{where} cannot reproduce every text: {needs}; {remedy}")

    def _cut(self, texts: list[str], special: bool) -> list[list[int]]:
        return self._model.encode(texts, num_threads=os.cpu_count() or 1)


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learn a tokenizer from documents; the same text gives the same model. A document is one SentencePiece sentence,
    so that line ends and indentation are learned too (a model trained on lines needs 6 % more tokens for Python), cut
    at U+2581: no piece is learned that the encoder would never use. Tabs stay single bytes: SentencePiece keeps them
    for itself. Raises ConfigError when the vocabulary does not fit the text or there is no text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=filter(None, (part for text in documents for part in text.split(SPACE))),
            model_writer=model,
            model_type=config.kind, vocab_size=config.vocab_size, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            control_symbols=list(config.special_tokens), byte_fallback=True, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            max_sentence_length=2**30, minloglevel=2,
            num_threads=16,  # fixed: the count is stored in the model, and unigram sums depend on it
        )  # fmt: skip
    except RuntimeError as error:
        why = str(error).rpartition("] ")[2] or "there is no text to train it on"  # behind the place in its source
        remedy = "change tokenizer.vocab_size, tokenizer.special_tokens or data.paths"
        raise ConfigError(f"tokenizer of {config.vocab_size} pieces: {why.rstrip('.')}; {remedy}") from None
    return SentencePieceTokenizer(model.getvalue())
