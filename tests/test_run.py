"""A run directory through the command line: what does not fit it is refused in one line, and nothing in it is lost."""

import dataclasses
import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxgpt.config import TokenizerConfig, TrainConfig
from jaxgpt.errors import ConfigError
from jaxgpt.interop.load import load_model
from jaxgpt.run import load_run, read_config, refuse_other_config
from jaxgpt.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("compiled_once")


def content(run_dir: Path) -> dict[str, bytes]:
    """Every file that must survive a refusal. (The lock holds the name of its last holder.)"""
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.name != "LOCK"]
    assert len(files) > 20
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


@pytest.fixture
def run(finished: Path, tiny: TrainConfig, tmp_path: Path) -> TrainConfig:
    """`tiny`, with a finished run in its directory."""
    shutil.copytree(finished, tmp_path / "run")
    return dataclasses.replace(tiny, run_dir=str(tmp_path / "run"))


# Other settings


def test_other_settings_are_refused_with_old_and_new(command: Callable[..., Any], run: TrainConfig) -> None:
    before = content(run.run_path)
    changes = {
        "model.d_model": ("32", "64"),
        "model.positions": ("'learned'", "'rotary'"),
        "model.dtype": ("'float32'", "'bfloat16'"),
        "tokenizer.vocab_size": ("500", "600"),
        "data.val_fraction": ("0.02", "0.1"),
        "optimizer.name": ("'adamw'", "'lion'"),
        "training.batch_size": ("4", "8"),
        "training.seed": ("0", "1"),
    }
    words = [word for key, (_, new) in changes.items() for word in (f"--{key}", new.strip("'"))]
    refused = command("train.py", run, *words)
    listed = ", ".join(f"{key} was {old} and is now {new}" for key, (old, new) in changes.items())
    assert refused.status == 2
    assert refused.error == (
        f"run directory {run.run_path} holds another configuration: {listed}; choose another --run-dir, "
        f"or pass --allow-change {' '.join(changes)}"
    )
    named = command("train.py", run, *words, "--allow-change", *list(changes)[:-2])
    assert named.status == 2 and " configuration: training.batch_size was 4 and is now 8, training.seed" in named.error
    assert content(run.run_path) == before


def test_settings_that_leave_the_results_alone_may_change(command: Callable[..., Any], run: TrainConfig) -> None:
    words = (
        "--name other --model.remat full --model.no-scan-layers --training.log-every 3 --training.eval-every 7 "
        "--training.eval-batches 1 --training.loss-chunks 4 --training.sample-tokens 1 --checkpoint.every 2 "
        "--checkpoint.keep-last 5 --checkpoint.on-save-error continue"
    )
    done = command("train.py", run, *words.split())
    assert done.status == 0 and "step 20 is the last" in done.out
    assert read_config(run.run_path).checkpoint.keep_last == 5, "the directory holds the newest settings"


def test_a_vocabulary_that_is_not_given_is_not_a_change(run: TrainConfig) -> None:
    """config.json names the tokenizer's; a preset names none."""
    stored = read_config(run.run_path)
    assert (run.model.vocab_size, stored.model.vocab_size) == (None, 500)
    refuse_other_config(stored, run)
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=501))
    with pytest.raises(ConfigError, match=r"model\.vocab_size was 500 and is now 501"):
        refuse_other_config(stored, other)


@pytest.mark.parametrize(
    ("key", "value", "status", "message"),
    [
        ("model.d-model", "64", 2, r"leaf \S+ is float32\[.*32.*\] there and float32\[.*64.*\] here; use the config"),
        ("model.n-layers", "3", 2, r"leaf \S+ is float32\[2,.* there and float32\[3,"),
        ("optimizer.ema-decay", "0", 2, r"leaf \['raw_model'\]\S+ is float32\S+ there and absent here"),
        ("data.val-fraction", "0.1", 65, "its (tokenizer_sha256|data) has changed since step 20 was saved"),
    ],
)
def test_an_allowed_change_that_cannot_be_leaves_the_run_as_it_was(
    command: Callable[..., Any], run: TrainConfig, key: str, value: str, status: int, message: str
) -> None:
    before = content(run.run_path)
    refused = command("train.py", run, f"--{key}", value, "--allow-change", key.replace("-", "_"))
    assert refused.status == status
    assert re.search(message, refused.error)
    assert content(run.run_path) == before


