"""The operations of a transformer at one shape: what they need, what is right, and who can compute it.

An oracle is the plain formula, written apart from what it checks; it is run in float64. FLOPs are those that the
mathematics needs: half of a causal square. Letters: `jaxgpt/sharding.py`, R = H / G, M experts of a token."""

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxgpt.config import ModelConfig, OptimizerConfig
from jaxgpt.errors import ConfigError
from jaxgpt.kernels.attention import attention, attention_mask, causal_attention
from jaxgpt.kernels.cross_entropy import LossOptions, linear_cross_entropy, output_logits
from jaxgpt.kernels.experts import mixture
from jaxgpt.model import Transformer
from jaxgpt.model.rotary import rotate
from jaxgpt.training.optimizer import make_optimizer

Function = Callable[..., Any]
Sizes = SimpleNamespace  # an integer for each letter
PRESETS: dict[str, dict[str, int]] = {
    "small": dict(B=4, T=256, D=384, H=6, G=6, K=64, F=1536, V=4096, E=8, M=2),
    "gpt2": dict(B=4, T=1024, D=768, H=12, G=12, K=64, F=3072, V=50304, E=8, M=2),
    "llama3": dict(B=1, T=4096, D=4096, H=32, G=8, K=128, F=14336, V=128256, E=8, M=2),
}


class Operation(NamedTuple):
    """An operation at one shape. An implementation that cannot run here is a text: why."""

    letters: str  # that its shape is made of
    inputs: tuple  # arrays, or trees of them
    differentiable: tuple[int, ...]  # inputs; none where there is no backward pass
    flops: float
    oracle: Function
    implementations: Mapping[str, Function | str]


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


def _splash(s: Sizes) -> Function:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.MultiHeadMask([masks.CausalMask((s.T, s.T))] * s.H)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1)

    def call(q_BTHK: Array, k_BTGK: Array, v_BTGK: Array) -> Array:
        q_BHTK, k_BGTK, v_BGTK = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK * s.K**-0.5, k_BTGK, v_BTGK))
        return jnp.swapaxes(jax.vmap(kernel)(q_BHTK, k_BGTK, v_BGTK), 1, 2)

    return call


def _attention(s: Sizes, platform: str, decoding: bool = False) -> Operation:
    """Of a whole sequence; when `decoding`, of one query for each text over a full cache, without gradients."""
    T = 1 if decoding else s.T
    positions_BS: Any = np.broadcast_to(np.arange(s.T), (s.B, s.T))
    mask_BTS = lambda: attention_mask(positions_BS[:, s.T - T :], positions_BS)  # noqa: E731
    library = functools.partial(jax.nn.dot_product_attention, is_causal=T > 1)
    cudnn = functools.partial(library, implementation="cudnn")
    implementations: dict[str, Function | str] = {
        "plain": lambda q, k, v: attention(q, k, v, mask_BTS(), None, None),
        "jax.nn": functools.partial(library, implementation="xla"),
        "jax.nn cudnn": cudnn if platform == "gpu" else "only on an NVIDIA GPU",
    }
    if not decoding:
        blocks = {"blocks": lambda q, k, v: causal_attention(q, k, v, mask_BTS(), None, None)}
        implementations = blocks | implementations | {"splash": _splash(s) if platform == "tpu" else "only on a TPU"}
    inputs = _normal(s.B, T, s.H, s.K), _normal(s.B, s.T, s.G, s.K), _normal(s.B, s.T, s.G, s.K)
    flops = 2 * s.B * s.H * s.K * T * (2 * s.T - T + 1)
    return Operation("BTHGK", inputs, () if decoding else (0, 1, 2), flops, _causal_oracle, implementations)


