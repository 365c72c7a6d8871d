"""Whole programs: a training step, prompts and texts of a model, and what a user would take instead."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tyro.conf import Positional

from jaxgpt.bench.report import Contender, Output, Row, measure
from jaxgpt.config import MeshConfig, ModelConfig, TrainConfig, TrainingConfig, load_preset
from jaxgpt.data.loader import Batch
from jaxgpt.generation.engine import Engine
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.interop.load import Dtype, load_model
from jaxgpt.roofline import forward_flops_per_token, measured_bandwidth, peak_flops
from jaxgpt.run import TrainedModel
from jaxgpt.sharding import check_divides, make_mesh, place
from jaxgpt.training.step import TrainState, init_state, make_train_step

_S = ModelConfig(n_layers=6, d_model=384, n_heads=6, context_length=256, vocab_size=512, scan_layers=False)
_M = ModelConfig(n_layers=4, d_model=768, n_heads=12, context_length=512, vocab_size=50304, scan_layers=False)
SIZES = {  # of the comparison with PyTorch; S four rows at a time, so that what a layer passes on stays in a cache
    "S": TrainConfig(name="S", model=_S, training=TrainingConfig(batch_size=16, accumulation_steps=4)),
    "M": TrainConfig(name="M", model=_M, training=TrainingConfig(batch_size=4)),
}


@dataclass(frozen=True, kw_only=True)
class Train(Output):
    """Time the training step: tokens a second, MFU, memory and time to compile."""

    # Presets. S: 6 layers of width 384, 16 x 256 tokens, 512 pieces. M: 4 of width 768, 4 x 512 tokens, 50304 pieces.
    configs: Positional[tuple[str, ...]] = ("S", "M")
    against: Literal["none", "torch"] = "none"  # Also time PyTorch, eager and compiled, in turn.

    def run(self) -> None:
        rows: list[Row] = []
        for name in self.configs:
            config = SIZES.get(name) or load_preset(name)
            if name in SIZES and jax.default_backend() != "cpu":  # there four rows are too little work
                config = dataclasses.replace(config, training=TrainingConfig(batch_size=config.training.batch_size))
            vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
            mesh = make_mesh(config.mesh)
            check_divides(mesh, config.model, config.training.batch_size // config.training.accumulation_steps)
            with jax.set_mesh(mesh):
                contenders = [training_step(config)]
                if self.against == "torch":
                    from jaxgpt.bench.peers import torch_training

                    contenders += torch_training(config)
                rows += measure(contenders, self.rounds, self.profile, warm=True)
        self.show("train", rows, {})


@dataclass(frozen=True, kw_only=True)
class Generate(Output):
    """Time generation: a long prompt, one text, eight at once, and 32 requests of mixed lengths."""

    model: Positional[Path]  # Run directory, directory of a Hugging Face model, or .gguf file.
    against: Literal["none", "transformers"] = "none"  # Also time transformers, in turn, in static batches.
    rounds: int = 3  # Times that each is measured, in turn with the others; the median counts.
    dtype: Dtype | None = None  # Arithmetic of a model that was not trained here. Default: float32.

    def run(self) -> None:
        with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices())), tempfile.TemporaryDirectory() as scratch:
            trained = load_model(self.model, dtype=self.dtype)
            contenders = list(generations(trained))
            if self.against == "transformers":
                from jaxgpt.bench.peers import transformers_generation

                contenders += transformers_generation(self.model, Path(scratch), trained.config)
                contenders.sort(key=lambda contender: contender.name)  # what is compared takes turns
            self.show("generate", measure(contenders, self.rounds, self.profile), {})


def random_batch(config: TrainConfig) -> Batch:
    """Rows of random tokens, one document each, on the host."""
    B, T = config.training.batch_size, config.model.context_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size or 0, (B, T + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((B, T), np.int32), positions)


def training_step(config: TrainConfig) -> Contender:
    """The compiled step."""
    batch = random_batch(config)
    state: TrainState = jax.jit(init_state, static_argnums=0)(config)
    placed, began = place(batch, "BT"), time.perf_counter()
    step = make_train_step(config).lower(state, placed).compile()
    figures: Row = {"compile_s": time.perf_counter() - began, "tokens": batch.tokens.size}
    memory: Any = step.memory_analysis()
    figures["memory_mib"] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20
    if peak := peak_flops(jax.sharding.get_mesh()):
        figures["mfu_s"] = 3 * forward_flops_per_token(config.model) * batch.tokens.size / peak

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, placed)
        return metrics

    return Contender(f"train {config.name}", "jaxgpt", call, figures)


def workloads(config: ModelConfig) -> dict[str, tuple[list[list[int]], list[int], int]]:
    """Prompts of random tokens, how many new tokens each gets, at most half the context each; and tokens in all."""
    half, rng = config.context_length // 2, np.random.default_rng(0)
    sizes, news = (rng.integers(min(16, half), min(most, half) + 1, 32).tolist() for most in (256, 128))
    long, *prompts = (rng.integers(0, config.vocab_size or 0, n).tolist() for n in (min(1024, half), *sizes))
    start, new = prompts[0][:16], min(128, half)
    return {
        f"prefill {len(long)} tokens": ([long], [1], len(long)),
        "decode 1 text": ([start], [new], new),
        "decode 8 texts": ([start] * 8, [new] * 8, 8 * new),
        "generate 32 requests": (prompts, news, sum(news)),
    }


def generations(trained: TrainedModel) -> Iterator[Contender]:
    """The workloads, greedy, up to 8 texts at a time."""
    config = trained.config
    pass_seconds = sum(leaf.nbytes for leaf in jax.tree.leaves(trained.model)) / measured_bandwidth()
    for name, (prompts, news, tokens) in workloads(config).items():
        figures: Row = {"tokens": tokens}
        if name.startswith("decode"):
            figures["mbu_s"] = news[0] * pass_seconds
        elif name.startswith("prefill") and (peak := peak_flops(jax.sharding.get_mesh())):
            figures["mfu_s"] = tokens * forward_flops_per_token(config, tokens) / peak
        yield Contender(name, "jaxgpt", functools.partial(_generate, trained, prompts, news), figures)


def _generate(trained: TrainedModel, prompts: list[list[int]], news: list[int]) -> list[list[int]]:
    settings = [SamplingParams(new, temperature=0, ignore_eos=True) for new in news]
    engine = Engine(trained.model, trained.tokenizer, slots=min(8, len(prompts)))  # has no keys of the prompts yet
    return [completion.token_ids for completion in engine.generate(prompts, settings)]
