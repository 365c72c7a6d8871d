"""10,000 odd texts through real tokenizers, compared with the libraries that they were made for."""

import itertools
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_gguf
import pytest
import real
import sentencepiece
import tokenizers

from jaxgpt.errors import ConfigError
from jaxgpt.interop.vocabulary import from_gguf, open_tokenizer, write_tokenizer
from jaxgpt.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.tokenizer.base import SPACE
from jaxgpt.tokenizer.bpe import JsonTokenizer

ALPHABETS = [
    (0x20, 0x7F), (0, 0x20), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x780), (0x900, 0xD80), (0xE00, 0xF00),
    (0x1100, 0x1200), (0x2000, 0x2070), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F700),
    (0x300, 0x370), (0xE000, 0xE010), (0x10000, 0x10100), (0x1D400, 0x1D500), (0xFE00, 0xFF00),
]  # fmt: skip
WORDS = [
    "the ", "  ", "    ", "\n\n", "\t", "123", "4567890", "don't", "I'LL ", " naïve", "<|im_end|>", "<s>", "</s>",
    "<eos>", "<end_of_turn>", "[INST]", "<0x41>", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "e\u0301",
    "def f(x):\n    return", SPACE, f"a{SPACE}b", "\r\n", "www.example.org/?q=1", "\ufeff", "\u00a0",
]  # fmt: skip


def _texts() -> list[str]:
    draw = random.Random(0)

    def part() -> str:
        if draw.random() < 0.4:
            return draw.choice(WORDS)
        low, high = draw.choice(ALPHABETS)
        return "".join(chr(draw.randrange(low, high)) for _ in range(draw.randint(1, 6)))

    return ["".join(part() for _ in range(draw.randint(0, 12))) for _ in range(10_000)]


TEXTS = _texts()


def assert_agrees(
    ours: Tokenizer, theirs: Callable[[str], list[int]], texts: list[str] = TEXTS, lost: str = ""
) -> None:
    """Equal ids, except that U+2581 is spelt by its bytes here, and exact round trips but for characters of `lost`."""
    spaces_are_pieces = not isinstance(ours, JsonTokenizer) or not ours.byte_level
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids == ours.encode(text)
        if not (spaces_are_pieces and SPACE in text):
            assert ids == theirs(text), ascii(text)
        kept = text.translate(dict.fromkeys(map(ord, lost)))
        assert ours.decode(ids) == kept, ascii(text)


def plain(model: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    model.encode_special_tokens = True
    return lambda text: model.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gptoss", "gemma3"])
def test_a_tokenizer_json_agrees_with_tokenizers(name: str) -> None:
    directory = real.tokenizer_json(name)
    oracle = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = [unicodedata.normalize("NFC", text) for text in TEXTS] if name == "qwen3" else TEXTS
    assert_agrees(load_tokenizer(directory), plain(oracle), texts)


@pytest.mark.parametrize("number", range(5))
def test_a_sentencepiece_model_agrees_with_sentencepiece(number: int) -> None:
    path = real.sentencepiece_models()[number]
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = load_tokenizer(path)
    assert_agrees(ours, oracle.encode)
    assert ours.bos_ids == [oracle.bos_id()] and ours.end_ids == (oracle.eos_id(),)
    # A completion goes on a text: the space that begins a word is not a dummy prefix there.
    assert ours.decode_bytes(ours.encode("word")) == b" word" and ours.decode(ours.encode("word")) == "word"


@pytest.mark.parity  # for the package `regex`
def test_smollm2_cuts_digits_one_by_one() -> None:
    ours = open_tokenizer(real.smollm2())
    bytes_without_token = "\x04\x06\x13\x14\x16\x1d"
    assert [ours.pieces[token] for token in ours.encode("in 2024")] == ["in", "Ġ", "2", "0", "2", "4"]
    assert_agrees(ours, _byte_level_bpe(ours, real.smollm2()), lost=bytes_without_token)
    assert (
        ours.bos_ids == [] and ours.pieces[ours.end_ids[0]] == "<|im_end|>" and "im_start" in (ours.chat_template or "")
    )


def test_a_byte_without_token_is_reported_once(capfd: pytest.CaptureFixture[str]) -> None:
    ours = open_tokenizer(real.smollm2())
    assert [ours.decode(ours.encode(text)) for text in ("a\x04b", "a\x04\x04b", "ab")] == ["ab"] * 3
    assert capfd.readouterr().err.count("has no token for bytes 04: left out") == 1


def _byte_level_bpe(ours: Tokenizer, path: Path) -> Callable[[str], list[int]]:
    """Byte-pair encoding written anew: GPT-2's words, where each digit is one, merged by rank."""
    import regex  # what transformers' own Python tokenizers use

    from jaxgpt.interop.gguf import read_gguf

    metadata = read_gguf(path)[0]
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    digits = regex.compile(r"\p{N}|\P{N}+")
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in shown}
    alphabet |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in shown)}

    def encode(text: str) -> list[int]:
        found = []
        for word in (word for part in digits.findall(text) for word in words.findall(part)):
            parts = [alphabet[byte] for byte in word.encode()]
            parts = [part for part in parts if part in ids]
            while known := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
                _, i = min(known)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            found += [ids[part] for part in parts]
        return found

    return encode


