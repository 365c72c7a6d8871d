"""Errors that a user can cause, each with its exit status, and the shell that prints them.

A user's error is one line: `jaxgpt: error: WHAT WHERE: WHY; WHAT TO DO`."""

import difflib
import errno
import faulthandler
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable

_STORAGE_ERRORS = ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR", "EEXIST", "EISDIR", "EFBIG"]


class JaxgptError(Exception):
    """A mistake or a fault that the user can act on; the message is one line."""

    exit_status = 70

    def __init_subclass__(cls, exit_status: int = 70) -> None:
        cls.exit_status = exit_status


class ConfigError(JaxgptError, exit_status=2):
    """The command line or the configuration is wrong."""


class BadFileError(JaxgptError, exit_status=65):
    """A data, tokenizer, model or checkpoint file is bad."""


class StorageError(JaxgptError, exit_status=74):
    """Reading or writing failed: disk full, read-only, no permission."""


class Stopped(JaxgptError, exit_status=75):
    """Stopped on purpose; whatever was finished is saved."""


class SlowerError(JaxgptError, exit_status=1):
    """A benchmark found what is slower than its baseline."""


class TrainingError(JaxgptError):
    """Training cannot go on, for example because the loss is not finite."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def nearest(name: str, known: Iterable[str]) -> str:
    """The phrase `; did you mean A or B?` for a misspelt name, or nothing when none is near."""
    near = difflib.get_close_matches(name[:100], list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def note(message: str) -> None:
    """A line for people, without what a file's names could make a terminal do."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split())[:2000])
    print(f"jaxgpt: {line}", file=sys.stderr, flush=True)


def _flush_output() -> None:
    """What cannot be written now goes nowhere: Python's own attempt at the end would fail again, with status 120."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def run_command(command: Callable[[list[str]], object]) -> None:
    """Run `command(arguments)` and leave the process with 0, or with the status of the error that it raised. `--debug`
    anywhere on the command line keeps the traceback of a user's error too."""
    faulthandler.enable()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the character for plus-minus must not end a run
    arguments, debug = [word for word in sys.argv[1:] if word != "--debug"], "--debug" in sys.argv[1:]
    try:
        try:
            command(arguments)
        finally:
            _flush_output()
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        mistake = _as_mistake(error)
        if debug or not mistake:
            traceback.print_exc()
        if mistake:
            note(f"error: {mistake}")
        sys.exit((mistake or JaxgptError).exit_status)


def _as_mistake(error: BaseException) -> JaxgptError | None:
    """An error as something that the user can act on; None for a bug."""
    if isinstance(error, JaxgptError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stopped("interrupted; run the same command again to go on")
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _STORAGE_ERRORS:
        where = error.filename2 or error.filename or "a file"
        return StorageError(f"cannot write or read {where}: {error.strerror}; free space or choose another path")
    if "RESOURCE_EXHAUSTED" in str(error):  # as XLA says it
        remedy = "raise training.accumulation_steps, set model.remat full, or lower the batch size or num_samples"
        return TrainingError(f"the devices have too little memory: {str(error).splitlines()[0]}; {remedy}")
    return None
