"""Promises about the files themselves: small enough to read, nothing private in them, no way to run hidden code."""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES, MAX_FILE_LINES, MAX_FUNCTION_LINES, P90_FUNCTION_LINES = 7_000, 400, 80, 40

# The tildes keep these lines from matching themselves.
HOSTS = """py~pi.org py~pi.python.org python~hosted.org npm~js.org npm~js.com download.pytorch~.org ana~conda.org
crates~.io proxy.golang~.org deb~.debian.org ghcr~.io docker~.io"""
REGISTRY_HOST = re.compile("|".join(rf"\b{re.escape(host)}\b" for host in HOSTS.replace("~", "").split()))
PERSONAL_PATH = re.compile(r"(?<![\w.~*])/(home|Users|root|work)/\w|\b[A-Z]:\\Users\b", re.ASCII)

CODE_FROM_DATA = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CODE_FROM_TEXT = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {"yaml.load", "yaml.unsafe_load", "torch.load", "os.system", "os.popen", "importlib.import_module"}
UNSAFE_ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code"}


def repository_files() -> list[Path]:
    """What git tracks or would add; without git, everything outside hidden and generated directories."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        return sorted(ROOT / name for name in names if name and (ROOT / name).is_file())
    except (OSError, subprocess.CalledProcessError):
        pass
    found = []
    for directory, folders, files in os.walk(ROOT):
        generated = {"__pycache__", "build", "dist", "runs", "venv"}
        folders[:] = [f for f in folders if f not in generated and not f.endswith(".egg-info")]
        folders[:] = [f for f in folders if not f.startswith(".") or f == ".ci"]
        found += [Path(directory, file) for file in files]
    return sorted(found)


FILES = repository_files()
SOURCES = [f for f in FILES if f.suffix == ".py" and "tests" not in f.relative_to(ROOT).parts]
TREES = {str(f.relative_to(ROOT)): ast.parse(f.read_text("utf-8")) for f in SOURCES}


def function_lengths() -> dict[str, int]:
    lengths = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lengths[f"{name}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    return lengths


def unsafe_uses(tree: ast.AST) -> list[str]:
    """Every place that could turn data into running code, as `line: what`."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [f"{node.lineno}: import {n.name}" for n in names if n.name.split(".")[0] in CODE_FROM_DATA]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in CODE_FROM_DATA:
                found.append(f"{node.lineno}: from {module}")
            case ast.Name(id=name) if name in CODE_FROM_TEXT:
                found.append(f"{node.lineno}: {name}")
            case ast.Attribute() if ast.unparse(node) in UNSAFE_CALLS or node.attr in CODE_FROM_DATA:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
            case ast.keyword(arg=str(name), value=value) if name in UNSAFE_ARGUMENTS:
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"{node.value.lineno}: {name}={ast.unparse(value)}")
    return found


def text_lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8").splitlines()
    except UnicodeDecodeError:  # recorded weights and the like
        return []


def test_names_no_registry_and_no_personal_path() -> None:
    assert any(file.name == "pyproject.toml" for file in FILES), "the listing is empty: nothing would be checked"
    assert REGISTRY_HOST.search("https://files.python" + "hosted.org/x") and not REGISTRY_HOST.search("mypy" + "pi.org")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match.group()}"
        for file in FILES
        for number, line in enumerate(text_lines(file), 1)
        if (match := REGISTRY_HOST.search(line) or PERSONAL_PATH.search(line))
    ]
    assert not found


@pytest.mark.parametrize(
    ("line", "personal"),
    [
        ("see " + "/home" + "/ada/runs", True),
        ('cache = "' + "/Users" + '/ada"', True),
        ("~/.cache/jaxgpt", False),
        ("https://example.org/home/page", False),
        ("runs/home/tiny", False),
    ],
)
def test_a_personal_path_is_an_absolute_one(line: str, personal: bool) -> None:
    assert bool(PERSONAL_PATH.search(line)) is personal


def test_code_fits_in_the_budget() -> None:
    lines = {str(file.relative_to(ROOT)): len(text_lines(file)) for file in SOURCES}
    total = sum(lines.values())
    assert total <= MAX_LINES, f"{total} lines of Python outside tests/: look for what has become unnecessary"
    too_long = {name: count for name, count in lines.items() if count > MAX_FILE_LINES}
    assert not too_long, f"files over {MAX_FILE_LINES} lines"


def test_functions_fit_a_screen() -> None:
    lengths = function_lengths()
    too_long = {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}
    assert not too_long, f"functions over {MAX_FUNCTION_LINES} lines"
    p90 = sorted(lengths.values())[len(lengths) * 9 // 10]
    assert p90 <= P90_FUNCTION_LINES, f"one function in ten has {p90} lines or more"


def test_nothing_runs_code_from_data() -> None:
    assert not [f"{name}:{use}" for name, tree in TREES.items() for use in unsafe_uses(tree)]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "import marshal as m",
        "eval(text)",
        "run = exec",
        "yaml.load(f)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "subprocess.run(line, shell=True)",
        "pandas.pickle.loads(b)",
    ],
)
def test_unsafe_uses_are_seen(code: str) -> None:
    assert unsafe_uses(ast.parse(code))


def test_safe_uses_are_not_reported() -> None:
    code = "import re\nre.compile(p)\njitted.compile()\nnp.load(f, allow_pickle=False)\nyaml.safe_load(f)"
    assert not unsafe_uses(ast.parse(code))


def test_constraints_cover_every_dependency_with_plain_versions() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["test"] + extras["parity"]
    pinned = {re.split("==", pin)[0].lower().replace("_", "-") for pin in pins}
    assert {re.split("[<>=]", name)[0].lower() for name in needed} <= pinned
