"""Completions with a form: each is what the form allows, and nothing else becomes another for it."""

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engine import PROMPTS, make_model, tokenizer  # noqa: F401  (a fixture)

from jaxgpt.errors import ConfigError
from jaxgpt.generation.automaton import token_table
from jaxgpt.generation.batch import parse_line
from jaxgpt.generation.engine import Engine
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.limited import in_process
from jaxgpt.tokenizer import Tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0},
        "kind": {"enum": ["one", "t\u00fcr"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
}
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]( \u00e9t\u00e9| noon)?"


def test_a_walk_through_the_table_spells_a_match(tokenizer: Tokenizer) -> None:  # noqa: F811
    """Whatever way is taken; and every way to cut a match into tokens leads to its end."""
    tokens, ends = tuple(tokenizer.token_bytes), tokenizer.end_ids
    table, random = token_table(DATE, "", tokens, ends), np.random.default_rng(0)
    for _ in range(200):
        state, raw, token = 0, b"", -1
        while token not in ends:
            token = int(random.choice(np.flatnonzero(table[state] >= 0)))
            raw, state = raw + tokens[token], table[state, token]
        assert re.fullmatch(DATE, raw.decode()), raw
    for text in ("1999-12-31", "2024-02-30 \u00e9t\u00e9", "2000-10-09 noon"):
        for _ in range(20):
            state, rest = 0, text.encode()
            while rest:
                fitting = [i for i, each in enumerate(tokens) if each and rest.startswith(each)]
                token = int(random.choice(fitting))
                state, rest = table[state, token], rest[len(tokens[token]) :]
                assert state >= 0
            assert (table[state, list(ends)] >= 0).all()
    assert (table[0, [i for i, each in enumerate(tokens) if not each]] == -1).all()


def test_what_leads_nowhere_is_not_begun() -> None:
    """With tokens that cannot spell all bytes: `ab` would need a `b`."""
    tokens = (b"", b"a", b"c", b"ac", b"d")
    table = token_table("a(b|cd)|d", "", tokens, (0,))
    assert [sorted(np.flatnonzero(row >= 0).tolist()) for row in table[:1]] == [[1, 3, 4]]
    assert np.flatnonzero(table[table[0, 1]] >= 0).tolist() == [2]
    with pytest.raises(ConfigError, match="regex 'ab': no text of this model's tokens is like that"):
        token_table("ab", "", tokens, (0,))


@pytest.mark.parametrize(
    ("regex", "texts", "others"),
    [
        ("^a|ab$", ["a", "ab"], ["", "b", "abb"]),
        (r"-?\d+(\.\d+)?\$?", ["1", "-12.5", "3$", "0.25$"], ["1.", "$", "--1"]),
        (r"\$", ["$"], ["", "$$"]),
        (".*", ["", "x y", "\u00fc\u4e2d"], ["a\nb"]),
        ("(?i)yes( sir)?", ["YES", "yes Sir"], ["yes ", "yes sir sir"]),
    ],
)
def test_the_table_accepts_what_the_expression_matches(regex: str, texts: list[str], others: list[str]) -> None:
    """Also what goes on where it could end, which outlines-core alone gets wrong."""
    accepts = acceptance(regex, "")
    assert all(map(accepts, texts)) and not any(map(accepts, others))


@pytest.mark.parametrize(
    ("schema", "texts", "others"),
    [
        ({"type": "string", "pattern": "^[0-9()+-]+$"}, ['"+1(2)"'], ['""', '"a"', ""]),
        ({"type": "object", "properties": {}}, ["{}", "{ }"], ["", "[]"]),
        ({"const": '"enum":[] ()'}, [r'"\"enum\":[] ()"'], ['""']),
    ],
)
def test_what_looks_empty_in_a_schema_is_allowed(schema: Any, texts: list[str], others: list[str]) -> None:
    accepts = acceptance("", json.dumps(schema))
    assert all(map(accepts, texts)) and not any(map(accepts, others))


