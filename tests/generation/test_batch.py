"""Batch jobs: every line answered once, in order, whatever is wrong with it and whatever happens meanwhile."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.errors import ConfigError, StorageError
from jaxgpt.generation import batch
from jaxgpt.generation.batch import LineParams, parse_line
from jaxgpt.generation.sampling import SamplingParams

DEFAULTS = SamplingParams(max_new_tokens=9, temperature=0.8)
OPENAI = {"custom_id": "r1", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}

BAD: dict[str, tuple[Any, str]] = {
    "unknown field": ({"prompt": "x", "topk": 3}, "the line: unknown key topk; did you mean top_k"),
    "wrong type": ({"prompt": "x", "temperature": "hot"}, "temperature: Input should be a valid number"),
    "a truth is no number": ({"prompt": "x", "max_tokens": True}, "max_new_tokens: Input should be a valid integer"),
    "out of bounds": ({"prompt": "x", "temperature": -1}, "temperature is -1.0: it must be 0, or between"),
    "not a number": (b'{"prompt": "x", "top_p": NaN}', "not valid JSON: "),
    "huge": ({"prompt": "x", "max_tokens": 2**63}, "max_new_tokens is 9223372036854775808: it must be"),
    "no prompt": ({"id": 3}, "one of prompt, prompt_token_ids, messages, and has none"),
    "two prompts": ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "and has prompt, messages"),
    "a number": (b"3", "neither a JSON string nor an object"),
    "a prompt of ids": ({"prompt": [1]}, "prompt: Input should be a valid string"),
    "ids of text": ({"prompt_token_ids": ["a"]}, "prompt_token_ids.0: Input should be a valid integer"),
    "unknown id": ({"prompt_token_ids": [10**6]}, "token 1000000 has no embedding"),
    "no ids": ({"prompt_token_ids": []}, "the prompt is empty"),
    "messages": ({"messages": [{"role": "user"}]}, "messages.0: Dictionary should have at least 2 items"),
    "too long": ({"prompt": "x " * 300}, "has no room"),
    "not JSON": (b"{", "the line is not valid JSON"),
    "not UTF-8": (b'"\xff"', "the line is not valid JSON: 'utf-8' codec can't decode"),
    "surrogate": (b'"\\ud800"', "the line: Invalid JSON: unexpected end of hex escape"),
    "NaN": (b'{"id": NaN, "prompt": "x"}', "the line is not valid JSON"),
    "an id without characters": ({"id": "\ud800", "prompt": 3}, "the line: prompt"),
    "a long id": ({"prompt": "x", "logit_bias": {"9" * 5000: 1}}, "the line: logit_bias"),
    "a list of urls": (OPENAI | {"url": ["x"]}, "one of the urls /v1/completions"),
    "deep": (b"[" * 100_000, "the line is not valid JSON"),
    "a url": (OPENAI | {"url": "/v1/embeddings"}, "one of the urls /v1/completions"),
    "a body": (OPENAI | {"body": 3}, "a body"),
    "chat to completions": (OPENAI | {"body": {"messages": []}}, "/v1/completions takes a prompt"),
}


@pytest.fixture
def job(command: Callable[..., Any], finished: Path, tmp_path: Path) -> Callable[..., Any]:
    """`job(lines, ...)` runs a batch job; it gives its outcome, and the output's lines if there is one."""

    def run(lines: list[Any], *words: str, output: str = "out.jsonl") -> Any:
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(raw) + b"\n")
        paths = ("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / output))
        done = command("generate.py", "--checkpoint", str(finished), *paths, "--max-new-tokens", "9", *words)
        path = tmp_path / output
        return done, [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else None

    return run


def test_equal_prompts_are_continued_in_ways_of_their_own(job: Callable[..., Any]) -> None:
    """Each line draws by its number, the same in every part of a job, unless it has a seed."""
    lines = ["import ", "import ", {"prompt": "import ", "seed": 2}, "import "]
    _, answers = job(lines, "--temperature", "1.5", "--seed", "0")
    texts = [answer["text"] for answer in answers]
    assert texts[1] == texts[2] and len(set(texts)) == 3
    _, half = job(lines, "--temperature", "1.5", "--shard", "1/2", output="half.jsonl")
    assert [answer["text"] for answer in half] == texts[2:]


@pytest.mark.slow
def test_each_bad_line_is_an_error_of_its_own(job: Callable[..., Any]) -> None:
    lines: list[Any] = []
    for value, _ in BAD.values():
        lines += [value, "import "]
    outcome, answers = job(lines, "--temperature", "0")
    assert outcome.status == 0 and len(answers) == len(lines)
    for (name, (value, message)), answer in zip(BAD.items(), answers[::2], strict=True):
        assert message in answer["error"]["message"], name
        assert answer["error"]["line"] == lines.index(value) + 1
        assert answer.get("custom_id") == "r1" if isinstance(value, dict) and "custom_id" in value else "id" in answer
    good = answers[1::2]
    assert [answer["id"] for answer in good] == list(range(2, len(lines) + 1, 2))
    assert {answer["text"] for answer in good} == {good[0]["text"]} and good[0]["text"]
    assert f"{len(BAD)} errors, 0 truncated" in outcome.err


def test_long_prompts_are_cut_where_that_is_asked_for(job: Callable[..., Any]) -> None:
    outcome, (cut, _) = job([{"prompt": "x " * 300, "truncate": "left"}, "x"])
    assert "0 errors, 1 truncated" in outcome.err and cut["prompt_tokens"] == 64 - 9 and cut["completion_tokens"] <= 9


def test_answers_say_all_that_was_asked_for(job: Callable[..., Any]) -> None:
    asked = {"model": "m", "prompt": "import ", "max_tokens": 5, "ignore_eos": True}
    _, (plain, ids, scored, many, text, openai) = job([
        "import ",
        {"id": "mine", "prompt_token_ids": [5, 6, 7], "max_tokens": 4, "logprobs": 2, "ignore_eos": True},
        {"prompt_token_ids": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 0},
        {"prompt": "x", "n": 3, "seed": 4},
        {"prompt": "x", "stop": ["e"], "max_tokens": 60},
        OPENAI | {"body": asked | {"logprobs": 1, "prompt_logprobs": 1}},
    ])  # fmt: skip
    assert plain.keys() == {"id", "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"}
    assert plain["completion_tokens"] == len(plain["token_ids"]) <= 9 and plain["id"] == 1
    assert ids["id"] == "mine" and len(ids["logprobs"]) == len(ids["token_ids"]) == ids["completion_tokens"] == 4
    assert ids["prompt_tokens"] == 3 and [len(top) for top in ids["top_logprobs"]] == [2] * 4
    first, *others = scored["prompt_logprobs"]
    assert first is None and [list(told) for told in others] == [["6"], ["7"]] and "logprobs" not in scored
    assert all(-99 < logprob < 0 for told in others for logprob in told.values())
    assert len({sample["text"] for sample in many["samples"]}) == 3
    assert text["finish_reason"] == "stop" and "e" not in text["text"]
    body = openai["response"]["body"]
    assert openai["custom_id"] == "r1" and openai["error"] is None and body["object"] == "text_completion"
    (choice,), usage = body["choices"], body["usage"]
    assert usage["completion_tokens"] == 5 == len(choice["logprobs"]["token_logprobs"])
    assert usage["prompt_tokens"] == len(choice["prompt_logprobs"]) and choice["prompt_logprobs"][0] is None


def test_parts_of_a_job_join_to_the_whole(job: Callable[..., Any], tmp_path: Path) -> None:
    lines = [f"line {i} " for i in range(11)] + ["", {"prompt": 3}]
    job(lines, output="whole")
    for i in range(3):
        job(lines, "--shard", f"{i}/3", output=f"part{i}")
    assert b"".join((tmp_path / f"part{i}").read_bytes() for i in range(3)) == (tmp_path / "whole").read_bytes()


def test_the_slots_do_not_show_in_the_answers(job: Callable[..., Any], tmp_path: Path) -> None:
    random_lengths = random.Random(0).choices(range(1, 40), k=30)
    lines = [{"prompt": "import os " * (i % 4 + 1), "max_tokens": n, "seed": i} for i, n in enumerate(random_lengths)]
    job(lines, output="eight")
    job(lines, "--slots", "13", output="thirteen")
    assert (tmp_path / "eight").read_bytes() == (tmp_path / "thirteen").read_bytes()


def test_text_lines_are_prompts(job: Callable[..., Any]) -> None:
    _, answers = job([b"import ", b"", b'"x"', b"\xff"], "--format", "text", "--temperature", "0")
    assert answers[0] == job(["import "], "--temperature", "0", output="json")[1][0]
    assert [answer["id"] for answer in answers] == [1, 3, 4] and "not valid UTF-8" in answers[2]["error"]["message"]


def test_a_refused_output_is_not_in_use(tmp_path: Path) -> None:
    """As long as somebody has the error, its traceback has the output."""
    (tmp_path / "out").write_text("another's")
    errors = []
    for _ in range(2):
        with pytest.raises(ConfigError, match="it is there, of another job") as refused:
            batch._Output(tmp_path / "out", "mine")
        errors.append(refused)


def test_a_complete_output_is_left_alone(job: Callable[..., Any], finished: Path, tmp_path: Path) -> None:
    older = min((path.name for path in (finished / "checkpoints").iterdir() if path.name.isdecimal()), key=int)
    first, _ = job(["a", "b"])
    written = (tmp_path / "out.jsonl").stat().st_mtime_ns
    again, _ = job(["a", "b"])
    assert first.status == again.status == 0 and "is complete" in again.err
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == written
    others = [("--temperature", "0.5"), ("--shard", "0/2"), ("--step", older), ("--slots", "13")]
    for lines, words in ((["a", "c"], ()), *((["a", "b"], words) for words in others)):
        other, _ = job(lines, *words)
        assert other.status == 2 and "it is there, of another job" in other.error
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--output", "."), 2, "output .: it is a directory"),
        (("--input", "/nowhere/in.jsonl"), 65, "input /nowhere/in.jsonl: there is no such file"),
        (("--shard", "2/2"), 2, "shard 2/2: the first must be below the second"),
        (("--shard", "one"), 2, "shard 'one': it must be I/N"),
        (("--slots", "0"), 2, "slots is 0: it must be between 1 and 4096"),
        (("--prompt", "x"), 2, "give --prompt, or --input with --output"),
        (("--output", "/proc/x/out"), 74, "/proc/x/out"),
    ],
)
def test_mistakes_end_in_one_line(job: Callable[..., Any], words: tuple[str, ...], status: int, message: str) -> None:
    outcome, _ = job(["a"], *words)
    assert outcome.status == status and message in outcome.error


