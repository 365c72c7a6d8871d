"""What a completion must look like, as an automaton over tokens: a table [N, V] of the state that each token leads to.

outlines-core makes an automaton over bytes of an expression or a schema, in a limited process, so this file imports no
JAX; every token then walks through it from each state. Letters: N states, V vocabulary, Y bytes of a token."""

import functools
from typing import Any

import numpy as np

from jaxgpt.errors import ConfigError, require
from jaxgpt.limited import in_process, limit

_SECONDS, _MEMORY = 10, 2**31  # for making the automaton over bytes
_END = "\U0010ffff"  # put behind every text: outlines-core may not go on from where an expression could end
_MOST = 2**28  # entries of a table, two bytes each: 5461 states of 49152 tokens


@functools.lru_cache(maxsize=8)
def token_table(regex: str, json_schema: str, tokens: tuple[bytes, ...], ends: tuple[int, ...]) -> np.ndarray:
    """Int16 [N, V]: the next state, -1 where a token may not come, for texts all of which `regex` matches, or that are
    JSON which `json_schema` allows. State 0 is the first. `tokens` are the bytes of each id, none for one that may not
    come; one of `ends` may come behind a complete text. Raises ConfigError for what is wrong, too large, impossible."""
    what = f"json_schema {json_schema!r:.100}" if json_schema else f"regex {regex!r:.100}"
    try:
        found = in_process(_byte_automaton, _SECONDS, regex=regex, json_schema=json_schema)
    except ValueError as error:
        found = {"error": str(error)}
    most = min(_MOST // len(tokens), 2**15 - 1)
    if "error" in found or len(found["next"]) > most:
        why = found.get("error") or f"it needs {len(found['next'])} states, and there can be {most}"
        raise ConfigError(f"{what}: {why}; {found.get('remedy', 'change it')}")
    next_of, final = _numbered(found)
    table_NV, count = _walk(next_of, tokens), len(next_of) - 1
    table_NV[:, list(ends)] = count
    table_NV[final[:, None], list(ends)] = final[:, None]
    while (leads_NV := np.append((table_NV == count).all(1), False)[table_NV]).any():  # to where no token can follow
        table_NV[leads_NV] = count
    require(bool((table_NV[0] != count).any()), f"{what}: no text of this model's tokens is like that; change it")
    table_NV[table_NV == count] = -1
    return table_NV


def _numbered(found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Int16 [N + 1, 256]: the state that each byte leads to, N when nothing matches any more; and the complete ones."""
    count, number = len(found["next"]), {found["first"]: 0}
    for state in found["next"]:
        number.setdefault(int(state), len(number))
    next_of = np.full((count + 1, 256), count, np.int16)
    for state, following in found["next"].items():
        for byte, after in following.items():
            if byte != "256":
                next_of[number[int(state)], int(byte)] = number[after]
    behind = np.arange(count + 1)
    for byte in _END.encode():
        behind = next_of[behind, byte]
    beyond = [number[state] for state in found["final"]]
    next_of[np.isin(next_of, beyond)] = count  # no text has that character
    return next_of, np.flatnonzero(np.isin(behind, beyond))


def _walk(next_of: np.ndarray, tokens: tuple[bytes, ...]) -> np.ndarray:
    """Int16 [N, V]: where each state gets with the bytes of each token."""
    lengths_V = np.array([len(token) for token in tokens])
    spelt_VY = np.zeros((len(tokens), lengths_V.max()), np.uint8)
    for token, spelt in enumerate(tokens):
        spelt_VY[token, : len(spelt)] = np.frombuffer(spelt, np.uint8)
    count = len(next_of) - 1
    table_NV = np.full((count, len(tokens)), count, np.int16)
    for state, row_V in enumerate(table_NV):
        walking, place = np.flatnonzero(lengths_V), 0
        at = np.full(len(walking), state, np.int16)
        while len(walking):
            at, place = next_of[at, spelt_VY[walking, place]], place + 1
            there = lengths_V[walking] == place
            row_V[walking[there]] = at[there]
            goes_on = ~there & (at != count)
            walking, at = walking[goes_on], at[goes_on]
    return table_NV


def _byte_automaton(regex: str, json_schema: str) -> dict[str, Any]:
    """{"next": {state: {byte: state}}, "final": [states], "first": state}, or {"error": why, "remedy": what to do}."""
    try:
        from outlines_core import Index, Vocabulary
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError:
        return {"error": "outlines-core is missing", "remedy": "pip install 'jaxgpt[constrain]'"}
    limit(_SECONDS, _MEMORY)
    try:
        expression = build_regex_from_schema(json_schema) if json_schema else regex.removeprefix("^")
        if any(f'"{key}":[]' in "".join(json_schema.split()) for key in ("enum", "type", "anyOf", "oneOf", "allOf")):
            raise ValueError("an enum, type, anyOf, oneOf or allOf in it is empty")  # an empty text would match it
        expression = expression if expression.endswith("\\$") else expression.removesuffix("$")
        found = Index(f"(?:{expression}){_END}", Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
        final = list(found.get_final_states())
        return {"next": found.get_transitions(), "final": final, "first": found.get_initial_state()}
    except (ValueError, TypeError) as error:
        return {"error": " ".join(str(error).split())[:300]}
