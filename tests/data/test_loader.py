"""Batches are a pure function of seed and step, cover each epoch once, and never mix documents."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgpt.data.loader import Batch, evaluation_batches, make_batch, read_ahead, training_batches
from jaxgpt.data.shards import Corpus, TokenStream
from jaxgpt.errors import BadFileError, ConfigError

T = 16


def stream(tokens: int, seed: int = 0, shards: int = 3, longest: int = 40) -> TokenStream:
    """Tokens that count up, in shards and documents of random lengths: a token says where it is in the stream."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, tokens, shards - 1))
    starts = np.cumsum(np.concatenate([[0], rng.integers(1, longest, tokens)]))
    return TokenStream(np.split(np.arange(tokens, dtype="<u4"), cuts), starts[starts < tokens])


def corpus(tokens: int = 1000, seed: int = 0, val: int = 0, vocab_size: int = 2**31 - 1) -> Corpus:
    train, held_out = stream(tokens, seed), stream(val, seed + 1) if val else TokenStream([], np.empty(0, np.int64))
    return Corpus(f"corpus {seed}", Path(), vocab_size, train, held_out, 0, 0, "")


def loader(
    corpora: list[Corpus], weights: tuple[float, ...] = (), batch_size: int = 8, seed: int = 3
) -> Sequence[Batch]:
    return training_batches(corpora, weights, batch_size=batch_size, length=T, seed=seed)


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def slow_row(stream: TokenStream, begin: int, length: int) -> list[list[int]]:
    """What a row must be, one token at a time."""
    tokens = stream._tokens.to_pylist()
    starts, rows, segment, position = set(stream.starts.tolist()), [], 0, 0
    for place in range(begin, begin + length):
        if place >= len(tokens):
            rows.append([0, -1, 0, 0])
            continue
        is_new = place in starts or place == begin
        segment, position = (segment + 1, 0) if is_new else (segment, position + 1)
        last = place + 1 == len(tokens) or place + 1 in starts
        rows.append([tokens[place], -1 if last else tokens[place + 1], segment, position])
    return np.array(rows).T.tolist()


@pytest.mark.parametrize("longest", [2, 5, 40, 10_000])
def test_windows_match_a_slow_reference(longest: int) -> None:
    source = stream(500, longest, shards=7, longest=longest)
    begins = [0, 1, 17, 250, 484, 490, 499, 500]
    batch = make_batch([(source, begin) for begin in begins], T)
    assert all(field.dtype == np.int32 and field.shape == (len(begins), T) for field in batch)
    for row, begin in enumerate(begins):
        assert [field[row].tolist() for field in batch] == slow_row(source, begin, T)


def test_a_label_is_the_next_token_of_the_same_document() -> None:
    batch = loader([corpus()])[0]
    continues = batch.segment_ids[:, :-1] == batch.segment_ids[:, 1:]
    assert (batch.labels[:, :-1] == np.where(continues, batch.tokens[:, 1:], -1)).all()
    assert 0 < (batch.labels == -1).sum() < batch.labels.size / 4


