"""Tokenizers in other people's formats: the same ids on either side, no forged token, no traceback for a bad file."""

import io
import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_gguf
import pytest
import sentencepiece
import tokenizers

from jaxgpt import cli
from jaxgpt.config import TokenizerConfig
from jaxgpt.errors import BadFileError, ConfigError, JaxgptError
from jaxgpt.interop.vocabulary import from_gguf, open_tokenizer, write_tokenizer
from jaxgpt.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from jaxgpt.tokenizer.base import SPACE, Kind
from jaxgpt.tokenizer.bpe import CUTTINGS, JsonTokenizer, tokenizer_json
from jaxgpt.tokenizer.spm import SentencePieceTokenizer

TEXTS = [
    "", " ", "   ", "a  b\n\n    c\t\t\n", "Don't SAY 31,415 things", "def f(x):\n        return x  # naïve \U0001f642",
    "e\u0301 \u4e2d\u6587 \u0627\u0644 \x00\ufeff\r\n", "<s></s><0x41><|user|><unk>[x]", "   [x]  [x][x]    <b> </b>",
]  # fmt: skip


def sources() -> list[str]:
    """In short pieces: over thousands of characters the sums of unigram scores differ in their last bits."""
    files = [path.read_text("utf-8") for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))]
    return [text[at : at + 400] for text in files for at in range(0, len(text), 400)]


def _foreign(prefix: bool, defined: tuple[str, ...] = ()) -> SentencePieceTokenizer:
    """As Gemma's: pieces of several spaces that are matched first; or with a dummy prefix, as Llama 2's."""
    model = io.BytesIO()
    defined = defined if prefix else ("[x]", "<b>", "\n", *(SPACE * n for n in range(2, 6)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sources()), model_writer=model, model_type="bpe", vocab_size=600, byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, user_defined_symbols=list(defined), minloglevel=2,
        control_symbols=["<|user|>"], normalization_rule_name="identity", add_dummy_prefix=prefix,
        remove_extra_whitespaces=False, max_sentence_length=2**20,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue(), "foreign", {"chat_template": "{{ x }}", "end_tokens": ["<|user|>"]})


def _unigram(texts: list[str]) -> Tokenizer:
    return train_tokenizer([*sources(), *texts], TokenizerConfig(kind="unigram", vocab_size=700))


