"""Operations in every implementation that there is for the device: how exact, how fast, how far from the roofline.

Figures are of the forward pass, or of both passes for all gradients; bytes those of inputs and results, read or written
once; the roofline is what a matrix product, and a read of the memory, reached on this device."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxgpt.bench.operations import OPERATIONS, Function, Operation, Sizes, parse_sizes
from jaxgpt.bench.report import Contender, Output, Row, first_line, measure
from jaxgpt.errors import ConfigError
from jaxgpt.roofline import measured_bandwidth, measured_flops

_BEYOND_CACHES = 2**27  # bytes of inputs that take turns, so that they come from the memory
_REFUSALS = (ValueError, NotImplementedError, RuntimeError)  # by an implementation that has not all that is asked for
Name = Literal["attention", "decode", "loss", "norm", "rope", "mlp", "moe", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class Kernels(Output):
    """Time the operations of a transformer in every implementation, with their errors and the roofline."""

    op: tuple[Name, ...] = ()  # Operations. Default: all.
    # small, gpt2 or llama3, and changes, such as gpt2,B=8,T=512: B rows, T tokens, D width, H heads, G key/value heads,
    # K head width, F feed-forward width, V vocabulary, E experts, M experts of a token.
    shapes: str = "small"
    dtype: Literal["float32", "bfloat16"] = "float32"  # Of the inputs.
    # Devices that are not here, such as v5e:2x2 or h100:1: nothing is timed, but compiled for them.
    compile_for: tuple[str, ...] = ()

    def run(self) -> None:
        sizes, rows = parse_sizes(self.shapes), list[Row]()
        for target in self.compile_for or ("",):
            rows += measure(contenders(self.op or tuple(OPERATIONS), sizes, self.dtype, target), self.rounds)
        limits = {"GFLOP/s": measured_flops(self.dtype) / 1e9, "GB/s": measured_bandwidth() / 1e9}
        self.show("kernels", rows, {} if self.compile_for else limits)


def contenders(names: Sequence[str], sizes: Sizes, dtype: str, target: str = "") -> Iterator[Contender]:
    """Every implementation of the operations, ready to be timed, and what the oracle says. With a `target`, devices
    that are not here, such as v5e:2x2 or h100:1: whether each compiles for them."""
    device = absent_devices(target)[0] if target else jax.local_devices()[0]
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    for title, run in _passes(names, sizes, device.platform, dtype):
        title += f" for {target}" if target else ""
        shapes = jax.tree.map(lambda x: struct(x.shape, x.dtype), run.inputs)
        expected, turns = ([], iter(())) if target else (_expected(run), _turns(run.inputs))
        for implementation, function in run.implementations.items():
            try:
                if isinstance(function, str):
                    raise NotImplementedError(function)
                compiled = jax.jit(function).lower(*shapes).compile()
            except _REFUSALS as error:
                yield Contender(title, implementation, None, {"reason": first_line(error)})
                continue
            memory: Any = compiled.memory_analysis()
            figures: Row = {"memory_mib": memory.temp_size_in_bytes / 2**20}
            if target:
                yield Contender(title, implementation, None, figures | {"reason": "compiles"})
                continue
            moved = memory.argument_size_in_bytes + memory.output_size_in_bytes  # arguments that are needed
            shortest = max(run.flops / measured_flops(dtype), moved / measured_bandwidth())
            figures |= {"flops": run.flops, "bytes": moved, "intensity": run.flops / moved, "roofline_s": shortest}
            call = functools.partial(next, itertools.starmap(compiled, turns))
            yield Contender(title, implementation, call, figures, expected)


def absent_devices(target: str) -> Sequence[jax.Device]:
    """Devices to compile for, of a TPU topology such as v5e:2x2, or h100:N. Raises ConfigError where the compiler is
    not installed or does not know it."""
    kind, _, shape = target.partition(":")
    try:
        if kind == "h100":
            config = Path(__file__).with_name("h100.textproto").read_text("utf-8")
            return topologies.get_topology_desc("h100", "cuda", target_config=config, topology=f"1x1x{shape}").devices
        return topologies.get_topology_desc(target, "tpu").devices
    except _REFUSALS as error:
        remedy = f"pip install 'jaxgpt[{'cuda' if kind == 'h100' else 'tpu'}]', and name it as v5e:2x2 or h100:1"
        raise ConfigError(f"compile-for {target}: {first_line(error)}; {remedy}") from None


def _passes(names: Sequence[str], sizes: Sizes, platform: str, dtype: str) -> Iterator[tuple[str, Operation]]:
    for name in names:
        forward = OPERATIONS[name](sizes, platform)
        title = " ".join([name, *(f"{letter}{getattr(sizes, letter)}" for letter in forward.letters)])
        passes = {title: forward}
        if forward.differentiable:
            passes[f"{title} + gradients"] = _with_gradients(forward)
        for title, run in passes.items():
            yield title, run._replace(inputs=_cast(run.inputs, "float32" if name == "optimizer" else dtype))


def _with_gradients(forward: Operation) -> Operation:
    """Both passes: the gradients of the differentiable inputs, for the cotangent that the last input is."""

    def wrapped(function: Function) -> Function:
        def product(*inputs: Any) -> Any:
            *given, cotangent = inputs
            return (function(*given) * cotangent).sum()

        return jax.grad(product, argnums=forward.differentiable)

    out = jax.eval_shape(forward.oracle, *forward.inputs)
    cotangent = np.cos(np.arange(out.size, dtype=np.float32)).reshape(out.shape)
    inputs, oracle = (*forward.inputs, cotangent), wrapped(forward.oracle)
    implementations = {k: f if isinstance(f, str) else wrapped(f) for k, f in forward.implementations.items()}
    return Operation(forward.letters, inputs, (), 3 * forward.flops, oracle, implementations)


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else None), tree)


def _expected(run: Operation) -> list[np.ndarray]:
    """What the oracle says in float64, with the inputs as they were rounded for the others."""
    inputs = jax.tree.map(np.asarray, run.inputs)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(run.oracle)(*_cast(inputs, "float64")))]


def _turns(inputs: tuple) -> Iterator[tuple]:
    """Copies of the inputs for ever, of which no cache holds all."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(inputs))
    return itertools.cycle([jax.tree.map(jnp.copy, inputs) for _ in range(1 + min(_BEYOND_CACHES // size, 64))])
