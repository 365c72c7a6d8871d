"""Every implementation against its oracle, and the figures that say how far from the roofline it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.bench import kernels
from jaxgpt.bench.kernels import OPERATIONS, PRESETS, Operation, Sizes, absent_devices, contenders, parse_sizes
from jaxgpt.bench.report import Row, measure
from jaxgpt.errors import ConfigError

TINY = parse_sizes("small,B=2,T=16,D=24,H=4,G=2,K=8,F=40,V=50,E=4")


def rows_of(name: str, dtype: str = "float32") -> list[Row]:
    return measure(contenders([name], TINY, dtype), rounds=1)


ELSEWHERE = {
    "jax.nn cudnn": "cuDNN is not detected.",
    "splash": "bkv_compute=16 must be a multiple of 128.",
    "flash": "flash takes multiples of 128 tokens, heads of up to 256 bytes; not 16, 8 numbers",
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_implementation_is_right(name: str) -> None:
    """In float32, values and gradients; the largest error over the largest entry."""
    rows = rows_of(name)
    assert {row["error"] < 2e-6 for row in rows if "ms" in row} == {True}
    refused = {row["implementation"]: row["reason"] for row in rows if "ms" not in row}
    assert refused.items() <= ELSEWHERE.items(), "one of ours is refused"
    passes = 1 if name in ("decode", "optimizer") else 2
    assert len(rows) == passes * len(OPERATIONS[name](TINY).implementations)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "optimizer"])
def test_bfloat16_is_compared_with_the_same_rounded_inputs(name: str) -> None:
    rows = rows_of(name, "bfloat16")
    refused = {row["implementation"]: row["reason"] for row in rows if "ms" not in row}
    assert refused.items() <= ELSEWHERE.items(), "one of ours is refused"
    errors = [row["error"] for row in rows if "ms" in row]
    assert errors and all(1e-5 < error < 0.05 or name == "loss" for error in errors), errors


def test_a_wrong_implementation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is a little off, and one that forgets part of a gradient."""

    def broken(sizes: Sizes) -> Operation:
        operation = OPERATIONS["norm"](sizes)
        wrong = {"shifted": lambda x, norm: norm(x) + 1e-3, "stopped": lambda x, norm: norm(jax.lax.stop_gradient(x))}
        return operation._replace(implementations=wrong)

    monkeypatch.setitem(kernels.OPERATIONS, "broken", broken)
    shifted, stopped, shifted_gradient, stopped_gradient = rows_of("broken")
    assert shifted["error"] > 1e-4 > stopped["error"]
    assert shifted_gradient["error"] < 1e-4 < stopped_gradient["error"]


def test_what_cannot_run_here_is_listed_with_the_reason() -> None:
    reasons = {row["implementation"]: row["reason"] for row in rows_of("attention") if "ms" not in row}
    assert reasons == ELSEWHERE


@pytest.mark.parametrize(("flops", "bandwidth"), [(1e9, 1e12), (1e15, 1e6)])
def test_the_roofline_is_the_nearer_of_two_bounds(
    monkeypatch: pytest.MonkeyPatch, flops: float, bandwidth: float
) -> None:
    """On a device that computes slowly, and on one whose memory is slow."""
    monkeypatch.setattr(kernels, "measured_flops", lambda _: flops)
    monkeypatch.setattr(kernels, "measured_bandwidth", lambda: bandwidth)
    row = rows_of("norm")[0]
    shortest = max(row["flops"] / flops, row["bytes"] / bandwidth)
    assert (shortest == row["flops"] / flops) is (flops < bandwidth)
    assert row["roofline_s"] == pytest.approx(shortest) and row["roofline"] == pytest.approx(1e3 * shortest / row["ms"])
    assert row["gflops"] == pytest.approx(row["flops"] / row["ms"] / 1e6)
    assert row["gbytes"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
    assert row["intensity"] == row["flops"] / row["bytes"]


@pytest.mark.parametrize("name", ["attention", "mlp", "loss"])
def test_operations_are_counted_as_the_compiler_counts_them(name: str) -> None:
    """XLA counts what the oracle computes, all keys of every query where attention needs half of them."""
    operation = OPERATIONS[name](TINY)
    inputs = jax.tree.map(jnp.asarray, operation.inputs)
    counted = jax.jit(operation.oracle).lower(*inputs).compile().cost_analysis()["flops"]
    expected = operation.flops * (2 * TINY.T / (TINY.T + 1) if name == "attention" else 1)
    assert expected <= counted < 1.35 * expected


def test_a_changed_input_changes_what_is_timed() -> None:
    """The inputs that take turns are equal, and none of them is a constant of the program."""
    (first,) = [c for c in contenders(["decode"], TINY, "float32") if c.implementation == "plain"]
    assert first.call
    outs = [np.asarray(first.call()) for _ in range(3)]
    assert np.array_equal(outs[0], outs[1]) and np.array_equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("big", "shapes 'big': it must be one of small, gpt2, llama3"),
        ("gpt2,Q=3", "shapes 'Q=3': it must be one of B, T"),
        ("gpt2,T=0", "shapes 'T=0': it must"),
        ("gpt2,T=x", "shapes 'T=x': it must"),
        ("gpt2,T", "shapes 'T': it must"),
        ("gpt2,G=5", "G must divide H"),
    ],
)
def test_bad_shapes_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sizes(text)


def test_presets_change_by_letter() -> None:
    assert parse_sizes("gpt2,B=8,T=512").__dict__ == PRESETS["gpt2"] | {"B": 8, "T": 512}


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compile-for v99:2x2: .*; pip install 'jaxgpt.tpu.'"):
        absent_devices("v99:2x2")


@pytest.mark.tpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_compile_for_a_tpu(name: str) -> None:
    sizes = parse_sizes("gpt2,B=1,E=2,T=256,V=1024")
    rows = measure(contenders([name], sizes, "bfloat16", "v5e:2x2"), rounds=1)
    refused = {row["implementation"]: row["reason"] for row in rows if row["reason"] != "compiles"}
    assert refused.items() <= {"jax.nn cudnn": "cuDNN is not detected."}.items(), "one of ours is refused"
    assert any(row["implementation"] == "splash" for row in rows) == (name == "attention")
