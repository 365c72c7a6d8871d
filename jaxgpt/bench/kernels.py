"""Operations in every implementation that there is for the device: how exact, how fast, how far from the roofline.

Figures are those of the forward pass, or of forward and backward together, for the gradients of all differentiable
inputs. The error is the largest one over the largest entry of the oracle's result, in float64 on the CPU. Bytes are
those of inputs and results, read or written once. The roofline is what a matrix product, and a read of the memory,
reached on this device."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxgpt.bench.operations import OPERATIONS, Function, Sizes
from jaxgpt.bench.report import Contender, Row, first_line
from jaxgpt.errors import ConfigError
from jaxgpt.roofline import measured_bandwidth, measured_flops

_BEYOND_CACHES = 2**27  # bytes of inputs that take turns, so that they come from the memory
_REFUSALS = (ValueError, NotImplementedError, RuntimeError)  # by an implementation that has not all that is asked for


def _cast(tree: Any, dtype: str) -> Any:
    def cast(x: Any) -> Any:
        return jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else None)

    return jax.tree.map(cast, tree)


def _bytes(*trees: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))


def _with_gradients(function: Function, differentiable: tuple[int, ...]) -> Function:
    """The gradients of the inputs that are differentiable, for the cotangent that the last input is."""

    def gradients(*inputs: Any) -> Any:
        *given, cotangent = inputs

        def varied(*some: Any) -> Any:
            places = dict(zip(differentiable, some, strict=True))
            return function(*(places.get(i, x) for i, x in enumerate(given)))

        out, pull = jax.vjp(varied, *(given[i] for i in differentiable))
        return pull(cotangent.astype(out.dtype))

    return gradients


def _expected(function: Function, inputs: tuple) -> list[np.ndarray]:
    """What the oracle says, with the inputs as they were rounded for the others."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = _cast(jax.tree.map(np.asarray, _cast(inputs, "float32")), "float64")
        return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(function)(*wide))]


def _error(found: Any, expected: list[np.ndarray]) -> float:
    pairs = zip(jax.tree.leaves(found), expected, strict=True)
    return max(float(np.abs(np.asarray(a, np.float64) - b).max() / max(np.abs(b).max(), 1e-300)) for a, b in pairs)


def contenders(names: Sequence[str], sizes: Sizes, dtype: str) -> Iterator[Contender]:
    """Every implementation of the operations, compiled and compared with the oracle, ready to be timed."""
    for run in _passes(names, sizes, jax.default_backend(), dtype):
        inputs = jax.device_put(run.inputs)
        expected = _expected(run.oracle, inputs)
        for implementation, function in run.implementations.items():
            try:
                compiled = jax.jit(_available(function)).lower(*inputs).compile()
                found = jax.block_until_ready(compiled(*inputs))
            except _REFUSALS as error:
                yield Contender(run.title, implementation, None, {"reason": first_line(error)})
                continue
            figures: Row = {"error": _error(found, expected), "memory_mib": _temporaries(compiled)}
            memory = compiled.memory_analysis()  # whose arguments are those that are needed
            moved = memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else _bytes(inputs, found)
            figures |= {"flops": run.flops, "bytes": moved}
            copies = [jax.tree.map(jnp.copy, inputs) for _ in range(min(_BEYOND_CACHES // _bytes(inputs), 64))]
            turns = itertools.cycle([inputs, *copies])
            yield Contender(run.title, implementation, functools.partial(_call, compiled, turns), figures)


def _call(compiled: jax.stages.Compiled, turns: Iterator[tuple]) -> Any:
    return compiled(*next(turns))


def with_roofline(rows: list[Row], limits: Row) -> list[Row]:
    """Speeds, arithmetic intensity, and the share of what the device could do at that intensity."""
    for row in rows:
        if "ms" in row:
            seconds, flops, moved = row["ms"] / 1e3, row["flops"], row["bytes"]
            row["gflops"], row["gbytes"], row["intensity"] = flops / seconds / 1e9, moved / seconds / 1e9, flops / moved
            bound = max(flops / limits["GFLOP/s"], moved / limits["GB/s"]) / 1e9
            row["roofline"] = bound / seconds
    return rows


def limits(dtype: str) -> Row:
    return {"GFLOP/s": measured_flops(dtype) / 1e9, "GB/s": measured_bandwidth() / 1e9}


def compiled_for(targets: Sequence[str], names: Sequence[str], sizes: Sizes, dtype: str) -> Iterator[Row]:
    """Whether each implementation compiles for absent devices, such as v5e:2x2 or h100:1, and what it needs there."""
    for target in targets:
        device = absent_devices(target)[0]
        struct = functools.partial(_struct, where=SingleDeviceSharding(device))
        for run in _passes(names, sizes, device.platform, dtype):
            shapes = jax.tree.map(struct, run.inputs)
            for implementation, function in run.implementations.items():
                row: Row = {"name": f"{run.title} for {target}", "implementation": implementation}
                try:
                    compiled = jax.jit(_available(function)).lower(*shapes).compile()
                    row |= {"memory_mib": _temporaries(compiled), "reason": "compiles"}
                except _REFUSALS as error:
                    row["reason"] = first_line(error)
                yield row


def _struct(x: Array, where: SingleDeviceSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


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
        need = "cuda" if kind == "h100" else "tpu"
        remedy = f"pip install 'jaxgpt[{need}]', and name it as v5e:2x2 or h100:1"
        raise ConfigError(f"compile-for {target}: {first_line(error)}; {remedy}") from None


class _Pass(NamedTuple):
    """An operation, forward or backward too."""

    title: str
    inputs: tuple
    flops: float
    oracle: Function
    implementations: Mapping[str, Function | str]


def _passes(names: Sequence[str], sizes: Sizes, platform: str, dtype: str) -> Iterator[_Pass]:
    for name in names:
        operation = OPERATIONS[name](sizes, platform)
        title = " ".join([name, *(f"{letter}{getattr(sizes, letter)}" for letter in operation.letters)])
        inputs = _cast(operation.inputs, "float32" if name == "optimizer" else dtype)
        yield _Pass(title, inputs, operation.flops, operation.oracle, operation.implementations)
        if operation.differentiable:
            out = jax.eval_shape(operation.oracle, *inputs)
            cotangent = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
            wrap = functools.partial(_with_gradients, differentiable=operation.differentiable)
            wrapped = {k: f if isinstance(f, str) else wrap(f) for k, f in operation.implementations.items()}
            oracle = wrap(operation.oracle)
            yield _Pass(f"{title} + gradients", (*inputs, cotangent), 3 * operation.flops, oracle, wrapped)


def _available(function: Function | str) -> Function:
    if isinstance(function, str):
        raise NotImplementedError(function)
    return function


def _temporaries(compiled: jax.stages.Compiled) -> float | None:
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes / 2**20 if memory else None