def acceptance(regex: str, json_schema: str) -> Callable[[str], bool]:
    tokens = (b"", *(bytes([byte]) for byte in range(256)))
    table = token_table(regex, json_schema, tokens, (0,))

    def accepts(text: str) -> bool:
        state = 0
        for byte in text.encode():
            state = table[state, 1 + byte] if state >= 0 else -1
        return state >= 0 and table[state, 0] >= 0

    return accepts


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "speculate"), [((1, 1, 1), 0), ((2, 2, 2), 0), ((1, 1, 1), 5)])
def test_every_completion_has_its_form(
    mesh_of: Callable[..., Any],
    tokenizer: Tokenizer,  # noqa: F811
    shape: tuple[int, int, int],
    speculate: int,
) -> None:
    """Greedy and drawn, beside texts without a form, which stay as they are; more forms than slots."""
    free = SamplingParams(60, temperature=0.9, seed=3)
    settings = [
        free,
        replace(free, json_schema=json.dumps(SCHEMA), max_new_tokens=150),
        replace(free, regex=DATE, temperature=0),
        replace(free, choice=("yes", "no", "yes, but (a+b)*2.5 \u00fc")),
        replace(free, regex="[a-c]{3,5}", repetition_penalty=1.3, top_p=0.9, num_samples=3),
        replace(free, regex="(ab)*", ignore_eos=True, max_new_tokens=7, stop=("abab",)),
        replace(free, json_schema=json.dumps(SCHEMA), temperature=0, max_new_tokens=150, logit_bias=((40, 100.0),)),
    ]
    with mesh_of(*shape):
        model = make_model(tokenizer, context_length=256)
        engine = Engine(model, tokenizer, slots=4, speculate=speculate)
        alone = engine.generate([PROMPTS[0]], free)
        found = engine.generate([PROMPTS[0]] * 7, settings)
        again = [Engine(model, tokenizer, slots=4).generate([PROMPTS[0]], own)[0] for own in settings[1:4]]
    assert found[:1] == alone and [each.text for each in found[1:4]] == [each.text for each in again]
    for each in (found[1], found[8]):
        value = json.loads(each.text)
        assert value.keys() == SCHEMA["properties"].keys() and value["kind"] in ("one", "t\u00fcr")
        assert isinstance(value["age"], int) and len(value["name"]) <= 8 and each.finish_reason == "stop"
    assert re.fullmatch(DATE, found[2].text)
    assert found[3].text in settings[3].choice
    assert all(re.fullmatch("[a-c]{3,5}", each.text) for each in found[4:7])
    assert found[7].text == "" and found[7].finish_reason == "stop", "the model's own end may not come"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "a("}, r"regex 'a\(': Failed to build DFA"),
        ({"regex": "a(?=b)"}, "regex .*: Failed to build DFA"),
        ({"regex": "[^\\s\\S]"}, "regex .*: The vocabulary provided is incompatible"),
        ({"regex": "(a{1000}){500}"}, "regex .*: it (needs|computes|ended)"),
        ({"json_schema": "{"}, "json_schema '{': Expected a valid JSON string"),
        ({"json_schema": '{"type": "banana"}'}, "json_schema .*: Unsupported type: banana"),
        ({"json_schema": '{"$ref": "#"}'}, "json_schema .*: Ref recusion limit reached"),
        ({"regex": "a", "choice": ("b",)}, "one of them, without"),
        ({"choice": ("",)}, "without empty texts"),
        ({"json_schema": '{"enum": []}'}, "an enum, type, anyOf, oneOf or allOf in it is empty"),
        ({"json_schema": '{"properties": {"a": {"oneOf"\n: [ ]}}}'}, "oneOf or allOf in it is empty"),
        ({"regex": "a", "min_new_tokens": 1}, "no min_new_tokens beside it"),
    ],
)
def test_what_cannot_be_a_form_is_refused(
    mesh_of: Callable[..., Any],
    tokenizer: Tokenizer,  # noqa: F811
    settings: dict[str, Any],
    message: str,
) -> None:
    with mesh_of(), pytest.raises(ConfigError, match=message):
        Engine(make_model(tokenizer), tokenizer).requests("x", SamplingParams(**settings))


def test_lines_may_give_a_schema_as_it_is() -> None:
    line = parse_line(json.dumps({"prompt": "x", "json_schema": SCHEMA}).encode(), 1, SamplingParams())
    assert json.loads(line.params.json_schema) == SCHEMA
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    body = {"prompt": "x", "response_format": form}
    openai = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    assert json.loads(parse_line(json.dumps(openai).encode(), 1, SamplingParams()).params.json_schema) == SCHEMA
    body["response_format"] = {"type": "text"}
    assert not parse_line(json.dumps(openai).encode(), 1, SamplingParams()).params.json_schema
    body["response_format"] = {"type": "json_object", "json_schema": {"schema": SCHEMA}}
    with pytest.raises(ConfigError, match="response_format: its type must be text, or json_schema with a schema"):
        parse_line(json.dumps(openai).encode(), 1, SamplingParams())


def test_without_the_library_a_form_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = [path for path in sys.path if "packages" in path]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in packages])
    monkeypatch.setattr("jaxgpt.generation.automaton.in_process", lambda f, s, **a: f(**a))
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(ConfigError, match=r"outlines-core is missing; pip install 'jaxgpt\[constrain\]'$"):
        token_table("never asked before", "", (b"", b"a"), (0,))


def test_a_process_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "from jaxgpt.limited import limit\ndef endless():\n    limit(1, 2**30)\n    while True: pass\n"
    (tmp_path / "endless.py").write_text(endless)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="it computes for more than 1 s"):
        in_process(importlib.import_module("endless").endless, 1)
