"""The sampling rule: each filter by its definition, tokens as often as they should come, rows that do not mix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.errors import ConfigError
from jaxgpt.generation.sampling import Rules, SamplingParams, choose, lowest_kept

V = 12
CUT, CHOOSE = jax.jit(lowest_kept), jax.jit(choose)


def rules_of(*params: SamplingParams, prompt_length: int = 3, samples: Any = None) -> Rules:
    samples = samples if samples is not None else [0] * len(params)
    each = [Rules.of(p, prompt_length, 100, p.stop_token_ids, s) for p, s in zip(params, samples, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *each)


def draws(logits_V: np.ndarray, params: SamplingParams, count: int, text: list[int]) -> np.ndarray:
    """How often each token is drawn behind `text`, whose first three tokens are the prompt."""
    one = rules_of(params)
    rules = jax.tree.map(lambda x: jnp.repeat(x, count, 0), one)._replace(sample=jnp.arange(count))
    tokens_BS = jnp.tile(jnp.array([text + [7] * 5]), (count, 1))  # what is behind the text means nothing
    lengths_B = jnp.full(count, len(text))
    chosen = CHOOSE(jnp.tile(jnp.asarray(logits_V), (count, 1)), rules, tokens_BS, lengths_B)
    return np.bincount(chosen, minlength=V)


def expected(logits_V: np.ndarray, params: SamplingParams, text: list[int]) -> np.ndarray:
    """The probability of each token by the definitions, in float64."""
    x = logits_V.astype(np.float64)
    for token, by in params.logit_bias:
        x[token] += by
    for token in set(text):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(text[3:]):
        x[token] -= params.presence_penalty + params.frequency_penalty * text[3:].count(token)
    if len(text) < 3 + params.min_new_tokens:
        x[list(params.stop_token_ids)] = -np.inf
    x /= params.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    if params.top_k:
        p[np.argsort(-p)[params.top_k :]] = 0
        p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    if params.typical_p < 1:
        surprise = -np.log(np.where(p > 0, p, 1)) + np.where(p > 0, 0, np.inf)
        order = np.argsort(np.abs(surprise - (p[p > 0] * surprise[p > 0]).sum()))
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= params.typical_p]] = 0
    return p / p.sum()


CASES: dict[str, dict[str, Any]] = {
    "temperature": dict(temperature=0.5), "hot": dict(temperature=2.0), "top-k": dict(top_k=5), "one": dict(top_k=1),
    "top-p": dict(top_p=0.6), "only the first": dict(top_p=1e-6), "min-p": dict(min_p=0.2),
    "typical": dict(typical_p=0.5), "repetition": dict(repetition_penalty=1.7), "presence": dict(presence_penalty=1.5),
    "frequency": dict(frequency_penalty=0.9), "bias": dict(logit_bias=((2, 3.0), (5, -100.0))),
    "no end yet": dict(min_new_tokens=9, stop_token_ids=(0, 4)), "top-k and top-p": dict(top_k=7, top_p=0.8),
    "all": dict(
        temperature=1.3, top_k=9, top_p=0.9, min_p=0.05, typical_p=0.8, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, logit_bias=((1, 1.0),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_tokens_come_as_often_as_they_should(name: str) -> None:
    """Chi-squared over 50,000 draws; 45 is beyond 0.99999 for 11 degrees of freedom."""
    logits_V = np.random.default_rng(1).normal(size=V).astype(np.float32)
    text = [1, 2, 2, 3, 5, 3]
    params = SamplingParams(**CASES[name])
    count, p = draws(logits_V, params, 50_000, text), expected(logits_V, params, text)
    assert not count[p == 0].any()
    assert (((count - 50_000 * p) ** 2)[p > 0] / (50_000 * p[p > 0])).sum() < 45


def test_rows_do_not_mix() -> None:
    """Each row of a batch of all settings is what it is alone."""
    logits_BV = np.random.default_rng(2).normal(size=(len(CASES) + 1, 100)).astype(np.float32)
    params = [SamplingParams(**case, seed=i) for i, case in enumerate(CASES.values())] + [SamplingParams(temperature=0)]
    tokens_BS, lengths_B = np.tile(np.arange(8), (len(params), 1)), np.full(len(params), 6)
    together = CHOOSE(logits_BV, rules_of(*params), tokens_BS, lengths_B)
    for row, each in enumerate(params):
        here = slice(row, row + 1)
        alone = CHOOSE(logits_BV[here], rules_of(each), tokens_BS[here], lengths_B[here])
        assert alone[0] == together[row]


@pytest.mark.parametrize("logits", [[1, 2, 3, 0], [3, 3, 1, 3], [-1e38, -1e38, -3e38, 0], [0, 0, 0, 0]])
def test_temperature_0_takes_the_first_of_the_largest(logits: list[float]) -> None:
    greedy = rules_of(SamplingParams(temperature=0), SamplingParams(seed=1))
    token = choose(jnp.array([logits] * 2, jnp.float32), greedy, jnp.zeros((2, 4), jnp.int32), jnp.array([3, 3]))[0]
    assert token == np.argmax(logits)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(width=32, allow_nan=False, max_value=2.0**126), min_size=1, max_size=20), st.data())
def test_a_cut_keeps_just_enough(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    x, weights = np.zeros((2, 20), np.float32)
    x[: len(values)], weights[: len(values)] = values, 1
    cut = CUT(jnp.asarray(x)[None], jnp.asarray(weights)[None], jnp.array([float(count)]))
    assert cut[0] == np.sort(x[: len(values)])[-count]


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", value) for value in (0, -1, 2**63)]
    + [("temperature", value) for value in (float("nan"), -1.0, float("inf"), 1e-30)]
    + [("top_p", value) for value in (0.0, 1.1, float("nan"))]
    + [("min_p", value) for value in (-0.1, 1.1, float("nan"))]
    + [("typical_p", 0.0), ("repetition_penalty", 0.0), ("presence_penalty", float("nan")), ("logprobs", 21)]
    + [("top_k", -1), ("seed", -1), ("seed", 2**64), ("num_samples", 0), ("num_samples", 10**6)]
    + [("stop", ("",)), ("min_new_tokens", 101), ("logit_bias", ((0, float("nan")),))],
)
def test_illegal_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .*: it must be "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "processor"),
    [
        (dict(top_k=9), "TopKLogitsWarper(9)"),
        (dict(top_p=0.7), "TopPLogitsWarper(0.7)"),
        (dict(min_p=0.1), "MinPLogitsWarper(0.1)"),
        (dict(typical_p=0.6), "TypicalLogitsWarper(0.6)"),
        (dict(repetition_penalty=1.4), "RepetitionPenaltyLogitsProcessor(1.4)"),
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(name: dict[str, Any], processor: str) -> None:
    import torch
    import transformers

    from jaxgpt.generation.sampling import _filter, edit

    kind, _, argument = processor.rstrip(")").partition("(")
    theirs = getattr(transformers, kind)(float(argument) if "." in argument else int(argument))
    logits_BV = np.random.default_rng(3).normal(size=(16, 200)).astype(np.float32) * 3
    tokens_BS = np.random.default_rng(4).integers(0, 200, (16, 20))
    rules = rules_of(*[SamplingParams(**name)] * 16)
    ours = _filter(edit(jnp.asarray(logits_BV), rules, jnp.asarray(tokens_BS), jnp.full(16, 20)), rules)
    np.testing.assert_allclose(ours, theirs(torch.tensor(tokens_BS), torch.tensor(logits_BV)).numpy(), rtol=1e-6)
