"""Models from one format to another: the same model and tokenizer, whole or not at all, and of use for every verb."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import made
import made_gguf
import numpy as np
import pytest

from jaxgpt.interop import convert as convert_module
from jaxgpt.interop.configs import canonical
from jaxgpt.interop.convert import compare, convert
from jaxgpt.interop.load import load_model
from jaxgpt.run import read_config
from jaxgpt.tokenizer import Tokenizer

TEXT = "The quick  brown fox, jumps 42 times\n\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return made.tokenizer_of()


@pytest.fixture(scope="module")
def sources(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, mesh_of: Callable) -> Path:
    """Directories of Hugging Face: not to be changed."""
    directory = tmp_path_factory.mktemp("sources")
    with mesh_of():
        for name in ("llama 3", "gpt2", "gemma3", "qwen3_moe"):
            made.write_hf(
                directory / name, name, tokenizer, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 2}
            )
    return directory


def assert_same(a: Path, b: Path, atol: float = 0) -> None:
    """Configuration, every parameter, and what the tokenizers make of a text."""
    one, other = load_model(a), load_model(b)
    assert canonical(one.config) == canonical(other.config)
    for x, y in zip(jax.tree.leaves(one.model), jax.tree.leaves(other.model), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)
    for name in ("bos_ids", "end_ids", "pad_id", "chat_template"):
        assert getattr(one.tokenizer, name) == getattr(other.tokenizer, name), name
    for text in (TEXT, made.TEXT, "<|user|> naïve \U0001f642"):
        assert one.tokenizer.encode(text, bos=True) == other.tokenizer.encode(text, bos=True)
        assert other.tokenizer.decode(other.tokenizer.encode(text)) == text


CHAINS = [(of, to) for of in ("hf", "gguf") for to in itertools.permutations(["jaxgpt", "hf"])]
OTHERS = [("gpt2", CHAINS[0]), ("gemma3", CHAINS[2]), ("qwen3_moe", CHAINS[3])]


@pytest.mark.parametrize(("name", "chain"), [*(("llama 3", chain) for chain in CHAINS), *OTHERS])
def test_every_format_leads_to_every_other(
    name: str, chain: tuple[str, tuple[str, ...]], sources: Path, mesh_of: Callable, tmp_path: Path
) -> None:
    """Two conversions in a row, from either kind of other people's files, end where they began."""
    of, targets = chain
    places = [sources / name]
    if of == "gguf":
        places.append(tmp_path / "there.gguf")
        made_gguf.convert(sources / name, places[-1])
    with mesh_of():
        for to in targets:
            places.append(tmp_path / to)
            convert(places[-2], places[-1], to, "float32")  # type: ignore[arg-type]
        assert_same(sources / name, places[-1], atol=1e-6 if name == "gemma3" else 0)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in places[1:]}, "nothing else is left"


def test_the_family_survives_where_the_format_names_it(sources: Path, mesh_of: Callable, tmp_path: Path) -> None:
    with mesh_of():
        for name in ("gemma3", "qwen3_moe"):
            made_gguf.convert(sources / name, tmp_path / f"{name}.gguf")
            convert(tmp_path / f"{name}.gguf", tmp_path / name, "hf", "float32")
            before, after = (json.loads((p / name / "config.json").read_text()) for p in (sources, tmp_path))
            assert {key: after[key] for key in before} == before
            assert after["dtype"] == after["torch_dtype"] == "float32" and "bos_token_id" in after


@pytest.mark.slow
def test_the_check_measures_how_far_apart_two_models_are(sources: Path, mesh_of: Callable, tmp_path: Path) -> None:
    """The three figures, against a computation of their definitions."""
    with mesh_of():
        convert(sources / "llama 3", tmp_path / "x", "hf", "bfloat16")
        difference, kl, top1 = compare(sources / "llama 3", tmp_path / "x")
        one, other = load_model(sources / "llama 3"), load_model(tmp_path / "x")
        ids = one.tokenizer.encode(convert_module._PROMPT, bos=True)[:128]
        a, b = (np.asarray(m.model.logits(m.model(jnp.array([ids]))[0])[0], np.float64) for m in (one, other))
    assert len(ids) > 40
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    assert difference == pytest.approx(np.abs(a - b).max(), rel=0.01)
    assert kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=0.01)
    assert top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert 0 < kl < 0.05 and top1 > 0.8


