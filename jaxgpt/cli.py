"""The command line: every verb is a few lines over the library.

A verb is a frozen dataclass: tyro reads its fields as options, and `run` does what its docstring says. What a verb
needs is imported when it runs: Grain, Orbax and TensorBoard take 2 s, which `--help` should not."""

import contextlib
import io
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.cells import cell_len, set_cell_size
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from jaxgpt.config import MeshConfig, TrainConfig, load_preset, to_json
from jaxgpt.errors import ConfigError, JaxgptError, nearest, note, require, run_command
from jaxgpt.files import cache_home
from jaxgpt.generation.sampling import SamplingParams


def parse(arguments: Sequence[str], kind: Any, program: str, **options: Any) -> Any:
    """`arguments` as an instance of a dataclass. Raises ConfigError in one line; `--help` prints and leaves."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(arguments), prog=program, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    text = said.getvalue()  # a frame, whose first part is the message, and names that are proposed
    lines = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    message = " ".join(itertools.takewhile(lambda line: not line.startswith("──"), lines)).rstrip(".")
    if "Unrecognized" in message and (near := re.findall(r"^│ {5}(--[\w.-]+)", text, re.MULTILINE)):
        message += f"; did you mean {' or '.join(near[:3])}?"
    raise ConfigError(f"{message}; `{program.split(' [')[0]} --help` lists the options")


def training_config(arguments: Sequence[str], program: str) -> TrainConfig:
    """The configuration of `[CONFIG] [--section.field VALUE ...]`; `--print-config` prints it and leaves."""
    words = [word for word in arguments if word != "--print-config"]
    has_preset = bool(words) and not words[0].startswith("-")
    preset = load_preset(words[0] if has_preset else "configs/tiny.py")
    description = (
        "CONFIG is a preset such as configs/tiny.py (the default), or the config.json of a run; the options below "
        "change it. --print-config prints the result as JSON and leaves; --debug keeps the traceback of errors."
    )
    config = parse(words[has_preset:], TrainConfig, f"{program} [CONFIG]", default=preset, description=description)
    if len(words) < len(arguments):
        print(to_json(config), end="")
        sys.exit(0)
    return config


def train(arguments: list[str], program: str) -> None:
    """Train a model: text to tokenizer to shards to checkpoints."""
    config = training_config(arguments, program)
    from jaxgpt.training.loop import train

    with kept_programs():
        train(config)


def prepare(arguments: list[str], program: str) -> None:
    """Make the tokenizer and the token shards of a training configuration, and say where they are."""
    config = training_config(arguments, program)
    from jaxgpt.data.prepare import prepare_corpora

    for corpus in prepare_corpora(config.data, config.tokenizer)[1]:
        print(corpus.directory)


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """Keep what is compiled meanwhile in `<cache>/jaxgpt/compiled`, or in JAX_COMPILATION_CACHE_DIR, and say how much.
    A program is code that runs when it is read, so the directory is its owner's alone."""
    import jax

    counts: Counter[str] = Counter()
    count = lambda event, **_: counts.update([event.rpartition("/")[2]])  # noqa: E731
    if not (directory := jax.config.values["jax_compilation_cache_dir"]):
        directory = cache_home() / "compiled"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)  # which fails for somebody else's
            jax.config.update("jax_compilation_cache_dir", str(directory))
        except OSError as error:
            note(f"compiled programs are not kept: {directory}: {error.strerror}")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.monitoring.register_event_listener(count)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_listener(count)
    if counts["cache_misses"] + counts["cache_hits"]:  # not beside an error, which is one line
        note(f"{counts['cache_misses']} programs compiled, {counts['cache_hits']} read from {directory}")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and how precisely a model runs."""

    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))  # Devices to spread the model over.
    dtype: Literal["float32", "bfloat16"] | None = None  # Arithmetic of other people's models. Default: float32.

    @contextlib.contextmanager
    def load(self, path: Path, step: int | None = None) -> Iterator[Any]:
        """The TrainedModel at `path`, on a mesh that is set meanwhile. Raises what `load_model` raises."""
        import jax

        from jaxgpt.interop.load import load_model
        from jaxgpt.sharding import make_mesh

        with jax.set_mesh(make_mesh(self.mesh, jax.devices())), kept_programs():
            yield load_model(path, step=step, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class Generate(Compute):
    """Continue a prompt, or answer each line of a file, with any model."""

    checkpoint: Path  # Run directory of train.py, directory of a Hugging Face model, or .gguf file.
    prompt: str = ""  # Text to continue.
    input: Path | None = None  # File of prompts, one a line, all of which are answered; see docs/batch.md.
    output: Path | None = None  # File for the answers, one JSON object a line. After a kill the same command goes on.
    format: Literal["jsonl", "text"] = "jsonl"  # What the lines of the input are: JSON, or the prompts themselves.
    shard: str = "0/1"  # I/N answers the I-th of N equal parts of the input; `cat` joins the outputs.
    slots: int = 8  # Lines that are answered at the same time. The answers are the same but for rounding.
    speculate: int = 0  # Tokens to guess at a time from what a text repeats: faster, same but for rounding (try 7).
    draft: Path | None = None  # A model that guesses instead: same tokenizer and vocabulary size, no shorter context.
    step: int | None = None  # Checkpoint of a run to use. Default: the newest intact one.
    sampling: OmitArgPrefixes[SamplingParams] = field(default_factory=SamplingParams)

    def run(self) -> None:
        if (self.input is None) != (self.output is None) or (self.input and self.prompt):
            raise ConfigError("generate: give --prompt, or --input with --output")
        for name, least, most in (("slots", 1, 4096), ("speculate", int(bool(self.draft)), 64)):  # an Engine comes late
            value = getattr(self, name)
            require(least <= value <= most, f"{name} is {value}: it must be between {least} and {most}")
        from jaxgpt.generation.engine import Engine
        from jaxgpt.interop.load import load_model

        if self.input and self.output:
            from jaxgpt.generation.batch import Job

            if not (shard := re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard)):
                raise ConfigError(f"shard {self.shard!r}: it must be I/N, such as 0/4")
            job = Job(self.input, self.output, self.sampling, self.format == "text", (int(shard[1]), int(shard[2])))
        with self.load(self.checkpoint, self.step) as trained:
            slots = self.slots if self.input else self.sampling.best_of or self.sampling.num_samples
            draft = load_model(self.draft, dtype=self.dtype) if self.draft else None
            same = draft is None or draft.tokenizer.token_bytes == trained.tokenizer.token_bytes
            require(same, f"draft {self.draft}: its tokenizer is another one; take a smaller model of the same family")
            engine = Engine(trained.model, trained.tokenizer, slots, self.speculate, draft and draft.model)
            if not self.input:
                return self._continue(engine)
            from jaxgpt.checkpoint import fingerprint
            from jaxgpt.interop.chat import encode_chat

            by = trained.config, trained.tokenizer.sha256, fingerprint(trained.model), self.speculate, slots, self.draft
            job.run(engine, lambda said: encode_chat(trained.tokenizer, said), " ".join(map(str, by)))

    def _continue(self, engine: Any) -> None:
        """Print the first sample as it comes, the others, which come at the same time, behind it."""
        room, pieces = engine.room(self.prompt), engine.stream(self.prompt, self.sampling)
        if engine.truncated:
            note(f"the prompt leaves room for {max(room, 0)} tokens: truncated on the {self.sampling.truncate}")
        elif room < self.sampling.max_new_tokens:
            note(f"{room} tokens of the context are left, so it ends there at the latest")
        written = [self.prompt] * self.sampling.num_samples
        print("--- sample 1\n" if len(written) > 1 else "", self.prompt, sep="", end="", flush=True)
        for sample, text in pieces:
            written[sample] += text
            if sample == 0:
                print(text, end="", flush=True)
        print()
        for sample, text in enumerate(written[1:], 2):
            print(f"--- sample {sample}\n{text}")


@dataclass(frozen=True)
class Tokenize:
    """Show how tokenizers cut a text: pieces, ids and bytes."""

    text: Positional[str]  # The text, or - for standard input.
    # A tokenizer's file, or a model of any kind. Several are shown one after the other.
    tokenizer: UseAppendAction[tuple[Path, ...]]

    def run(self) -> None:
        require(bool(self.tokenizer), "tokenize: there is no --tokenizer; name a tokenizer's file or a model")
        from jaxgpt.interop.vocabulary import open_tokenizer

        text = sys.stdin.buffer.read().decode(errors="surrogateescape") if self.text == "-" else self.text
        for path in self.tokenizer:
            known = open_tokenizer(path)
            rows = [(repr(known.pieces[i])[1:-1], str(i), known.token_bytes[i].hex(" ")) for i in known.encode(text)]
            width = max(cell_len(piece) for piece, *_ in [("piece", ""), *rows])
            for piece, token, raw_bytes in [("piece", "id", "bytes"), *rows]:
                print(f"{set_cell_size(piece, width)}  {token:<6}  {raw_bytes}")
            size = len(text.encode())
            print(f"{path}: {len(rows)} tokens, {size} bytes, {size / max(len(rows), 1):.2f} bytes per token")


@dataclass(frozen=True)
class Convert:
    """Write a model in another format, and prove that it is the same."""

    source: Positional[Path]  # Run directory, directory of a Hugging Face model, or .gguf file.
    target: Positional[Path]  # The directory that is written. It must not exist.
    to: Literal["jaxgpt", "hf"]  # A run directory, to train on, or a Hugging Face one, which llama.cpp converts.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Numbers of the target; bfloat16 only in hf.
    check: bool = False  # Run both on a prompt and report how far they are apart.

    def run(self) -> None:
        import jax

        from jaxgpt.interop.convert import compare, convert
        from jaxgpt.sharding import make_mesh

        with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices())):
            convert(self.source, self.target, self.to, self.dtype)
            print(f"wrote {self.target}")
            if self.check:
                d, kl, top1 = compare(self.source, self.target)
                print(f"max logit difference {d:.2g}, KL divergence {kl:.2g} nats, top-1 agreement {100 * top1:.1f} %")


@dataclass(frozen=True, kw_only=True)
class Verify(Compute):
    """Check that every path computes the same on this device: cached and full, batched and alone, no leaks."""

    model: Positional[Path]  # Run directory, directory of a Hugging Face model, or .gguf file.

    def run(self) -> None:
        import jax

        from jaxgpt.interop.verify import LENGTH, verify
        from jaxgpt.kernels.attention import chosen_form

        with self.load(self.model) as trained, jax.default_matmul_precision("highest"):  # a TPU's usual one is bfloat16
            checks = verify(trained.model)
            _, attention = chosen_form(trained.config, min(LENGTH, trained.config.context_length))
        print(f"{'check':<29}  worst difference  limit")
        for each in checks:
            print(f"{each.name:<29}  {each.difference:<16.1e}  {each.limit:.0e}  {'ok' if each.passed else 'FAILED'}")
        failed = sum(not check.passed for check in checks)
        summary = f"{self.model}, attention by {attention}, {trained.config.dtype} on {jax.devices()[0].device_kind}"
        if failed:
            raise JaxgptError(f"verify {summary}: {failed} of {len(checks)} checks failed; report this with the table")
        print(f"{summary}: all {len(checks)} checks hold")


@dataclass(frozen=True, kw_only=True)
class Chat(Compute):
    """Talk with a model in the terminal, or answer each line of standard input."""

    model: Positional[Path]  # Run directory, Hugging Face directory or .gguf file; it must have a chat template.
    system: str = ""  # What the model is told before the conversation. Default: what its template says.
    sampling: OmitArgPrefixes[SamplingParams] = field(default_factory=lambda: SamplingParams(512, temperature=0))

    def run(self) -> None:
        if (samples := self.sampling.best_of or self.sampling.num_samples) > 1:
            raise ConfigError(f"num_samples or best_of is {samples}: a conversation has one answer; leave it out")
        from jaxgpt.generation.engine import Engine
        from jaxgpt.interop.chat import chat

        with self.load(self.model) as trained:
            chat(Engine(trained.model, trained.tokenizer, slots=1), trained.tokenizer, self.sampling, self.system)


def bench(arguments: list[str], program: str) -> None:
    """Time kernels, train or generate; `jaxgpt bench kernels --help` and so on list the options."""
    from jaxgpt.bench.kernels import Kernels
    from jaxgpt.bench.programs import Generate, Train

    parse(arguments, Kernels | Train | Generate, program).run()


VERBS: dict[str, Any] = {  # a class of options, or a function of the words behind the verb and the program's name
    "train": train, "generate": Generate, "chat": Chat, "convert": Convert, "verify": Verify, "tokenize": Tokenize,
    "data prepare": prepare, "bench": bench,
}  # fmt: skip


def dispatch(arguments: list[str], program: str | None = None) -> None:
    """Run the verb that the first words name; messages call it `program`."""
    for name, verb in VERBS.items():
        words = name.split()
        if arguments[: len(words)] == words:
            given, program = arguments[len(words) :], program or f"jaxgpt {name}"
            return parse(given, verb, program).run() if isinstance(verb, type) else verb(given, program)
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigError(f"unknown verb {arguments[0]}{nearest(arguments[0], VERBS)}; there are {', '.join(VERBS)}")
    print("usage: jaxgpt VERB [OPTIONS]; `jaxgpt VERB --help` lists its options\n")
    for name, verb in VERBS.items():
        print(f"  {name:<14}{verb.__doc__}")


def main() -> None:
    run_command(dispatch)
