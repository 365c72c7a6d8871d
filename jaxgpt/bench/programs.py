"""Whole programs: a training step, its compilation, prompts and texts of a model, and what a user would take instead.

Letters: B batch, T length."""

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.profiler import ProfileData

from jaxgpt.bench.report import Contender, Row
from jaxgpt.config import ModelConfig, TrainConfig, TrainingConfig
from jaxgpt.data.loader import Batch
from jaxgpt.generation.engine import Engine, for_decoding
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.roofline import forward_flops_per_token, measured_bandwidth, peak_flops
from jaxgpt.run import TrainedModel
from jaxgpt.sharding import place_batch
from jaxgpt.training.step import TrainState, init_state, make_train_step

_S = ModelConfig(n_layers=6, d_model=384, n_heads=6, context_length=256, vocab_size=512, scan_layers=False)
_M = ModelConfig(n_layers=4, d_model=768, n_heads=12, context_length=512, vocab_size=50304, scan_layers=False)
SIZES = {  # of the comparison with PyTorch
    "S": TrainConfig(name="S", model=_S, training=TrainingConfig(batch_size=16)),
    "M": TrainConfig(name="M", model=_M, training=TrainingConfig(batch_size=4)),
}


def random_batch(config: TrainConfig) -> Batch:
    """Rows of random tokens, one document each, on the host."""
    B, T = config.training.batch_size, config.model.context_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size or 0, (B, T + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((B, T), np.int32), positions)


def training_steps(config: TrainConfig, profile: Path | None = None) -> Iterator[Contender]:
    """The compiled step alone, and with what the loop does around it: placing a batch, reading the metrics before. With
    `profile`, first a trace of the step into that directory."""
    batch, mesh = random_batch(config), jax.sharding.get_mesh()
    state: TrainState = jax.jit(init_state, static_argnums=0)(config)
    placed, began = place_batch(batch), time.perf_counter()
    step = make_train_step(config).lower(state, placed).compile()
    figures: Row = {"compile_s": time.perf_counter() - began, "tokens": batch.tokens.size}
    if memory := step.memory_analysis():
        figures["memory_mib"] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20
    if peak := peak_flops(mesh):
        figures["mfu_of"] = peak / (3 * forward_flops_per_token(config.model))  # tokens a second
    metrics: Any = None

    def alone() -> Any:
        nonlocal state
        state, found = step(state, placed)
        return found

    def in_the_loop() -> Any:
        nonlocal state, metrics
        state, found = step(state, place_batch(batch))
        jax.device_get(metrics)
        metrics = found
        return found

    if profile:
        profiled(alone, step, profile)
    name = f"train {config.name}"
    yield Contender(name, "jaxgpt", alone, figures)
    yield Contender(name, "with the loop", in_the_loop, {"tokens": batch.tokens.size})


def compilations(config: TrainConfig) -> Iterator[Contender]:
    """Tracing and compiling the step for 4 and for 24 layers."""
    for layers in (4, 24):
        deep = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layers=layers, scan_layers=True))
        state = jax.eval_shape(lambda deep=deep: init_state(deep))
        batch = place_batch(random_batch(deep))
        call = lambda deep=deep, state=state, batch=batch: make_train_step(deep).lower(state, batch).compile()  # noqa: E731
        yield Contender(f"compile {config.name}", f"{layers} layers", call, {})


def request_mix() -> tuple[list[list[int]], list[int]]:
    """32 prompts of 16 to 256 random tokens, and 16 to 128 new tokens for each."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1000, 40_000, int(size)).tolist() for size in rng.integers(16, 257, 32)]
    return prompts, rng.integers(16, 129, 32).tolist()


def generations(trained: TrainedModel, what: str) -> Iterator[Contender]:
    """`decode`: 128 new tokens for one text, and for eight at once. `prefill`: one prompt of half the context, up to
    1024 tokens. `generate`: one text, then the mix of requests. Greedy, of random tokens."""
    vocabulary, config = trained.tokenizer.vocab_size, trained.model.config
    prompts, news = request_mix()
    prompts = [[token % vocabulary for token in prompt] for prompt in prompts]
    start, long = prompts[0][:16], [i % vocabulary for i in range(min(1024, config.context_length // 2))]
    if what == "prefill":
        peak = peak_flops(jax.sharding.get_mesh())
        figures: Row = {"tokens": len(long)} | ({"mfu_of": peak / forward_flops_per_token(config)} if peak else {})
        return (yield _generation(trained, f"prefill {len(long)} tokens", 1, [long], [1], figures))
    bytes_per_pass = sum(leaf.nbytes for leaf in jax.tree.leaves(for_decoding(trained.model)))
    figures = {"tokens": 128, "mbu_of": measured_bandwidth() / bytes_per_pass}
    yield _generation(trained, "decode 1 text", 1, [start], [128], figures)
    if what == "decode":
        figures = {"tokens": 8 * 128, "mbu_of": 8 * measured_bandwidth() / bytes_per_pass}
        yield _generation(trained, "decode 8 texts", 8, [start] * 8, [128] * 8, figures)
    else:
        yield _generation(trained, "generate 32 requests", 8, prompts, news, {"tokens": sum(news)})


def _generation(
    trained: TrainedModel, name: str, slots: int, prompts: list[list[int]], news: list[int], figures: Row
) -> Contender:
    model = for_decoding(trained.model)
    settings = [SamplingParams(new, temperature=0, ignore_eos=True) for new in news]

    def call() -> list[list[int]]:  # with an engine that has no keys of the prompts yet
        engine = Engine(model, trained.tokenizer, slots=slots)
        return [completion.token_ids for completion in engine.generate(prompts, settings)]

    return Contender(name, "jaxgpt", call, figures)


def with_speeds(rows: list[Row]) -> list[Row]:
    """Tokens a second, and their share of what the device could do."""
    for row in rows:
        if "ms" in row:
            row["tokens_per_second"] = row["tokens"] / row["ms"] * 1e3
            row |= {
                share: row["tokens_per_second"] / row[f"{share}_of"] for share in ("mfu", "mbu") if f"{share}_of" in row
            }
    return rows


def profiled(call: Callable[[], Any], compiled: jax.stages.Compiled, directory: Path) -> None:
    """Trace three calls of a compiled program into `directory`, and print what took most of the device's time (of all
    threads, on a CPU), by the names that the program's source gives."""
    with jax.profiler.trace(directory):
        for _ in range(3):
            jax.block_until_ready(call())
    text = compiled.as_text() or ""
    sources = dict(re.findall(r'%([\w.-]+) = .*? metadata={[^}]*op_name="(?:jit\(\w+\)/)?([^"]*)"', text))
    spent: Counter[str] = Counter()
    newest = max(directory.glob("plugins/profile/*/*.xplane.pb"))
    events = (e for plane in ProfileData.from_file(str(newest)).planes for line in plane.lines for e in line.events)
    for event in events:
        operation = str(dict(event.stats).get("hlo_op", ""))
        if operation and not operation.startswith(("while", "call", "conditional")):  # they hold others
            spent[sources.get(operation, operation)] += event.duration_ns
    print(f"traced into {directory}; of {spent.total() / 3e6:.1f} ms a call")
    for source, nanoseconds in spent.most_common(15):
        print(f"{nanoseconds / 3e6:>9.2f} ms {nanoseconds / spent.total():>4.0%}  {source}")
