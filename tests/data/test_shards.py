"""Preparing text: nothing is lost, a kill changes nothing, the second run reuses the first, damage is refused."""

import contextlib
import gzip
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.config import DataConfig, TokenizerConfig
from jaxgpt.data import prepare as prepare_module
from jaxgpt.data.prepare import prepare_corpora
from jaxgpt.data.shards import Corpus, TokenStream, open_tokenized
from jaxgpt.errors import BadFileError
from jaxgpt.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = TokenizerConfig(vocab_size=500, training_bytes=100_000)


def prepare(cache: Path, *paths: Path | str, **settings: object) -> tuple[Tokenizer, list[Corpus], list[str]]:
    said = io.StringIO()
    config = DataConfig(paths=tuple(map(str, paths)), cache_dir=str(cache), **settings)  # type: ignore[arg-type]
    with contextlib.redirect_stderr(said):
        tokenizer, corpora = prepare_corpora(config, TOKENIZER)
    lines = said.getvalue().splitlines()
    assert all(line.startswith("jaxgpt: ") for line in lines)
    return tokenizer, corpora, [line.removeprefix("jaxgpt: ") for line in lines]


def tokens_of(stream: TokenStream) -> list[int]:
    return stream.window(0, len(stream)).tolist()


def documents_of(tokenizer: Tokenizer, stream: TokenStream) -> list[str]:
    """Undo everything: from tokens back to texts, checking bos and eos on the way."""
    tokens, found = tokens_of(stream), []
    for begin, end in zip(stream.starts, [*stream.starts[1:], len(stream)], strict=True):
        assert tokens[begin] == tokenizer.bos_id and tokens[end - 1] == tokenizer.eos_id
        found.append(tokenizer.decode(tokens[begin:end]))
    return found


def files_of(directory: Path) -> dict[str, bytes]:
    """Their content; but the lock holds the name of its last holder."""
    return {path.name: b"" if path.name == "LOCK" else path.read_bytes() for path in sorted(directory.iterdir())}


@contextlib.contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    original = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    yield
    path.write_bytes(original)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, text_dir: Path) -> Path:
    """About 200 documents of real text, two of them the same."""
    directory = tmp_path_factory.mktemp("pages")
    text = "".join(path.read_text() for path in sorted(text_dir.glob("*.py")))
    chunks = [text[i : i + 1500] for i in range(0, 300_000, 1500)]
    lines = [json.dumps({"text": chunk}) + "\n" for chunk in [*chunks, chunks[7]]]
    (directory / "pages.jsonl").write_text("".join(lines))
    return directory


