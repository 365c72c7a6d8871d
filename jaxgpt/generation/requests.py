"""Lines of a batch job to requests, and completions to lines.

A line is a JSON string, an object with `prompt`, `prompt_token_ids` or `messages` and any sampling field, or a line of
OpenAI's batch format, whose answer has that format too. What is wrong with a line is an error of that line alone."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from jaxgpt.config import validated
from jaxgpt.errors import ConfigError, nearest, require
from jaxgpt.generation.engine import Completion
from jaxgpt.generation.sampling import SamplingParams

Json = dict[str, Any]
_OTHER_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_OTHER_NAMES |= {"min_tokens": "min_new_tokens", "n": "num_samples"}
_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_Message = Annotated[dict[Literal["role", "content"], str], Field(min_length=2)]
_URLS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat.completion"}


@dataclass(frozen=True)
class LineParams(SamplingParams):
    """The fields of a line: one of the three kinds of prompts, and settings."""

    prompt: str | None = None
    prompt_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = [name for name in _PROMPTS if getattr(self, name) is not None]
        require(len(kinds) == 1, f"a line needs one of {', '.join(_PROMPTS)}, and has {', '.join(kinds) or 'none'}")


class Line(NamedTuple):
    """One line of the input."""

    id: Any
    params: LineParams
    url: str | None = None  # where OpenAI's batch format would send it; None for other lines


def parse_line(raw: bytes, number: int, defaults: SamplingParams, *, is_text: bool = False) -> Line:
    """A line of the input, numbered from 1, without its line end; `is_text` takes it as a prompt as it is. Raises
    ConfigError, naming the field, for what cannot be."""
    try:
        value = raw.decode() if is_text else json.loads(raw.decode(), parse_constant=int)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the line is not valid {'UTF-8' if is_text else 'JSON'}: {error}") from None
    value = {"prompt": value} if isinstance(value, str) else value
    require(isinstance(value, dict), "the line is neither a JSON string nor an object")
    name = value.pop("custom_id") if (is_openai := "custom_id" in value) else value.pop("id", number)
    given, url = _openai_body(value) if is_openai else (value, None)
    fields = {_OTHER_NAMES.get(key, key): each for key, each in given.items()}
    if isinstance(stop := fields.get("stop"), str):
        fields["stop"] = [stop]
    if isinstance(schema := fields.get("json_schema"), dict):
        fields["json_schema"] = json.dumps(schema)
    if isinstance(bias := fields.get("logit_bias"), dict):
        fields["logit_bias"] = [[int(k) if k.isdecimal() and len(k) < 10 else k, by] for k, by in bias.items()]
    return Line(name, validated(LineParams, asdict(defaults) | fields, "the line"), url)


def _openai_body(value: Json) -> tuple[Json, str]:
    body, url = value.get("body"), value.get("url")
    if unknown := value.keys() - {"method", "url", "body"}:
        raise ConfigError(f"unknown key {min(unknown)}{nearest(min(unknown), ('method', 'url', 'body'))}")
    if url not in list(_URLS) or value.get("method", "POST") != "POST" or not isinstance(body, dict):
        raise ConfigError(f"an OpenAI line needs method POST, a body, and one of the urls {', '.join(_URLS)}")
    body.pop("model", None)
    if (form := body.pop("response_format", {"type": "text"})) != {"type": "text"}:
        try:
            body["json_schema"] = form["json_schema"]["schema"]
        except (LookupError, TypeError):
            raise ConfigError("response_format: its type must be text, or json_schema with a schema") from None
    if "messages" in body and isinstance(body.get("logprobs"), bool):  # where it only says whether
        body["logprobs"] = body.get("top_logprobs", 0) if body["logprobs"] else None
        body.pop("top_logprobs", None)
    require(("messages" in body) == ("chat" in url), f"{url} takes {'messages' if 'chat' in url else 'a prompt'}")
    return body, url


def answer(line: Line, completions: Sequence[Completion]) -> Json:
    """The output of a line: its completions are the samples that it asked for."""
    generated = sum(len(each.token_ids) for each in completions)
    counts = {"prompt_tokens": completions[0].prompt_tokens, "completion_tokens": generated}
    if line.url is None:
        samples = [{name: x for name, x in asdict(each).items() if x is not None} for each in completions]
        return {"id": line.id} | (samples[0] if len(samples) == 1 else {"samples": samples}) | counts
    choices: list[Json] = []
    for i, each in enumerate(completions):
        said = {"message": {"role": "assistant", "content": each.text}} if line.params.messages else {"text": each.text}
        logprobs = {"token_logprobs": each.logprobs, "top_logprobs": each.top_logprobs}
        more = {} if each.logprobs is None else {"logprobs": logprobs}
        choices.append({"index": i, "finish_reason": each.finish_reason, **said, **more})
    usage = counts | {"total_tokens": sum(counts.values())}
    body = {"object": _URLS[line.url], "created": 0, "choices": choices, "usage": usage}
    return {"custom_id": line.id, "response": {"status_code": 200, "body": body}, "error": None}


def error_answer(raw: bytes, number: int, message: str) -> Json:
    """The output of a line that is wrong, under its own id where that can be read."""
    try:
        value = json.loads(raw, parse_constant=int)
    except (ValueError, RecursionError):
        value = None
    error, value = {"message": message, "line": number}, value if isinstance(value, dict) else {}
    if "custom_id" in value:
        return {"custom_id": value["custom_id"], "response": None, "error": error}
    return {"id": value.get("id", number), "error": error}
