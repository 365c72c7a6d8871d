"""Beam search: the most probable texts as a whole, as a plain search finds them, and transformers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import MODERN, PROMPTS, full_pass, make_model, tokenizer  # noqa: F401  (a fixture)

from jaxgpt.errors import ConfigError
from jaxgpt.generation.engine import Engine
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.interop.configs import family_of, write_config
from jaxgpt.interop.load import stored_tensors
from jaxgpt.interop.tensors import write_safetensors
from jaxgpt.model import Transformer
from jaxgpt.tokenizer import Tokenizer


def plain_search(model: Transformer, ids: list[int], params: SamplingParams, ends: set[int]) -> list[list[int]]:
    """The same by full passes, sorted lists and no arrays that are updated."""
    beams, width = [(0.0, ids)], params.beam_width
    complete: list[tuple[float, list[int]]] = []
    for new in range(1, params.max_new_tokens + 1):
        rows = np.zeros((width, model.config.context_length), np.int32)
        for row, (_, text) in zip(rows, beams, strict=False):
            row[: len(text)] = text
        log_p = np.asarray(jax.nn.log_softmax(full_pass(model, rows)[:, len(ids) + new - 2]))
        every = [
            (total + float(row[token]), [*text, token])
            for (total, text), row in zip(beams, log_p, strict=False)
            for token in range(len(row))
        ]
        every.sort(key=lambda each: -each[0])
        last = lambda text: text[-1] in ends or new == params.max_new_tokens  # noqa: B023, E731
        complete += [(total / new**params.length_penalty, text) for total, text in every[:width] if last(text)]
        complete = sorted(complete, key=lambda each: -each[0])[:width]
        beams = [each for each in every if not last(each[1])][:width]
        if not beams or (len(complete) == width and beams[0][0] / new**params.length_penalty <= complete[-1][0]):
            break
    return [text[len(ids) :] for _, text in complete]


@pytest.mark.parametrize(
    "given",
    [
        {"beam_width": 4},
        {"beam_width": 2, "length_penalty": 0.0},
        {"beam_width": 4, "length_penalty": 3.0, "stop_token_ids": tuple(range(40, 60))},
        {"beam_width": 6, "length_penalty": -1.0, "stop_token_ids": tuple(range(100, 116))},
    ],
)
def test_beams_are_those_of_a_plain_search(
    mesh_of: Callable[..., Any],
    tokenizer: Tokenizer,  # noqa: F811
    given: dict[str, Any],
) -> None:
    params = SamplingParams(12, num_samples=given["beam_width"], **given)
    ends = {*tokenizer.end_ids, *params.stop_token_ids}
    prompts = [*PROMPTS, "def f(x): return f(x)" * 4]
    with mesh_of():
        model = make_model(tokenizer, **MODERN)
        found = Engine(model, tokenizer).generate(prompts, params)
        ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
        expected = [text for each in ids for text in plain_search(model, each, params, ends)]
    assert [each.token_ids for each in found] == expected
    for each in found:
        assert each.finish_reason == ("stop" if each.token_ids[-1] in ends else "length")
        whole = each.token_ids[:-1] if each.finish_reason == "stop" else each.token_ids
        assert each.text == tokenizer.decode(whole)


def test_beams_and_samples_answer_one_job(mesh_of: Callable[..., Any], tokenizer: Tokenizer) -> None:  # noqa: F811
    """In slots of their own, whatever else is in the engine; also on a mesh, and in a stream."""
    beams, drawn = SamplingParams(9, num_samples=2, beam_width=4), SamplingParams(9, seed=3, num_samples=2)
    texts = []
    for sizes in ((1, 1, 1), (2, 1, 2)):
        with mesh_of(*sizes):
            engine = Engine(make_model(tokenizer, **MODERN), tokenizer, slots=2)
            mixed = engine.generate(["x = ", "def f(", "y", "z"], [drawn, beams, beams, drawn])
            alone = [engine.generate(["x = "], drawn), engine.generate(["def f("], beams)]
            assert mixed[:4] == alone[0] + alone[1] and len(mixed) == 8
            assert "".join(text for sample, text in engine.stream("def f(", beams) if sample == 1) == mixed[3].text
            assert engine.tokens == sum(len(each.token_ids) for each in [*mixed, *mixed[:4], *mixed[2:4]])
            texts.append(mixed)
            if sizes[0] == 2:
                with pytest.raises(ConfigError, match="beam_width is 3: it must be a multiple of 2, up to 400"):
                    engine.generate(["x"], SamplingParams(beam_width=3))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("beams", "most"), [(2, 5), (4, 5), (2, 1), (4, 1)])
def test_a_search_ends_where_logits_are_not_finite(
    mesh_of: Callable[..., Any],
    tokenizer: Tokenizer,  # noqa: F811
    beams: int,
    most: int,
) -> None:
    """Also in the last step, and where the tokens that come first in such a list would end a text."""
    with mesh_of():
        model = make_model(tokenizer)
        bad = tokenizer.encode("def")[0]
        row = jnp.arange(model.config.vocab_rows)[:, None] == bad
        model.token_embedding = jax.tree.map(lambda p: jnp.where(row, jnp.nan, p), model.token_embedding)
        engine, params = Engine(model, tokenizer), SamplingParams(most, num_samples=beams, beam_width=beams)
        failed, good = engine.generate([[bad]], params), engine.generate([[5]], params)
    assert [(each.finish_reason, each.token_ids) for each in failed] == [("error", [])] * beams
    assert {each.finish_reason for each in good} <= {"stop", "length"} and all(each.token_ids for each in good)


@pytest.mark.parametrize("beams", [1, 3])
def test_each_beam_turns_by_the_length_of_its_text(
    mesh_of: Callable[..., Any],
    tokenizer: Tokenizer,  # noqa: F811
    beams: int,
) -> None:
    """Longrope's frequencies depend on it. A whole penalty is a number as another."""
    factors = dict(rope_short_factors=(1.0,) * 4, rope_long_factors=(4.0, 2.0, 8.0, 3.0))
    longrope = MODERN | dict(rope_scaling="longrope", rope_original_context=20, **factors)
    params = SamplingParams(30, num_samples=beams, beam_width=beams, length_penalty=-1, ignore_eos=True)
    with mesh_of():
        model = make_model(tokenizer, **longrope)
        ids = tokenizer.encode("def f(x): return f(x)", bos=True)
        found = [each.token_ids for each in Engine(model, tokenizer).generate([ids], params)]
        assert found == plain_search(model, ids, params, set())


