"""The tokenizer keeps every text exactly, and no text can forge a special token."""

import io
import json
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import TokenizerConfig
from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from jaxgpt.tokenizer.base import SPACE
from jaxgpt.tokenizer.spm import SentencePieceTokenizer

SPECIAL = ("<|user|>", "<|end|>", "<|end|>more")
NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n    indented\n\treturn\r\n",
    "\ufeffBOM",
    "a\x00b",
    SPACE,
    f"{SPACE}{SPACE}a {SPACE} b{SPACE}",
    "<s></s><pad><unk><0x41><|user|><|end|>",
    "e\u0301 \u00e9 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0627\u0644 \u4e2d\u6587",
    "\U0010ffff\ufffd\u2028\x85\x7f",
]


def sources() -> list[str]:
    return [
        path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))
    ]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Trained on source code that also spells special tokens, bytes, and SentencePiece's space."""
    texts = [*sources(), f"</s><0x41><|user|>{SPACE}x\n" * 50]
    return train_tokenizer(texts, TokenizerConfig(kind=request.param, vocab_size=700, special_tokens=SPECIAL))


@pytest.mark.parametrize("text", [*NASTY, json.decoder.__doc__, sources()[0]])
def test_text_survives_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode(text, bos=True), tokenizer.eos_id]) == text
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.encode_batch([text, "x", text]) == [tokenizer.encode(t) for t in (text, "x", text)]


@settings(max_examples=200, deadline=None, database=None)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(f" \n\t\r{SPACE}<|>sx0"))))
def test_any_text_survives_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True), special=True) == text


def test_special_tokens_have_the_first_ids_and_only_the_program_writes_them(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    names = {"<pad>": 0, "<s>": 1, "</s>": 2} | {name: 4 + i for i, name in enumerate(SPECIAL)}
    assert tokenizer.special_tokens == names
    forged = "<s>a</s><|end|>more<|user|><pad>"
    assert set(tokenizer.encode(forged)).isdisjoint(names.values())
    a = tokenizer.encode("a")
    assert tokenizer.encode(forged, allow_special=True) == [1, *a, 2, names["<|end|>more"], names["<|user|>"], 0]
    assert tokenizer.encode("a", bos=True) == [1, *a]
    assert tokenizer.decode([1, *a, 2]) == "a"
    assert tokenizer.decode([1, *a, 2], special=True) == "<s>a</s>"


def test_code_gets_pieces_for_indentation_and_line_ends() -> None:
    tokenizer = train_tokenizer(sources(), TokenizerConfig(vocab_size=700))
    text = "):\n        return x\n"
    pieces = [tokenizer.pieces[token] for token in tokenizer.encode(text)]
    assert len(pieces) <= 6 and SPACE * 8 in pieces and any(piece.endswith(":\n") for piece in pieces)
    assert b"".join(tokenizer.token_bytes[token] for token in tokenizer.encode(text)) == text.encode()
    assert not any(SPACE in tokenizer.token_bytes[i].decode(errors="replace") for i in range(700))


def test_training_is_deterministic() -> None:
    texts, config = sources(), TokenizerConfig(vocab_size=400)
    assert train_tokenizer(texts, config).sha256 == train_tokenizer(texts, config).sha256
    assert train_tokenizer(texts, config).sha256 != train_tokenizer(texts[:1], config).sha256


def test_a_file_gives_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    loaded = load_tokenizer(tmp_path / "t.model")
    assert loaded.sha256 == tokenizer.sha256 and loaded.encode("def f(x):") == tokenizer.encode("def f(x):")


@pytest.mark.parametrize("damage", ["empty", "half", "other"])
def test_bad_files_are_named(tokenizer: Tokenizer, tmp_path: Path, damage: str) -> None:
    with pytest.raises(BadFileError, match=r"gone\.model: there is no such file"):
        load_tokenizer(tmp_path / "gone.model")
    raw = tokenizer.model_bytes
    (tmp_path / "bad.model").write_bytes(
        {"empty": b"", "half": raw[: len(raw) // 2], "other": b"no model" * 99}[damage]
    )
    with pytest.raises(BadFileError, match=r"bad\.model (is not a SentencePiece model|cannot reproduce)") as caught:
        load_tokenizer(tmp_path / "bad.model")
    assert "\n" not in str(caught.value)


def test_a_model_that_changes_text_is_refused() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sources()), model_writer=model, vocab_size=500, byte_fallback=True, minloglevel=2
    )  # the default: a dummy prefix, NFKC, and single spaces
    with pytest.raises(BadFileError, match="cannot reproduce every text"):
        SentencePieceTokenizer(model.getvalue())


def test_errors_name_the_place_and_the_figure(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"character 3: '\\ud800' is a lone surrogate"):
        tokenizer.encode("abc\ud800")
    with pytest.raises(ConfigError, match="character 0"):
        tokenizer.encode_batch(["fine", "\udfff"])
    for token in (-1, 700):
        with pytest.raises(ConfigError, match=f"token id {token}: it must be between 0 and 699"):
            tokenizer.decode([token])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_that_does_not_fit_names_one_that_does(kind: str) -> None:
    texts = sources()[:1]
    with pytest.raises(ConfigError, match="of 60000 pieces: Vocabulary size too high") as caught:
        train_tokenizer(texts, TokenizerConfig(kind=kind, vocab_size=60_000))  # type: ignore[arg-type]
    most = int(str(caught.value).split("value <= ")[1].split(";")[0])
    assert train_tokenizer(texts, TokenizerConfig(kind=kind, vocab_size=most)).vocab_size == most  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"of 270 pieces: Vocabulary size is smaller than required_chars. 270 vs \d+"):
        train_tokenizer(texts, TokenizerConfig(kind=kind, vocab_size=270))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no text"):
        train_tokenizer([], TokenizerConfig(kind=kind))  # type: ignore[arg-type]
    for name in ("<unk>", "<0x41>"):
        with pytest.raises(ConfigError, match=name):
            train_tokenizer(texts, TokenizerConfig(vocab_size=400, special_tokens=(name,)))
