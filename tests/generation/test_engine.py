"""Generation: what repeated full passes would give, the same for every batch, mesh and run, within its bounds."""

import functools
import json
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import ModelConfig, TokenizerConfig
from jaxgpt.errors import ConfigError
from jaxgpt.generation.decode import _guess, admit, decode, prefill
from jaxgpt.generation.engine import STEPS_PER_DISPATCH, Engine, Request, _Text
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.model import Transformer
from jaxgpt.sharding import shard
from jaxgpt.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.tokenizer.spm import SentencePieceTokenizer

MODERN = dict(positions="rotary", norm="rmsnorm", n_kv_heads=2, gated_mlp=True, windows=(7, 0), qk_norm="head")
PROMPTS = ["def f(x):\n", "", "import os, sys\n\n\nclass Reader:\n    "]
GREEDY = SamplingParams(max_new_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    sources = Path(sysconfig.get_path("stdlib"), "json").glob("*.py")
    return train_tokenizer([path.read_text("utf-8") for path in sorted(sources)], TokenizerConfig(vocab_size=400))


def make_model(tokenizer: Tokenizer, **settings: Any) -> Transformer:
    """Random weights, 15 times as large as usual ones, so that the most probable token is clear and varied."""
    config = ModelConfig(**{
        "n_layers": 3, "d_model": 32, "n_heads": 4, "context_length": 96, "vocab_size": tokenizer.vocab_size,
        "tie_embeddings": False, **settings,
    })  # fmt: skip
    return _make(config)


@functools.partial(jax.jit, static_argnums=0)
def _make(config: ModelConfig) -> Transformer:
    model = Transformer(config, jax.random.key(3))
    return jax.tree.map(lambda p: jnp.where(p == 1, p, 15 * p), model)  # norms stay 1


@jax.jit  # compiled once for all models of a kind
def full_pass(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    return model.logits(model(tokens_BT)[0])


def full_passes(model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int) -> list[int]:
    """The most probable token of a whole forward pass without a cache, again and again."""
    ids = tokenizer.encode(prompt, bos=True)
    for _ in range(tokens):
        padded = np.zeros((1, model.config.context_length), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(full_pass(model, padded)[0, len(ids) - 1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    return ids


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "modern"])
def test_greedy_text_is_that_of_full_passes(
    mesh_of: Callable[..., Any], tokenizer: Tokenizer, settings: dict[str, Any]
) -> None:
    with mesh_of():
        model = make_model(tokenizer, **settings)
        together = Engine(model, tokenizer).generate(PROMPTS, GREEDY)
        for prompt, completion in zip(PROMPTS, together, strict=True):
            expected = full_passes(model, tokenizer, prompt, 20)[completion.prompt_tokens :]
            assert completion.token_ids == expected
            assert len(set(expected)) > 3, "a model that repeats one token shows little"
            assert completion.text == tokenizer.decode(expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 2, 2)])
def test_other_meshes_give_the_same_text(
    mesh_of: Callable[..., Any], tokenizer: Tokenizer, shape: tuple[int, ...]
) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=0.7, top_k=30, top_p=0.9, seed=5, num_samples=4)
    texts = []
    for sizes in ((1, 1, 1), shape):
        with mesh_of(*sizes):
            engine = Engine(make_model(tokenizer, **MODERN), tokenizer)
            texts.append(engine.generate(PROMPTS, params) + engine.generate(PROMPTS[:1], GREEDY))
    assert texts[0] == texts[1]


def test_a_row_depends_on_its_prompt_seed_and_number_alone(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        engine = Engine(make_model(tokenizer), tokenizer)
        params = SamplingParams(max_new_tokens=30, temperature=1.0, seed=7, num_samples=3)
        together = engine.generate(PROMPTS, params)
        assert together == engine.generate(PROMPTS, params)
        alone = [engine.generate([prompt], params) for prompt in PROMPTS]
        assert together == [completion for completions in alone for completion in completions]
        (first,) = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=30, temperature=1.0, seed=7))
        assert first == together[0]
        assert len({completion.text for completion in together}) == 9
        (other_seed,) = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=30, temperature=1.0, seed=8))
        assert other_seed.text != first.text


