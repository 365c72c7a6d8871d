"""Text to a tokenizer and token shards, once: the second run finds both in the cache by their content.

The corpus is read up to three times, because tokenizing takes 20 times as long as reading: to choose what is held out,
to train the tokenizer on the rest, and to write the shards."""

import hashlib
import itertools
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import DataConfig, TokenizerConfig
from jaxgpt.data.corpus import Document, Problems, find_sources, read_documents
from jaxgpt.data.shards import FORMAT, Corpus, finished_shards, open_tokenized, token_dtype, write_meta, write_shard
from jaxgpt.errors import BadFileError, ConfigError, note
from jaxgpt.files import locked, write_atomically
from jaxgpt.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer, train_tokenizer

BATCH_CHARACTERS = 4 * 2**20  # text that is encoded at once, over all threads
REPORT_SECONDS = 5.0


def prepare_corpora(data: DataConfig, tokenizer: TokenizerConfig) -> tuple[Tokenizer, list[Corpus]]:
    """The tokenizer and the tokenized corpora of a configuration, from the cache where they are there. Without
    `data.weights` all text is one corpus; with weights each path is one, in their order. A path that is a prepared
    directory or nanoGPT's .bin files is opened as it is, a corpus of its own, and brings its tokenizer. Raises
    BadFileError for unusable text or shards, ConfigError for a vocabulary that does not fit."""
    opened = [path for path in data.paths if _is_tokenized(path)]
    texts = [path for path in data.paths if path not in opened]
    groups = [[path] for path in data.paths] if data.weights else [texts, *([path] for path in opened)]
    corpora = [group[0] if group[0] in opened else TextCorpus(group, data) for group in groups if group]
    chosen = _choose_tokenizer(tokenizer, opened, [each for each in corpora if isinstance(each, TextCorpus)], data)
    return chosen, [
        _prepare(corpus, chosen) if isinstance(corpus, TextCorpus) else open_tokenized(Path(corpus), chosen)
        for corpus in corpora
    ]


def _is_tokenized(path: str) -> bool:
    prepared = Path(path, "meta.json").exists() and _has_tokenizer(Path(path))
    return prepared or (os.path.exists(path) and path.endswith(".bin")) or Path(path, "train.bin").exists()


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).exists() for name in TOKENIZER_FILES)


def _choose_tokenizer(
    config: TokenizerConfig, opened: list[str], corpora: list["TextCorpus"], data: DataConfig
) -> Tokenizer:
    """The configured tokenizer, else the one that the first tokenized path brings, else one trained on the text."""
    if config.path:
        return load_tokenizer(config.path)
    if opened:
        beside = Path(opened[0]) if os.path.isdir(opened[0]) else Path(opened[0]).parent
        if not _has_tokenizer(beside):
            raise ConfigError(f"data {opened[0]}: there is no tokenizer.model beside the tokens; set tokenizer.path")
        return load_tokenizer(beside)
    key = _key([corpus.digest for corpus in corpora], asdict(config))
    path = data.cache_path / "tokenizers" / f"{key}.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        note(f"tokenizer: training {config.kind} with {config.vocab_size} pieces")
        total = sum(corpus.survey.text_bytes for corpus in corpora)
        texts = (part.text for corpus in corpora for part in corpus.parts(held_out=False))
        trained = train_tokenizer(_sample(texts, total, config.training_bytes), config)
        for corpus in corpora:
            corpus.refuse_changes()  # or the cache would keep a tokenizer of other text under this key
        write_atomically(path, trained.model_bytes)
    return load_tokenizer(path)


def _sample(texts: Iterable[str], total: int, limit: int) -> Iterator[str]:
    """Texts spread evenly over all, so that about `limit` of `total` bytes are taken."""
    share, due = min(1.0, limit / max(total, 1)), 0.0
    for text in texts:
        due += share * len(text)
        if due >= min(len(text), limit / 8):
            taken = text[: int(due)]
            due -= len(taken)
            yield taken


@dataclass(frozen=True)
class Survey:
    """What the first reading of a corpus finds."""

    text_bytes: int
    problems: Problems
    cut: tuple[int, int] | None  # where only the end of one document is held out: its number, and the first character


