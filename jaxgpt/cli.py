"""The command line: every verb is a few lines over the library.

Options are the fields of frozen dataclasses, read by tyro. A mistake ends in one line and status 2. What a verb needs
is imported when it runs: Grain, Orbax and TensorBoard take 2 s, which `--help` should not.
"""

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import OmitArgPrefixes, Positional

from jaxgpt.config import MeshConfig, TrainConfig
from jaxgpt.errors import ConfigError, nearest, run_command
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.presets import load_preset, to_json
from jaxgpt.tokenizer import Tokenizer

Options = TypeVar("Options")


def parse(arguments: Sequence[str], kind: type[Options], program: str, **options: Any) -> Options:
    """`arguments` as an instance of a dataclass. Raises ConfigError in one line; `--help` prints and leaves."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(arguments), prog=program, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _out_of_the_box(said.getvalue())
        raise ConfigError(f"{message}; `{program.split(' [')[0]} --help` lists the options") from None


def _out_of_the_box(text: str) -> str:
    """The first part of the message that tyro frames, and the names that it proposes, in one line."""
    lines = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    message = " ".join(lines[: next((i for i, line in enumerate(lines) if line.startswith("──")), None)])
    near = re.findall(r"^│ {5}(--[\w.-]+)", text, re.MULTILINE)
    return message.rstrip(".") + (
        f"; did you mean {' or '.join(near[:3])}?" if "Unrecognized" in message and near else ""
    )


def parse_training(arguments: Sequence[str], program: str) -> tuple[TrainConfig, bool]:
    """The configuration of `[CONFIG] [--section.field VALUE ...]`, and whether `--print-config` is there."""
    words = [word for word in arguments if word != "--print-config"]
    has_preset = bool(words) and not words[0].startswith("-")
    preset = load_preset(words[0] if has_preset else "configs/tiny.py")
    description = (
        "CONFIG is a preset such as configs/tiny.py (the default), or the config.json of a run; the options below "
        "change it. --print-config prints the result as JSON and leaves; --debug keeps the traceback of errors."
    )
    config = parse(words[has_preset:], TrainConfig, f"{program} [CONFIG]", default=preset, description=description)
    return config, len(words) < len(arguments)


def train(arguments: list[str], program: str = "train.py") -> None:
    """Train a model: text to tokenizer to shards to checkpoints."""
    config, print_config = parse_training(arguments, program)
    if print_config:
        return print(to_json(config), end="")
    from jaxgpt.training.loop import train as run

    run(config)


@dataclass(frozen=True)
class GenerateOptions:
    """Generate text from a run directory."""

    checkpoint: str
    """Run directory of train.py."""
    prompt: str = ""
    """Text to continue."""
    step: int | None = None
    """Checkpoint to use. Default: the newest intact one."""
    sampling: OmitArgPrefixes[SamplingParams] = field(default_factory=SamplingParams)
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """Devices to spread the model over."""


def generate(arguments: list[str], program: str = "generate.py") -> None:
    """Continue a prompt with the model of a run."""
    options = parse(arguments, GenerateOptions, program)
    import jax

    from jaxgpt.generation.engine import Engine
    from jaxgpt.run import read_config
    from jaxgpt.sharding import check_divides, make_mesh

    run_dir, samples = Path(options.checkpoint), options.sampling.num_samples
    model = read_config(run_dir).model
    mesh = make_mesh(options.mesh, jax.devices()[: options.mesh.size])
    check_divides(mesh, model)
    with jax.set_mesh(mesh):
        engine = Engine.load(run_dir, options.step)
        if 0 < (room := engine.room(options.prompt)) < options.sampling.max_new_tokens:
            print(f"jaxgpt: {room} tokens of the context are left, so it ends there at the latest", file=sys.stderr)
        pieces = engine.stream(options.prompt, options.sampling)
        _print_samples(pieces, options.prompt, samples)


def _print_samples(pieces: Iterator[tuple[int, str]], prompt: str, samples: int) -> None:
    """The first sample as it comes, the others, which come at the same time, behind it."""
    later = [""] * samples
    if samples > 1:
        print("--- sample 1")
    for sample, text in itertools.chain([(0, prompt)], pieces):
        if sample == 0:
            print(text, end="", flush=True)
        later[sample] += text
    print()
    for sample, text in enumerate(later[1:], 2):
        print(f"--- sample {sample}\n{prompt}{text}")


@dataclass(frozen=True)
class TokenizeOptions:
    """Show how a tokenizer cuts a text: pieces, ids and bytes."""

    text: Positional[str]
    """The text, or - for standard input."""
    tokenizer: str
    """A SentencePiece .model file, or a run directory."""


def tokenize(arguments: list[str], program: str = "jaxgpt tokenize") -> None:
    """Show the pieces, ids and bytes of a text."""
    options = parse(arguments, TokenizeOptions, program)
    path = Path(options.tokenizer)
    tokenizer = Tokenizer.load(path / "tokenizer.model" if path.is_dir() else path)
    text = sys.stdin.buffer.read().decode(errors="surrogateescape") if options.text == "-" else options.text
    rows = tokenizer.rows(text)
    table = Table("piece", "id", "bytes", box=None, pad_edge=False)
    for piece, token, raw in rows:
        table.add_row(Text(repr(piece)[1:-1]), str(token), raw.hex(" "))
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    size = len(text.encode())
    print(f"{captured.get()}{len(rows)} tokens, {size} bytes, {size / max(len(rows), 1):.2f} bytes per token")


def prepare(arguments: list[str], program: str = "jaxgpt data prepare") -> None:
    """Make the tokenizer and the token shards of a training configuration, and say where they are."""
    config, print_config = parse_training(arguments, program)
    if print_config:
        return print(to_json(config), end="")
    from jaxgpt.data.prepare import prepare_corpora

    for corpus in prepare_corpora(config.data, config.tokenizer)[1]:
        print(corpus.directory)


VERBS: dict[str, Callable[[list[str], str], None]] = {
    "train": train,
    "generate": generate,
    "tokenize": tokenize,
    "data prepare": prepare,
}


def dispatch(arguments: list[str]) -> None:
    """Run the verb that the first words name."""
    for verb, run in VERBS.items():
        words = verb.split()
        if arguments[: len(words)] == words:
            return run(arguments[len(words) :], f"jaxgpt {verb}")
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigError(f"unknown verb {arguments[0]}{nearest(arguments[0], VERBS)}; there are {', '.join(VERBS)}")
    print("usage: jaxgpt VERB [OPTIONS]; `jaxgpt VERB --help` lists its options\n")
    for verb, run in VERBS.items():
        print(f"  {verb:<14}{run.__doc__}")


def main() -> None:
    """The command `jaxgpt`."""
    run_command(dispatch)
