"""The command line: every verb is a few lines over the library.

Options are the fields of frozen dataclasses, read by tyro. A mistake ends in one line and status 2. What a verb needs
is imported when it runs: Grain, Orbax and TensorBoard take 2 s, which `--help` should not."""

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from jaxgpt.config import MeshConfig, TrainConfig
from jaxgpt.errors import ConfigError, JaxgptError, nearest, run_command
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.presets import load_preset, to_json

if TYPE_CHECKING:
    from jaxgpt.run import TrainedModel

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


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and how precisely a model runs."""

    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """Devices to spread the model over."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Arithmetic of a model that was not trained here. Default: float32."""


@contextlib.contextmanager
def loaded(path: Path, compute: ComputeOptions, step: int | None = None) -> "Iterator[TrainedModel]":
    """The model at `path`, on a mesh that is set meanwhile. Raises what `load_model` raises."""
    import jax

    from jaxgpt.interop.load import load_model, model_config
    from jaxgpt.sharding import check_divides, make_mesh

    mesh = make_mesh(compute.mesh, jax.devices()[: compute.mesh.size])
    check_divides(mesh, model_config(path))
    with jax.set_mesh(mesh):
        yield load_model(path, step=step, dtype=compute.dtype)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ComputeOptions):
    """Generate text with any model: continue a prompt, or answer each line of a file."""

    checkpoint: str
    """Run directory of train.py, directory of a Hugging Face model, or .gguf file."""
    prompt: str = ""
    """Text to continue."""
    input: str | None = None
    """File of prompts, one a line, that are all answered; the options below are the defaults of each line."""
    output: str | None = None
    """File for the answers, one JSON object a line. The same command goes on after a kill."""
    format: Literal["jsonl", "text"] = "jsonl"
    """What the lines of the input are: JSON, or the prompts themselves."""
    shard: str = "0/1"
    """I/N answers only the I-th of N equal parts of the input; `cat` joins the outputs."""
    slots: int = 8
    """Lines that are answered at the same time. The answers do not depend on it from 8 on."""
    step: int | None = None
    """Checkpoint of a run to use. Default: the newest intact one."""
    sampling: OmitArgPrefixes[SamplingParams] = field(default_factory=SamplingParams)


def generate(arguments: list[str], program: str = "generate.py") -> None:
    """Continue a prompt, or answer every line of a file."""
    options = parse(arguments, GenerateOptions, program)
    if (options.input is None) != (options.output is None) or (options.input and options.prompt):
        raise ConfigError("generate: give --prompt, or --input with --output")
    from jaxgpt.generation.engine import Engine

    if options.input and options.output:
        return _generate_batch(options, Path(options.input), Path(options.output))
    samples = options.sampling.num_samples
    with loaded(Path(options.checkpoint), options, options.step) as trained:
        engine = Engine(trained.model, trained.tokenizer, slots=samples)
        if 0 < (room := engine.room(options.prompt)) < options.sampling.max_new_tokens:
            print(f"jaxgpt: {room} tokens of the context are left, so it ends there at the latest", file=sys.stderr)
        pieces = engine.stream(options.prompt, options.sampling)
        _print_samples(pieces, options.prompt, samples)


def _generate_batch(options: GenerateOptions, source: Path, target: Path) -> None:
    from jaxgpt.generation.batch import Job, run_job
    from jaxgpt.generation.engine import Engine
    from jaxgpt.interop.chat import encode_chat

    if not (shard := re.fullmatch(r"(\d{1,6})/(\d{1,6})", options.shard)):
        raise ConfigError(f"shard {options.shard!r}: it must be I/N, such as 0/4")
    of = int(shard[1]), int(shard[2])
    job = Job(source, target, options.sampling, is_text=options.format == "text", shard=of)
    with loaded(Path(options.checkpoint), options, options.step) as trained:
        tokenizer = trained.tokenizer
        model = f"{options.checkpoint} {options.step} {trained.config} {tokenizer.sha256}"
        engine = Engine(trained.model, tokenizer, slots=options.slots)
        run_job(job, engine, lambda messages: encode_chat(tokenizer, messages), model)


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


def print_table(table: Table) -> None:
    """Print a table, without the control sequences and colours that only some terminals show."""
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    print(captured.get(), end="")


@dataclass(frozen=True)
class TokenizeOptions:
    """Show how tokenizers cut a text: pieces, ids and bytes."""

    text: Positional[str]
    """The text, or - for standard input."""
    tokenizer: UseAppendAction[tuple[str, ...]]
    """A tokenizer's file, or a model of any kind. Several are shown side by side."""


def tokenize(arguments: list[str], program: str = "jaxgpt tokenize") -> None:
    """Show the pieces, ids and bytes of a text."""
    options = parse(arguments, TokenizeOptions, program)
    if not options.tokenizer:
        raise ConfigError("tokenize: there is no --tokenizer; name a tokenizer's file or a model")
    from jaxgpt.interop.vocabulary import open_tokenizer

    text = sys.stdin.buffer.read().decode(errors="surrogateescape") if options.text == "-" else options.text
    cuts = [open_tokenizer(Path(path)).rows(text) for path in options.tokenizer]
    heads = ["piece"] if len(cuts) == 1 else [chr(ord("A") + i) for i in range(len(cuts))]
    table = Table(*(head for name in heads for head in (name, "id")), "bytes", box=None, pad_edge=False)
    for spans in _side_by_side(cuts):
        cells: list[Text] = []
        for rows in spans:
            cells.append(Text("\n".join(repr(piece)[1:-1] for piece, _, _ in rows)))
            cells.append(Text("\n".join(str(token) for _, token, _ in rows)))
        raw = min((b"".join(raw for _, _, raw in rows) for rows in spans), key=len)  # without a dummy prefix
        table.add_row(*cells, raw.hex(" "))
    print_table(table)
    size = len(text.encode())
    for name, path, rows in zip(heads, options.tokenizer, cuts, strict=True):
        said = f"{len(rows)} tokens, {size} bytes, {size / max(len(rows), 1):.2f} bytes per token"
        print(said if len(cuts) == 1 else f"{name}: {said}, {len(rows) / max(size, 1):.2f} tokens per byte, {path}")