@pytest.mark.parametrize(("speculate", "drafts"), [(0, False), (3, False), (3, True)])
def test_two_hundred_requests_are_what_full_passes_give(
    mesh_of: Callable[..., Any], tokenizer: Tokenizer, speculate: int, drafts: bool
) -> None:
    """Of all lengths, through five slots that are refilled; prompts over several chunks; in any order; a token or
    several for each pass, which the text or another model brings."""
    random = np.random.default_rng(0)
    lengths, news = random.integers(1, 90, 200), random.integers(1, 30, 200)
    prompts = [random.integers(4, tokenizer.vocab_size, n).tolist() for n in lengths]
    with mesh_of():
        model = make_model(tokenizer, context_length=128, **MODERN)
        draft = make_model(tokenizer, context_length=128, n_layers=1) if drafts else None
        engine = Engine(model, tokenizer, slots=5, speculate=speculate, draft=draft)
        params = [SamplingParams(max_new_tokens=int(n), temperature=0) for n in news]
        requests = [r for i in random.permutation(200) for r in engine.requests(prompts[i], params[i], int(i))]
        found = {p.request.tag: p.completion for p in engine.run(requests) if p.completion}
        rows = np.zeros((200, 128), np.int32)
        for i, prompt in enumerate(prompts):
            ids = [*prompt, *found[i].token_ids]
            rows[i, : len(ids)] = ids
        best = np.concatenate([full_pass(model, shard(jnp.asarray(p), "BT")).argmax(-1) for p in np.split(rows, 4)])
    for i, prompt in enumerate(prompts):
        done = found[i]
        behind = best[i, len(prompt) - 1 : len(prompt) - 1 + len(done.token_ids)].tolist()
        assert done.token_ids == behind, i
        assert len(behind) == news[i] if done.finish_reason == "length" else behind[-1] == tokenizer.eos_id
    assert (0.65 if speculate else 0.75) < engine.used / engine.places <= 1
    assert engine.used <= engine.tokens - (not drafts) if speculate else engine.used == engine.tokens, (
        engine.used,
        engine.tokens,
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_prompts_that_begin_alike_share_keys_and_values(
    mesh_of: Callable[..., Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    """From slots that are live, free, or about to be filled with another text; also after the cache was cut and grew
    again. What comes of a prompt is what an engine gives that has seen no other."""
    random = np.random.default_rng(1)
    one, other = (random.integers(4, tokenizer.vocab_size, n).tolist() for n in (150, 129))
    ends = [random.integers(4, tokenizer.vocab_size, n).tolist() for n in (1, 40, 70, 3)]
    prompts = [(one, other)[i % 3 == 2] + end for i, end in enumerate(3 * ends)] + [one, one, one[:64], one[:65]]
    params = [SamplingParams(4 + 3 * (i % 5), temperature=0.8, seed=i, logprobs=1) for i in range(len(prompts))]
    short = [[5, 6, 7]], SamplingParams(3, temperature=0)
    passes = 0

    def counted(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        return prefill(*given)

    with mesh_of(*shape):
        engine = Engine(make_model(tokenizer, context_length=768, **MODERN), tokenizer)
        alone = []
        for prompt, own in zip(prompts, params, strict=True):
            fresh = Engine(engine._models[0], tokenizer)
            alone += fresh.generate([prompt], own)
            assert fresh.reused == 0
        monkeypatch.setattr("jaxgpt.generation.engine.prefill", counted)
        assert engine.generate(prompts, params) == alone
        assert engine.reused >= 64 * 9
        before, passes = engine.reused, 0
        engine.generate(*short)  # does not make the cache shorter
        assert engine.reused == before
        assert engine.generate(prompts[:1], params[0]) == alone[:1] and engine.reused >= before + 128
        engine.generate(short[0], SamplingParams(700, temperature=0))
        engine.generate(*short)  # this one does
        assert engine.generate(prompts[:8], params[:8]) == alone[:8]
        assert engine.generate([one + ends[2]], params[0])[0].prompt_tokens == 220 and engine.reused > before
        before, passes = engine.reused, 0
        (again,) = engine.generate(prompts[7:8], params[7])
        assert again == alone[7] and engine.reused - before == 128 and passes == 1, "the rest is one chunk"


@pytest.mark.slow
def test_longrope_goes_by_what_each_text_may_grow_to(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    """Short and long factors side by side, also where a long text begins as a short one does."""
    factors = dict(rope_short_factors=(1.0, 1.5, 2.0, 2.5), rope_long_factors=(3.0, 9.0, 2.0, 7.0))
    scaling = dict(rope_scaling="longrope", rope_original_context=100, rope_attention_factor=1.2, **factors)
    ids = np.random.default_rng(5).integers(4, tokenizer.vocab_size, 150).tolist()
    prompts, params = (
        [ids[:70], ids[:70], ids],
        [replace(GREEDY, max_new_tokens=n, ignore_eos=True) for n in (20, 40, 20)],
    )
    with mesh_of(data=2):
        model = make_model(tokenizer, context_length=192, **MODERN | scaling)
        together = Engine(model, tokenizer).generate(prompts, params)
        for prompt, own, found in zip(prompts, params, together, strict=True):
            assert Engine(model, tokenizer).generate([prompt], own) == [found]
            length = len(prompt) + own.max_new_tokens  # as long as the text, so that a whole pass takes its factors
            rows = shard(jnp.array(2 * [[*prompt, *found.token_ids]], jnp.int32), "BT")
            best = np.asarray(full_pass(model, rows))[0].argmax(-1).tolist()
            assert rows.shape[1] == length and best[len(prompt) - 1 : -1] == found.token_ids
    assert together[0].token_ids != together[1].token_ids[:20]


def test_a_run_in_another_s_time_has_slots_of_its_own(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        engine = Engine(make_model(tokenizer), tokenizer, slots=1)
        expected = [engine.generate([prompt], GREEDY)[0].text for prompt in PROMPTS[:2]]
        outer = engine.stream(PROMPTS[0], GREEDY)
        first = next(outer)[1]
        assert engine.generate(PROMPTS[1:2], GREEDY)[0].text == expected[1]
        for _ in engine.stream(PROMPTS[1], GREEDY):
            break  # and is left
        assert first + "".join(text for _, text in outer) == expected[0]
        assert engine.generate(PROMPTS[1:2], GREEDY)[0].text == expected[1]


@pytest.mark.slow
def test_guesses_change_no_text(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    """With every kind of setting; only the number of passes is less."""
    params = [
        SamplingParams(40, temperature=0, logprobs=2),
        SamplingParams(40, temperature=0.7, seed=1, repetition_penalty=1.2, frequency_penalty=0.1, logprobs=1),
        SamplingParams(40, temperature=0.5, top_k=20, top_p=0.9, seed=2, num_samples=3),
        SamplingParams(40, temperature=0, min_new_tokens=11, stop_token_ids=tuple(range(100, 116))),
        SamplingParams(40, temperature=0, logit_bias=((40, 900.0),), ignore_eos=True),
        SamplingParams(1, temperature=0),
        SamplingParams(1000, temperature=0, presence_penalty=0.1),
    ]
    prompts = ["def f(x): return f(x)" * 2, *PROMPTS, "a a a a a", "x", "import os, "]
    with mesh_of(data=2):
        model = make_model(tokenizer, context_length=256, **MODERN)
        plain, guessing = Engine(model, tokenizer), Engine(model, tokenizer, speculate=7)
        for one, other in zip(plain.generate(prompts, params), guessing.generate(prompts, params), strict=True):
            assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
            if one.logprobs is not None:
                np.testing.assert_allclose(one.logprobs, other.logprobs or [], atol=1e-4)
        assert guessing.tokens == plain.tokens and guessing.used < 0.95 * plain.used
        before = guessing.used
        (one,) = guessing.generate(prompts[4:5], params[4])
        assert set(one.token_ids) == {40} and guessing.used - before == 6, "one pass to find it, then 8 tokens each"


def test_a_draft_changes_no_text(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    """What it guesses is drawn by the same rules with the same random numbers: a draft that is the model is always
    right, also over refilled slots and prompts of several chunks; one that is a little wrong sometimes."""
    greedy, drawn = SamplingParams(33, temperature=0), SamplingParams(33, top_k=50, seed=4, num_samples=2)
    repeats = SamplingParams(33, temperature=0.7, repetition_penalty=1.3, logit_bias=((40, 3.0),), min_new_tokens=20)
    prompts, params = [*PROMPTS, "x" * 100], [greedy, drawn, replace(repeats, ignore_eos=True), greedy]
    with mesh_of(data=2):
        model = make_model(tokenizer, context_length=128, **MODERN)
        near = jax.tree.map(lambda p: p + 0.05 * jnp.std(p), model)
        plain = Engine(model, tokenizer, slots=2)
        expected, passes = plain.generate(prompts, params), [plain.used]
        for draft in (near, model):
            engine = Engine(model, tokenizer, slots=2, speculate=3, draft=draft)
            assert engine.generate(prompts, params) == expected
            passes.append(engine.used)
        assert passes[0] > passes[1] > passes[2]
        before = engine.used
        engine.generate([PROMPTS[2] * 2], SamplingParams(24, seed=2, ignore_eos=True))
        assert engine.used - before == 6, "never wrong: four tokens a pass"
        other = make_model(tokenizer, context_length=64)
        for given, message in (
            ({"speculate": 3}, "draft: it has 400 tokens and a context of 64, this model 400 and 128; take one that"),
            ({}, "draft: speculate, which says how many tokens it guesses, is 0; try 4"),
        ):
            with pytest.raises(ConfigError, match=message):
                Engine(model, tokenizer, draft=other if given else model, **given)


@pytest.mark.parametrize(
    ("text", "guesses"),
    [
        ([1, 2, 3, 4, 9, 2, 3, 4, 8, 7, 1, 2, 3], [4, 9, 2, 3]),  # the longest match, not the newest
        ([2, 3, 4, 5, 6, 2, 3, 7, 8, 2, 3], [7, 8, 2, 3]),  # of equals the newest
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),  # what repeats goes on
        ([5, 5], [5, 5, 5, 5]),
        ([1, 9, 3, 9], [3, 9, 3, 9]),
        ([7], [7, 7, 7, 7]),
    ],
)
def test_what_is_guessed(text: list[int], guesses: list[int]) -> None:
    padded = jnp.array([*text, 1, 2, 3, 4, 5, 6], jnp.int32)  # behind the text: of another one
    assert _guess(padded, jnp.int32(len(text)), 4).tolist() == [text[-1], *guesses]


def test_log_probabilities_are_the_model_s(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        model = make_model(tokenizer)
        engine = Engine(model, tokenizer)
        params = SamplingParams(max_new_tokens=12, temperature=1.5, top_k=9, seed=2, logprobs=3)
        plain = SamplingParams(max_new_tokens=20, temperature=0)
        requests = [*engine.requests("import ", params), *engine.requests("x", plain, 1)]
        found = {p.request.tag: p.completion for p in engine.run(requests) if p.completion}
        ids = tokenizer.encode("import ", bos=True)
        logits = full_pass(model, jnp.array([ids + found[0].token_ids]))[0]
    assert found[1].logprobs is None and found[0].logprobs is not None and found[0].top_logprobs is not None
    expected = np.asarray(jax.nn.log_softmax(logits))[len(ids) - 1 : -1]
    for row, token, logprob, top in zip(
        expected, found[0].token_ids, found[0].logprobs, found[0].top_logprobs, strict=True
    ):
        assert abs(row[token] - logprob) < 1e-3
        assert list(top) == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose(list(top.values()), np.sort(row)[::-1][:3], atol=1e-3)


def test_log_probabilities_of_a_prompt_are_the_model_s(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    """Over several chunks, beside a prompt that wants none, also where another has left its keys and values."""
    ids = np.random.default_rng(2).integers(4, tokenizer.vocab_size, 150).tolist()
    with mesh_of(data=2):
        model = make_model(tokenizer, context_length=192, **MODERN)
        engine = Engine(model, tokenizer, slots=2)  # one on each device
        plain = replace(GREEDY, max_new_tokens=3, logprobs=0)
        settings = [plain, replace(plain, prompt_logprobs=2), replace(plain, prompt_logprobs=0, num_samples=2)]
        *found, second = engine.generate([ids, ids, ids[:1]], settings)
        (again,) = engine.generate([ids], settings[1])
        alone = Engine(model, tokenizer, slots=2).generate([ids], plain)
        logits = full_pass(model, shard(jnp.array([ids, ids]), "BT"))
    expected = np.asarray(jax.nn.log_softmax(np.asarray(logits)[0]))
    assert alone == found[:1], "to the last bit, where nothing is scored beside it"
    assert found[0].prompt_logprobs is second.prompt_logprobs is None and found[2].prompt_logprobs == [None]
    assert found[0].logprobs == found[1].logprobs is not None
    assert again.prompt_logprobs == found[1].prompt_logprobs is not None and again.token_ids == found[0].token_ids
    first, *others = found[1].prompt_logprobs
    assert first is None and len(others) == 149
    for row, token, told in zip(expected, ids[1:], others, strict=False):
        assert told is not None and next(iter(told)) == token
        assert told.keys() == {token, *np.argsort(-row)[:2].tolist()}
        np.testing.assert_allclose(list(told.values()), row[list(told)], atol=1e-3)


def test_the_best_of_several_have_the_highest_mean(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    params = SamplingParams(12, temperature=1.5, seed=5, num_samples=6, logprobs=0, prompt_logprobs=1)
    with mesh_of():
        engine = Engine(make_model(tokenizer), tokenizer)
        every = engine.generate(["def f("], params)
        best = engine.generate(["x", "def f("], replace(params, num_samples=2, best_of=6, logprobs=None))
        alone = replace(params, num_samples=2, best_of=6, logprobs=None, prompt_logprobs=None)
        streamed = list(engine.stream("def f(", alone))
    means = [np.mean(each.logprobs or []) for each in every]
    expected = [every[i] for i in np.argsort(means)[::-1][:2]]
    assert every[0] not in expected and every[0].prompt_logprobs, "which the best is given all the same"
    assert len(best) == 4 and best[2:] == [expected[0]._replace(prompt_logprobs=every[0].prompt_logprobs), expected[1]]
    assert streamed == [(0, expected[0].text), (1, expected[1].text)]
    with pytest.raises(ConfigError, match="best_of is 2: it must be between 3 and 1024"):
        SamplingParams(num_samples=3, best_of=2)


def test_stop_texts_end_a_completion_where_they_begin(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        engine = Engine(make_model(tokenizer), tokenizer)
        params = SamplingParams(max_new_tokens=60, temperature=1.0, seed=3)
        (whole,) = engine.generate(["def f("], params)
        stop = whole.text[20:23]
        assert len(stop) == 3
        (cut,) = engine.generate(["def f("], replace(params, stop=("never there", stop)))
        assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        pieces = engine.stream("def f(", replace(params, stop=(stop,)))
        assert "".join(text for _, text in pieces) == cut.text, "a stop text is never shown in parts"
        end = whole.token_ids[10]
        place = whole.token_ids.index(end)
        (ended,) = engine.generate(["def f("], replace(params, stop_token_ids=(end,)))
        assert ended.token_ids == whole.token_ids[: place + 1] and ended.finish_reason == "stop"
        later = replace(params, stop_token_ids=(end,), min_new_tokens=place + 2)
        assert len(engine.generate(["def f("], later)[0].token_ids) > place + 1


def test_a_row_that_is_not_finite_fails_alone(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        model = make_model(tokenizer)
        good = Engine(model, tokenizer).generate(["def f(", "import "], GREEDY)
        poisoned = tokenizer.encode("q")[0]
        assert all(poisoned not in each.token_ids for each in good)
        row = jnp.arange(model.config.vocab_rows)[:, None] == poisoned
        model.token_embedding = jax.tree.map(lambda p: jnp.where(row, jnp.nan, p), model.token_embedding)
        found = Engine(model, tokenizer).generate(["def f(", "q", "import "], GREEDY)
        engine = Engine(model, tokenizer, slots=2)
        refilled = engine.generate(["q", "q", "q" * 90, *3 * ["def f(", "import "]], GREEDY)
        later = engine.generate(["def f(", "import "], GREEDY)
        (scored,) = engine.generate(["aq" + 70 * "b"], replace(GREEDY, prompt_logprobs=1))
        longer = Engine(make_model(tokenizer, context_length=640), tokenizer, slots=1)
        longer._models[0].token_embedding = jax.tree.map(
            lambda p: jnp.where(row, jnp.nan, p), longer._models[0].token_embedding
        )
        fresh = Engine(longer._models[0], tokenizer, slots=1).generate(["def f("], GREEDY)
        behind = longer.generate(["a" * 500 + "q", "def f("], GREEDY)
    assert scored.finish_reason == "error" and None in (scored.prompt_logprobs or [{}])[-1].values()
    json.dumps(scored._asdict(), allow_nan=False)
    assert [found[0], found[2]] == good
    assert (found[1].finish_reason, found[1].token_ids) == ("error", [])
    assert [each.finish_reason for each in refilled[:3]] == ["error"] * 3
    assert (behind[0].finish_reason, behind[1:]) == ("error", fresh) and fresh[0].token_ids, "nor where little is read"
    assert refilled[3:] == 3 * good and later == good, "nothing of it stays in the slot, or comes from another"


def test_a_token_without_a_piece_has_no_text(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    """Models have more tokens than their tokenizers: tables are padded."""
    with mesh_of():
        engine = Engine(make_model(tokenizer, vocab_size=tokenizer.vocab_size + 100), tokenizer)
        (one,) = engine.generate(["x"], SamplingParams(60, seed=1, ignore_eos=True))
    assert max(one.token_ids) >= tokenizer.vocab_size and len(one.token_ids) == 60
    known = [token for token in one.token_ids if token < tokenizer.vocab_size]
    assert one.text == tokenizer.decode(known)


def test_a_complete_text_asks_for_nothing_any_more(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        engine = Engine(make_model(tokenizer), tokenizer, slots=3)
        settings = [
            SamplingParams(2, top_p=0.5, typical_p=0.5, repetition_penalty=2.0),
            replace(GREEDY, max_new_tokens=30),
        ]
        engine.generate(["x", "y"], settings)
        slots = engine._kept[0]
        assert slots is not None
        rules = jax.device_get(slots.rules)
    assert rules.temperature.tolist() == [0, 0, 0] and rules.repetition_penalty.tolist() == [1, 1, 1]
    assert rules.top_p.tolist() == rules.typical_p.tolist() == [1, 1, 1]


def test_a_character_is_never_split_in_a_stream(tokenizer: Tokenizer) -> None:
    face = tokenizer.encode("\U0001f642")
    text, row = _Text(Request([1], GREEDY), tokenizer), np.array([1, *face, *face[:2]])
    assert [text.push(row, n, False, False).text for n in range(2, 7)] == ["", "", "", "\U0001f642", ""]
    assert text.push(row, 7, True, False).text == "\ufffd", "what is left at the end"
    text, end = _Text(Request([1], GREEDY, (tokenizer.eos_id,)), tokenizer), [1, *face[:2], tokenizer.eos_id]
    assert text.push(np.array(end), 4, True, False).text == "\ufffd", "also where a token ends it"


def test_the_stream_is_the_text(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        engine = Engine(make_model(tokenizer), tokenizer)
        params = SamplingParams(max_new_tokens=50, temperature=1.2, num_samples=2)
        texts, pieces = ["", ""], 0
        for sample, text in engine.stream(PROMPTS[0], params):
            texts[sample] += text
            pieces += 1
        assert texts == [completion.text for completion in engine.generate(PROMPTS[:1], params)]
        assert pieces >= 50 // STEPS_PER_DISPATCH


def test_the_text_ends_with_its_last_token_or_the_context(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        model = make_model(tokenizer)
        engine = Engine(model, tokenizer)
        (long,) = engine.generate(["x"], SamplingParams(max_new_tokens=10_000, temperature=0.5, seed=1))
        assert long.prompt_tokens + len(long.token_ids) == model.config.context_length == engine.room("x") + 2
        assert long.finish_reason == "length"
        # A token that greedy decoding takes third becomes the end of the text.
        third = engine.generate(["x"], GREEDY)[0].token_ids[2]
        tokenizer = SentencePieceTokenizer(tokenizer.model_bytes)
        tokenizer.end_ids = (third,)
        (ended, other) = Engine(model, tokenizer).generate(["x", "def f("], GREEDY)
        assert ended.token_ids[-1] == third and len(ended.token_ids) <= 3 and ended.finish_reason == "stop"
        assert other.token_ids == engine.generate(["def f("], GREEDY)[0].token_ids[: len(other.token_ids)]


@pytest.mark.parametrize("settings", [{"slots": 0}, {"slots": -8}, {"speculate": -1}, {"speculate": 65}])
def test_an_engine_that_cannot_be_is_refused(
    mesh_of: Callable[..., Any], tokenizer: Tokenizer, settings: dict[str, int]
) -> None:
    ((name, value),) = settings.items()
    with mesh_of(), pytest.raises(ConfigError, match=f"{name} is {value}: "):
        Engine(make_model(tokenizer), tokenizer, **settings)


def test_the_context_can_be_filled_but_not_exceeded(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        engine = Engine(make_model(tokenizer), tokenizer)
        full = tokenizer.decode(tokenizer.encode("a b " * 200)[:94])
        while engine.room(full) > 1:
            full += "!"
        (one,) = engine.generate([full], GREEDY)
        assert (len(one.token_ids), one.finish_reason) == (1, "length")
        while engine.room(full) > 0:
            full += "!"
        for prompt, params, message in (
            (full, GREEDY, r"prompt of 96 tokens: the context of 96 has no room; shorten the prompt"),
            ("x", SamplingParams(top_k=401), "top_k is 401: the vocabulary has 400 tokens"),
            ("\ud800", GREEDY, "lone surrogate"),
            ([-3, 5], GREEDY, "prompt: token -3 has no embedding"),
            ("x", SamplingParams(stop_token_ids=(5, -1)), "stop_token_ids: token -1 has no embedding"),
            ("x", SamplingParams(stop_token_ids=(5,) * 32), "stop_token_ids: with the model's own, 33 end a text; 32"),
            ("x", SamplingParams(logit_bias=((400, 1.0),)), "logit_bias: token 400 has no embedding"),
        ):
            with pytest.raises(ConfigError, match=message):
                engine.generate([prompt], params)
        ids, room = tokenizer.encode(full, bos=True), 96 - GREEDY.max_new_tokens
        for side, wanted in (("left", [ids[0], *ids[1 - room :]]), ("right", ids[:room])):
            (cut,) = engine.generate([full], replace(GREEDY, truncate=side))
            assert cut == engine.generate([wanted], GREEDY)[0] and cut.prompt_tokens == room
        assert engine.truncated == 2
        engine.generate(["x"], replace(GREEDY, truncate="left"))
        assert engine.truncated == 2, "there was room"
        (half,) = engine.generate([full], replace(GREEDY, truncate="left", max_new_tokens=1000))
        assert half.prompt_tokens == 48, "half the context is the prompt's"


def test_other_settings_run_the_same_program(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        engine = Engine(make_model(tokenizer), tokenizer)
        assert engine.generate([], GREEDY) == []
        engine.generate(["x", "y"], GREEDY)
        engine.generate(["x"], GREEDY)
        programs = (admit, prefill, decode)
        before = [program._cache_size() for program in programs]
        for params in (
            SamplingParams(max_new_tokens=7, temperature=0.3, top_k=5, top_p=0.5, seed=9),
            SamplingParams(max_new_tokens=31, min_p=0.1, typical_p=0.9, logprobs=2, stop=("x",), stop_token_ids=(7,)),
            SamplingParams(presence_penalty=0.1, logit_bias=((3, 1.0),), num_samples=9, ignore_eos=True),
        ):
            engine.generate(["def g(y):", "z" * 70][: 1 + params.num_samples], params)
        assert [program._cache_size() for program in programs] == before