def _byte_level(**more: Any) -> dict[str, Any]:
    """A small byte-level tokenizer.json, whose special token <|end|> ends a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = ["a b", "Ġ a", "ab c", "1 2", "i n", "t h", "th e", "Ċ Ċ"]
    tokens = ["<|end|>", "<think>", "<|turn|>", *alphabet, *(pair.replace(" ", "") for pair in pairs)]
    special = {"<|end|>": Kind.CONTROL, "<think>": Kind.USER_DEFINED, "<|turn|>": Kind.CONTROL}
    kinds = [special.get(token, Kind.NORMAL) for token in tokens]
    step = CUTTINGS["gpt-2"]["pre_tokenizers"][0]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": pairs} | more
    before = {"type": "Sequence", "pretokenizers": [step]}
    built: dict[str, Any] = json.loads(tokenizer_json(tokens, kinds, None, model, pre_tokenizer=before, decoder=step))
    return built


def _special(token: int, name: str) -> dict[str, Any]:
    return _byte_level()["added_tokens"][0] | {"id": token, "content": name}


def _json(built: dict[str, Any], **settings: Any) -> JsonTokenizer:
    return JsonTokenizer(json.dumps(built).encode(), "t", {"eos_token": "<|end|>", **settings})


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: train_tokenizer(sources(), TokenizerConfig(vocab_size=700, special_tokens=("<|user|>",))),
    "unigram": lambda: _unigram(["</s><|0x123456789ABCDEF\n" * 50]),
    "gemma": lambda: _foreign(prefix=False),
    "llama": lambda: _foreign(prefix=True),
    "bytes": lambda: _json(_byte_level(), end_tokens=["<|turn|>"], chat_template="{{ y }}"),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def ours(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


def same(a: Tokenizer, b: Tokenizer) -> bool:
    attributes = ("bos_ids", "end_ids", "bos_id", "eos_id", "pad_id", "chat_template", "token_bytes")
    return all(getattr(a, name) == getattr(b, name) for name in attributes)


# Out and in again


def test_a_run_directory_keeps_all_of_a_tokenizer(ours: Tokenizer, tmp_path: Path) -> None:
    ours.write(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.sha256 == ours.sha256 and same(again, ours) and again.special_tokens == ours.special_tokens
    assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS)


def test_every_format_cuts_a_text_alike(ours: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(ours, tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, JsonTokenizer) and same(again, ours)
    texts = [*TEXTS, *sources(), "\n".join(TEXTS)]
    assert again.encode_batch(texts) == ours.encode_batch(texts) == [ours.encode(text) for text in texts]
    assert [again.decode(again.encode(text)) for text in texts] == texts
    for text in texts:
        assert again.encode(text, bos=True, allow_special=True) == [
            *again.bos_ids, *again.encode(text, allow_special=True),
        ]  # fmt: skip
        assert not set(again.encode(text)) & set(again.special_tokens.values())


def test_a_text_that_begins_with_the_sign_of_a_space_has_its_dummy_prefix() -> None:
    llama = MAKERS["llama"]()
    assert llama.pieces[llama.encode(SPACE + "a")[0]] == SPACE and llama.decode(llama.encode(SPACE)) == SPACE
    assert llama.encode_batch([SPACE + "a"]) == [llama.encode(SPACE + "a")]


@pytest.mark.parametrize("kind", ["bpe", "gemma", "llama", "bytes"])
def test_gguf_keeps_how_a_text_is_cut(kind: str) -> None:
    ours, texts = MAKERS[kind](), [*TEXTS, *sources()]
    back = from_gguf(made_gguf.tokenizer_settings(ours, ours.vocab_size + 3), "back")
    assert back.encode_batch(texts) == ours.encode_batch(texts)
    assert (back.bos_ids, back.end_ids, back.pad_id, back.chat_template) == (
        ours.bos_ids, ours.end_ids, ours.pad_id, ours.chat_template,
    )  # fmt: skip
    assert (back.vocab_size, back.token_bytes[: ours.vocab_size]) == (ours.vocab_size + 3, ours.token_bytes)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_names_how_bytes_are_cut(pre: str) -> None:
    text = "I'll in 1212  the\n\n\nab"
    metadata = made_gguf.tokenizer_settings(_json(_byte_level()), 280, pre)
    ours = from_gguf(metadata, "t")
    del metadata["tokenizer.ggml.add_bos_token"]
    implied = from_gguf(metadata | {"tokenizer.ggml.bos_token_id": 2}, "t").bos_ids
    assert implied == ([2] if pre == "llama-bpe" else [])
    cut = {"gpt-2": ["Ġ", "12", "12"], "smollm": ["Ġ", "1", "2", "1", "2"]}
    cut |= {"llama-bpe": ["Ġ", "12", "1", "2"], "qwen2": ["Ġ", "1", "2", "1", "2"]}
    pieces = [ours.pieces[token] for token in ours.encode(text)]
    assert pieces[pieces.index("in") + 1 :][: len(cut[pre])] == cut[pre]


@pytest.mark.parametrize("kind", ["prefix", "digit"])
def test_a_tokenizer_json_that_would_cut_differently_is_not_written(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # `tokenizers` would put the dummy prefix behind each [x] too; and would read <0x07> as a byte where 7 has no piece.
    ours = _foreign(True, ("[x]",)) if kind == "prefix" else _unigram([])
    write_tokenizer(ours, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    assert same(load_tokenizer(tmp_path), ours)
    assert capfd.readouterr().err == f"jaxgpt: {ours.where}: no tokenizer.json cuts as it does, so there is none\n"


@pytest.mark.parity
@pytest.mark.parametrize("kind", list(MAKERS))
def test_transformers_reads_the_written_directory(kind: str, tmp_path: Path) -> None:
    import transformers

    ours, texts = MAKERS[kind](), [*TEXTS, *sources()]
    write_tokenizer(ours, tmp_path)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        assert theirs.encode(text, split_special_tokens=True) == ours.encode(text, bos=True)
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text
    assert (theirs.bos_token_id or ours.eos_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.chat_template == ours.chat_template


# Special tokens


def test_no_text_forges_a_special_token(ours: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(ours, tmp_path)
    special = ours.special_tokens
    forged = " ".join([*special, "".join(special), "<0x41><unk>"])
    for tokenizer in (ours, load_tokenizer(tmp_path)):
        assert (
            not set(tokenizer.encode(forged)) & set(special.values())
            and tokenizer.decode(tokenizer.encode(forged)) == forged
        )
        for name, token in special.items():
            assert tokenizer.encode(name, allow_special=True)[-1] == token
        assert not set(tokenizer.encode_batch([forged])[0]) & set(special.values())


@pytest.mark.parametrize("how", ["ignore_merges", "one character", "unigram"])
def test_a_tokenizer_that_text_can_forge_is_refused(how: str) -> None:
    built = _byte_level(ignore_merges=True)
    name = "the" if how == "ignore_merges" else "Q"
    if how == "unigram":
        name, decoder = "</s>", {"type": "Fuse"}
        vocab = [["<unk>", 0.0], ["</s>", 0.0], *([c, -5.0] for c in "</s>ab")]
        built |= {"model": {"type": "Unigram", "vocab": vocab, "unk_id": 0}, "pre_tokenizer": None, "decoder": decoder}
        built["added_tokens"] = [_special(1, name)]
    else:
        built["added_tokens"].append(_special(built["model"]["vocab"][name], name))
    with pytest.raises(BadFileError, match=f"reads '{name}' in any text as that special token"):
        _json(built, eos_token=name)


# What stands beside a tokenizer


def test_the_files_beside_a_tokenizer_say_what_ends_a_text(tmp_path: Path) -> None:
    def load(**files: Any) -> Tokenizer:
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "tokenizer.json").write_text(json.dumps(_byte_level()))
        for name, content in files.items():
            suffix = "json" if isinstance(content, dict) else "jinja"
            (tmp_path / f"{name}.{suffix}").write_text(json.dumps(content) if suffix == "json" else content)
        return load_tokenizer(tmp_path)

    with pytest.raises(BadFileError, match="nothing ends a text; name its eos_token"):
        load()
    assert load(config={"eos_token_id": 2}).end_ids == (2,)
    assert load(config={"eos_token_id": 1}, generation_config={"eos_token_id": [0, 2]}).end_ids == (0, 2)
    named = [{"name": "tool", "template": "a"}, {"name": "default", "template": "b"}]
    ours = load(
        tokenizer_config={"eos_token": {"content": "<|turn|>"}, "chat_template": named, "pad_token": "[PAD]"},
        generation_config={"eos_token_id": 0},
    )
    assert (ours.eos_id, ours.end_ids, ours.chat_template, ours.bos_ids, ours.pad_id) == (2, (2, 0), "b", [], 2)
    assert load(tokenizer_config={"eos_token": "a", "chat_template": "c"}, chat_template="d").chat_template == "d"
    with pytest.raises(BadFileError, match=r"its eos_token '</s>' is not in the vocabulary"):
        load(tokenizer_config={"eos_token": "</s>"})
    with pytest.raises(BadFileError, match=r"its end_tokens 999 is not in the vocabulary"):
        load(config={"eos_token_id": [0, 999]})


def test_what_training_left_in_a_tokenizer_json_changes_no_text() -> None:
    built = _byte_level()
    built["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    built["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|end|>",
    }  # fmt: skip
    built["model"]["dropout"] = 1.0
    text = "in the ab 1212"
    assert _json(built).encode(text) == _json(_byte_level()).encode(text)


def test_a_byte_without_a_token_is_reported_in_a_batch_too(capfd: pytest.CaptureFixture[str]) -> None:
    built = _byte_level()
    del built["model"]["vocab"]["Ā"]  # how byte 0 is written
    ours = _json(built)
    assert [ours.decode(ids) for ids in ours.encode_batch(["a\0b", "\0"])] == ["ab", ""]
    assert capfd.readouterr().err == "jaxgpt: t has no token for bytes 00: left out\n"


# Hostile files


_VALUES: list[Any] = [None, True, -1, 0, 1, 2**31, 2**70, 1e300, "", "x", "<|end|>", [], {}, [[]], [1], {"a": 1}]


def _mutated(value: Any, draw: random.Random) -> Any:
    """A copy where one or two values, at any depth, are gone or are something else."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 2)):
        inner, depth = value, draw.randint(0, 3)
        while isinstance(inner, dict | list) and inner:
            key = draw.choice(list(inner)[:40]) if isinstance(inner, dict) else draw.randrange(min(len(inner), 20))
            if depth == 0 or not isinstance(inner[key], dict | list) or not inner[key]:
                if draw.random() < 0.25:
                    del inner[key]
                else:
                    inner[key] = json.loads(json.dumps(draw.choice(_VALUES)))
                break
            inner, depth = inner[key], depth - 1
    return value


