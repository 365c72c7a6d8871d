"""Files that a reader, a kill or a power failure sees whole or not at all, and the locks of directories."""

import errno
import fcntl
import io
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jaxgpt.errors import BadFileError, ConfigError, note


def cache_home() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/jaxgpt, or ~/.cache/jaxgpt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jaxgpt")


def sync(path: Path) -> None:
    """Return when a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(complete: Path, path: Path) -> None:
    """Give a complete file its name, when it is on the disk."""
    sync(complete)
    complete.replace(path)
    sync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        publish(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append(file: io.FileIO, content: bytes) -> None:
    """Write all of `content` behind an unbuffered file, or raise OSError and leave the file as it was."""
    end = os.fstat(file.fileno()).st_size
    try:
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        file.truncate(end)
        error.filename = file.name
        raise


def bounded_lines(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Each line with its end; None in place of one of `limit` bytes or more, of which no more is in memory."""
    while line := file.readline(limit):
        yield line if len(line) < limit or line.endswith(b"\n") else None
        while len(line) == limit and not line.endswith(b"\n"):  # the rest of it
            line = file.readline(limit)


@contextmanager
def locked(path: Path, *, wait: bool, what: Path | None = None) -> Iterator[None]:
    """Hold a lock, which the system frees when this process dies; the file names the holder. When another process holds
    it: raises ConfigError, saying `what` is in use (the directory by default), or waits for it and says so."""
    with open(path, "a+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            busy = f"{what or path.parent} is in use by {file.read(200).strip() or 'another process'}"
            if not wait:
                raise ConfigError(f"{busy}; stop that or choose another {'name' if what else 'run_dir'}") from None
            note(f"{busy}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        print(f"pid {os.getpid()} on host {socket.gethostname()}", file=file, flush=True)
        yield


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises BadFileError when it is none, holds NaN, or names a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        value = json.loads(content.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{where} is not valid JSON: {error}; restore the file") from None
    if not isinstance(value, dict):
        raise BadFileError(f"{where} is not a JSON object; restore the file")
    return value


def read_bounded(path: Path, limit: int) -> bytes:
    """What is in a file. Raises BadFileError when there is no such file, or more than `limit` bytes in it."""
    if not path.is_file():  # a pipe would be waited for
        raise BadFileError(f"{path}: there is no such file; name one, or a directory that has it")
    if path.stat().st_size > limit:
        raise BadFileError(f"{path} is larger than {limit} bytes; restore the file")
    return path.read_bytes()


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file. Raises BadFileError as `read_bounded` and `parse_json`."""
    return parse_json(read_bounded(path, limit), str(path))


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise BadFileError for whatever comes of values that are illegal or of another kind than they should be."""
    try:
        yield
    except ConfigError as error:
        raise BadFileError(f"{where}: {error}; restore the file") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        what = f"a setting is missing or of the wrong kind ({type(error).__name__}: {error})"
        raise BadFileError(f"{where}: {what}; restore the file") from error
