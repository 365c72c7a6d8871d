"""Operations in every implementation that there is for the device: how exact, how fast, how far from the roofline.

Figures are of the forward pass, or of both passes for all gradients; FLOPs what the mathematics needs, half of a causal
square; bytes those of inputs and results, read or written once; the roofline what a matrix product, and a read of the
memory, reached on this device. An oracle is the plain formula, written apart from what it checks, in float64.
Letters: `jaxgpt/sharding.py`, R = H / G, M experts of a token."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxgpt.bench.report import Contender, Output, Row, first_line, measure
from jaxgpt.config import ModelConfig, OptimizerConfig
from jaxgpt.errors import ConfigError, require
from jaxgpt.kernels.attention import FORMS, attention, attention_mask
from jaxgpt.kernels.cross_entropy import LossOptions, linear_cross_entropy, output_logits
from jaxgpt.kernels.experts import mixture
from jaxgpt.model import Transformer
from jaxgpt.model.rotary import rotate
from jaxgpt.roofline import measured_bandwidth, measured_flops
from jaxgpt.training.step import make_optimizer

_BEYOND_CACHES = 2**27  # bytes of inputs that take turns, so that they come from the memory
_REFUSALS = (ValueError, NotImplementedError, RuntimeError)  # by an implementation that has not all that is asked for
Name = Literal["attention", "decode", "loss", "norm", "rope", "mlp", "moe", "optimizer"]
Function = Callable[..., Any]
Sizes = SimpleNamespace  # an integer for each letter
PRESETS: dict[str, dict[str, int]] = {
    "small": dict(B=4, T=256, D=384, H=6, G=6, K=64, F=1536, V=4096, E=8, M=2),
    "gpt2": dict(B=4, T=1024, D=768, H=12, G=12, K=64, F=3072, V=50304, E=8, M=2),
    "llama3": dict(B=1, T=4096, D=4096, H=32, G=8, K=128, F=14336, V=128256, E=8, M=2),
}


class Operation(NamedTuple):
    letters: str  # that the shape is made of
    inputs: tuple  # arrays, or trees of them
    differentiable: tuple[int, ...]  # inputs; none where there is no backward pass
    flops: float
    oracle: Function
    implementations: Mapping[str, Function]


def parse_sizes(text: str) -> Sizes:
    """`gpt2`, or `gpt2,B=8,T=512`. Raises ConfigError."""
    preset, *changes = text.split(",")
    if preset not in PRESETS:
        raise ConfigError(f"shapes {preset!r}: it must be one of {', '.join(PRESETS)}, with changes such as ,T=512")
    sizes = dict(PRESETS[preset])
    for change in changes:
        letter, _, number = change.partition("=")
        if letter not in sizes or not number.isdecimal() or not 0 < int(number) < 2**24:
            raise ConfigError(f"shapes {change!r}: it must be one of {', '.join(sizes)} and a number, such as T=512")
        sizes[letter] = int(number)
    if sizes["H"] % sizes["G"] or sizes["K"] % 2 or sizes["M"] > sizes["E"]:
        raise ConfigError(f"shapes {text}: G must divide H, K must be even, and M at most E")
    return Sizes(**sizes)


def _normal(*shape: int, std: float = 1.0) -> np.ndarray:
    return std * np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def _causal_oracle(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array) -> Array:
    k_BSHK, v_BSHK = (jnp.repeat(x, q_BTHK.shape[2] // x.shape[2], axis=2) for x in (k_BSGK, v_BSGK))
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) / q_BTHK.shape[-1] ** 0.5
    T, S = scores_BHTS.shape[2:]
    seen_TS = np.tri(T, S, S - T, dtype=bool)[None, None]
    return jnp.einsum("BHTS,BSHK->BTHK", jax.nn.softmax(jnp.where(seen_TS, scores_BHTS, -jnp.inf)), v_BSHK)


def _attention(s: Sizes, decoding: bool = False) -> Operation:
    """Of a whole sequence; when `decoding`, of one query for each text over a full cache, without gradients."""
    T = 1 if decoding else s.T
    positions_BS: Any = np.broadcast_to(np.arange(s.T), (s.B, s.T))
    mask_BTS = lambda: attention_mask(positions_BS[:, s.T - T :], positions_BS)  # noqa: E731
    library = functools.partial(jax.nn.dot_product_attention, is_causal=T > 1)
    implementations: dict[str, Function] = {
        "plain": lambda q, k, v: attention(q, k, v, mask_BTS(), None, s.K**-0.5),
        "jax.nn": functools.partial(library, implementation="xla"),
        "jax.nn cudnn": functools.partial(library, implementation="cudnn"),
    }
    if not decoding:
        whole: Any = dict(segments_BT=np.zeros((s.B, s.T), np.int32), window=0, softcap=None, scale=s.K**-0.5)
        implementations = {name: functools.partial(form, **whole) for name, form in FORMS.items()} | implementations
    inputs = _normal(s.B, T, s.H, s.K), _normal(s.B, s.T, s.G, s.K), _normal(s.B, s.T, s.G, s.K)
    flops = 2 * s.B * s.H * s.K * T * (2 * s.T - T + 1)
    return Operation("BTHGK", inputs, () if decoding else (0, 1, 2), flops, _causal_oracle, implementations)


def _loss(s: Sizes) -> Operation:
    labels_BT = np.random.default_rng(0).integers(0, s.V, (s.B, s.T)).astype(np.int32)

    def oracle(x_BTD: Array, w_VD: Array, labels_BT: Array) -> Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(x_BTD @ w_VD.T), labels_BT[..., None], -1).sum() / labels_BT.size

    def chunked(chunks: int) -> Function:
        weights_BT = np.full((s.B, s.T), 1 / labels_BT.size, np.float32)
        options = LossOptions(s.V, chunks=chunks)
        return lambda x, w, labels: linear_cross_entropy(x, w, labels, jnp.asarray(weights_BT), options)[0]

    losses = optax.softmax_cross_entropy_with_integer_labels
    implementations = {f"{n} chunks": chunked(n) for n in (8, 2, 1) if s.T % n == 0}
    implementations["optax"] = lambda x, w, labels: losses(output_logits(x, w, None), labels).mean()
    inputs = _normal(s.B, s.T, s.D), _normal(s.V, s.D, std=s.D**-0.5), labels_BT
    return Operation("BTDV", inputs, (0, 1), 2 * s.B * s.T * s.D * s.V, oracle, implementations)


def _block(s: Sizes) -> Any:
    shape: Any = dict(n_layers=1, d_model=s.D, n_heads=s.H, n_kv_heads=s.G, head_dim=s.K, d_ff=s.F, vocab_size=1)
    config = ModelConfig(**shape, norm="rmsnorm", activation="silu", gated_mlp=True, mlp_bias=False)
    return Transformer(config, jax.random.key(0)).unstacked().layers[0]  # type: ignore[index]


def _norm(s: Sizes) -> Operation:
    def oracle(x_BTD: Array, norm: Any) -> Array:
        return x_BTD / jnp.sqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-5) * norm.scale[...][None, None]

    inputs = _normal(s.B, s.T, s.D), _block(s).mlp_norm
    return Operation("BTD", inputs, (0, 1), 4 * s.B * s.T * s.D, oracle, {"jaxgpt": lambda x, norm: norm(x)})


def _rope(s: Sizes) -> Operation:
    angles = np.arange(s.T)[:, None] * 10_000.0 ** (-np.arange(0, s.K, 2) / s.K)
    turns = [np.broadcast_to(f(angles)[None, :, None], (s.B, s.T, 1, s.K // 2)) for f in (np.cos, np.sin)]

    def oracle(q_BTHK: Array, cos: Array, sin: Array) -> Array:
        pairs = jax.lax.complex(*jnp.split(q_BTHK, 2, axis=-1)) * jax.lax.complex(cos, sin)
        return jnp.concatenate([pairs.real, pairs.imag], -1)

    inputs, flops = (_normal(s.B, s.T, s.H, s.K), *turns), 3 * s.B * s.T * s.H * s.K
    return Operation("BTHK", inputs, (0,), flops, oracle, {"jaxgpt": lambda q, cos, sin: rotate(q, (cos, sin))})


def _mlp(s: Sizes) -> Operation:
    def oracle(x_BTD: Array, mlp: Any) -> Array:
        up_DF, gate_DF, down_FD = (p.kernel[...] for p in (mlp.up, mlp.gate, mlp.down))
        return (jax.nn.silu(x_BTD @ gate_DF) * (x_BTD @ up_DF)) @ down_FD

    inputs, flops = (_normal(s.B, s.T, s.D), _block(s).mlp), 6 * s.B * s.T * s.D * s.F
    return Operation("BTDF", inputs, (0, 1), flops, oracle, {"jaxgpt": lambda x, mlp: mlp(x)[0]})


def _moe(s: Sizes) -> Operation:
    experts_BTM = np.random.default_rng(0).random((s.B, s.T, s.E)).argsort(-1)[..., : s.M].astype(np.int32)

    def every_expert(x_BTD: Array, weights_BTM: Array, experts_BTM: Array, matrices: tuple) -> Array:
        gate_EDF, up_EDF, down_EFD = matrices
        chosen_BTME = experts_BTM[..., None] == jnp.arange(s.E)[None, None, None]
        weights_BTE = jnp.where(chosen_BTME, weights_BTM[..., None], 0).sum(2)
        hidden_BTEF = jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x_BTD, gate_EDF))
        hidden_BTEF *= jnp.einsum("BTD,EDF->BTEF", x_BTD, up_EDF) * weights_BTE[..., None].astype(x_BTD.dtype)
        return jnp.einsum("BTEF,EFD->BTD", hidden_BTEF, down_EFD)

    up = _normal(s.E, s.D, s.F, std=s.D**-0.5)
    matrices = up[::-1], up, _normal(s.E, s.F, s.D, std=s.F**-0.5)
    ragged = functools.partial(mixture, activate=jax.nn.silu)
    implementations: dict[str, Function] = {"ragged products": ragged, "every expert": every_expert}
    inputs = _normal(s.B, s.T, s.D), np.full(experts_BTM.shape, 1 / s.M, np.float32), experts_BTM, matrices
    return Operation("BTDFEM", inputs, (0, 3), 6 * s.B * s.T * s.M * s.D * s.F, every_expert, implementations)


def _optimizer(s: Sizes) -> Operation:
    config = OptimizerConfig(warmup_steps=0, schedule="constant", clip_norm=0.0)  # AdamW, of one matrix
    rule = make_optimizer(config, 2)
    parameter, gradient = {"kernel": _normal(s.D, s.F)}, {"kernel": _normal(s.D, s.F, std=0.1)}
    state = rule.update(gradient, rule.init(parameter), parameter)[1]

    def update(parameter: Any, gradient: Any, state: Any) -> Any:
        updates, state = rule.update(gradient, state, parameter)
        return optax.apply_updates(parameter, updates), state[1].mu, state[1].nu

    def oracle(parameter: Any, gradient: Any, state: Any) -> Any:
        p, g, m, v = (tree["kernel"] for tree in (parameter, gradient, state[1].mu, state[1].nu))
        m, v = config.beta1 * m + (1 - config.beta1) * g, config.beta2 * v + (1 - config.beta2) * g * g
        step = m / (1 - config.beta1**2) / (jnp.sqrt(v / (1 - config.beta2**2)) + config.epsilon)
        return p - config.peak_lr * (step + config.weight_decay * p), m, v

    return Operation("DF", (parameter, gradient, state), (), 15 * s.D * s.F, oracle, {"optax": update})


OPERATIONS: dict[str, Callable[[Sizes], Operation]] = {
    "attention": _attention, "decode": functools.partial(_attention, decoding=True), "loss": _loss, "norm": _norm,
    "rope": _rope, "mlp": _mlp, "moe": _moe, "optimizer": _optimizer,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kernels(Output):
    """Time the operations of a transformer in every implementation, with their errors and the roofline."""

    op: tuple[Name, ...] = ()  # Operations. Default: all.
    # small, gpt2 or llama3, and changes, such as gpt2,B=8,T=512: B rows, T tokens, D width, H heads, G key/value heads,
    # K head width, F feed-forward width, V vocabulary, E experts, M experts of a token.
    shapes: str = "small"
    dtype: Literal["float32", "bfloat16"] = "float32"  # Of the inputs.
    compile_for: tuple[str, ...] = ()  # Absent devices, such as v5e:2x2 h100:1: compile for them, time nothing.

    def run(self) -> None:
        require(not (self.compile_for and self.profile), "profile: what is compiled for other devices is not run")
        sizes, rows, names = parse_sizes(self.shapes), list[Row](), self.op or list(OPERATIONS)
        for target in self.compile_for or ("",):
            rows += measure(contenders(names, sizes, self.dtype, target), self.rounds, self.profile)
        limits = {"GFLOP/s": measured_flops(self.dtype) / 1e9, "GB/s": measured_bandwidth() / 1e9}
        self.show("kernels", rows, {} if self.compile_for else limits)


def contenders(names: Sequence[str], sizes: Sizes, dtype: str, target: str = "") -> Iterator[Contender]:
    """Every implementation of the operations, ready to be timed, and what the oracle says. With a `target`, devices
    that are not here, such as v5e:2x2 or h100:1: whether each compiles for them."""
    where = SingleDeviceSharding(absent_devices(target)[0] if target else jax.local_devices()[0])
    for title, run in _passes(names, sizes, dtype):
        title += f" for {target}" if target else ""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), run.inputs)
        expected, turns = ([], iter(())) if target else (_expected(run), _turns(run.inputs))
        for implementation, function in run.implementations.items():
            try:
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
    """Those of v5e:2x2, h100:1 or the like. Raises ConfigError where the compiler is missing or does not know them."""
    kind, _, shape = target.partition(":")
    try:
        if kind == "h100":
            config = Path(__file__).with_name("h100.textproto").read_text("utf-8")
            return topologies.get_topology_desc("h100", "cuda", target_config=config, topology=f"1x1x{shape}").devices
        return topologies.get_topology_desc(target, "tpu").devices
    except _REFUSALS as error:
        remedy = f"pip install 'jaxgpt[{'cuda' if kind == 'h100' else 'tpu'}]', and name it as v5e:2x2 or h100:1"
        raise ConfigError(f"compile-for {target}: {first_line(error)}; {remedy}") from None


def _passes(names: Sequence[str], sizes: Sizes, dtype: str) -> Iterator[tuple[str, Operation]]:
    for name in names:
        forward = OPERATIONS[name](sizes)
        title = " ".join([name, *(f"{letter}{getattr(sizes, letter)}" for letter in forward.letters)])
        passes = {title: forward}
        if forward.differentiable:
            passes[f"{title} + gradients"] = _with_gradients(forward)
        for title, run in passes.items():
            yield title, run._replace(inputs=_cast(run.inputs, "float32" if name == "optimizer" else dtype))


def _with_gradients(forward: Operation) -> Operation:
    """Both passes: the gradients of the differentiable inputs, for the cotangent that the last input is."""

    def wrapped(function: Function) -> Function:
        return jax.grad(lambda *inputs: (function(*inputs[:-1]) * inputs[-1]).sum(), argnums=forward.differentiable)

    out = jax.eval_shape(forward.oracle, *forward.inputs)
    cotangent = np.cos(np.arange(out.size, dtype=np.float32)).reshape(out.shape)
    inputs, oracle = (*forward.inputs, cotangent), wrapped(forward.oracle)
    implementations = {name: wrapped(function) for name, function in forward.implementations.items()}
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