def _loss(s: Sizes, platform: str) -> Operation:
    labels_BT = np.random.default_rng(0).integers(0, s.V, (s.B, s.T)).astype(np.int32)

    def oracle(x_BTD: Array, w_VD: Array, labels_BT: Array) -> Array:
        log_p_BTV = jax.nn.log_softmax(x_BTD @ w_VD.T)
        return -jnp.take_along_axis(log_p_BTV, labels_BT[..., None], -1).sum() / labels_BT.size

    def chunked(chunks: int) -> Function:
        weights_BT = np.full((s.B, s.T), 1 / labels_BT.size, np.float32)
        options = LossOptions(s.V, chunks=chunks)
        return lambda x, w, labels: linear_cross_entropy(x, w, labels, jnp.asarray(weights_BT), options)[0]

    def with_optax(x_BTD: Array, w_VD: Array, labels_BT: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(output_logits(x_BTD, w_VD, None), labels_BT).mean()

    implementations = {f"{n} chunks": chunked(n) for n in (8, 2, 1) if s.T % n == 0} | {"optax": with_optax}
    inputs = _normal(s.B, s.T, s.D), _normal(s.V, s.D, std=s.D**-0.5), labels_BT
    return Operation("BTDV", inputs, (0, 1), 2 * s.B * s.T * s.D * s.V, oracle, implementations)


def _block(s: Sizes) -> Any:
    shape: Any = dict(n_layers=1, d_model=s.D, n_heads=s.H, n_kv_heads=s.G, head_dim=s.K, d_ff=s.F, vocab_size=1)
    config = ModelConfig(**shape, norm="rmsnorm", activation="silu", gated_mlp=True, mlp_bias=False)
    return Transformer(config, jax.random.key(0)).unstacked().layers[0]  # type: ignore[index]


def _norm(s: Sizes, platform: str) -> Operation:
    def oracle(x_BTD: Array, norm: Any) -> Array:
        return x_BTD / jnp.sqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-5) * norm.scale[...][None, None]

    inputs = _normal(s.B, s.T, s.D), _block(s).mlp_norm
    return Operation("BTD", inputs, (0, 1), 4 * s.B * s.T * s.D, oracle, {"jaxgpt": lambda x, norm: norm(x)})


def _rope(s: Sizes, platform: str) -> Operation:
    angles = np.arange(s.T)[:, None] * 10_000.0 ** (-np.arange(0, s.K, 2) / s.K)
    turns = [np.broadcast_to(f(angles)[None, :, None], (s.B, s.T, 1, s.K // 2)) for f in (np.cos, np.sin)]

    def oracle(q_BTHK: Array, cos: Array, sin: Array) -> Array:
        pairs = jax.lax.complex(*jnp.split(q_BTHK, 2, axis=-1)) * jax.lax.complex(cos, sin)
        return jnp.concatenate([pairs.real, pairs.imag], -1)

    inputs, flops = (_normal(s.B, s.T, s.H, s.K), *turns), 3 * s.B * s.T * s.H * s.K
    return Operation("BTHK", inputs, (0,), flops, oracle, {"jaxgpt": lambda q, cos, sin: rotate(q, (cos, sin))})


def _mlp(s: Sizes, platform: str) -> Operation:
    def oracle(x_BTD: Array, mlp: Any) -> Array:
        up_DF, gate_DF, down_FD = (p.kernel[...] for p in (mlp.up, mlp.gate, mlp.down))
        return (jax.nn.silu(x_BTD @ gate_DF) * (x_BTD @ up_DF)) @ down_FD

    inputs, flops = (_normal(s.B, s.T, s.D), _block(s).mlp), 6 * s.B * s.T * s.D * s.F
    return Operation("BTDF", inputs, (0, 1), flops, oracle, {"jaxgpt": lambda x, mlp: mlp(x)[0]})


def _moe(s: Sizes, platform: str) -> Operation:
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
    implementations: dict[str, Function | str] = {"ragged products": ragged, "every expert": every_expert}
    inputs = _normal(s.B, s.T, s.D), np.full(experts_BTM.shape, 1 / s.M, np.float32), experts_BTM, matrices
    return Operation("BTDFEM", inputs, (0, 3), 6 * s.B * s.T * s.M * s.D * s.F, every_expert, implementations)


def _optimizer(s: Sizes, platform: str) -> Operation:
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


OPERATIONS: dict[str, Callable[[Sizes, str], Operation]] = {
    "attention": _attention, "decode": functools.partial(_attention, decoding=True), "loss": _loss, "norm": _norm,
    "rope": _rope, "mlp": _mlp, "moe": _moe, "optimizer": _optimizer,
}  # fmt: skip
