"""Evaluation against a slow one: one document at a time, in float64, over the bytes of the text itself."""

import functools
import gzip
import json
import math
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxgpt.config import DataConfig, TokenizerConfig, TrainConfig
from jaxgpt.data.loader import Batch, evaluation_batches
from jaxgpt.data.prepare import prepare_corpora
from jaxgpt.data.shards import Corpus
from jaxgpt.model import Transformer
from jaxgpt.run import load_run, read_config
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.training.metrics import evaluate, evaluation_figures
from jaxgpt.training.step import eval_step, loss_options

pytestmark = pytest.mark.usefixtures("compiled_once")


@dataclass(frozen=True)
class Case:
    """Held-out documents, and a trained model."""

    run_dir: Path
    config: TrainConfig
    tokenizer: Tokenizer
    corpus: Corpus
    texts: list[str]
    """The held-out documents as they were written."""

    def windows(self, batches: int = 0) -> Sequence[Batch]:
        return evaluation_batches([self.corpus], batch_size=8, length=64, batches=batches)

    def evaluate(self, mesh_of: Callable[..., Any], *sizes: int, batches: int = 0) -> dict[str, float]:
        with mesh_of(*sizes):
            model = load_run(self.run_dir).model
            step = functools.partial(eval_step, options=loss_options(self.config))
            figures = evaluate(step, model, self.windows(batches), self.tokenizer, lambda: False)
        assert figures is not None
        return figures