def test_every_document_is_there_once_on_its_side(tmp_path: Path, pages: Path) -> None:
    tokenizer, (corpus,), _ = prepare(tmp_path, pages, val_fraction=0.1, shard_tokens=5000)
    train, val = documents_of(tokenizer, corpus.train), documents_of(tokenizer, corpus.val)
    lines = (pages / "pages.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert set(train).isdisjoint(val)  # copies are not on both sides
    assert train == [text for text in texts if text in train] and val == [text for text in texts if text in val]
    assert len(train) + len(val) == len(lines) and 8 <= len(val) <= 35
    assert len(list(corpus.directory.glob("train_*.bin"))) > 5
    text = "".join(val).encode()
    assert corpus.val_bytes == len(text)
    assert corpus.val_gzip_bytes == len(gzip.compress(text, 9, mtime=0))
    meta = json.loads((corpus.directory / "meta.json").read_text())
    assert meta["splits"]["train"]["tokens"] == len(corpus.train) == sum(len(tokenizer.encode(t)) + 2 for t in train)
    on_disk = np.concatenate([np.fromfile(path, "<u2") for path in sorted(corpus.directory.glob("train_*.bin"))])
    assert on_disk.tolist() == tokens_of(corpus.train)


def test_a_held_out_document_stays_so_when_the_corpus_grows(tmp_path: Path, pages: Path) -> None:
    (tmp_path / "less").mkdir()
    lines = (pages / "pages.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "less" / "pages.jsonl").write_text("".join(lines[:120]))
    tokenizer, (less,), _ = prepare(tmp_path, tmp_path / "less", val_fraction=0.1)
    more_tokenizer, (more,), _ = prepare(tmp_path, pages, val_fraction=0.1)
    held_out = documents_of(tokenizer, less.val)
    assert held_out and set(held_out) <= set(documents_of(more_tokenizer, more.val))


@pytest.mark.parametrize("books", [1, 3])
def test_the_end_of_a_single_book_is_held_out(tmp_path: Path, text_dir: Path, books: int) -> None:
    book = (text_dir / "argparse.py").read_text()
    (tmp_path / "text").mkdir()
    for number in range(books):
        (tmp_path / "text" / f"{number}.txt").write_text(book[number:])
    tokenizer, (corpus,), _ = prepare(tmp_path / "cache", tmp_path / "text", val_fraction=0.05)
    held_out = tokenizer.decode(tokens_of(corpus.val))
    assert [tokens_of(corpus.train).count(token) for token in (tokenizer.bos_id, tokenizer.eos_id)] == [books, books]
    trained_on = tokenizer.decode(tokens_of(corpus.train))
    assert book.endswith(held_out) and trained_on.startswith(book[:1000])
    assert len(held_out) + len(trained_on) == sum(len(book) - number for number in range(books))
    assert 0.04 < len(held_out) / (books * len(book)) < 0.06
    assert book[-len(held_out) - 1] == "\n"  # a whole line
    assert tokens_of(corpus.val)[0] == tokenizer.bos_id and tokens_of(corpus.val)[-1] == tokenizer.eos_id


def test_nothing_is_held_out_when_nothing_is_asked_for(tmp_path: Path, text_dir: Path) -> None:
    tokenizer, (corpus,), _ = prepare(tmp_path, text_dir, val_fraction=0.0)
    assert len(corpus.val) == 0 and len(documents_of(tokenizer, corpus.train)) == 7


def test_the_second_run_reuses_and_a_change_does_not(tmp_path: Path, pages: Path) -> None:
    tokenizer, (first,), said = prepare(tmp_path, pages)
    assert any("training bpe" in line for line in said)
    again_tokenizer, (again,), said = prepare(tmp_path, pages)
    assert [line.split(" ", 2)[2] for line in said] == [f"reusing {first.directory}"]
    assert (again.fingerprint, again_tokenizer.sha256) == (first.fingerprint, tokenizer.sha256)
    (tmp_path / "copy").mkdir()
    text = (pages / "pages.jsonl").read_text()
    (tmp_path / "copy" / "pages.jsonl").write_text(text)
    assert prepare(tmp_path, tmp_path / "copy")[1][0].directory == first.directory  # the content decides, not the place
    (tmp_path / "copy" / "pages.jsonl").write_text(text.replace("import", "export", 1))
    other = prepare(tmp_path, tmp_path / "copy")[1][0]
    assert other.directory != first.directory and other.fingerprint != first.fingerprint
    assert prepare(tmp_path, pages, val_fraction=0.3)[1][0].directory != first.directory


PREPARE = """
import sys
from jaxgpt.config import DataConfig, TokenizerConfig
from jaxgpt.data import prepare, shards
prepare.BATCH_CHARACTERS = 5000  # many small steps, so that a kill comes in the middle of them
path, cache = sys.argv[1:]
data = DataConfig(paths=(path,), cache_dir=cache, shard_tokens=1024, val_fraction=0.2)
prepare.prepare_corpora(data, TokenizerConfig(vocab_size=500, training_bytes=100_000))
"""


def start(pages: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(pages), str(cache)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    return said


def test_a_kill_changes_nothing(tmp_path: Path, pages: Path) -> None:
    """kill -9 when a random number of shards is there, twice, then the run that finishes writes the same bytes."""
    finish(start(pages, tmp_path / "calm"))
    (calm,) = (tmp_path / "calm" / "data").iterdir()
    finished = [path for path in calm.glob("*.json") if path.name != "meta.json"]
    seed = random.SystemRandom().randrange(2**31)
    for shards in sorted(random.Random(seed).sample(range(1, len(finished)), 2)):
        process = start(pages, tmp_path / "killed")
        while process.poll() is None and len(list((tmp_path / "killed").glob("data/*/*_*.json"))) < shards:
            time.sleep(0.0005)
        process.kill()
        process.communicate()
    said = finish(start(pages, tmp_path / "killed"))
    assert "going on after" in said, seed
    (killed,) = (tmp_path / "killed" / "data").iterdir()
    assert files_of(killed) == files_of(calm), seed


def test_two_processes_at_once(tmp_path: Path, pages: Path) -> None:
    processes = [start(pages, tmp_path) for _ in range(2)]
    assert "reusing" in "".join(finish(process) for process in processes)
    (directory,) = (tmp_path / "data").iterdir()
    assert not list(directory.glob("*.tmp"))
    open_tokenized(directory, load_tokenizer(directory / "tokenizer.model"))


def test_damage_is_refused(tmp_path: Path, pages: Path) -> None:
    tokenizer, (corpus,), _ = prepare(tmp_path, pages, shard_tokens=20_000)
    directory = corpus.directory
    meta = json.loads((directory / "meta.json").read_text())
    damages = [
        ("train_00001.bin", lambda raw: raw[:-1], "has .* bytes where meta.json says"),
        ("train_00001.bin", lambda raw: None, "is missing"),
        ("val_00000.bin", lambda raw: raw[:50] + bytes([raw[50] ^ 4]) + raw[51:], "its SHA-256 is not"),
        ("train_00000.offsets.npy", lambda raw: raw[:-1] + b"\x01", "its SHA-256 is not"),
        ("train_00000.offsets.npy", lambda raw: None, "is missing"),
        ("meta.json", lambda raw: raw[:-9], "is not valid JSON"),
        ("meta.json", lambda raw: b"[]", "is not a JSON object"),
        ("meta.json", lambda raw: json.dumps(meta | {"format": 99}).encode(), "is of format 99"),
        ("meta.json", lambda raw: json.dumps(meta | {"splits": []}).encode(), "has no usable field"),
    ]
    for name, damage, message in damages:
        with (
            changed(directory / name, damage((directory / name).read_bytes())),
            pytest.raises(BadFileError, match=f"{name}:? {message}") as caught,
        ):
            open_tokenized(directory, tokenizer)
        assert "\n" not in str(caught.value)
    assert open_tokenized(directory, tokenizer).fingerprint == corpus.fingerprint


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path, pages: Path, text_dir: Path) -> None:
    _, (corpus,), _ = prepare(tmp_path, pages)
    other, _, _ = prepare(tmp_path, text_dir)
    with pytest.raises(BadFileError, match=f"come from tokenizer .*, not from {other.sha256[:12]}; set tokenizer.path"):
        open_tokenized(corpus.directory, other)


def test_prepared_directories_are_opened(tmp_path: Path, pages: Path, text_dir: Path) -> None:
    tokenizer, (corpus,), _ = prepare(tmp_path, pages)
    same_tokenizer, corpora, _ = prepare(tmp_path, corpus.directory, text_dir, weights=(0.5, 0.5))
    assert same_tokenizer.sha256 == tokenizer.sha256
    assert corpora[0].fingerprint == corpus.fingerprint and corpora[0].val_bytes == corpus.val_bytes
    texts = documents_of(tokenizer, corpora[1].train) + documents_of(tokenizer, corpora[1].val)
    assert (text_dir / "argparse.py").read_text() in texts
    by_size = prepare(tmp_path, corpus.directory, text_dir)[1]
    assert [c.name for c in by_size] == [str(text_dir), corpora[0].name]  # all text first, as one corpus


def test_a_directory_of_text_with_its_own_meta_json_is_text(tmp_path: Path, text_dir: Path) -> None:
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "a.py").write_text((text_dir / "argparse.py").read_text())
    assert len(prepare(tmp_path / "cache", tmp_path)[1][0].train) > 1000


@pytest.mark.parametrize("moment", ["train_tokenizer", "_write_split"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, text_dir: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.py"
    path.write_text((text_dir / "argparse.py").read_text())
    config = DataConfig(paths=(str(path),), cache_dir=str(tmp_path / "cache"))
    usual = getattr(prepare_module, moment)

    def meddle(*arguments: object) -> object:
        result = usual(*arguments)
        path.write_text((text_dir / "ast.py").read_text())
        return result

    monkeypatch.setattr(prepare_module, moment, meddle)
    with pytest.raises(BadFileError, match="a file changed while it was read"):
        prepare_corpora(config, TOKENIZER)
    left = [path.parent.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == ([] if moment == "train_tokenizer" else ["tokenizers"]), (
        "nothing of the other text may be found again"
    )


def test_skipped_documents_are_listed(tmp_path: Path, pages: Path) -> None:
    (tmp_path / "a.jsonl").write_text((pages / "pages.jsonl").read_text() + '{"body": "x"}\n')
    with pytest.raises(BadFileError, match=r"a.jsonl:202: .*there is no field 'text'"):
        prepare(tmp_path, tmp_path / "a.jsonl")
    _, (corpus,), said = prepare(tmp_path, tmp_path / "a.jsonl", max_bad_documents=1)
    assert any("skipped 1 bad documents; the first is a.jsonl:202" in line for line in said)
    assert json.loads((corpus.directory / "bad.jsonl").read_text())["document"] == "a.jsonl:202"


def test_text_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(BadFileError, match="there is no text in it"):
        prepare(tmp_path / "cache", tmp_path / "a.txt")


MEMORY = """
import resource, sys
from jaxgpt.config import DataConfig, TokenizerConfig
from jaxgpt.data import prepare, corpus
prepare.BATCH_CHARACTERS = 2**18
corpus.MOST_CHARACTERS = 2**17
data = DataConfig(paths=(sys.argv[1],), cache_dir=sys.argv[2], shard_tokens=2**18)
prepare.prepare_corpora(data, TokenizerConfig(vocab_size=500, training_bytes=100_000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, text_dir: Path) -> None:
    """1 and 12 MB in one file, in which a list of the larger one's tokens alone would take 150 MB."""
    text = "".join(path.read_text() for path in sorted(text_dir.glob("*.py")))
    peak = []
    for copies in (3, 36):
        path = tmp_path / f"{copies}.txt"
        path.write_text(text * copies)
        command = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "cache")]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100)
        peak.append(int(done.stdout))
    assert peak[1] - peak[0] < 40, peak


def test_a_tokenizer_s_text_is_taken_evenly_up_to_its_bytes() -> None:
    """Short texts are taken whole, of long ones a part; with a text that fits, all of it."""
    texts = [f"{i} \u00e9" * (1 + 997 * i % 50) for i in range(400)]
    total = sum(len(text.encode()) for text in texts)
    taken = list(prepare_module._sample(texts, total, total // 10))
    assert 0.9 < sum(len(text.encode()) for text in taken) / (total // 10) < 1.1
    numbers = [int(text.split()[0]) for text in taken]
    assert numbers == sorted(numbers) and numbers[0] < 40 and numbers[-1] > 360
    assert list(prepare_module._sample(texts, total, total)) == texts
