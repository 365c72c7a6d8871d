"""Lines of a batch job to requests, and completions to lines.

A line is a JSON string, an object with `prompt`, `prompt_token_ids` or `messages` and any sampling field, or a line of
OpenAI's batch format, whose answer has that format too. What is wrong with a line is an error of that line alone."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from jaxgpt.errors import ConfigError, nearest
from jaxgpt.generation.engine import Completion
from jaxgpt.generation.sampling import SamplingParams

Json = dict[str, Any]
_Message = Annotated[dict[Literal["role", "content"], str], Field(min_length=2)]
_PROMPTS: dict[str, TypeAdapter] = {
    "prompt": TypeAdapter(str),
    "prompt_token_ids": TypeAdapter(list[Annotated[int, Field(ge=0)]]),
    "messages": TypeAdapter(Annotated[list[_Message], Field(min_length=1)]),
}
_PARAMS = TypeAdapter(SamplingParams)
_OTHER_NAMES = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "min_tokens": "min_new_tokens",
    "n": "num_samples",
}  # fmt: skip
_FIELDS = {*SamplingParams.__dataclass_fields__, *_OTHER_NAMES, *_PROMPTS}
_URLS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat.completion"}


@dataclass(frozen=True)
class Line:
    """One line of the input. `messages` are there or a prompt."""

    id: Any
    params: SamplingParams
    prompt: str | list[int] = ""
    messages: list[Json] | None = None
    url: str | None = None  # where OpenAI's batch format would send it; None for other lines


def parse_line(raw: bytes, number: int, defaults: SamplingParams, *, is_text: bool = False) -> Line:
    """A line of the input, numbered from 1, without its line end; `is_text` takes it as a prompt as it is.

    Raises ConfigError, naming the field, for what cannot be."""
    try:
        value = raw.decode() if is_text else json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the line is not valid {'UTF-8' if is_text else 'JSON'}: {error}") from None
    if isinstance(value, str):
        return Line(number, defaults, prompt=value)
    if not isinstance(value, dict):
        raise ConfigError("the line is neither a JSON string nor an object")
    if "custom_id" in value:
        return _openai_line(value, defaults)
    return _line(value, value.pop("id", number), defaults)


def _openai_line(value: Json, defaults: SamplingParams) -> Line:
    _refuse_unknown(value, {"custom_id", "method", "url", "body"})
    body, url = value.get("body"), value.get("url")
    if url not in _URLS or value.get("method", "POST") != "POST" or not isinstance(body, dict):
        raise ConfigError(f"an OpenAI line needs method POST, a body, and one of the urls {', '.join(_URLS)}")
    body.pop("model", None)
    if "messages" in body and isinstance(body.get("logprobs"), bool):  # where it only says whether
        body["logprobs"] = body.get("top_logprobs", 0) if body["logprobs"] else None
        body.pop("top_logprobs", None)
    if ("messages" in body) != (url == "/v1/chat/completions"):
        raise ConfigError(f"{url} takes {'messages' if 'chat' in url else 'a prompt'}")
    return _line(body, value["custom_id"], defaults, url)


def _line(value: Json, name: Any, defaults: SamplingParams, url: str | None = None) -> Line:
    _refuse_unknown(value, _FIELDS)
    kinds = [key for key in _PROMPTS if key in value]
    if len(kinds) != 1:
        raise ConfigError(f"the line needs one of {', '.join(_PROMPTS)}, and has {', '.join(kinds) or 'none'}")
    (kind,) = kinds
    prompt = _valid(_PROMPTS[kind], value.pop(kind), kind)
    fields = {_OTHER_NAMES.get(key, key): each for key, each in value.items()}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if isinstance(fields.get("logit_bias"), dict):
        fields["logit_bias"] = [[int(key) if key.isdecimal() else key, by] for key, by in fields["logit_bias"].items()]
    params = _valid(_PARAMS, asdict(defaults) | fields)
    return Line(name, params, url=url, **{"messages" if kind == "messages" else "prompt": prompt})


def _refuse_unknown(value: Json, known: set[str]) -> None:
    for key in value:
        if key not in known:
            raise ConfigError(f"unknown field {key!r}{nearest(key, known)}")


def _valid(adapter: TypeAdapter, value: Any, *place: str) -> Any:
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, [*place, *first['loc']]))}: {first['msg']}") from None


def answer(line: Line, completions: Sequence[Completion]) -> Json:
    """The output of a line: its completions are the samples that it asked for."""
    generated = sum(len(each.token_ids) for each in completions)
    counts = {"prompt_tokens": completions[0].prompt_tokens, "completion_tokens": generated}
    if line.url:
        usage = counts | {"total_tokens": sum(counts.values())}
        choices = [_choice(line, i, each) for i, each in enumerate(completions)]
        body = {"object": _URLS[line.url], "created": 0, "choices": choices, "usage": usage}
        return {"custom_id": line.id, "response": {"status_code": 200, "body": body}, "error": None}
    samples = [_sample(each) for each in completions]
    return {"id": line.id} | (samples[0] if len(samples) == 1 else {"samples": samples}) | counts


def _sample(completion: Completion) -> Json:
    kept = ("text", "token_ids", "finish_reason", "logprobs", "top_logprobs")
    return {name: x for name in kept if (x := getattr(completion, name)) is not None}


def _choice(line: Line, index: int, completion: Completion) -> Json:
    choice: Json = {"index": index, "finish_reason": completion.finish_reason}
    if line.messages is None:
        choice["text"] = completion.text
    else:
        choice["message"] = {"role": "assistant", "content": completion.text}
    if completion.logprobs is not None:
        choice["logprobs"] = {"token_logprobs": completion.logprobs, "top_logprobs": completion.top_logprobs}
    return choice


def error_answer(raw: bytes, number: int, message: str) -> Json:
    """The output of a line that is wrong, under its own id where that can be read."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    error = {"message": message, "line": number}
    if isinstance(value, dict) and "custom_id" in value:
        return {"custom_id": value["custom_id"], "response": None, "error": error}
    return {"id": value.get("id", number) if isinstance(value, dict) else number, "error": error}