def test_an_epoch_visits_every_window_once_in_another_order_each_time() -> None:
    data = loader([corpus(64 * T + 5)], batch_size=4)
    epochs = [
        [data[step].tokens[row, 0] // T for step in range(e * 16, e * 16 + 16) for row in range(4)] for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    other_seeds = [loader([corpus(64 * T + 5)], batch_size=64, seed=seed)[0].tokens[:, 0] // T for seed in (4, 5, 6)]
    assert len({tuple(order) for order in [range(64), *epochs, *other_seeds]}) == 7


def test_the_order_looks_random() -> None:
    """Neighbouring windows land apart, and every window is equally likely to come first."""
    windows = 1000
    order = loader([corpus(windows * T + 1)], batch_size=windows)[0].tokens[:, 0] // T
    assert abs(np.corrcoef(order, np.arange(windows))[0, 1]) < 0.1
    assert np.abs(np.diff(order)).mean() > windows / 4
    first = [loader([corpus(8 * T + 1)], batch_size=1, seed=seed)[0].tokens[0, 0] // T for seed in range(400)]
    assert np.bincount(first, minlength=8).min() > 25  # 50 expected, standard deviation 6.6


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    corpora = [corpus(3000), corpus(700, 1)]
    one, other = loader(corpora, (0.7, 0.3)), loader(corpora, (0.7, 0.3))
    for step in (10**6, 3, 17, 3):
        assert equal(one[step], other[step])
    assert not equal(one[3], one[4])
    assert not equal(one[3], loader(corpora, (0.7, 0.3), seed=4)[3])
    iterator = read_ahead(one, 5)
    assert all(equal(next(iterator), other[step]) for step in range(5, 25))


def drawn(data: Any, step: int) -> np.ndarray:
    """(number of the corpus, first token) of each row, [2, B]."""
    rows = data.parents[0][step]  # which the last function makes a batch of
    return np.array([(int(corpus.name.split()[1]), begin) for corpus, begin in rows]).T


def test_the_mixture_has_its_weights_at_any_moment() -> None:
    sizes, weights = (50_000, 5000, 9000), (0.5, 0.3, 0.2)
    data = loader([corpus(size, seed) for seed, size in enumerate(sizes)], weights, batch_size=1000)
    first_corpus, _ = drawn(data, 0)
    for rows in (10, 100, 1000):
        assert np.abs(np.bincount(first_corpus[:rows], minlength=3) / rows - weights).max() <= 1 / rows
    corpora, begins = np.concatenate([drawn(data, step) for step in range(20)], axis=1)
    assert np.allclose(np.bincount(corpora) / 20_000, weights, atol=1e-4)
    counts = np.bincount(begins[corpora == 1] // T)
    assert len(counts) == 312 and counts.max() - counts.min() <= 1  # the small corpus repeats evenly
    twins = loader([corpus(5000), corpus(5000)], batch_size=1000)
    assert len(np.unique(drawn(twins, 0)[1][:100])) > 60  # each corpus has an order of its own
    by_size = loader([corpus(9000), corpus(1000, 1)], batch_size=1000)
    assert abs(np.bincount(drawn(by_size, 0)[0])[0] - 1000 * 562 / (562 + 62)) <= 1


def test_evaluation_takes_each_held_out_token_once_in_order() -> None:
    corpora = [corpus(100, 0, val=357), corpus(100, 5, val=90)]
    windows = evaluation_batches(corpora, batch_size=4, length=T)
    batches = [windows[i] for i in range(len(windows))]
    tokens, labels, segments, positions = (np.concatenate(fields) for fields in zip(*batches, strict=True))
    assert len(windows) == -(-(23 + 6) // 4) and tokens.shape == (32, T)
    assert tokens[segments > 0].tolist() == [*range(357), *range(90)]
    starts = [len(set(c.val.starts.tolist()) - {0}) for c in corpora]
    assert (labels >= 0).sum() == 357 - 1 - starts[0] + 90 - 1 - starts[1]
    assert (labels[segments == 0] == -1).all() and (positions[segments == 0] == 0).all()
    with pytest.raises(IndexError):
        windows[8]
    some = evaluation_batches(corpora, batch_size=4, length=T, batches=2)
    assert len(some) == 2 and np.diff(some[0].tokens[:, 0]).tolist() == [48, 64, 48]
    assert len(evaluation_batches([corpus(100)], batch_size=4, length=T)) == 0


def test_errors() -> None:
    assert len(loader([corpus(T + 1)])[0].tokens) == 8
    with pytest.raises(ConfigError, match=r"corpus 0: 16 training tokens are fewer than one sequence of 16"):
        loader([corpus(T)])
    empty = Corpus("corpus 7", Path(), 9, TokenStream([], np.empty(0, np.int64)), stream(9), 0, 0, "")
    with pytest.raises(ConfigError, match="corpus 7: 0 training tokens"):
        loader([corpus(), empty])
    with pytest.raises(BadFileError, match=r"corpus 0, training step 0: token \d+ is outside the vocabulary of 500"):
        loader([corpus(vocab_size=500)], batch_size=60)[0]
    with pytest.raises(BadFileError, match=r"evaluation batch 0: token \d+ is outside the vocabulary of 50"):
        evaluation_batches([corpus(val=99, vocab_size=50)], batch_size=4, length=T)[0]
    iterator = read_ahead(loader([corpus(vocab_size=500)], batch_size=60))
    with pytest.raises(BadFileError, match="training step 0"):
        next(iterator)


@pytest.mark.parametrize("length", [256, 1024])
def test_millions_of_tokens_a_second_on_one_core(length: int) -> None:
    """5 million and more were measured; a busy machine gets 2, at the best of up to 25 moments."""
    data = training_batches([corpus(2_000_000)], (), batch_size=32, length=length, seed=0)
    best = 0.0
    for attempt in range(25):
        started = time.process_time()
        for step in range(attempt * 20, attempt * 20 + 20):
            data[step]
        best = max(best, 20 * 32 * length / (time.process_time() - started))
        if best > 2e6:
            break
    assert best > 2e6