Rows = list[tuple[str, int, bytes]]


def _side_by_side(cuts: list[Rows]) -> list[list[Rows]]:
    """What each tokenizer makes of the text up to every place where all of them end a token.

    A place is the number of bytes behind it: what is before may be longer by a dummy prefix."""
    behind = [[*itertools.accumulate((len(raw) for _, _, raw in reversed(rows)), initial=0)] for rows in cuts]
    shared = set(behind[0]).intersection(*behind[1:])
    spans: dict[int, list[Rows]] = {place: [[] for _ in cuts] for place in sorted(shared, reverse=True)}
    for i, rows in enumerate(cuts):
        place = 0
        for row, end in zip(reversed(rows), behind[i], strict=False):
            place = end if end in shared else place
            spans[place][i].insert(0, row)
    return [span for span in spans.values() if any(span)]


def prepare(arguments: list[str], program: str = "jaxgpt data prepare") -> None:
    """Make the tokenizer and the token shards of a training configuration, and say where they are."""
    config, print_config = parse_training(arguments, program)
    if print_config:
        return print(to_json(config), end="")
    from jaxgpt.data.prepare import prepare_corpora

    for corpus in prepare_corpora(config.data, config.tokenizer)[1]:
        print(corpus.directory)


@dataclass(frozen=True)
class ConvertOptions:
    """Write a model in another format."""

    source: Positional[str]
    """Run directory, directory of a Hugging Face model, or .gguf file."""
    target: Positional[str]
    """What is written: a directory, or a file for gguf. It must not exist."""
    to: Literal["jaxgpt", "hf", "gguf"]
    """Format of the target."""
    dtype: Literal["float32", "bfloat16", "q8_0"] = "float32"
    """Numbers of the target's matrices; q8_0 (8 bits and a scale for each 32) only in gguf."""
    check: bool = False
    """Run both on a prompt and report how far they are apart."""


def convert(arguments: list[str], program: str = "jaxgpt convert") -> None:
    """Write a model in another format, and prove that it is the same."""
    options = parse(arguments, ConvertOptions, program)
    import jax

    from jaxgpt.interop.convert import compare
    from jaxgpt.interop.convert import convert as run
    from jaxgpt.sharding import make_mesh

    source, target = Path(options.source), Path(options.target)
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        run(source, target, options.to, options.dtype)
        print(f"wrote {target}")
        if options.check:
            print(compare(source, target))


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(ComputeOptions):
    """Check that every path computes the same on this device."""

    model: Positional[str]
    """Run directory, directory of a Hugging Face model, or .gguf file."""


def verify(arguments: list[str], program: str = "jaxgpt verify") -> None:
    """Check a model on this device: cached against full, batched against alone, no leaks."""
    options = parse(arguments, VerifyOptions, program)
    import jax

    from jaxgpt.interop.verify import verify as run

    with loaded(Path(options.model), options) as trained:
        checks = run(trained.model)
        device = jax.devices()[0].device_kind
    table = Table("check", "worst difference", "limit", "", box=None, pad_edge=False)
    for check in checks:
        table.add_row(check.name, f"{check.difference:.1e}", f"{check.limit:.0e}", "ok" if check.passed else "FAILED")
    print_table(table)
    failed = sum(not check.passed for check in checks)
    summary = f"{options.model}, attention xla, {trained.config.dtype} on {device}"
    if failed:
        raise JaxgptError(f"verify {summary}: {failed} of {len(checks)} checks failed; report this with the table")
    print(f"{summary}: all {len(checks)} checks hold")


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ComputeOptions):
    """Talk with a model in the terminal, or answer each line of standard input."""

    model: Positional[str]
    """Run directory, directory of a Hugging Face model, or .gguf file; it must have a chat template."""
    system: str = ""
    """What the model is told before the conversation. Default: what its template says."""
    sampling: OmitArgPrefixes[SamplingParams] = field(default_factory=lambda: SamplingParams(512, temperature=0))


def chat(arguments: list[str], program: str = "jaxgpt chat") -> None:
    """Talk with a model, in its own chat template."""
    options = parse(arguments, ChatOptions, program)
    if options.sampling.num_samples > 1:
        raise ConfigError(f"num_samples is {options.sampling.num_samples}: a conversation has one answer; leave it out")
    from jaxgpt.generation.engine import Engine
    from jaxgpt.interop.chat import chat as run

    with loaded(Path(options.model), options) as trained:
        run(Engine(trained.model, trained.tokenizer, slots=1), trained.tokenizer, options.sampling, options.system)


VERBS: dict[str, Callable[[list[str], str], None]] = {
    "train": train,
    "generate": generate,
    "chat": chat,
    "convert": convert,
    "verify": verify,
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
