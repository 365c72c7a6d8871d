"""Text to a tokenizer and token shards, once: the second run finds both in the cache by their content.

The corpus is read several times, because tokenizing takes 20 times as long as reading: to choose what is held out, to
train the tokenizer on the rest, to write the shards of each side, and to compress what is held out."""

import hashlib
import itertools
import json
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import DataConfig, TokenizerConfig
from jaxgpt.data.corpus import Problems, find_sources, read_documents
from jaxgpt.data.shards import FORMAT, LONGEST_JSON, Corpus, open_tokenized, token_dtype, write_shard
from jaxgpt.errors import BadFileError, note
from jaxgpt.files import locked, read_json, write_atomically
from jaxgpt.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer, train_tokenizer

BATCH_CHARACTERS = 4 * 2**20  # text that is encoded at once, over all threads
REPORT_SECONDS = 5.0


def prepare_corpora(data: DataConfig, tokenizer: TokenizerConfig) -> tuple[Tokenizer, list[Corpus]]:
    """The tokenizer and the tokenized corpora of a configuration, from the cache where they are there. Without
    `data.weights` all text is one corpus; with weights each path is one, in order. A prepared directory is a corpus of
    its own, and brings its tokenizer. Raises BadFileError for unusable text or shards, ConfigError for a vocabulary."""
    has_tokenizer = [path for path in data.paths if any(Path(path, name).exists() for name in TOKENIZER_FILES)]
    prepared = [path for path in has_tokenizer if Path(path, "meta.json").exists()]  # which text may have too
    texts = [path for path in data.paths if path not in prepared]
    groups = [[path] for path in data.paths] if data.weights else [texts, *([path] for path in prepared)]
    corpora = [Path(group[0]) if group[0] in prepared else TextCorpus(group, data) for group in groups if group]
    path = tokenizer.path or next(iter(prepared), None)
    of_text = [corpus for corpus in corpora if isinstance(corpus, TextCorpus)]
    chosen = load_tokenizer(path) if path else _tokenizer_of(of_text, tokenizer, data)
    opened = [open_tokenized(each, chosen) if isinstance(each, Path) else _prepare(each, chosen) for each in corpora]
    return chosen, opened


def _tokenizer_of(texts: list["TextCorpus"], config: TokenizerConfig, data: DataConfig) -> Tokenizer:
    """The one that is trained on all of these texts together."""
    path = data.cache_path / "tokenizers" / f"{_key([corpus.digest for corpus in texts], asdict(config))}.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        note(f"tokenizer: training {config.kind} with {config.vocab_size} pieces")
        total = sum(corpus.survey.text_bytes for corpus in texts)
        documents = itertools.chain.from_iterable(corpus.documents(held_out=False) for corpus in texts)
        trained = train_tokenizer(_sample(documents, total, config.training_bytes), config)
        for corpus in texts:
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


class Survey(NamedTuple):
    """What the first reading of a corpus finds."""

    text_bytes: int
    problems: Problems
    cut: int | None  # the character from which on all is held out, where the hashes of documents leave a side empty


class TextCorpus:
    """Text files, what identifies them, and which of their documents are held out."""

    def __init__(self, paths: list[str], data: DataConfig) -> None:
        self.name, self.data = ",".join(paths), data
        self._sources = [source for path in paths for source in find_sources(path, data.cache_path)]
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

    def _read(self, problems: Problems) -> Iterator[tuple[bool, str]]:
        """Each document, and whether it is held out: by a hash of its text, so copies and larger corpora agree."""
        for text in read_documents(self._sources, self.data, problems):
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            yield int.from_bytes(digest) < self.data.val_fraction * 2**64, text

    @cached_property
    def survey(self) -> Survey:
        """Read everything once. When the hashes leave a side empty (one book), the end of the corpus is held out."""
        problems, text_bytes, lengths = Problems(self.data.max_bad_documents), 0, [0, 0]  # characters on each side
        for held_out, text in self._read(problems):
            text_bytes += len(text.encode())
            lengths[held_out] += len(text)
        for line in problems.lines():
            note(f"data {self.name}: {line}")
        if not text_bytes:
            raise BadFileError(f"data {self.name}: there is no text in it; check data.paths and data.text_key")
        total = sum(lengths)
        tail = max(1, min(total // 2, round(self.data.val_fraction * total)))
        return Survey(text_bytes, problems, total - tail if self.data.val_fraction and 0 in lengths else None)

    def documents(self, *, held_out: bool) -> Iterator[str]:
        begin = 0
        for by_hash, text in self._read(Problems(self.data.max_bad_documents)):
            place = 0 if by_hash else len(text)
            if self.survey.cut is not None:
                place = min(max(self.survey.cut - begin, 0), len(text))
                line_end = text.find("\n", place) + 1 if place else 0  # a line stays whole where that leaves a rest
                place = line_end if 0 < line_end < len(text) else place
            begin += len(text)
            if side := text[place:] if held_out else text[:place]:
                yield side


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
        meta = {"format": FORMAT, "name": text.name, "tokenizer_sha256": tokenizer.sha256, "splits": splits}
        write_atomically(directory / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())
    for split, counts in splits.items():
        note(f"data {text.name}: {split} has {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    return open_tokenized(directory, tokenizer)


def _write_split(directory: Path, split: str, text: TextCorpus, tokenizer: Tokenizer) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    while (side_car := directory / f"{split}_{len(shards):05}.json").exists():
        shards.append(read_json(side_car, LONGEST_JSON))
    if shards:
        note(f"data {text.name}: going on after {len(shards)} finished {split} shards")
    done = sum(shard["documents"] for shard in shards)
    documents = itertools.islice(text.documents(held_out=split == "val"), done, None)
    encoded = _encode(documents, tokenizer, f"data {text.name}: {split}")
    while shard := write_shard(directory / f"{split}_{len(shards):05}", encoded, text.data.shard_tokens):
        shards.append(shard)
    entry: dict[str, Any] = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "bytes")}
    if split == "val":
        compressor = zlib.compressobj(9, wbits=31)  # wbits 31 writes gzip's format
        parts = (compressor.compress(document.encode()) for document in text.documents(held_out=True))
        entry["gzip_bytes"] = sum(map(len, parts)) + len(compressor.flush())
    return {**entry, "shards": shards}


def _encode(documents: Iterator[str], tokenizer: Tokenizer, what: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each document, and its [bos] text [eos], a batch of texts at a time on all cores."""
    dtype = token_dtype(tokenizer)
    characters, reported = 0, time.monotonic()
    while batch := _take(documents):
        for document, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            yield document, np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype)
        characters += sum(map(len, batch))
        if time.monotonic() > reported + REPORT_SECONDS:
            reported = time.monotonic()
            note(f"{what}: {characters / 1e6:,.1f} million characters tokenized")


def _take(documents: Iterator[str]) -> list[str]:
    batch, characters = list[str](), 0
    while characters < BATCH_CHARACTERS and (document := next(documents, None)):
        batch.append(document)
        characters += len(document)
    return batch