def test_a_line_beyond_all_bounds(job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "LONGEST_LINE", 1000)
    _, answers = job(["a", "b" * 5000, "c"])
    assert [answer["id"] for answer in answers] == [1, 2, 3]
    assert "the line is longer than" in answers[1]["error"]["message"]


def test_a_full_disk_loses_no_line(job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third write fails in the middle; when there is room, the same command goes on to the same bytes."""
    lines = [f"line {i} " for i in range(9)]
    job(lines, output="whole")
    real, calls = batch.append, []

    def failing(file: Any, content: bytes) -> None:
        calls.append(content)
        if len(calls) == 3:
            os.write(file.fileno(), content[:5])
            raise OSError(28, "No space left on device", str(tmp_path / "out.jsonl.part"))
        real(file, content)

    monkeypatch.setattr(batch, "append", failing)
    outcome, answers = job(lines)
    assert (outcome.status, answers) == (StorageError.exit_status, None) and "No space left" in outcome.error
    monkeypatch.undo()
    outcome, _ = job(lines)
    assert "going on after 2 of 9 lines" in outcome.err
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on_to_the_same_bytes(
    job: Callable[..., Any], finished: Path, tmp_path: Path
) -> None:
    chance = random.Random(1)
    lines = [{"prompt": f"def f{i}(", "max_tokens": chance.choice([3, 9, 50]), "seed": i} for i in range(400)]
    job(lines, output="whole")
    part, whole = tmp_path / "out.jsonl.part", (tmp_path / "whole").stat().st_size
    words = ["--checkpoint", str(finished), "--input", str(tmp_path / "in.jsonl"), "--max-new-tokens", "9"]
    command = [
        sys.executable,
        "-c",
        "from jaxgpt.cli import main; main()",
        "generate",
        *words,
        "--output",
        str(tmp_path / "out.jsonl"),
    ]
    kills = 0
    for share in (0.05, 0.3, 0.5, 0.7):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if part.exists() and part.stat().st_size > (share + 0.1 * chance.random()) * whole:
                    process.kill()
                    kills += 1
                    break
                time.sleep(0.001)
        if part.exists():
            with part.open("ab") as torn:
                torn.write(b'{"id": "torn')
    assert kills >= 3
    outcome, _ = job(lines)
    assert outcome.status == 0 and (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_line_is_read_as_it_says() -> None:
    line = parse_line(b'{"prompt": "x", "logit_bias": {"3": 1.5}, "stop": "a", "n": 2, "min_tokens": 1}', 7, DEFAULTS)
    assert (line.id, line.params.prompt) == (7, "x")
    wanted = LineParams(9, 0.8, logit_bias=((3, 1.5),), stop=("a",), num_samples=2, min_new_tokens=1, prompt="x")
    assert line.params == replace(wanted, seed=DEFAULTS.seed + 7)
    last = replace(DEFAULTS, seed=2**32 - 1)
    assert parse_line(b'"x"', 3, last).params.seed == 2
    assert parse_line(b'{"prompt": "x", "seed": 5}', 3, last).params.seed == 5
    with pytest.raises(ConfigError, match="logit_bias"):
        parse_line(b'{"prompt": "x", "logit_bias": {"a": 1}}', 1, DEFAULTS)
