"""The command line: what it understands, what it says about what it does not, and what each verb prints."""

import ast
import dataclasses
import inspect
import io
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxgpt import cli
from jaxgpt.config import MeshConfig, TrainConfig, to_json, validated
from jaxgpt.data.shards import open_tokenized
from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.run import read_config
from jaxgpt.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[1]
ENTRY = [sys.executable, "-c", "from jaxgpt.cli import main; main()"]


def from_json(text: str) -> TrainConfig:
    config: TrainConfig = validated(TrainConfig, json.loads(text), "configuration")
    return config


# Configurations


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--training.stepz 3", "Unrecognized options: --training.stepz, 3; did you mean --training.steps or --trainin"),
        ("--model.n_layerz=3", "Unrecognized options: --model.n_layerz=3; did you mean --model.n-layers"),
        (
            "--training.steps",
            "Missing value for argument '--training.steps'. Expected 1 values; `train.py --help` list",
        ),
        ("--training.steps x", "Error parsing --training.steps: invalid literal for int() with base 10: 'x'; `train"),
        ("--training.steps 2.5", "Error parsing --training.steps: invalid literal for int() with base 10: '2.5'; "),
        ("--optimizer.peak-lr fast", "Error parsing --optimizer.peak-lr: could not convert string to float: 'fast'; "),
        ("--optimizer.peak-lr nan", "optimizer.peak_lr is nan: it must be finite"),
        (
            "--model.norm batch",
            "invalid choice 'batch' for argument '--model.norm'. Expected one of ('layernorm', 'rms",
        ),
        ("--training.wandb maybe", "Unrecognized options: maybe; `train.py --help` lists the options"),
        ("--training.steps 3 more", "Unrecognized options: more; `train.py --help` lists the options"),
        ("--training.steps -3", "training.steps is -3: it must be "),
        ("--data.weights 1 2", "data.weights has 2 numbers for 1 data.paths: give one for each path"),
        ("configs/tyni.py", "configuration configs/tyni.py: there is no such file; did you mean configs/tiny.py"),
        ("nothing", "configuration nothing: there is no such file; there are configs/"),
        ("pyproject.toml", "configuration pyproject.toml: it must be a .py preset or a .json file"),
        ("train.py", "configuration train.py: it must define a function config() that returns a TrainConfig"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(command: Callable[..., Any], words: str, message: str) -> None:
    outcome = command("train.py", *words.split())
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.error.startswith(message)


def test_a_narrow_terminal_changes_no_message(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    outcome = command("train.py", "--training.accumulation-stepz", "3")
    assert outcome.error.startswith("Unrecognized options: --training.accumulation-stepz, 3; did you mean --training.a")


def test_the_printed_configuration_is_the_one_that_would_run(command: Callable[..., Any], tmp_path: Path) -> None:
    words = (
        "--training.steps 7 --model.windows 16 0 --model.gated-mlp --data.paths a b --optimizer.name lion "
        "--model.n-kv-heads 2 --model.no-attention-bias --tokenizer.special-tokens"
    )
    printed = command("train.py", "configs/tiny.py", *words.split(), "--print-config")
    assert printed.status == 0
    config, preset = from_json(printed.out), cli.load_preset("configs/tiny.py")
    expected = dataclasses.replace(
        preset,
        model=dataclasses.replace(
            preset.model, windows=(16, 0), gated_mlp=True, n_kv_heads=2, attention_bias=False
        ),
        tokenizer=dataclasses.replace(preset.tokenizer, special_tokens=()),
        data=dataclasses.replace(preset.data, paths=("a", "b")),
        optimizer=dataclasses.replace(preset.optimizer, name="lion"),
        training=dataclasses.replace(preset.training, steps=7),
    )  # fmt: skip
    assert config == expected
    (tmp_path / "printed.json").write_text(printed.out)
    for verb in (["train"], ["data", "prepare"]):
        assert command("jaxgpt", *verb, str(tmp_path / "printed.json"), "--print-config").out == printed.out
    assert command("train.py", "--print-config").out == to_json(preset), "tiny is the default"


def test_the_configuration_of_a_run_is_a_preset(command: Callable[..., Any], finished: Path) -> None:
    outcome = command("train.py", str(finished / "config.json"), "--training.steps", "21", "--print-config")
    stored = read_config(finished)
    assert from_json(outcome.out) == dataclasses.replace(
        stored, training=dataclasses.replace(stored.training, steps=21)
    )


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_preset_can_be_changed_and_printed(command: Callable[..., Any], preset: Path) -> None:
    outcome = command("train.py", f"configs/{preset.name}", "--training.seed", "3", "--print-config")
    assert outcome.status == 0
    assert from_json(outcome.out).training.seed == 3 and from_json(outcome.out).name == preset.stem


def test_a_preset_beside_train_py_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.load_preset("configs/tiny.py").name == "tiny"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.py").write_text("from jaxgpt.config import *\ndef config(): return TrainConfig('mine')")
    assert cli.load_preset("configs/tiny.py").name == "mine"


def test_a_bad_json_configuration_is_refused(tmp_path: Path) -> None:
    for content, kind, message in (
        (b"{", BadFileError, "is not valid JSON"),
        (b"\xff", BadFileError, "is not valid JSON"),
        (b'{"training": {"stepz": 1}}', ConfigError, r"unknown key training\.stepz; did you mean steps"),
        (b'{"training": {"steps": "many"}}', ConfigError, r"bad\.json: training\.steps: "),
    ):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(kind, match=message):
            cli.load_preset(str(tmp_path / "bad.json"))


# Help


def explanations(kind: type, prefix: str = "") -> dict[str, str]:
    """Option -> what the source says below, behind or above the field, for a dataclass and those in it."""
    source = textwrap.dedent(inspect.getsource(kind))
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for field_node, below in itertools.pairwise([*body.body, None]):
        match field_node, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=text):
                texts[prefix + name] = ast.literal_eval(text)
            case ast.AnnAssign(target=ast.Name(id=name)), _:
                if text_beside := comment(source.splitlines(), field_node.lineno - 1):
                    texts[prefix + name] = text_beside
    for field in dataclasses.fields(kind):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            texts |= explanations(field.type, f"{prefix}{field.name}.")
    return texts


def comment(lines: list[str], place: int) -> str:
    """The comment behind the field in line `place`, or else above it."""
    if behind := lines[place].partition("  # ")[2]:
        return behind
    above = itertools.takewhile(lambda line: line.startswith("    # "), reversed(lines[:place]))
    return " ".join(line.strip(" #") for line in reversed([*above]))


TRAINING, MESH = explanations(TrainConfig), explanations(MeshConfig, "mesh.")


@pytest.mark.parametrize(
    ("program", "words", "texts"),
    [
        ("train.py", [], TRAINING),
        ("jaxgpt", ["train"], TRAINING),
        ("jaxgpt", ["data", "prepare"], TRAINING),
        ("generate.py", [], explanations(cli.Generate) | explanations(SamplingParams) | MESH),
        ("jaxgpt", ["tokenize"], explanations(cli.Tokenize)),
    ],
)
def test_help_explains_every_option(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, program: str, words: list[str], texts: dict[str, str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    outcome = command(program, *words, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    said = re.sub(r"[\s│]", "", outcome.out)
    assert len(texts) > (1 if words == ["tokenize"] else 5)
    for option, text in texts.items():
        if option != "text":  # has no name on the command line
            assert f"--{option.replace('_', '-')}" in said
        assert re.sub(r"\s", "", text) in said, f"{option} is not explained"
    assert "usage:" + "".join([program, *words]) in said
    if texts is TRAINING:
        assert "--print-configprintstheresultasJSON" in said and "--debugkeepsthetraceback" in said


def test_the_explanations_are_those_of_every_field() -> None:
    """So that the test above misses none."""
    wanted = {"training.steps", "model.n_layers", "mesh.tensor", "run_dir", "allow_change", "checkpoint.every"}
    assert wanted <= set(TRAINING)
    names = [
        (section.name, field.name)
        for section in dataclasses.fields(TrainConfig)
        if isinstance(section.type, type) and dataclasses.is_dataclass(section.type)
        for field in dataclasses.fields(section.type)
    ]
    assert {f"{section}.{field}" for section, field in names} <= set(TRAINING)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_verbs_are_listed(command: Callable[..., Any], words: list[str]) -> None:
    outcome = command("jaxgpt", *words)
    assert (outcome.status, outcome.err) == (0, "")
    for verb in ("train", "generate", "tokenize", "data prepare"):
        assert re.search(rf"^  {verb} +[A-Z].*\.$", outcome.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "unknown verb trian; did you mean train?; there are train, generate, chat, convert, "),
        ("data", "unknown verb data; there are "),
        ("--steps 3", "unknown verb --steps"),
    ],
)
def test_an_unknown_verb_names_its_neighbour(command: Callable[..., Any], words: str, message: str) -> None:
    outcome = command("jaxgpt", *words.split())
    assert outcome.status == 2 and outcome.error.startswith(message)


# Tokenize and data prepare


def rows(text: str) -> list[tuple[str, int, bytes]]:
    """The printed table without its head and its last line."""
    cells = [re.fullmatch(r"(\S+) +(\d+) +([0-9a-f ]+?) *", line) for line in text.splitlines()[1:-1]]
    assert all(cells), text
    return [(cell[1], int(cell[2]), bytes.fromhex(cell[3])) for cell in cells if cell]


def test_tokenize_shows_pieces_ids_and_bytes(command: Callable[..., Any], finished: Path) -> None:
    text, tokenizer = "def f(x):\n\treturn 'naïve' <|user|></s>", load_tokenizer(finished / "tokenizer.model")
    outcome = command("jaxgpt", "tokenize", text, "--tokenizer", str(finished))
    assert (outcome.status, outcome.err) == (0, "")
    shown = rows(outcome.out)
    assert b"".join(raw for _, _, raw in shown) == text.encode()
    assert [token for _, token, _ in shown] == tokenizer.encode(text)
    assert [piece.encode() for piece, _, _ in shown] == [repr(tokenizer.pieces[t])[1:-1].encode() for _, t, _ in shown]
    assert not {token for _, token, _ in shown} & set(tokenizer.special_tokens.values()), "a special token was forged"
    size = len(text.encode())
    said = f"{len(shown)} tokens, {size} bytes, {size / len(shown):.2f} bytes per token\n"
    assert outcome.out.endswith(f"\n{finished}: {said}")
    by_file = command("jaxgpt", "tokenize", text, "--tokenizer", str(finished / "tokenizer.model"))
    assert by_file.out == outcome.out.replace(f"{finished}: ", f"{finished}/tokenizer.model: ")


def test_tokenize_reads_standard_input_as_it_is(
    command: Callable[..., Any], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for raw, status in ((b"a\r\nb\n", 0), (b"", 0), (b"ab\xff", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        outcome = command("jaxgpt", "tokenize", "-", "--tokenizer", str(finished))
        assert outcome.status == status
        if status:
            assert outcome.error.startswith(r"text at character 2: '\udcff' is a lone surrogate")
        else:
            assert b"".join(data for _, _, data in rows(outcome.out)) == raw


def test_tokenize_names_a_bad_tokenizer(command: Callable[..., Any], tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "there is no such file"), (tmp_path, "there is no such file")):
        outcome = command("jaxgpt", "tokenize", "x", "--tokenizer", str(path))
        assert outcome.status == 65 and message in outcome.error
    assert command("jaxgpt", "tokenize", "--tokenizer", "x").error.startswith("Missing from jaxgpt tokenize: STR The t")


def test_data_prepare_prints_where_and_reuses_it(
    command: Callable[..., Any], tiny: TrainConfig, text_dir: Path, tmp_path: Path
) -> None:
    words = ("data", "prepare", tiny, "--data.cache-dir", str(tmp_path / "cache"))
    first, second = command("jaxgpt", *words), command("jaxgpt", *words)
    assert first.status == second.status == 0
    assert first.out == second.out and first.out.count("\n") == 1
    directory = Path(first.out.strip())
    assert directory.parent == tmp_path / "cache/data"
    corpus = open_tokenized(directory, load_tokenizer(directory / "tokenizer.model"))
    assert len(corpus.train) > 100_000 and corpus.vocab_size == 500
    assert "jaxgpt: tokenizer: training bpe with 500 pieces\n" in first.err and "reusing" not in first.err
    assert second.err == f"jaxgpt: data {text_dir}: reusing {directory}\n"
    again = command("jaxgpt", "data", "prepare", tiny, "--data.paths", str(directory))
    assert Path(again.out.strip()) == directory, "a prepared directory is data too"


# Generate


@pytest.mark.slow
def test_generate_continues_a_prompt(command: Callable[..., Any], finished: Path) -> None:
    words = ("--checkpoint", str(finished), "--prompt", "import os\n", "--max-new-tokens", "12")
    one = command("generate.py", *words, "--seed", "3")
    assert (one.status, one.err) == (0, "")
    assert one.out.startswith("import os\n") and len(one.out) > len("import os\n") + 5
    assert command("jaxgpt", "generate", *words, "--seed", "3") == one
    assert command("generate.py", *words, "--seed", "4").out != one.out
    three = command("generate.py", *words, "--seed", "3", "--num-samples", "3")
    parts = re.split(r"--- sample (\d)\n", three.out)
    assert parts[0] == "" and parts[1::2] == ["1", "2", "3"]
    assert parts[2] == one.out, "the first sample does not depend on how many there are"
    assert len(set(parts[2::2])) == 3 and all(part.startswith("import os\n") for part in parts[2::2])
    without_prompt = command("generate.py", *words[:2], "--num-samples", "2", "--max-new-tokens", "12").out
    assert re.findall(r"--- sample \d\n", without_prompt) == ["--- sample 1\n", "--- sample 2\n"]


@pytest.mark.slow
def test_generate_takes_a_mesh(command: Callable[..., Any], finished: Path) -> None:
    words = ("--checkpoint", str(finished), "--prompt", "import ", "--max-new-tokens", "8", "--temperature", "0")
    one = command("generate.py", *words)
    assert command("generate.py", *words, "--mesh.tensor", "2").out == one.out


def test_generate_takes_a_draft(command: Callable[..., Any], finished: Path, tmp_path: Path) -> None:
    words = ("--checkpoint", str(finished), "--prompt", "import ", "--max-new-tokens", "12", "--seed", "3")
    alone = command("generate.py", *words)
    drafted = command("generate.py", *words, "--draft", str(finished), "--speculate", "3")
    assert (drafted.status, drafted.out) == (0, alone.out), drafted.err
    assert command("jaxgpt", "convert", str(finished), str(tmp_path / "hf"), "--to", "hf").status == 0
    path = tmp_path / "hf" / "tokenizer.json"
    other = json.loads(path.read_text())
    ids = other["model"]["vocab"]
    one, two = [piece for piece in ids if len(piece) == 1][:2]
    ids[one], ids[two] = ids[two], ids[one]
    path.write_text(json.dumps(other))
    outcome = command("generate.py", *words, "--draft", str(tmp_path / "hf"), "--speculate", "3")
    assert outcome.status == 2 and "hf: its tokenizer is another one; take a smaller model" in outcome.error


@pytest.mark.parametrize("words", ["--slots 0", "--slots 4097", "--speculate 65", "--speculate 0 --draft nowhere"])
def test_generate_refuses_before_a_model_is_read(command: Callable[..., Any], words: str) -> None:
    outcome = command("generate.py", "--checkpoint", "nowhere", "--prompt", "x", *words.split())
    assert outcome.status == 2 and outcome.error.startswith("{} is {}: it must be between".format(*words[2:].split()))


def plain_environment() -> dict[str, str]:
    """With a buffered standard output, as users have it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.slow
def test_the_second_run_compiles_nothing(finished: Path, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    words = ["generate.py", "--checkpoint", str(finished), "--prompt", "x", "--max-new-tokens", "9"]
    own = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    first, again = (run_cli(words, env=own) for _ in range(2))
    assert re.fullmatch(r"jaxgpt: [1-9]\d* programs compiled, 0 read from .*\n", first.stderr)
    assert re.fullmatch(r"jaxgpt: 0 programs compiled, [1-9]\d* read from .*\n", again.stderr)
    assert first.stdout == again.stdout
    assert (tmp_path / "jaxgpt/compiled").stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_done_without(
    finished: Path, run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    words = ["generate.py", "--checkpoint", str(finished), "--prompt", "x", "--max-new-tokens", "3"]
    done = run_cli(words, env={"XDG_CACHE_HOME": str(tmp_path / "file"), "JAX_COMPILATION_CACHE_DIR": ""})
    assert done.returncode == 0 and done.stdout.startswith("x")
    assert re.fullmatch(r"jaxgpt: compiled programs are not kept: .*: Not a directory\n", done.stderr)


@pytest.mark.slow
def test_generate_streams_into_a_pipe_that_closes(finished: Path) -> None:
    """The prompt comes before anything is generated, and a reader that leaves then (`| head`) ends it quietly."""
    words = ["--checkpoint", str(finished), "--prompt", "def ", "--num-samples", "2", "--max-new-tokens", "40"]
    command = [*ENTRY, "generate", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=plain_environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(17) == b"--- sample 1\ndef "
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    "words",
    [["tokenize", "abc", "--tokenizer", "RUN"], ["train", "--print-config"], ["train", "--help"], []],
    ids=["tokenize", "print-config", "help", "verbs"],
)
def test_a_reader_that_has_gone_is_no_error(finished: Path, words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*ENTRY, *(str(finished) if word == "RUN" else word for word in words)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=plain_environment(), timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_the_scripts_say_the_same(run_cli: Callable[..., Any], finished: Path) -> None:
    """train.py and generate.py as a user starts them, without a GPU, a home directory or a terminal."""
    printed = run_cli(["train.py", "configs/tiny.py", "--print-config"])
    assert json.loads(printed.stdout)["name"] == "tiny" and printed.stderr == ""
    wrong = run_cli(["generate.py", "--checkpoint", str(finished), "--temperature", "-1"])
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "jaxgpt: error: temperature is -1.0: it must be 0, or between 0.001 and 1000\n"