def test_bfloat16_is_the_nearest_of_every_parameter(sources: Path, mesh_of: Callable, tmp_path: Path) -> None:
    with mesh_of():
        convert(sources / "llama 3", tmp_path / "narrow", "hf", "bfloat16")
        before, after = (load_model(path).model for path in (sources / "llama 3", tmp_path / "narrow"))
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(x.astype("bfloat16").astype("float32")), np.asarray(y))
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"


# What is refused, and what an interruption leaves


def test_the_command_converts_and_checks(command: Callable[..., Any], sources: Path, tmp_path: Path) -> None:
    words = ["--to", "hf", "--dtype", "bfloat16", "--check"]
    outcome = command("jaxgpt", "convert", str(sources / "llama 3"), str(tmp_path / "x"), *words)
    assert (outcome.status, outcome.err) == (0, "")
    first, second = outcome.out.splitlines()
    assert first == f"wrote {tmp_path / 'x'}"
    number = r"[\d.e+-]+"
    figures = rf"max logit difference {number}, KL divergence {number} nats, top-1 agreement [\d.]+ %"
    assert re.fullmatch(figures, second), second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{there} --to hf", "convert: {there} exists; remove it or choose another name"),
        ("{there}/file --to hf", "convert: {there}/file exists; remove it or choose another name"),
        ("new --to jaxgpt --dtype bfloat16", "convert: jaxgpt holds float32 parameters, not bfloat16; leave --dtype"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_changes_nothing(
    words: str,
    message: str,
    command: Callable[..., Any],
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("mine")
    outcome = command("jaxgpt", "convert", str(sources / "llama 3"), *words.format(there=there).split())
    assert outcome.status == 2 and outcome.error.startswith(message.format(there=there)) and not outcome.out
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "file"] and (there / "file").read_text() == "mine"


STOPS = {"data": ("hf", "stored_tensors"), "hf": ("hf", "write_tokenizer"), "jaxgpt": ("jaxgpt", "write_run")}


@pytest.mark.parametrize("where", STOPS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_leaves_what_was_there(
    where: str, error: BaseException, command: Callable[..., Any], sources: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the middle of the data, or before the last file of the directory; the next attempt finds its way clear."""
    target = tmp_path / "deep" / "x.y"
    (tmp_path / "mine").write_text("mine")

    def stop(*_: object, **__: object) -> None:
        raise error

    whole = convert_module.stored_tensors

    def breaking(*arguments: Any) -> dict:
        tensors = whole(*arguments)
        middle = list(tensors)[len(tensors) // 2]
        return tensors | {middle: tensors[middle]._replace(read=stop)}  # type: ignore[arg-type]

    to, name = STOPS[where]
    words = ["jaxgpt", "convert", str(sources / "llama 3"), str(target), "--to", to]
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, name, breaking if where == "data" else stop)
        outcome = command(*words)
    assert outcome.status == (75 if isinstance(error, KeyboardInterrupt) else 74) and outcome.error and not outcome.out
    assert not list(target.parent.iterdir()) and (tmp_path / "mine").read_text() == "mine"
    partial = target.with_name("x.y.partial")  # what a kill leaves
    partial.mkdir()
    (partial / "rest").write_text("rest")
    assert command(*words).status == 0 and [path.name for path in target.parent.iterdir()] == ["x.y"]
    assert not (target / "rest").exists()


def test_a_bad_source_is_named(command: Callable[..., Any], sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "gpt2", tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "mamba"}')
    for source, message in (
        (tmp_path / "bad", "model_type 'mamba' is not implemented"),
        (tmp_path / "none", "there is no"),
    ):
        outcome = command("jaxgpt", "convert", str(source), str(tmp_path / "x"), "--to", "hf")
        assert outcome.status == 65 and message in outcome.error and not (tmp_path / "x").exists()


# What a converted model is good for


@pytest.mark.parametrize("kind", ["directory", "gguf", "run"])
def test_every_verb_takes_a_foreign_model(
    kind: str, command: Callable[..., Any], sources: Path, mesh_of: Callable, tmp_path: Path
) -> None:
    path = sources / "llama 3"
    if kind == "gguf":
        path = tmp_path / "x.gguf"
        made_gguf.convert(sources / "llama 3", path)
    if kind == "run":
        path = tmp_path / "run"
        with mesh_of():
            convert(sources / "llama 3", path, "jaxgpt", "float32")
    words = ["--prompt", "The quick", "--max-new-tokens", "8", "--temperature", "0"]
    outcome = command("generate.py", "--checkpoint", str(path), *words)
    assert (outcome.status, outcome.err) == (0, "") and outcome.out.startswith("The quick")
    assert outcome.out == command("generate.py", "--checkpoint", str(sources / "llama 3"), *words).out
    outcome = command("jaxgpt", "tokenize", TEXT, "--tokenizer", str(path))
    original = command("jaxgpt", "tokenize", TEXT, "--tokenizer", str(sources / "llama 3")).out
    assert outcome.status == 0 and outcome.out == original.replace(f"{sources / 'llama 3'}: ", f"{path}: ")
    outcome = command("jaxgpt", "chat", str(path))
    assert outcome.status == 2 and "there is no chat template, so it cannot chat" in outcome.error
    if kind != "run":
        outcome = command("jaxgpt", "verify", str(path))
        assert outcome.status == 0 and "all 5 checks hold" in outcome.out


@pytest.mark.slow
def test_on_a_mesh_the_text_is_the_same(command: Callable[..., Any], sources: Path) -> None:
    words = ["generate.py", "--checkpoint", str(sources / "qwen3_moe"), "--prompt", "The quick"]
    words += ["--max-new-tokens", "8", "--temperature", "0"]
    assert command(*words, "--mesh.tensor", "2").out == command(*words).out


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_converted_model_trains_on(
    command: Callable[..., Any], sources: Path, mesh_of: Callable, text_dir: Path, tmp_path: Path
) -> None:
    """From the parameters it had, with settings of one's own; then its steps are a run's like any other."""
    run = tmp_path / "v1.5"  # a dot in its name is no suffix
    assert command("jaxgpt", "convert", str(sources / "qwen3_moe"), str(run), "--to", "jaxgpt").status == 0
    config = read_config(run)
    assert config.run_dir == str(run) and config.tokenizer.path == str(run / "tokenizer.json")
    words = [
        "train.py", str(run / "config.json"), "--data.paths", str(text_dir), "--training.steps", "3",
        "--training.batch-size", "2", "--training.log-every", "1", "--training.eval-batches", "1",
        "--optimizer.peak-lr", "1e-9", "--optimizer.ema-decay", "0.5", "--training.sample-tokens", "4",
    ]  # fmt: skip
    outcome = command(*words)
    assert outcome.status == 0, outcome.err
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"router_balance", "router_z"} <= records[0].keys()
    with mesh_of():
        before, after = load_model(sources / "qwen3_moe").model, load_model(run).model
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)  # at this rate it learns nothing
    assert command(*words).status == 0
    words[words.index("--optimizer.peak-lr") + 1] = "1e-3"
    assert "optimizer.peak_lr was 1e-09 and is now 0.001" in command(*words).error


@pytest.mark.usefixtures("one_device")
def test_a_converted_model_keeps_its_tokenizer(
    command: Callable[..., Any], sources: Path, finished: Path, text_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert command("jaxgpt", "convert", str(sources / "gpt2"), str(run), "--to", "jaxgpt").status == 0
    other = tmp_path / "other.model"
    made_here = made.train_tokenizer([made.TEXT], made.TokenizerConfig(vocab_size=330))
    other.write_bytes(made_here.model_bytes)
    words = ["--data.paths", str(text_dir), "--tokenizer.path", str(other), "--training.batch-size", "2"]
    outcome = command("train.py", str(run / "config.json"), *words)
    assert outcome.status == 65 and "its tokenizer_sha256 has changed since step 0 was saved" in outcome.error