@pytest.fixture(scope="module")
def case(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Functions of a module of the standard library, one a document, a third of them held out.

    Their tokenizer has pieces of several bytes for one character. (The model has seen another one; any will do.)
    """
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text("utf-8")
    documents = ["# größer, naïve — 中文\ndef " + text for text in source.split("    def ")[1:]]
    path = tmp_path_factory.mktemp("documents") / "functions.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    data = DataConfig(paths=(str(path),), val_fraction=0.33)
    tokenizer, (corpus,) = prepare_corpora(data, TokenizerConfig(vocab_size=500))
    assert "ß".encode() in tokenizer.token_bytes
    ids = corpus.val.window(0, len(corpus.val))
    held_out = [tokenizer.decode(part) for part in np.split(ids, corpus.val.starts[1:])]
    is_a_part = set(held_out) <= set(documents)
    assert is_a_part and 20 < len(held_out) < len(documents) / 2
    return Case(finished, read_config(finished), tokenizer, corpus, [text for text in documents if text in held_out])


@pytest.fixture(scope="module")
def slow_rows(case: Case, mesh_of: Callable[..., Any]) -> np.ndarray:
    """(nats, tokens, bytes) of each window of 64 tokens, float64 [windows, 3].

    The text is encoded again, cut where a window ends, and each piece goes through the model alone, from position 0.
    """
    tokenizer, T = case.tokenizer, 64
    stream = [token for text in case.texts for token in (*tokenizer.encode(text, bos=True), tokenizer.eos_id)]
    rows = np.zeros((-(-(len(stream) - 1) // T), 3))
    with mesh_of():
        model = load_run(case.run_dir).model
        for window, row in enumerate(rows):
            tokens = stream[window * T : window * T + T + 1]
            begins = [0, *(i for i in range(1, len(tokens)) if tokens[i] == tokenizer.bos_id)]
            for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
                labels = tokens[begin + 1 : end]
                if labels:
                    logits_TV = one_document(model, np.array(tokens[begin : end - 1]))
                    peaks_T = logits_TV.max(1)
                    normalizers_T = peaks_T + np.log(np.exp(logits_TV - peaks_T[:, None]).sum(1))
                    nats = normalizers_T - logits_TV[np.arange(len(labels)), labels]
                    row += nats.sum(), len(labels), len(tokenizer.decode_bytes(labels))
    return rows


@jax.jit
def padded_logits(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    return model.logits(model(tokens_BT)[0])


def one_document(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """Float64 logits [T, V]; what stands behind a token cannot change them, so that one compilation serves all."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(padded_logits(model, padded)[0, : len(tokens)], np.float64)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 2)])
def test_loss_and_bits_are_those_of_the_slow_way(
    case: Case, slow_rows: np.ndarray, mesh_of: Callable[..., Any], sizes: tuple[int, int, int]
) -> None:
    figures = case.evaluate(mesh_of, *sizes)
    nats, tokens, _ = slow_rows.sum(0)
    text_bytes = sum(len(text.encode()) for text in case.texts)
    assert figures["val_loss"] == pytest.approx(nats / tokens, rel=2e-6)
    assert figures["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=2e-6)
    assert 2 < figures["val_bits_per_byte"] < 8


def test_a_full_evaluation_covers_every_byte_once(case: Case, slow_rows: np.ndarray) -> None:
    text_bytes = sum(len(text.encode()) for text in case.texts)
    assert slow_rows[:, 2].sum() == case.corpus.val_bytes == text_bytes
    lengths = np.array([len(raw) for raw in case.tokenizer.token_bytes])
    batches = [case.windows()[index] for index in range(len(case.windows()))]
    assert sum(lengths[batch.labels[batch.labels >= 0]].sum() for batch in batches) == text_bytes
    assert len(batches) * 8 > len(slow_rows), "the last batch is not full: padding must not count"


def test_the_standard_error_is_that_of_a_bootstrap(
    case: Case, slow_rows: np.ndarray, mesh_of: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(slow_rows), (4000, len(slow_rows)))
    nats, _, sizes = np.moveaxis(slow_rows[draws].sum(1), 1, 0)
    spread = np.std(nats / math.log(2) / sizes)
    figures = case.evaluate(mesh_of)
    assert figures["val_bits_per_byte_se"] == pytest.approx(spread, rel=0.25)
    assert 0.001 < spread < 0.2


def test_a_model_that_pays_the_same_for_each_byte_has_no_error(case: Case, mesh_of: Callable[..., Any]) -> None:
    """However the bytes are spread over the windows: the error is that of the ratio, not that of the sums."""
    lengths = np.array([len(raw) for raw in case.tokenizer.token_bytes])

    def two_bits_a_byte(model: Any, batch: Any) -> np.ndarray:
        labels = np.asarray(batch.labels)
        return 2 * math.log(2) * np.where(labels >= 0, lengths[labels], 0).sum(1)

    with mesh_of():
        step: Any = two_bits_a_byte
        figures = evaluate(step, load_run(case.run_dir).model, case.windows(), case.tokenizer, lambda: False)
    assert figures is not None
    assert figures["val_bits_per_byte"] == pytest.approx(2)
    assert figures["val_bits_per_byte_se"] < 1e-12


def test_a_part_of_the_windows_gives_nearly_the_same(case: Case, mesh_of: Callable[..., Any]) -> None:
    full, part = case.evaluate(mesh_of), case.evaluate(mesh_of, batches=5)
    assert part != full
    distance = abs(part["val_bits_per_byte"] - full["val_bits_per_byte"])
    assert distance < 3 * part["val_bits_per_byte_se"]
    assert part["val_bits_per_byte_se"] > full["val_bits_per_byte_se"]


def test_a_stop_leaves_no_half_figures(case: Case, mesh_of: Callable[..., Any]) -> None:
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    with mesh_of():
        model = load_run(case.run_dir).model
        step = functools.partial(eval_step, options=loss_options(case.config))
        assert evaluate(step, model, case.windows(), case.tokenizer, stop) is None
    assert len(asked) == 3


def test_gzip_bits_are_those_of_gzip(case: Case) -> None:
    text = "".join(case.texts).encode()
    record = {"val_loss": 6.0, "val_bits_per_byte": 3.0, "val_bits_per_byte_se": 0.1}
    alone, twice = (evaluation_figures(record, corpora) for corpora in ([case.corpus], [case.corpus, case.corpus]))
    bits = float(alone.partition("gzip -9: ")[2].rstrip(")"))
    assert bits == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text), rel=0.01)
    assert 1 < bits < 4 and twice == alone