# Other data


def test_text_that_has_changed_is_refused_until_it_is_restored(
    command: Callable[..., Any], tiny: TrainConfig, text_dir: Path, tmp_path: Path
) -> None:
    """The tokenizer is trained on that text, so it changes too; the run must keep its own."""
    text = tmp_path / "text"
    shutil.copytree(text_dir, text)
    data = dataclasses.replace(tiny.data, paths=(str(text),))
    training = dataclasses.replace(tiny.training, steps=4, eval_every=0)
    config = dataclasses.replace(tiny, run_dir=str(tmp_path / "run"), data=data, training=training)
    assert command("train.py", config).status == 0
    before, original = content(tmp_path / "run"), (text / "ast.py").read_text("utf-8")
    (text / "ast.py").write_text(original.replace("class", "klass"))
    refused = command("train.py", config)
    assert refused.status == 65
    assert re.match(rf"run {tmp_path}/run: its \w+ has changed since step 4 was saved; restore what", refused.error)
    assert content(tmp_path / "run") == before
    (text / "ast.py").write_text(original)
    assert command("train.py", config).status == 0


def test_another_tokenizer_is_refused(command: Callable[..., Any], tiny: TrainConfig, tmp_path: Path) -> None:
    """First by its path, then, where that is allowed or the same, by its content."""
    for name, module in (("one", "ast"), ("two", "shutil")):
        source = Path(sysconfig.get_path("stdlib"), f"{module}.py").read_text("utf-8")
        trained = train_tokenizer([source], TokenizerConfig(vocab_size=500))
        (tmp_path / f"{name}.model").write_bytes(trained.model_bytes)
    training = dataclasses.replace(tiny.training, steps=1, eval_every=0, eval_batches=1)
    tokenizer = TokenizerConfig(path=str(tmp_path / "one.model"))
    config = dataclasses.replace(tiny, run_dir=str(tmp_path / "run"), training=training, tokenizer=tokenizer)
    assert command("train.py", config).status == 0
    before = content(tmp_path / "run")
    words = ("--tokenizer.path", str(tmp_path / "two.model"))
    refused = command("train.py", config, *words)
    assert refused.status == 2
    assert f"tokenizer.path was '{tmp_path}/one.model' and is now '{tmp_path}/two.model'" in refused.error
    allowed = command("train.py", config, *words, "--allow-change", "tokenizer.path")
    shutil.copy(tmp_path / "two.model", tmp_path / "one.model")
    same_path = command("train.py", config)
    for outcome in (allowed, same_path):
        assert outcome.status == 65 and "its tokenizer_sha256 has changed since step 1" in outcome.error
    assert content(tmp_path / "run") == before


# A table of mistakes


def small_text(directory: Path) -> Path:
    path = directory / "small.txt"
    path.write_text("To be, or not to be.\n")
    return path


def binary(directory: Path) -> Path:
    path = directory / "binary.txt"
    path.write_bytes(bytes(range(256)))
    return path


def broken_json(directory: Path) -> Path:
    path = directory / "broken.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    return path


def empty_directory(directory: Path) -> Path:
    path = directory / "empty"
    path.mkdir()
    return path


def no_model(directory: Path) -> Path:
    path = directory / "no.model"
    path.write_text("hello")
    return path


def file_in_the_way(directory: Path) -> Path:
    path = directory / "file"
    path.write_text("mine")
    return path


def below_a_file(directory: Path) -> Path:
    return file_in_the_way(directory) / "run"


def missing(directory: Path) -> Path:
    return directory / "missing"