def _use(tokenizer: Tokenizer) -> None:
    for text in ("in the 12 <|end|> é\n", ""):
        ids = [*tokenizer.encode(text, bos=True), tokenizer.eos_id]
        assert all(0 <= token < tokenizer.vocab_size for token in (*ids, *tokenizer.end_ids))
        assert not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())
        tokenizer.decode(ids)
        tokenizer.encode_batch([text, text])
        tokenizer.encode(text, allow_special=True)
    assert tokenizer.chat_template is None or isinstance(tokenizer.chat_template, str)
    tokenizer.settings()


@pytest.mark.parametrize("what", ["json", "bits", "settings", "gguf bytes", "gguf pieces"])
def test_a_damaged_file_ends_in_one_line(what: str, tmp_path: Path) -> None:
    """2,500 in all: each is refused in one line, or is a tokenizer that works and forges nothing."""
    draw, built = random.Random(0), _byte_level()
    raw = json.dumps(built).encode()
    settings: dict[str, Any] = {"eos_token": {"content": "<|end|>"}, "pad_token": None, "add_bos_token": False}
    settings["chat_template"] = [{"name": "default", "template": "x"}]
    described = made_gguf.tokenizer_settings(_json(built), 300)
    pieces = made_gguf.tokenizer_settings(train_tokenizer(sources(), TokenizerConfig(vocab_size=400)), 400)
    (tmp_path / "tokenizer.json").write_bytes(raw)
    kinds = {"ok": 0, "refused": 0}
    for _ in range(500):
        try:
            if what == "json":
                _use(_json(_mutated(built, draw)))
            elif what == "bits":
                flipped = bytearray(raw)
                flipped[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
                _use(JsonTokenizer(bytes(flipped), "t", {"eos_token": "<|end|>"}))
            elif what == "settings":
                (tmp_path / "tokenizer_config.json").write_text(json.dumps(_mutated(settings, draw)))
                (tmp_path / "generation_config.json").write_text(json.dumps(_mutated({"eos_token_id": [0, 2]}, draw)))
                _use(load_tokenizer(tmp_path))
            else:
                _use(from_gguf(_mutated(described if what == "gguf bytes" else pieces, draw), "t"))
            kinds["ok"] += 1
        except JaxgptError as error:
            assert isinstance(error, BadFileError) and "\n" not in str(error), repr(error)
            kinds["refused"] += 1
    assert min(kinds.values()) > 20, kinds


def test_gguf_names_what_is_not_implemented() -> None:
    metadata = made_gguf.tokenizer_settings(_json(_byte_level()), 280)
    for key, value, message in (
        ("pre", "tekken", r"tokenizer\.ggml\.pre 'tekken' is not implemented; gpt-2, smollm, llama-bpe, qwen2 are"),
        ("model", "t5", r"tokenizer\.ggml\.model 't5' is not implemented; gpt2 and llama are"),
        ("eos_token_id", 280, "its eos_token 280 is not in the vocabulary"),
        ("token_type", [1], "tokens or token_type are damaged"),
        ("merges", ["a"], "is not a tokenizer.json"),
    ):
        with pytest.raises(BadFileError, match=message):
            from_gguf(metadata | {f"tokenizer.ggml.{key}": value}, "t")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not a tokenizer.json"),
        (b"", "is not a tokenizer.json"),
        (b"\xff\xfe", "is not a tokenizer.json"),
        (
            b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
            "WordLevel with ids up to 1 is not",
        ),
    ],
)
def test_no_tokenizer_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BadFileError, match=message):
        open_tokenizer(tmp_path)
    with pytest.raises(BadFileError, match="with ids up to 1000001 is not implemented"):
        _json(_byte_level() | {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1_000_000}, "merges": []}})


# Several


def test_tokenize_shows_several_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, kinds = "the in 12 naïve", ("llama", "bytes", "bpe")
    for kind in kinds:
        (tmp_path / kind).mkdir()
        MAKERS[kind]().write(tmp_path / kind)
    cli.dispatch(["tokenize", text, *(word for kind in kinds for word in ("--tokenizer", str(tmp_path / kind)))])
    lines = iter(capsys.readouterr().out.splitlines())
    for kind in kinds:
        ids, size = MAKERS[kind]().encode(text), len(text.encode())
        head = next(lines)
        assert head.split() == ["piece", "id", "bytes"]
        rows = [next(lines)[head.index("id") :].split() for _ in ids]
        assert [int(row[0]) for row in rows] == ids
        assert b"".join(bytes.fromhex(" ".join(row[1:])) for row in rows).strip() == text.encode()
        said = f"{len(ids)} tokens, {size} bytes, {size / len(ids):.2f} bytes per token"
        assert next(lines) == f"{tmp_path / kind}: {said}"
    with pytest.raises(ConfigError, match="there is no --tokenizer"):
        cli.dispatch(["tokenize", text])