class TextCorpus:
    """Text files, what identifies them, and which of their documents are held out."""

    def __init__(self, paths: list[str], data: DataConfig) -> None:
        self.name, self.data = ",".join(paths), data
        self._sources = find_sources(paths, data.cache_path)
        self._digests = self._digest_files()
        settings = {name: getattr(data, name) for name in ("text_key", "val_fraction", "max_bad_documents")}
        self.digest = _key(FORMAT, [source.name for source in self._sources], self._digests, settings)

    def _digest_files(self) -> list[str]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(_file_digest, [source.path for source in self._sources]))

    def refuse_changes(self) -> None:
        """Raise BadFileError when the files are no longer those that `digest` stands for."""
        if self._digests != self._digest_files():
            raise BadFileError(f"data {self.name}: a file changed while it was read; run the same command again")

    def _read(self, problems: Problems) -> Iterator[tuple[int, int, bool, Document]]:
        """Each part, with the number of its document, where in that it begins, and whether that is to be held out. A
        hash of the content decides, so that this stays when the corpus grows, and copies are on the same side."""
        number, begin, held_out = -1, 0, False
        for part in read_documents(self._sources, self.data, problems):
            if part.first:
                number, begin = number + 1, 0
                digest = hashlib.blake2b(part.text.encode(), digest_size=8).digest()
                held_out = int.from_bytes(digest) < self.data.val_fraction * 2**64
            yield number, begin, held_out, part
            begin += len(part.text)

    @cached_property
    def survey(self) -> Survey:
        """Read everything once. When the hashes leave nothing on one side (one book, a few files), the end of the
        longest document is held out instead."""
        problems, text_bytes = Problems(self.data.max_bad_documents), 0
        lengths, longest = [0, 0], (0, 0)  # characters on each side; characters and number of a document
        for number, begin, held_out, part in self._read(problems):
            text_bytes += len(part.text.encode())
            lengths[held_out] += len(part.text)
            longest = max(longest, (begin + len(part.text), number))
        for line in problems.lines():
            note(f"data {self.name}: {line}")
        if not text_bytes:
            raise BadFileError(f"data {self.name}: there is no text in it; check data.paths and data.text_key")
        cut = None
        if self.data.val_fraction and 0 in lengths:
            tail = max(1, min(longest[0] // 2, round(self.data.val_fraction * sum(lengths))))
            cut = longest[1], longest[0] - tail
        return Survey(text_bytes, problems, cut)

    def parts(self, *, held_out: bool) -> Iterator[Document]:
        cut = self.survey.cut
        for number, begin, by_hash, part in self._read(Problems(self.data.max_bad_documents)):
            if cut and number == cut[0]:
                part = _cut(part, cut[1] - begin)[held_out]
            elif held_out != (by_hash and not cut):
                continue
            if part.text:
                yield part


def _cut(part: Document, place: int) -> tuple[Document, Document]:
    """What comes before and after character `place`, or rather after the line that it is in."""
    if place < 0:
        return replace(part, text=""), part
    if place >= len(part.text):
        return part, replace(part, text="")
    line_end = part.text.find("\n", place) + 1
    place = line_end if 0 < line_end < len(part.text) else place
    return replace(part, text=part.text[:place], last=True), replace(part, text=part.text[place:], first=True)


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise BadFileError(f"data {path}: the file is gone or a broken link; repair or remove it") from None


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _prepare(text: TextCorpus, tokenizer: Tokenizer) -> Corpus:
    """Tokenize one corpus into `<cache>/data/<key>/`, or go on where an earlier run stopped, or reuse what is there."""
    directory = text.data.cache_path / "data" / _key(text.digest, tokenizer.sha256, text.data.shard_tokens)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "LOCK", wait=True):
        if (directory / "meta.json").exists():
            note(f"data {text.name}: reusing {directory}")
            return open_tokenized(directory, tokenizer)
        for leftover in directory.glob("*.tmp"):  # of a killed run; the lock says that nobody writes them
            leftover.unlink()
        tokenizer.write(directory)
        splits = {split: _write_split(directory, split, text, tokenizer) for split in ("train", "val")}
        try:
            text.refuse_changes()
        except BadFileError:
            shutil.rmtree(directory)
            raise
        if bad := text.survey.problems.bad:
            write_atomically(directory / "bad.jsonl", "".join(json.dumps(line) + "\n" for line in bad).encode())
        write_meta(directory, text.name, tokenizer, splits)
    for split, counts in splits.items():
        note(f"data {text.name}: {split} has {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    return open_tokenized(directory, tokenizer)


def _write_split(directory: Path, split: str, text: TextCorpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the shards of one split that are not there yet; returns its entry in meta.json."""
    parts = text.parts(held_out=split == "val")
    compressor = zlib.compressobj(9, wbits=31)  # wbits 31 writes gzip's format
    gzip_bytes = 0

    def compressed() -> Iterator[Document]:
        nonlocal gzip_bytes
        for part in parts:
            gzip_bytes += len(compressor.compress(part.text.encode()))
            yield part

    shards = finished_shards(directory, split)
    if shards:
        note(f"data {text.name}: going on after {len(shards)} finished {split} shards")
    todo = itertools.islice(compressed() if split == "val" else parts, sum(shard["parts"] for shard in shards), None)
    encoded = _encode(todo, tokenizer, f"data {text.name}: {split}")
    while shard := write_shard(directory / f"{split}_{len(shards):05}", encoded, text.data.shard_tokens):
        shards.append(shard)
    entry: dict[str, Any] = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "bytes")}
    if split == "val":
        entry["gzip_bytes"] = gzip_bytes + len(compressor.flush())
    return {**entry, "shards": shards}


def _encode(parts: Iterator[Document], tokenizer: Tokenizer, what: str) -> Iterator[tuple[Document, np.ndarray]]:
    """[bos] text [eos] of each document, a batch of texts at a time on all cores."""
    dtype = token_dtype(tokenizer)
    done, started = 0, time.monotonic()
    reported = started
    while batch := _take(parts):
        for part, ids in zip(batch, tokenizer.encode_batch([part.text for part in batch]), strict=True):
            ids = [*[tokenizer.bos_id] * part.first, *ids, *[tokenizer.eos_id] * part.last]
            yield part, np.array(ids, dtype)
        done += sum(len(part.text) for part in batch)
        if (now := time.monotonic()) - reported > REPORT_SECONDS:
            speed = done / 1e6 / (now - started)
            note(f"{what}: {done / 1e6:,.1f} million characters tokenized, {speed:.1f} a second")
            reported = now


def _take(parts: Iterator[Document]) -> list[Document]:
    batch: list[Document] = []
    characters = 0
    while characters < BATCH_CHARACTERS and (part := next(parts, None)):
        batch.append(part)
        characters += len(part.text)
    return batch
