"""A batch job: lines in, lines out, in their order, whatever happens in between.

A line is a JSON string, an object with a prompt and settings, or a line of OpenAI's batch format, which gets an answer
in that format. What is wrong with a line is an error of that line alone. The output grows in `OUTPUT.part`, a whole
line at a time, and gets its name when it is complete; `OUTPUT.job` says which job it is of. After a kill the same
command cuts off a torn last line, and goes on with the first line that has no answer. What was computed but not written
is computed again, to the same tokens: they depend on the request alone."""

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from jaxgpt.config import differences, validated
from jaxgpt.errors import BadFileError, ConfigError, StorageError, nearest, note, require
from jaxgpt.files import append, bounded_lines, locked, publish, sync, write_atomically
from jaxgpt.generation.engine import Completion, Engine, Request
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.progress import Bar

LONGEST_LINE = 16 * 2**20  # bytes of an input line
_REPORT_SECONDS = 10.0  # between lines for people where there is no terminal, each when its answers are on the disk
EncodeChat = Callable[[Any], list[int]]  # the ids of a conversation
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
    """Line `number`, by which its seed goes, a prompt as it is if `is_text`. Raises ConfigError for a wrong field."""
    try:
        value = raw.decode() if is_text else json.loads(raw.decode(), parse_constant=int)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the line is not valid {'UTF-8' if is_text else 'JSON'}: {error}") from None
    value = {"prompt": value} if isinstance(value, str) else value
    require(isinstance(value, dict), "the line is neither a JSON string nor an object")
    name = value.pop("custom_id") if (is_openai := "custom_id" in value) else value.pop("id", number)
    given, url = _openai_body(value) if is_openai else (value, None)
    fields = {"seed": (defaults.seed + number) % 2**32} | {_OTHER_NAMES.get(key, key): x for key, x in given.items()}
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
    match body.pop("response_format", {"type": "text"}):
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            body["json_schema"] = schema
        case form if form != {"type": "text"}:
            raise ConfigError("response_format: its type must be text, or json_schema with a schema")
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
        samples = [{name: x for name, x in each._asdict().items() if x is not None} for each in completions]
        return {"id": line.id} | (samples[0] if len(samples) == 1 else {"samples": samples}) | counts
    choices: list[Json] = []
    for i, each in enumerate(completions):
        said = {"message": {"role": "assistant", "content": each.text}} if line.params.messages else {"text": each.text}
        logprobs = {"token_logprobs": each.logprobs, "top_logprobs": each.top_logprobs}
        more = {"logprobs": None if each.logprobs is None else logprobs, "prompt_logprobs": each.prompt_logprobs}
        told = {name: x for name, x in more.items() if x is not None}
        choices.append({"index": i, "finish_reason": each.finish_reason, **said, **told})
    usage = counts | {"total_tokens": sum(counts.values())}
    body = {"object": _URLS[line.url], "created": 0, "choices": choices, "usage": usage}
    return {"custom_id": line.id, "response": {"status_code": 200, "body": body}, "error": None}


def error_answer(raw: bytes, number: int, message: str) -> Json:
    """The output of a line that is wrong, under its own id where that can be read."""
    value: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(raw, parse_constant=int)
    error, value = {"message": message, "line": number}, value if isinstance(value, dict) else {}
    if "custom_id" in value:
        return {"custom_id": value["custom_id"], "response": None, "error": error}
    return {"id": value.get("id", number), "error": error}


