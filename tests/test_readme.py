"""What README.md says is so: its commands run, its options exist, its tables and its tree are those of the code."""

import dataclasses
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxgpt import errors
from jaxgpt.config import TrainConfig, load_preset
from jaxgpt.model import Transformer, parameter_count
from jaxgpt.training.loop import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
INLINE = re.findall(r"`((?:python|jaxgpt) [^`]+)`", README)


def test_the_first_commands_are_the_two_that_set_everything_up() -> None:
    """CI runs them as they stand."""
    venv = "python3 -m venv .venv && .venv/bin/pip install -e"
    assert COMMANDS[:2] == [f"{venv} . && .venv/bin/python train.py", f"{venv} '.[test]' && .venv/bin/python -m pytest"]
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "readme_command '/python train.py'" in ci and "readme_command '-m pytest'" in ci


@pytest.fixture
def with_runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the command at the top of README has run, with a smaller model."""
    shutil.copytree(finished, tmp_path / "runs" / "tiny")
    (tmp_path / "prompts.jsonl").write_text('"import "\n{"prompt": "class ", "max_tokens": 4, "seed": 1}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("line", [*COMMANDS[2:], *(line for line in INLINE if "..." not in line)])
def test_commands_are_accepted(command: Callable[..., Any], with_runs: Path, line: str) -> None:
    """Those that train or prepare only print their configuration; the others run."""
    words = shlex.split(line)
    program = words[1:] if words[0] == "python" else words
    if program[0] == "train.py" or program[1] == "data":
        program += [] if {"--print-config", "--help"} & set(program) else ["--print-config"]
    outcome = command(*program)
    if "--input" in program:
        assert outcome.status == 0 and len((with_runs / "answers.jsonl").read_text().splitlines()) == 2
        return
    assert (outcome.status, outcome.err) == (0, "") or "tokens of the context" in outcome.err
    assert outcome.out


@pytest.mark.usefixtures("compiled_once")
def test_the_python_example_runs(with_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [text for kind, text in BLOCKS if kind == "python"]
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.usefixtures("one_device")
def test_the_ten_steps_of_how_a_model_works_run(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/learn.md checks itself that what it does by hand is what the code does; here with a smaller model."""
    model = dataclasses.replace(tiny.model, positions="rotary", dropout=0.0)
    training = dataclasses.replace(tiny.training, steps=4)
    train(dataclasses.replace(tiny, model=model, training=training, run_dir=str(tmp_path / "runs" / "tiny")))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "learn.md").read_text("utf-8")
    steps = re.findall(r"^## \d+\. .*?^```python\n(.*?)^```\n\n```text\n", page, re.MULTILINE | re.DOTALL)
    assert len(steps) == 10
    names: dict[str, Any] = {}
    with jax.set_mesh(jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])):
        for code in steps:
            exec(compile(code, "docs/learn.md", "exec"), names)
            assert capsys.readouterr().out


def rows(first_column: str) -> dict[str, list[str]]:
    """The rows of a table by their first column, which matches `first_column`."""
    lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in README.splitlines() if "|" in line]
    return {cells[0]: cells[1:] for cells in lines if re.fullmatch(first_column, cells[0])}


def test_the_table_of_presets_is_complete_and_right() -> None:
    table = rows(r"configs/\w+\.py")
    assert set(table) == {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    for name, (size, _) in table.items():
        config = load_preset(name)
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size)
        abstract = jax.eval_shape(lambda model=model: Transformer(model, jax.random.key(0)))
        number, unit = size.split()
        assert float(number) == pytest.approx(parameter_count(abstract) / {"M": 1e6, "B": 1e9}[unit], rel=0.01), name


def test_the_table_of_statuses_is_that_of_the_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.JaxgptError)]
    in_code = {"0", *(str(kind.exit_status) for kind in kinds)}
    assert list(rows(r"\d+")) == sorted(in_code, key=int) == ["0", "1", "2", "65", "70", "74", "75"]


def test_the_file_tree_is_that_of_the_repository() -> None:
    (tree,) = [text for kind, text in BLOCKS if kind == "text" and "sharding.py" in text]
    named = set(re.findall(r"[\w.]+\.py\b|\b\w+/", tree))
    places = [ROOT, *(ROOT / "jaxgpt").rglob("*/"), ROOT / "jaxgpt", ROOT / "tests"]
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
    files = {path.name for path in (ROOT / "jaxgpt").rglob("*.py") if path.name != "__init__.py"}
    in_kernels = {path.name for path in (ROOT / "jaxgpt" / "kernels").glob("*.py")}
    assert files - in_kernels <= named, "every file has its place in the tree"


def test_links_lead_somewhere() -> None:
    assert all((ROOT / target).exists() for target in re.findall(r"\]\(([\w./]+)\)", README))