TRAINING_MISTAKES: list[tuple[str, Callable[[Path], Path] | None, int, str]] = [
    ("--data.paths {}", missing, 65, "data {}: there is no file that ends in .txt "),
    ("--data.paths {}", empty_directory, 65, "data {}: there is no file that ends in .txt"),
    ("--data.paths {}", binary, 65, "binary.txt: holds NUL characters, so it is binary or UTF-16; repair it or raise"),
    ("--data.paths {}", broken_json, 65, "broken.jsonl:2: no text can be read from it: "),
    ("--data.paths {} --tokenizer.path TOKENIZER", small_text, 2, "data {}: "),
    (
        "--data.paths {}",
        small_text,
        2,
        "tokenizer of 500 pieces: Vocabulary size too high (500). Please set it to a value <= ",
    ),
    ("--data.paths @pythn", None, 2, "data.paths: unknown builtin @pythn; did you mean @python?"),
    ("--tokenizer.path {}", missing, 65, "{}: there is no such file"),
    ("--tokenizer.path {}", no_model, 65, "tokenizer {} is not a SentencePiece model"),
    ("--model.vocab-size 100", None, 2, "model.vocab_size 100 is smaller than the tokenizer's 500; leave it out"),
    ("--model.n-heads 5", None, 2, "model.d_model 32 does not divide by model.n_heads 5; change one"),
    ("--model.context-length 65", None, 2, "model.context_length 65 does not divide by training.loss_chunks 2"),
    ("--training.accumulation-steps 3", None, 2, "training.batch_size 4 does not divide by training.accumulation_step"),
    ("--mesh.data 8", None, 2, "sequences at a time 2 does not divide over mesh.data * mesh.fsdp 8"),
    ("--mesh.data 1 --mesh.tensor 8", None, 2, "model.n_heads 2 does not divide over mesh.tensor 8"),
    ("--mesh.data 3", None, 2, "mesh data 3 x fsdp 1 x tensor 1 does not fit 8 devices; make the sizes multiply to 8"),
    ("--run-dir {}", file_in_the_way, 74, "cannot write {}"),
    ("--run-dir {}", below_a_file, 74, "cannot write {}"),
    ("--data.cache-dir {}", below_a_file, 74, "cannot write or read {}"),
    ("--training.wandb", None, 2, "training.wandb: wandb is not installed; run: pip install wandb"),
]


def name(value: Any) -> str | None:
    """A readable id for a part of a row."""
    return value.__name__ if callable(value) else value[:40] if isinstance(value, str) else None