@dataclass(frozen=True)
class Job:
    """What is to be done. `shard` (i, n) takes the i-th of n equal parts of the lines; `cat` joins their outputs."""

    input: Path
    output: Path
    params: SamplingParams
    is_text: bool = False
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        i, n = self.shard
        require(0 <= i < n, f"shard {i}/{n}: the first must be below the second")
        if not self.input.is_file():
            raise BadFileError(f"input {self.input}: there is no such file; name a file with one request a line")
        if not self.output.parent.is_dir():
            raise StorageError(f"output {self.output}: there is no directory {self.output.parent}; make it")
        require(not self.output.is_dir(), f"output {self.output}: it is a directory; name a file")

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Number and content of each line that is not blank; None for one that is too long."""
        with open(self.input, "rb") as file:
            for number, line in enumerate(bounded_lines(file, LONGEST_LINE), 1):
                if line is None or line.strip():
                    yield number, line and line.rstrip(b"\r\n")

    def identity(self, model: str) -> str:
        with open(self.input, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        own = differences(SamplingParams(), self.params)  # a new setting then makes no other job of an old one
        return json.dumps(asdict(self) | {"params": own, "input": digest, "output": "", "model": model}) + "\n"

    def run(self, engine: Engine, encode_chat: EncodeChat, model: str) -> None:
        """Answer every line of the input by the model that `model` names. Raises ConfigError for another's output."""
        with _Output(self.output, self.identity(model)) as output:
            if not output.complete:
                lines = sum(1 for _ in self.lines())
                first, last = (lines * i // self.shard[1] for i in (self.shard[0], self.shard[0] + 1))
                if before := output.written:
                    note(f"going on after {before} of {last - first} lines")
                _answer_lines(self, engine, encode_chat, output, range(first, last))
                publish(output.part, self.output)
                answered = f"{last - first - before} lines answered now, {output.errors} errors"
                note(f"{answered}, {engine.truncated} truncated, {engine.reused} tokens of prompts reused")
            note(f"{self.output} is complete")


class _Output(contextlib.ExitStack):
    """The file that grows, and the records that wait until all before them are there."""

    def __init__(self, path: Path, identity: str) -> None:
        """Raises ConfigError when the output is another job's, or another process writes it."""
        super().__init__()
        self.part, marker = (Path(f"{path}{end}") for end in (".part", ".job"))
        self.enter_context(locked(marker.with_suffix(".lock"), wait=False, what=path))
        known = marker.read_text() if marker.exists() else None
        if known != identity and (known or path.exists() or self.part.exists()):
            self.close()  # the lock, or it would be held for as long as the error
            raise ConfigError(f"output {path}: it is there, of another job; remove it or choose another name")
        self.complete, self.written, self.errors = path.exists(), 0, 0
        self._waiting: dict[int, bytes] = {}
        if not self.complete:
            write_atomically(marker, identity.encode())
            self._file = self.enter_context(self.part.open("ab", buffering=0))
            with self.part.open("rb") as lines:
                sizes = [len(line) for line in lines if line.endswith(b"\n")]  # else a kill tore it
            self.written = len(sizes)
            self._file.truncate(sum(sizes))

    def put(self, index: int, record: dict[str, Any]) -> None:
        """Write a record as soon as all before it are written."""
        self.errors += record.get("error") is not None
        self._waiting[index] = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        while self.written in self._waiting:
            append(self._file, self._waiting.pop(self.written))
            self.written += 1


def _answer_lines(job: Job, engine: Engine, encode_chat: EncodeChat, output: _Output, part: range) -> None:
    """Answer what is left of a part of the lines."""
    begun: dict[int, tuple[Line, dict[int, Completion]]] = {}

    def requests() -> Iterator[Request]:
        left = itertools.islice(job.lines(), part.start + output.written, part.stop)
        for index, (number, raw) in enumerate(left, output.written):
            try:
                if raw is None:
                    raise ConfigError(f"the line is longer than {LONGEST_LINE >> 20} MiB")
                line = parse_line(raw, number, job.params, is_text=job.is_text)
                params = line.params
                prompt = encode_chat(params.messages) if params.messages else params.prompt
                made = engine.requests(params.prompt_token_ids or [] if prompt is None else prompt, params, index)
            except (ConfigError, BadFileError) as error:
                output.put(index, error_answer(raw or b"", number, str(error)))
                continue
            begun[index] = line, {}
            yield from made

    began = said = time.monotonic()
    first = output.written
    with Bar("lines", len(part), first, stderr=True) as bar:
        for request, _, completion in engine.run(requests()):
            if completion is None:
                continue
            line, completions = begun[request.tag]
            completions[request.sample] = completion
            if len(completions) == line.params.num_samples:
                output.put(request.tag, answer(line, [completions[i] for i in range(len(completions))]))
                del begun[request.tag]
                if due := (now := time.monotonic()) - said > _REPORT_SECONDS:
                    sync(output.part)
                    said = now
                left = round((len(part) - output.written) * (now - began) / max(output.written - first, 1))
                full = engine.used / max(engine.places, 1)
                figures = f"{engine.tokens / (now - began):,.1f} tokens/s  slots {full:.0%} full"
                bar.show(output.written, f"{figures}  {timedelta(seconds=left)} left  {output.errors} errors", due=due)