@pytest.mark.parity
def test_beams_are_those_of_transformers(mesh_of: Callable[..., Any], tokenizer: Tokenizer, tmp_path: Path) -> None:  # noqa: F811
    import torch
    from transformers import AutoModelForCausalLM

    llama = dict(positions="rotary", norm="rmsnorm", n_kv_heads=2, gated_mlp=True, activation="silu", mlp_bias=False)
    llama |= dict(attention_bias=False, norm_bias=False)
    with mesh_of():
        ours = make_model(tokenizer, **llama)
        _, hf = write_config(ours.config, "llama")
        (tmp_path / "config.json").write_text(json.dumps(hf | {"dtype": "float32"}))
        write_safetensors(tmp_path, stored_tensors(ours, family_of("llama", "test")))
        theirs, engine = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval(), Engine(ours, tokenizer)
        for beams, penalty, more in (
            (4, 1.0, {}),
            (3, 0.0, {"repetition_penalty": 1.3}),
            (5, 2.0, {"min_new_tokens": 6}),
            (2, -1.0, {}),
        ):
            stops = tuple(range(50, 58))
            params = SamplingParams(20, num_samples=beams, beam_width=beams, stop_token_ids=stops, **more)
            params = replace(params, length_penalty=penalty)
            ends = [*tokenizer.end_ids, *params.stop_token_ids]
            for prompt in PROMPTS:
                ids = tokenizer.encode(prompt, bos=True)
                options: Any = dict(num_beams=beams, num_return_sequences=beams, length_penalty=penalty, **more)
                options |= dict(do_sample=False, max_new_tokens=20, eos_token_id=ends, pad_token_id=399)
                rows = theirs.generate(torch.tensor([ids]), **options)[:, len(ids) :].tolist()
                cut = [row[: next((i + 1 for i, each in enumerate(row) if each in ends), 20)] for row in rows]
                assert [each.token_ids for each in engine.generate([prompt], params)] == cut, (prompt, params)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(best_of=2, beam_width=2), "best_of: beam search has no use for it; leave it out"),
        (dict(num_samples=3, beam_width=2), "beam_width is 2: it must be between 3 and 64"),
        (dict(beam_width=65), "beam_width is 65: it must be between 1 and 64"),
        (dict(max_new_tokens=0), "max_new_tokens is 0: it must be between 1 and 1048576"),
        (dict(beam_width=2, top_k=4, stop=("x",)), "top_k, stop: beam search has no use for it; leave it out"),
        (dict(beam_width=2, temperature=0.5), "temperature: beam search has no use for it; leave it out"),
        (dict(beam_width=2, logprobs=0), "logprobs: beam search has no use for it; leave it out"),
        (dict(beam_width=2, length_penalty=float("nan")), "length_penalty is nan: it must be between -10 and 10"),
    ],
)
def test_what_a_search_cannot_take_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        SamplingParams(**given)
    assert message in str(refused.value)