@pytest.mark.slow
def test_gemma_is_rebuilt_from_its_gguf() -> None:
    ours = open_tokenizer(real.gemma3())
    oracle = tokenizers.Tokenizer.from_file(str(real.tokenizer_json("gemma3") / "tokenizer.json"))
    assert_agrees(ours, plain(oracle))
    assert [ours.pieces[token] for token in ours.bos_ids] == ["<bos>"] and ours.end_ids == (1,)


def test_special_tokens_are_read_only_when_they_are_allowed() -> None:
    ours = load_tokenizer(real.tokenizer_json("llama3"))
    text = "<|begin_of_text|>hi<|eot_id|>"
    assert not set(ours.encode(text)) & set(ours.special_tokens.values()) and ours.decode(ours.encode(text)) == text
    assert [ours.pieces[token] for token in ours.encode(text, allow_special=True)] == [
        "<|begin_of_text|>", "hi", "<|eot_id|>",
    ]  # fmt: skip


REAL = ["llama3", "qwen3", "smollm2", "mistral", pytest.param("gemma3", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", REAL)
def test_gguf_gives_the_same_tokenizer_back(name: str) -> None:
    ours = _one_of(name)
    pre = {"llama3": "llama-bpe", "qwen3": "qwen2", "smollm2": "smollm"}.get(name, "default")
    again = from_gguf(made_gguf.tokenizer_settings(ours, pre=pre), "again")
    texts = TEXTS[::10]
    assert again.encode_batch(texts) == ours.encode_batch(texts)
    assert (again.bos_ids, again.end_ids, again.chat_template) == (ours.bos_ids, ours.end_ids, ours.chat_template)
    assert again.token_bytes == ours.token_bytes and again.special_tokens == ours.special_tokens


@pytest.mark.parametrize("name", REAL)
def test_a_written_directory_gives_the_same_tokenizer_back(name: str, tmp_path: Path) -> None:
    ours = _one_of(name)
    write_tokenizer(ours, tmp_path)
    again = load_tokenizer(tmp_path)
    texts = [text for text in TEXTS[::10] if name not in ("mistral", "gemma3") or SPACE not in text]
    assert again.encode_batch(texts) == ours.encode_batch(texts)
    assert (again.bos_ids, again.end_ids, again.chat_template) == (ours.bos_ids, ours.end_ids, ours.chat_template)


@pytest.mark.parity
@pytest.mark.parametrize("name", REAL)
def test_transformers_reads_a_written_directory(name: str, tmp_path: Path) -> None:
    import transformers

    ours = _one_of(name)
    write_tokenizer(ours, tmp_path)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[::10]:
        if name not in ("mistral", "gemma3") or SPACE not in text:
            assert theirs.encode(text, split_special_tokens=True) == ours.encode(text, bos=True), ascii(text)
    assert (theirs.eos_token_id, theirs.chat_template) == (ours.eos_id, ours.chat_template)


def _one_of(name: str) -> Tokenizer:
    if name in ("llama3", "qwen3"):
        return load_tokenizer(real.tokenizer_json(name))
    if name == "mistral":
        return load_tokenizer(real.sentencepiece_models()[-1])
    return open_tokenizer(real.smollm2() if name == "smollm2" else real.gemma3())


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_a_lone_surrogate_is_named(name: str) -> None:
    ours = _one_of(name)
    with pytest.raises(ConfigError, match=r"character 3: '\\ud800' is a lone surrogate"):
        ours.encode("abc\ud800")
    with pytest.raises(ConfigError, match="character 0"):
        ours.encode_batch(["fine", "\udfff"])
