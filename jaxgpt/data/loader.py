"""Token streams to batches: batch `step` is a pure function of the seed and the step, for any number of hosts.

Row r of step s is draw s * batch_size + r. Grain says which window of which corpus that is, in any order: it mixes the
corpora and shuffles each anew for every epoch, at about 10 us a row (more below 1,000 windows: 0.3 ms for 100). A whole
batch of windows is computed by a few numpy calls, and Grain reads ahead in a background thread."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxgpt.data.shards import Corpus, TokenStream
from jaxgpt.errors import BadFileError, ConfigError

Ints = Any  # a NumPy array on the host, a JAX array on the devices
_READ_AHEAD = 8  # batches


class Batch(NamedTuple):
    """One batch; every field is int32 [B, T]."""

    tokens: Ints
    labels: Ints  # the next token; -1 (ignored) where that belongs to another document, and at padding
    segment_ids: Ints  # counts the documents of a row from 1; 0 is padding
    positions: Ints  # counts tokens from 0 at the start of each document, and at the start of the row


def make_batch(stream: TokenStream, begins: np.ndarray, length: int) -> Batch:
    """Windows stream[begin : begin + length] as a batch; what lies behind the end of the stream is padding."""
    window = stream.rows(begins.tolist(), length + 1)
    is_start = np.zeros(window.shape, bool)
    first = np.searchsorted(stream.starts, begins)
    last = np.searchsorted(stream.starts, begins + length, "right")
    for row, (low, high, begin) in enumerate(zip(first.tolist(), last.tolist(), begins.tolist(), strict=True)):
        is_start[row, stream.starts[low:high] - begin] = True
    starts = is_start[:, :-1]
    columns = np.arange(length, dtype=np.int32)
    positions = columns - np.maximum.accumulate(np.where(starts, columns, np.int32(0)), axis=1)
    segment_ids = 1 + np.cumsum(starts, axis=1, dtype=np.int32) - starts[:, :1]
    left = (len(stream) - begins)[:, None]  # tokens from the window's begin to the end of the stream
    labels = np.where(is_start[:, 1:] | (columns + 1 >= left), np.int32(-1), window[:, 1:])
    if left.min() < length:
        inside = columns < left
        segment_ids, positions = np.where(inside, segment_ids, 0), np.where(inside, positions, 0)
    return Batch(window[:, :-1], labels, segment_ids, positions)


class Loader:
    """Random access to training batches: `loader[step]`."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        weights: Sequence[float] = (),
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: slice = slice(None),
    ) -> None:
        """weights: share of the rows from each corpus, by default its share of the tokens; rows: this host's part.
        Raises ConfigError when a corpus is shorter than one sequence."""
        self._corpora, self._length = corpora, sequence_length
        self._batch_size, self._rows = batch_size, np.arange(batch_size)[rows]
        for corpus in corpora:
            if len(corpus.train) <= sequence_length:
                why = f"{len(corpus.train)} training tokens are fewer than one sequence of {sequence_length} and its"
                raise ConfigError(f"data {corpus.name}: {why} last label; lower model.context_length or add text")
        # The windows of all corpora are numbered; the last label of a window is the token after it.
        counts = np.array([(len(corpus.train) - 1) // sequence_length for corpus in corpora])
        self._ends = np.cumsum(counts)
        self._firsts = self._ends - counts
        seeds = np.random.SeedSequence(seed).generate_state(len(corpora))
        ranges = zip(self._firsts.tolist(), self._ends.tolist(), seeds.tolist(), strict=True)
        orders = [grain.MapDataset.range(first, end).shuffle(seed=own).repeat() for first, end, own in ranges]
        self._order = grain.MapDataset.mix(orders, weights or counts.tolist())

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which as many windows were drawn as there are (with weights: of a mean corpus)."""
        return float(self._ends[-1] / self._batch_size)

    def _draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, first token) of each row of this host, int64 [B]."""
        draws = step * self._batch_size + self._rows
        windows = np.array([self._order[draw] for draw in draws.tolist()])
        corpus = np.searchsorted(self._ends, windows, "right")
        return corpus, (windows - self._firsts[corpus]) * self._length

    def __getitem__(self, step: int) -> Batch:
        """This host's rows of batch `step`. Raises BadFileError for a token that is not in the vocabulary."""
        corpus_of_row, begins = self._draw(step)
        return _read(self._corpora, "train", corpus_of_row, begins, self._length, f"training step {step}")

    def __len__(self) -> int:
        return 2**31  # steps that can be asked for: training never runs out

    def documents(self, step: int) -> list[str]:
        """The names of the documents in this host's rows of batch `step`, for error reports."""
        names: dict[str, None] = {}
        for number, begin in zip(*self._draw(step), strict=True):
            names |= dict.fromkeys(self._corpora[number].train.names(begin, begin + self._length))
        return list(names)

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on, read ahead by one background thread."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD)
        return iter(grain.MapDataset.source(self).slice(slice(start_step, None)).to_iter_dataset(options))


class EvalWindows:
    """The held-out windows of every corpus in order, never shuffled; `windows[i]` is the i-th batch."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        batch_size: int,
        sequence_length: int,
        batches: int = 0,
        rows: slice = slice(None),
    ) -> None:
        """batches: take only this many, evenly spaced over all windows; 0 takes all. rows: this host's part of each."""
        self._corpora, self._length, self._rows = corpora, sequence_length, rows
        begins = [np.arange(0, len(corpus.val) - 1, sequence_length) for corpus in corpora]
        corpus_of_window = np.repeat(np.arange(len(corpora)), [len(each) for each in begins])
        windows = np.stack([corpus_of_window, np.concatenate(begins)])
        count, wanted = windows.shape[1], batches * batch_size
        if 0 < wanted < count:
            windows = windows[:, np.arange(wanted) * count // wanted]
        behind = [[len(corpora) - 1], [len(corpora[-1].val)]]  # a window of nothing but padding
        padding = np.repeat(behind, -windows.shape[1] % batch_size, axis=1)
        self._windows = np.concatenate([windows, padding], axis=1).reshape(2, -1, batch_size)

    def __len__(self) -> int:
        return self._windows.shape[1]

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`; rows after the last window are padding. Raises IndexError behind the last batch."""
        if not 0 <= index < len(self):
            raise IndexError(f"evaluation batch {index}: there are {len(self)}")
        corpus_of_row, begins = self._windows[:, index, self._rows]
        return _read(self._corpora, "val", corpus_of_row, begins, self._length, f"evaluation batch {index}")


def _read(
    corpora: Sequence[Corpus], split: str, corpus_of_row: np.ndarray, begins: np.ndarray, length: int, where: str
) -> Batch:
    """The windows at `begins`, each in its row's corpus; raises BadFileError for a token outside the vocabulary."""
    batch = Batch(*(np.empty((len(begins), length), np.int32) for _ in Batch._fields))
    for number in np.unique(corpus_of_row):
        chosen, corpus = corpus_of_row == number, corpora[number]
        part = make_batch(getattr(corpus, split), begins[chosen], length)
        highest = max(part.tokens.max(), part.labels.max())
        if highest >= corpus.vocab_size:  # JAX would clamp it to the last row of the embedding without a word
            why = f"token {highest} is outside the vocabulary of {corpus.vocab_size}"
            raise BadFileError(f"data {corpus.name}, {where}: {why}; use its tokenizer or prepare the text again")
        for whole, piece in zip(batch, part, strict=True):
            whole[chosen] = piece
    return batch
