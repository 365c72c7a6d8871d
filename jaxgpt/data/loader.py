"""Token streams to batches: batch `step` is a pure function of the seed and the step.

Row r of step s is draw s * batch_size + r. Grain says which window of which corpus that is: it mixes the corpora and
shuffles each anew for every epoch, at 10 us a row (0.3 ms where there are 100 windows), and reads ahead in a thread."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxgpt.data.shards import Corpus, TokenStream
from jaxgpt.errors import BadFileError, ConfigError

Ints = Any  # a NumPy array on the host, a JAX array on the devices


class Batch(NamedTuple):
    """One batch; every field is int32 [B, T]."""

    tokens: Ints
    labels: Ints  # the next token; -1 (ignored) where that belongs to another document, and at padding
    segment_ids: Ints  # counts the documents of a row from 1; 0 is padding
    positions: Ints  # counts tokens from 0 at the start of each document, and at the start of the row


def make_batch(rows: Sequence[tuple[TokenStream, int]], length: int) -> Batch:
    """For each (stream, begin) the window stream[begin : begin + length], padded behind the end of the stream."""
    batch = Batch(*np.zeros((len(Batch._fields), len(rows), length), np.int32))
    batch.labels[:] = -1
    for (stream, begin), tokens, labels, segment_ids, positions in zip(rows, *batch, strict=True):
        window = stream.window(begin, length + 1)
        count, following = len(window[:length]), window[1:]
        first, last = stream.starts.searchsorted((begin + 1, begin + length + 1))
        starts = stream.starts[first:last] - begin  # of the documents but the first: from 1 to length
        bounds = np.concatenate(([0], starts, [count]))  # np.diff with ends would take half of the time
        lengths = bounds[1:] - bounds[:-1]
        tokens[:count] = window[:length]
        labels[: len(following)] = following
        labels[starts - 1] = -1
        segment_ids[:count] = np.repeat(np.arange(1, len(bounds)), lengths)
        positions[:count] = np.arange(count) - np.repeat(bounds[:-1], lengths)
    return batch


def training_batches(
    corpora: Sequence[Corpus], weights: Sequence[float], *, batch_size: int, length: int, seed: int
) -> Sequence[Batch]:
    """Endless; `batches[step]` makes one. weights: shares of the rows, or else of tokens. ConfigError for too few."""
    for corpus in corpora:
        if len(corpus.train) <= length:
            why = f"{len(corpus.train)} training tokens are fewer than one sequence of {length} and its"
            raise ConfigError(f"data {corpus.name}: {why} last label; lower model.context_length or add text")
    counts = [(len(corpus.train) - 1) // length for corpus in corpora]  # a last label is the token after
    seeds = np.random.SeedSequence(seed).generate_state(len(corpora)).tolist()
    orders = [
        grain.MapDataset.range(count).shuffle(seed=own).repeat().map(lambda i, c=corpus: (c, i * length))
        for corpus, count, own in zip(corpora, counts, seeds, strict=True)
    ]
    return _read(grain.MapDataset.mix(orders, weights or counts), "train", batch_size, length)


def read_ahead(batches: Sequence[Batch], start_step: int = 0) -> Iterator[Batch]:
    """Training batches from `start_step` on, read ahead by one background thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(batches[start_step:].to_iter_dataset(options))  # type: ignore[attr-defined]


def evaluation_batches(corpora: Sequence[Corpus], *, batch_size: int, length: int, batches: int = 0) -> Sequence[Batch]:
    """The held-out windows of every corpus in order, never shuffled; rows after the last one are padding. batches: take
    only this many, evenly spaced over all windows; 0 takes all."""
    windows = [(corpus, i) for corpus in corpora for i in range(0, len(corpus.val) - 1, length)]
    count, wanted = len(windows), batches * batch_size
    if 0 < wanted < count:
        windows = [windows[i * count // wanted] for i in range(wanted)]
    windows += [(corpora[-1], len(corpora[-1].val))] * (-len(windows) % batch_size)  # nothing but padding
    return _read(grain.MapDataset.source(windows), "val", batch_size, length)


def _read(rows: Any, split: str, batch_size: int, length: int) -> Any:
    """Windows of a split as batches. To ask for one raises BadFileError for a token outside the vocabulary."""
    batches = rows.batch(batch_size, batch_fn=list)

    def read(number: int, rows: list[tuple[Corpus, int]]) -> Batch:
        number = range(batches.__len__())[number]  # IndexError behind the last one, where Grain would begin again
        batch = make_batch([(getattr(corpus, split), begin) for corpus, begin in rows], length)
        highest = np.maximum(batch.tokens, batch.labels).max(axis=1)
        corpus = rows[highest.argmax()][0]
        if highest.max() >= corpus.vocab_size:  # JAX would clamp it to the last row of the embedding without a word
            why = f"token {highest.max()} is outside the vocabulary of {corpus.vocab_size}"
            where = f"data {corpus.name}, {'training step' if split == 'train' else 'evaluation batch'} {number}"
            raise BadFileError(f"{where}: {why}; use its tokenizer or prepare the text again")
        return batch

    return batches.map_with_index(read)
