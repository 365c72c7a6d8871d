"""A batch job: lines in, lines out, in their order, whatever happens in between.

The output grows in `OUTPUT.part`, a whole line at a time, and gets its name when it is complete; `OUTPUT.job` says
which job it is of. After a kill the same command cuts off a torn last line, and goes on with the first line that has no
answer. What was computed but not written is computed again, to the same tokens: they depend on the request alone."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jaxgpt.errors import BadFileError, ConfigError, StorageError
from jaxgpt.files import append, sync, write_atomically
from jaxgpt.generation.engine import Completion, Engine, Request
from jaxgpt.generation.requests import Line, answer, error_answer, parse_line
from jaxgpt.generation.sampling import SamplingParams

LONGEST_LINE = 16 * 2**20
"""Bytes of an input line."""
EncodeChat = Callable[[list[dict[str, Any]]], list[int]]
_SYNC_SECONDS, _REPORT_SECONDS = 5.0, 10.0


@dataclass(frozen=True)
class Job:
    """What is to be done. `shard` (i, n) takes the i-th of n equal parts of the lines; `cat` joins their outputs."""

    input: Path
    output: Path
    params: SamplingParams
    is_text: bool = False
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if not 0 <= self.shard[0] < self.shard[1]:
            raise ConfigError(f"shard {self.shard[0]}/{self.shard[1]}: the first must be below the second")
        if not self.input.is_file():
            raise BadFileError(f"input {self.input}: there is no such file; name a file with one request a line")
        if not self.output.parent.is_dir():
            raise StorageError(f"output {self.output}: there is no directory {self.output.parent}; make it")
        if self.output.is_dir():
            raise ConfigError(f"output {self.output}: it is a directory; name a file")


class _Output(contextlib.ExitStack):
    """The file that grows, and the records that wait until all before them are there."""

    def __init__(self, job: Job, identity: str) -> None:
        """Raises ConfigError when the output is another job's, or another process writes it."""
        super().__init__()
        part, marker = (job.output.with_name(job.output.name + end) for end in (".part", ".job"))
        self._path, self._part = job.output, part
        known = marker.read_text() if marker.exists() else None
        if known != identity and (known or job.output.exists() or part.exists()):
            raise ConfigError(f"output {job.output}: it is there, of another job; remove it or choose another name")
        self.complete, self.written = job.output.exists(), 0
        self._waiting: dict[int, bytes] = {}
        self._synced = time.monotonic()
        if self.complete:
            return
        self._file = self.enter_context(part.open("ab", buffering=0))
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output {job.output}: another process writes it; wait for that") from None
        write_atomically(marker, identity.encode())
        with part.open("rb") as lines:
            sizes = [len(line) for line in lines if line.endswith(b"\n")]  # else a kill tore it
        self.written = len(sizes)
        self._file.truncate(sum(sizes))

    def put(self, index: int, record: dict[str, Any]) -> None:
        """Write a record as soon as all before it are written."""
        self._waiting[index] = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        while self.written in self._waiting:
            append(self._file, self._waiting.pop(self.written))
            self.written += 1
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def finish(self) -> None:
        os.fsync(self._file.fileno())
        self._part.rename(self._path)
        sync(self._path.parent)


def run_job(job: Job, engine: Engine, encode_chat: EncodeChat, model: str) -> None:
    """Answer every line of the input; `encode_chat` gives the ids of a conversation, `model` says which model it is.

    Raises ConfigError for an output of another job. Whatever is wrong with a line is in its answer."""
    with _Output(job, _identity(job, model)) as output:
        if output.complete:
            print(f"jaxgpt: {job.output} is complete", file=sys.stderr)
        else:
            _answer_lines(job, engine, encode_chat, output)


def _answer_lines(job: Job, engine: Engine, encode_chat: EncodeChat, output: _Output) -> None:
    lines = sum(1 for _ in _lines(job))
    first, last = (lines * i // job.shard[1] for i in (job.shard[0], job.shard[0] + 1))
    first += output.written
    if output.written:
        print(f"jaxgpt: going on after {output.written} of {last - first + output.written} lines", file=sys.stderr)
    begun: dict[int, tuple[Line, dict[int, Completion]]] = {}
    errors = 0

    def requests() -> Iterator[Request]:
        nonlocal errors
        for index, (number, raw) in enumerate(itertools.islice(_lines(job), first, last), output.written):
            try:
                if raw is None:
                    raise ConfigError(f"the line is longer than {LONGEST_LINE >> 20} MiB")
                line = parse_line(raw, number, job.params, is_text=job.is_text)
                prompt = line.prompt if line.messages is None else encode_chat(line.messages)
                made = engine.requests(prompt, line.params, index)
            except (ConfigError, BadFileError) as error:
                errors += 1
                output.put(index, error_answer(raw or b"", number, str(error)))
                continue
            begun[index] = line, {}
            yield from made

    with _Bar(last - first, engine) as bar:
        for more in engine.run(requests()):
            if more.completion is None:
                continue
            line, completions = begun[more.request.tag]
            completions[more.request.sample] = more.completion
            if len(completions) == line.params.num_samples:
                ordered = [completions[sample] for sample in range(len(completions))]
                output.put(more.request.tag, answer(line, ordered))
                del begun[more.request.tag]
                bar.update(output.written, errors)
    output.finish()
    print(f"jaxgpt: {job.output} is complete: {last - first} lines answered now, {errors} errors", file=sys.stderr)


def _lines(job: Job) -> Iterator[tuple[int, bytes | None]]:
    """(number, content) of each line that is not blank; None for one that is too long."""
    with open(job.input, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE)
            if not line:
                return
            too_long = len(line) == LONGEST_LINE and not line.endswith(b"\n")
            while too_long and line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
            if line.strip() or too_long:
                yield number, None if too_long else line.rstrip(b"\r\n")


def _identity(job: Job, model: str) -> str:
    with open(job.input, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    what = {"input": digest, "params": asdict(job.params), "text": job.is_text, "shard": job.shard, "model": model}
    return json.dumps(what, sort_keys=True) + "\n"


class _Bar:
    """Lines, tokens a second, how full the slots are and the time left: a live bar, or a line now and then."""

    def __init__(self, lines: int, engine: Engine) -> None:
        self._engine, self._lines = engine, lines
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = TextColumn("lines"), BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[figures]}")
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, expand=True)
        self._task = self._progress.add_task("", total=lines, figures="")

    def __enter__(self) -> "_Bar":
        self._progress.start()
        self._began = self._said = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, written: int, errors: int) -> None:
        now, tokens = time.monotonic(), self._engine.tokens
        seconds = now - self._began
        left = (self._lines - written) * seconds / max(written, 1)
        full = tokens / max(self._engine.places, 1)
        figures = f"{tokens / seconds:,.1f} tokens/s  slots {full:.0%} full  {left:,.0f} s left"
        self._progress.update(self._task, completed=written, figures=figures)
        if self._progress.disable and now - self._said > _REPORT_SECONDS:
            print(f"jaxgpt: {written}/{self._lines} lines  {figures}  {errors} errors", file=sys.stderr, flush=True)
            self._said = now
