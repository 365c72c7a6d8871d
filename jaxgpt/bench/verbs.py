"""`jaxgpt bench`: what each of its verbs takes, measures and shows."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
from tyro.conf import Positional

from jaxgpt.bench.report import Output, Row, measure
from jaxgpt.config import MeshConfig, TrainConfig
from jaxgpt.presets import load_preset
from jaxgpt.sharding import check_divides, make_mesh

Dtype = Literal["float32", "bfloat16"]
Operation = Literal["attention", "decode", "loss", "norm", "rope", "mlp", "moe", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class Kernels(Output):
    """Time the operations of a transformer in every implementation, with their errors and the roofline."""

    op: tuple[Operation, ...] = Operation.__args__  # type: ignore[attr-defined]  # Operations. Default: all.
    # small, gpt2 or llama3, and changes, such as gpt2,B=8,T=512: B rows, T tokens, D width, H heads, G key/value heads,
    # K head width, F feed-forward width, V vocabulary, E experts, M experts of a token.
    shapes: str = "small"
    dtype: Dtype = "float32"  # Of the inputs.
    # Devices that are not here, such as v5e:2x2 or h100:1: nothing is timed, but compiled for them.
    compile_for: tuple[str, ...] = ()

    def run(self) -> None:
        from jaxgpt.bench.kernels import contenders, limits
        from jaxgpt.bench.operations import parse_sizes

        sizes, rows = parse_sizes(self.shapes), list[Row]()
        for target in self.compile_for or ("",):
            rows += measure(contenders(self.op, sizes, self.dtype, target), self.rounds)
        self.show("kernels", rows, {} if self.compile_for else limits(self.dtype))


@contextmanager
def _on_mesh(name: str) -> Iterator[TrainConfig]:
    """The configuration that is called S or M, or a preset with the vocabulary of its tokenizer, and its mesh set."""
    from jaxgpt.bench.programs import SIZES

    config = SIZES.get(name) or load_preset(name)
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size)
    config, mesh = dataclasses.replace(config, model=model), make_mesh(config.mesh)
    check_divides(mesh, model, config.training.batch_size // config.training.accumulation_steps)
    with jax.set_mesh(mesh):
        yield config


@dataclass(frozen=True, kw_only=True)
class Train(Output):
    """Time the training step: tokens a second, MFU, memory, time to compile, what the loop around it costs."""

    # Presets. S: 6 layers of width 384, 16 x 256 tokens, vocabulary 512. M: 4 layers of width 768, 4 x 512 tokens,
    # vocabulary 50304.
    configs: Positional[tuple[str, ...]] = ("S", "M")
    against: Literal["none", "torch"] = "none"  # Also time PyTorch, eager and compiled, in turn.
    profile: Path | None = None  # Directory for a trace of three steps; its longest operations are listed.

    def run(self) -> None:
        from jaxgpt.bench.programs import training_steps

        rows: list[Row] = []
        for name in self.configs:
            with _on_mesh(name) as config:
                contenders = list(training_steps(config, self.profile and self.profile / config.name))
                if self.against == "torch":
                    from jaxgpt.bench.peers import torch_training

                    contenders += torch_training(config)
                rows += measure(contenders, self.rounds)
        self.show("train", rows, {})


@dataclass(frozen=True, kw_only=True)
class Compile(Output):
    """Time the compilation of the training step, for 4 and for 24 layers."""

    config: Positional[str] = "S"  # Preset, S or M.
    rounds: int = 3  # Times that each is compiled; the median counts.

    def run(self) -> None:
        from jaxgpt.bench.programs import compilations

        with _on_mesh(self.config) as config:
            self.show("compile", measure(compilations(config), self.rounds), {})


@dataclass(frozen=True, kw_only=True)
class Generate(Output):
    """Time generation: a long prompt, one text, eight at once, and 32 requests of mixed lengths."""

    model: Positional[Path]  # Run directory, directory of a Hugging Face model, or .gguf file.
    against: Literal["none", "transformers"] = "none"  # Also time transformers, in turn, in static batches.
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))  # Devices to spread the model over.
    dtype: Dtype | None = None  # Arithmetic of a model that was not trained here. Default: float32.

    def run(self) -> None:
        from jaxgpt.bench.programs import generations
        from jaxgpt.interop.load import load_model

        mesh = make_mesh(self.mesh, jax.devices()[: self.mesh.size])
        with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as scratch:
            trained = load_model(self.model, dtype=self.dtype)
            contenders = list(generations(trained))
            if self.against == "transformers":
                from jaxgpt.bench.peers import transformers_generation

                contenders += transformers_generation(self.model, Path(scratch), trained.config)
                contenders.sort(key=lambda contender: contender.name)  # what is compared takes turns
            self.show("generate", measure(contenders, self.rounds), {})