@pytest.mark.parametrize(("words", "make", "status", "message"), TRAINING_MISTAKES, ids=name)
def test_a_mistake_in_training_is_one_line(
    command: Callable[..., Any],
    run: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    make: Callable[[Path], Path] | None,
    status: int,
    message: str,
) -> None:
    """Even where the settings may change, a finished run keeps every file."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    path = str(make(tmp_path) if make else "")
    given = words.format(path).replace("TOKENIZER", str(run.run_path / "tokenizer.model")).split()
    changed = [word.removeprefix("--").replace("-", "_") for word in given if word.startswith("--")]
    before = content(run.run_path)
    outcome = command("train.py", run, *given, "--allow-change", *changed)
    assert outcome.status == status
    assert message.format(path) in outcome.error
    assert content(run.run_path) == before
    if make is file_in_the_way:
        assert Path(path).read_text() == "mine"


def test_a_corpus_shorter_than_one_sequence(
    command: Callable[..., Any], tiny: TrainConfig, finished: Path, tmp_path: Path
) -> None:
    words = ("--data.paths", str(small_text(tmp_path)), "--tokenizer.path", str(finished / "tokenizer.model"))
    outcome = command("train.py", tiny, "--run-dir", str(tmp_path / "run"), *words)
    assert outcome.status == 2
    assert re.search(r"small\.txt: \d+ training tokens are fewer than one sequence of 64 and its last", outcome.error)


def test_undecodable_bytes_are_reported(
    command: Callable[..., Any], tiny: TrainConfig, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes("façade, naïve, café\n".encode("latin-1") * 100)
    words = ("--data.paths", str(tmp_path / "latin.txt"), "--tokenizer.path", str(finished / "tokenizer.model"))
    outcome = command("jaxgpt", "data", "prepare", tiny, *words)
    assert outcome.status == 0
    assert "replaced bytes that are not UTF-8 by U+FFFD in 1 documents; the first is latin.txt\n" in outcome.err


def test_a_damaged_shard_is_refused(command: Callable[..., Any], run: TrainConfig, tmp_path: Path) -> None:
    cache = ("--data.cache-dir", str(tmp_path / "cache"))
    (directory,) = command("jaxgpt", "data", "prepare", run, *cache).out.split()
    raw = bytearray(Path(directory, "train_00000.bin").read_bytes())
    raw[1000] ^= 1
    Path(directory, "train_00000.bin").write_bytes(raw)
    outcome = command("train.py", run, *cache)
    assert outcome.status == 65
    assert outcome.error.startswith(f"data {directory}/train_00000.bin: its SHA-256 is not the one in meta.json; ")


def test_a_damaged_newest_checkpoint_is_passed_over(
    command: Callable[..., Any], run: TrainConfig, finished: Path
) -> None:
    """Steps 17 to 20 are done again, with the same result."""
    damage(run.run_path, 20)
    outcome = command("train.py", run)
    assert outcome.status == 0 and "going on after step 16" in outcome.out
    line = next(line for line in outcome.err.splitlines() if "damaged" in line)
    assert line.startswith("jaxgpt: checkpoint step 20 is damaged: ") and "20.corrupt, using step 16" in line
    keys = ("step", "loss", "val_loss")
    ours, theirs = (
        [[json.loads(line).get(key) for key in keys] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run.run_path, finished)
    )
    assert ours == theirs


def test_training_does_not_start_again_where_all_checkpoints_are_damaged(
    command: Callable[..., Any], run: TrainConfig
) -> None:
    damage(run.run_path, 16, 20)
    before = content(run.run_path)
    outcome = command("train.py", run)
    assert outcome.status == 65
    assert outcome.error.startswith(f"no intact checkpoint in {run.run_path}/checkpoints: step 20: the manifest is unr")
    assert content(run.run_path) == before


def damage(run_dir: Path, *steps: int) -> None:
    for step in steps:
        os.truncate(run_dir / f"checkpoints/{step}/manifest/metadata", 100)


# Generation


def no_run(run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    run_dir.mkdir()


def no_checkpoint(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")


def all_damaged(run_dir: Path) -> None:
    damage(run_dir, 16, 20)


def no_tokenizer(run_dir: Path) -> None:
    (run_dir / "tokenizer.model").unlink()


def other_tokenizer(run_dir: Path) -> None:
    source = Path(sysconfig.get_path("stdlib"), "ast.py").read_text("utf-8")
    trained = train_tokenizer([source], TokenizerConfig(vocab_size=500))
    (run_dir / "tokenizer.model").write_bytes(trained.model_bytes)


def truncated_config(run_dir: Path) -> None:
    os.truncate(run_dir / "config.json", 100)


def binary_config(run_dir: Path) -> None:
    (run_dir / "config.json").write_bytes(b"\xff\xfe\x00")


def unknown_setting(run_dir: Path) -> None:
    edit_config(run_dir, '"n_layers"', '"n_layerz"')


def other_width(run_dir: Path) -> None:
    edit_config(run_dir, '"d_model": 32', '"d_model": 64')


def edit_config(run_dir: Path, old: str, new: str) -> None:
    text = (run_dir / "config.json").read_text()
    assert text.count(old) == 1
    (run_dir / "config.json").write_text(text.replace(old, new))


def nothing(run_dir: Path) -> None:
    pass


GENERATION_MISTAKES: list[tuple[Callable[[Path], None], str, int, str]] = [
    (no_run, "", 65, "checkpoint {}: there is no config.json; name a run directory of train.py"),
    (shutil.rmtree, "", 65, "checkpoint {}: there is no config.json; name a run directory of train.py"),
    (no_checkpoint, "", 65, "no checkpoint in {}/checkpoints; train first or choose one of steps []"),
    (nothing, "--step 7", 65, "no checkpoint of step 7 in {}/checkpoints; train first or choose one of steps [16, 20]"),
    (all_damaged, "", 65, "no intact checkpoint in {}/checkpoints: step 20: the manifest is unreadable"),
    (no_tokenizer, "", 65, "{}/tokenizer.model: there is no such file"),
    (other_tokenizer, "", 65, "tokenizer {}/tokenizer.model: it is not the one of the training; restore it"),
    (truncated_config, "", 65, "{}/config.json is not valid JSON: "),
    (binary_config, "", 65, "{}/config.json is not valid JSON: "),
    (unknown_setting, "", 2, "unknown key model.n_layerz; did you mean n_layers"),
    (other_width, "", 2, "checkpoint {}/checkpoints/20 does not fit this configuration: leaf "),
    (nothing, "--temperature nan", 2, "temperature is nan: it must be 0, or between 0.001 and 1000"),
    (nothing, "--top-k 501", 2, "top_k is 501: the vocabulary has 500 tokens"),
    (nothing, f"--prompt {'x' * 70}", 2, "the context of 64 has no room; shorten the prompt"),
    (nothing, "--mesh.tensor 4", 2, "model.n_heads 2 does not divide over mesh.tensor 4"),
    (nothing, "--mesh.data 9", 2, "mesh data 9 x fsdp 1 x tensor 1 does not fit 8 devices"),
]


@pytest.mark.parametrize(("change", "words", "status", "message"), GENERATION_MISTAKES, ids=name)
def test_a_mistake_in_generation_is_one_line(
    command: Callable[..., Any],
    run: TrainConfig,
    change: Callable[[Path], None],
    words: str,
    status: int,
    message: str,
) -> None:
    change(run.run_path)
    before = content(run.run_path) if change not in (no_run, shutil.rmtree, no_checkpoint) else None
    outcome = command("generate.py", "--checkpoint", str(run.run_path), *words.split())
    assert outcome.status == status
    assert message.format(run.run_path) in outcome.error
    assert outcome.out == ""
    if before:
        assert content(run.run_path) == before


def test_a_prompt_that_is_too_long_is_cut_and_that_is_said(command: Callable[..., Any], finished: Path) -> None:
    words = ("generate.py", "--checkpoint", str(finished), "--max-new-tokens", "5", "--prompt", "x" * 70)
    cut, whole = command(*words, "--truncate", "left"), command(*words, "--truncate", "no")
    assert cut.status == 0 and "the prompt leaves room for 0 tokens: truncated on the left" in cut.err
    assert whole.status == 2


def test_a_misspelt_allowed_change_is_named(command: Callable[..., Any], run: TrainConfig) -> None:
    refused = command("train.py", run, "--training.steps", "30", "--allow-change", "training.step")
    assert refused.status == 2
    assert "training.steps was 20 and is now 30; " in refused.error
    assert refused.error.endswith("or pass --allow-change training.steps")


def test_checkpoints_without_their_configuration_are_not_touched(command: Callable[..., Any], run: TrainConfig) -> None:
    (run.run_path / "config.json").unlink()
    before = content(run.run_path)
    refused = command("train.py", run)
    assert refused.status == 65 and "config.json: there is no such file" in refused.error
    assert content(run.run_path) == before


def test_generation_passes_a_damaged_checkpoint_over_and_leaves_it_there(
    command: Callable[..., Any], run: TrainConfig
) -> None:
    words = ("--checkpoint", str(run.run_path), "--prompt", "import ", "--max-new-tokens", "20")
    intact = command("generate.py", *words, "--step", "16")
    damage(run.run_path, 20)
    before = content(run.run_path)
    outcome = command("generate.py", *words)
    assert (outcome.status, outcome.out) == (0, intact.out)
    assert outcome.err.startswith("jaxgpt: checkpoint step 20 is damaged: ") and outcome.err.count("\n") == 1
    assert content(run.run_path) == before


def test_a_loaded_run_is_what_was_trained(finished: Path, mesh_of: Callable[..., Any]) -> None:
    """The averaged parameters, on any mesh; float32 whatever reads them."""
    with mesh_of():
        one = load_run(finished)
        with pytest.raises(ConfigError, match=r"dtype bfloat16: .* has its own; leave it out"):
            load_model(finished, dtype="bfloat16")
    with mesh_of(data=4, tensor=2):
        other = load_run(finished)
    assert one.config == read_config(finished).model and one.tokenizer.vocab_size == one.config.vocab_size == 500
    for a, b in zip(jax.tree.leaves(one.model), jax.tree.leaves(other.model), strict=True):
        assert a.dtype == np.float32 and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert {a.sharding.mesh.size for a in jax.tree.leaves(other.model)} == {8}
