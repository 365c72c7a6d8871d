"""Writing files so that a reader, a kill or a power failure sees all of one or nothing of it."""

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

from jaxgpt.errors import BadFileError


def sync(path: Path) -> None:
    """Return when a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


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


def parse_json(content: bytes, where: str, remedy: str = "restore the file") -> dict[str, Any]:
    """A JSON object. Raises BadFileError when it is none, holds NaN, or names a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        value = json.loads(content, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{where} is not valid JSON: {error}; {remedy}") from None
    if not isinstance(value, dict):
        raise BadFileError(f"{where} is not a JSON object; {remedy}")
    return value


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises BadFileError as `parse_json`, or without a file."""
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise BadFileError(f"{path}: there is no such file; name a directory that has it") from None
    if len(content) > limit:
        raise BadFileError(f"{path} is larger than {limit} bytes; restore the file")
    return parse_json(content, str(path))
