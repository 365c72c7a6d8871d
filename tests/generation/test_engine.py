"""Generation: what repeated full passes would give, the same for every batch, mesh and run, within its bounds."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import ModelConfig, TokenizerConfig
from jaxgpt.errors import ConfigError
from jaxgpt.generation.decode import decode
from jaxgpt.generation.engine import STEPS_PER_DISPATCH, Engine
from jaxgpt.generation.sampling import SamplingParams, choose
from jaxgpt.model import Transformer
from jaxgpt.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer

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
    model = jax.jit(lambda: Transformer(config, jax.random.key(3)))()
    return jax.tree.map(lambda p: jnp.where(p == 1, p, 15 * p), model)  # norms stay 1


def full_passes(model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int) -> list[int]:
    """The most probable token of a whole forward pass without a cache, again and again."""
    ids = tokenizer.encode(prompt, bos=True)
    forward = jax.jit(lambda padded: model.logits(model(padded)[0])[0])
    for _ in range(tokens):
        padded = np.zeros((1, model.config.context_length), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(forward(padded)[len(ids) - 1].argmax()))
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
        ):
            with pytest.raises(ConfigError, match=message):
                engine.generate([prompt], params)


def test_other_settings_run_the_same_program(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with mesh_of():
        engine = Engine(make_model(tokenizer), tokenizer)
        assert engine.generate([], GREEDY) == []
        engine.generate(["x"], GREEDY)
        before = decode._cache_size()
        for params in (
            SamplingParams(max_new_tokens=7, temperature=0.3, top_k=5, top_p=0.5, seed=9),
            SamplingParams(max_new_tokens=31),
        ):
            engine.generate(["def g(y):"], params)
        assert decode._cache_size() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", value) for value in (0, -1, 2**63)]
    + [("temperature", value) for value in (float("nan"), -1.0, float("inf"), 1e-30)]
    + [("top_p", value) for value in (0.0, 1.1, float("nan"))]
    + [("top_k", -1), ("seed", -1), ("seed", 2**64), ("num_samples", 0), ("num_samples", 10**6)],
)
def test_illegal_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .*: it must be "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


# --- the sampling rule


def allowed(logits_V: np.ndarray, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """The tokens that may be drawn and their probabilities, by the definitions, in float64."""
    ranked = sorted(range(len(logits_V)), key=lambda i: (-logits_V[i], i))[: top_k or None]
    odds = np.exp((logits_V[ranked].astype(np.float64) - logits_V.max()) / temperature)
    odds /= odds.sum()
    kept = [i for i in range(len(ranked)) if i == 0 or odds[:i].sum() < top_p]
    return {ranked[i]: odds[i] / odds[kept].sum() for i in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.6), (1.3, 7, 0.8), (1.0, 1, 1.0), (1.0, 0, 1e-6)],
)
def test_tokens_come_as_often_as_they_should(temperature: float, top_k: int, top_p: float) -> None:
    logits_V = np.random.default_rng(0).normal(size=12).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: choose(jnp.asarray(logits_V), key, temperature, top_k, top_p)))
    counts = np.bincount(draw(keys), minlength=12)
    expected = allowed(logits_V, temperature, top_k, top_p)
    assert set(np.flatnonzero(counts)) <= set(expected)
    for token, probability in expected.items():
        deviation = (20_000 * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - 20_000 * probability) <= 4 * deviation, token


@pytest.mark.parametrize("logits", [[1, 2, 3, 0], [3, 3, 1, 3], [-1e38, -1e38, -3e38, 0], [0, 0, 0, 0]])
def test_temperature_0_takes_the_first_of_the_largest(logits: list[float]) -> None:
    for key in jax.random.split(jax.random.key(0), 3):
        token = choose(jnp.array(logits, jnp.float32), key, jnp.float32(0), jnp.int32(0), jnp.float32(1))
        assert token == np.argmax(logits)
