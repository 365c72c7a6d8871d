"""How a program ends: one status for each kind of mistake, one line for people, the traceback for bugs alone."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.errors import (
    BadFileError,
    ConfigError,
    JaxgptError,
    SlowerError,
    Stopped,
    StorageError,
    TrainingError,
    nearest,
)

ROOT = Path(__file__).parents[1]
TABLE = {SlowerError: 1, ConfigError: 2, BadFileError: 65, TrainingError: 70, StorageError: 74, Stopped: 75}


@pytest.fixture
def end(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`end(error, *words)`: how a program ends in which `error` is raised."""

    def run(error: BaseException | None, *words: str) -> Any:
        def fail(arguments: list[str]) -> None:
            assert "--debug" not in arguments
            print("said before")
            if error:
                raise error

        monkeypatch.setattr("jaxgpt.cli.dispatch", fail)
        return command("jaxgpt", *words)

    return run


def test_the_table_is_the_documented_one() -> None:
    assert {kind.exit_status for kind in JaxgptError.__subclasses__()} == set(TABLE.values())
    for status in (0, *TABLE.values()):
        assert f"\n| {status} | " in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("kind", "status"), TABLE.items())
def test_a_mistake_is_one_line_with_its_status(end: Callable[..., Any], kind: type[JaxgptError], status: int) -> None:
    outcome = end(kind("what where:\n  why; \t what to do"))
    assert (outcome.status, outcome.out) == (status, "said before\n")
    assert outcome.err == "jaxgpt: error: what where: why; what to do\n"


@pytest.mark.parametrize(("kind", "status"), TABLE.items())
def test_debug_adds_the_traceback(end: Callable[..., Any], kind: type[JaxgptError], status: int) -> None:
    for words in (["--debug", "train"], ["train", "--debug"]):
        outcome = end(kind("what"), *words)
        assert outcome.status == status
        assert outcome.err.startswith("Traceback ") and outcome.err.endswith("\njaxgpt: error: what\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EFBIG, errno.EISDIR])
def test_a_disk_that_refuses_is_a_storage_error(end: Callable[..., Any], number: int) -> None:
    outcome = end(OSError(number, os.strerror(number), "some/file"))
    assert outcome.status == 74
    assert outcome.error == (
        f"cannot write or read some/file: {os.strerror(number)}; free space or choose another path"
    )
    assert end(OSError(number, os.strerror(number))).error.startswith("cannot write or read a file: ")
    with_traceback = end(OSError(number, "x"), "--debug")
    assert with_traceback.status == 74 and with_traceback.err.startswith("Traceback ")


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), AssertionError("x"), RecursionError("x"), OSError(errno.EBADF, "x")]
)
def test_a_bug_keeps_its_traceback(end: Callable[..., Any], error: Exception) -> None:
    outcome = end(error)
    assert outcome.status == 70
    assert outcome.err.startswith("Traceback ") and "jaxgpt: error: " not in outcome.err
    assert type(error).__name__ in outcome.err.splitlines()[-1]


def test_an_interrupt_can_be_resumed(end: Callable[..., Any]) -> None:
    outcome = end(KeyboardInterrupt())
    assert (outcome.status, outcome.error) == (75, "interrupted; run the same command again to go on")


def test_success_says_nothing(end: Callable[..., Any]) -> None:
    assert (end(None).status, end(None).err) == (0, "")


def test_nearest_names_what_is_near() -> None:
    assert nearest("trian", ["train", "tokenize"]) == "; did you mean train?"
    assert nearest("step", ["steps", "stop", "zebra"]) in (
        "; did you mean steps or stop?",
        "; did you mean stop or steps?",
    )
    assert nearest("quagga", ["train", "tokenize"]) == ""


# In a process of its own: what Python does after the last line of the program


PROGRAM = """
import os, signal, sys, time
from jaxgpt.errors import ConfigError, run_command
def command(arguments):
    match arguments[0]:
        case "print":
            print("x" * 10)
        case "print and fail":
            print("x" * 10)
            raise ConfigError("wrong")
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        case "characters":
            print("3.7 \\u00b1 0.1 \\U0001f642")
run_command(command)
"""


def run(word: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= options.pop("env", {})
    command = [sys.executable, "-c", PROGRAM, word]
    return subprocess.run(command, stderr=subprocess.PIPE, env=environment, timeout=60, **options)


@pytest.mark.parametrize(("word", "status", "message"), [("print", 0, b""), ("print and fail", 2, b"error: wrong")])
def test_a_closed_pipe_changes_neither_status_nor_message(word: str, status: int, message: bytes) -> None:
    """What is still buffered when the program ends finds no reader either: Python would leave with status 120."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run(word, stdout=writer)
    os.close(writer)
    assert done.returncode == status
    assert done.stderr.count(b"\n") == (1 if message else 0) and message in done.stderr


def test_a_request_to_terminate_ends_like_an_interrupt() -> None:
    done = run("terminate", stdout=subprocess.PIPE)
    assert done.returncode == 75 and signal.SIGTERM > 0
    assert done.stderr == b"jaxgpt: error: interrupted; run the same command again to go on\n"


def test_a_terminal_without_a_character_gets_another(tmp_path: Any) -> None:
    done = run("characters", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"3.7 ? 0.1 ?\n", b"")
