"""The parts of a transformer block: projections, norms, attention, feed-forward.

Modules are dataclasses with initialisers: parameters are float32 `nnx.Param`s, made from a key, and every
method is a pure function. Letters: `jaxgpt/sharding.py`."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgpt.config import ModelConfig
from jaxgpt.kernels.attention import LayerCache
from jaxgpt.kernels.experts import mixture, route, router_losses
from jaxgpt.kernels.matrix_first import matrix_first
from jaxgpt.model.rotary import Rotation, rotate
from jaxgpt.sharding import PARAMETER, out_sharding, shard

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False), "silu": jax.nn.silu, "relu": jax.nn.relu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}  # fmt: skip


def weight(parameter: nnx.Param, axes: str, dtype: jax.typing.DTypeLike) -> Array:
    """A parameter ready for use: cast, then gathered over fsdp (in this order: half the bytes move in bfloat16)."""
    return shard(parameter[...].astype(dtype), axes)


def dropout(x_BTD: Array, rate: float, key: Array | None) -> Array:
    """Zero a share `rate` of x and scale the rest up; the identity without a key."""
    if key is None or rate == 0:
        return x_BTD
    keep = jax.random.bernoulli(key, 1 - rate, x_BTD.shape, out_sharding=out_sharding("BTD"))
    return jnp.where(keep, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """How long the axis of each letter is, in parameters."""
    return dict(
        L=config.n_layers, D=config.d_model, H=config.n_heads, G=config.kv_heads, K=config.key_dim,
        F=config.ff_dim, E=config.n_experts, S=config.context_length, V=config.vocab_rows,
    )  # fmt: skip


def normal(rngs: nnx.Rngs, axes: str, config: ModelConfig, std: float = 0.02) -> nnx.Param:
    """A parameter drawn from N(0, std); the letters of its axes give its shape and how it is laid out over the mesh."""
    shape, where = [axis_sizes(config)[letter] for letter in axes], out_sharding(axes, PARAMETER)
    return nnx.Param(std * jax.random.normal(rngs(), shape, jnp.float32, out_sharding=where))  # in parts, not whole


def constant(axes: str, config: ModelConfig, value: float) -> nnx.Param:
    shape, where = [axis_sizes(config)[letter] for letter in axes], out_sharding(axes, PARAMETER)
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=where))


class Projection(nnx.Module):
    """A linear map written as an einsum, such as `BTD,DHK->BTHK`: its letters give kernel, bias and sharding."""

    def __init__(self, einsum: str, config: ModelConfig, rngs: nnx.Rngs, *, bias: bool, residual: bool = False) -> None:
        """`residual` marks a projection back into the residual stream: its std is divided by sqrt(2L), as in GPT-2."""
        self.in_axes, self.kernel_axes, self.out_axes = re.split(",|->", einsum)
        self.bias_axes = "".join(letter for letter in self.out_axes if letter in self.kernel_axes)
        std = 0.02 / (2 * config.n_layers) ** 0.5 if residual else 0.02
        self.kernel = normal(rngs, self.kernel_axes, config, std)
        self.bias = constant(self.bias_axes, config, 0.0) if bias else None

    def turn(self) -> None:
        """Store the outputs first, as `matrix_first` takes them; experts' stay."""
        if "E" not in self.kernel_axes:
            before, self.kernel_axes = self.kernel_axes, self.out_axes[2:] + self.in_axes[2:]
            self.kernel = nnx.Param(jnp.einsum(f"{before}->{self.kernel_axes}", self.kernel[...]))

    def __call__(self, x: Array) -> Array:
        kernel = weight(self.kernel, self.kernel_axes, x.dtype)
        axes = self.in_axes, self.kernel_axes, self.out_axes
        if self.kernel_axes[0] == self.out_axes[2]:  # it was turned
            y = matrix_first(x, kernel, *axes).astype(x.dtype)
        else:
            y = jnp.einsum("{},{}->{}".format(*axes), x, kernel, out_sharding=out_sharding(self.out_axes))
        if self.bias is None:
            return y
        # In float32: the gradient adds up all tokens, and bfloat16 cannot count past 256.
        bias = weight(self.bias, self.bias_axes, jnp.float32)
        return (y.astype(jnp.float32) + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))).astype(x.dtype)


class Norm(nnx.Module):
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last axes, computed in float32."""

    def __init__(self, axes: str, config: ModelConfig, kind: str | None = None) -> None:
        """`axes` are the letters of the axes that are normalised together, such as D."""
        self.axes, self.kind, self.epsilon = axes, kind or config.norm, config.norm_epsilon
        self.offset = 1.0 if config.norm_plus_one else 0.0
        self.scale = constant(axes, config, 1.0 - self.offset)
        self.bias = constant(axes, config, 0.0) if config.norm_bias and self.kind == "layernorm" else None

    @jax.checkpoint  # keeps x alone for the gradient, not what is made of it on the way
    def __call__(self, x: Array) -> Array:
        wide, over = x.astype(jnp.float32), tuple(range(-len(self.axes), 0))
        if self.kind == "layernorm":
            wide = wide - wide.mean(over, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(over, keepdims=True) + self.epsilon)
        leading = tuple(range(x.ndim - len(self.axes)))
        wide = wide * (self.offset + jnp.expand_dims(weight(self.scale, self.axes, jnp.float32), leading))
        if self.bias is not None:
            wide = wide + jnp.expand_dims(weight(self.bias, self.axes, jnp.float32), leading)
        return wide.astype(x.dtype)


def sinusoids(positions_BT: Array, width: int) -> Array:
    """Fixed sine and cosine positions [B, T, width] (arXiv:1706.03762, section 3.5), sines first."""
    turns = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles_BTK = positions_BT[:, :, None].astype(jnp.float32) * turns[None, None]
    return jnp.concatenate([jnp.sin(angles_BTK), jnp.cos(angles_BTK)], axis=-1)


class Attention(nnx.Module):
    """Causal multi-head, grouped-query or multi-query attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        bias = config.attention_bias
        output_bias = bias if config.attention_output_bias is None else config.attention_output_bias
        self.query = Projection("BTD,DHK->BTHK", config, rngs, bias=bias)
        self.key = Projection("BTD,DGK->BTGK", config, rngs, bias=bias)
        self.value = Projection("BTD,DGK->BTGK", config, rngs, bias=bias)
        self.output = Projection("BTHK,HKD->BTD", config, rngs, bias=output_bias, residual=True)
        axes = {"none": None, "head": ("K", "K"), "all": ("HK", "GK")}[config.qk_norm]
        self.query_norm = Norm(axes[0], config, "rmsnorm") if axes else None
        self.key_norm = Norm(axes[1], config, "rmsnorm") if axes else None
        self.softcap = config.attention_softcap
        self.scale = (config.query_scalar or config.key_dim) ** -0.5

    def __call__(self, x_BTD: Array, attend: Callable, rotation: Rotation | None) -> tuple[Array, LayerCache | None]:
        """Attend as `cached_attention` or `causal_attention` does, given what is seen; and the cache, if it has one."""
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        if rotation is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rotation), rotate(k_BTGK, rotation)
        out_BTHK, cache = attend(q_BTHK, k_BTGK, v_BTGK, softcap=self.softcap, scale=self.scale)
        return self.output(out_BTHK), cache


class FeedForward(nnx.Module):
    """Two projections around a non-linearity; gated (arXiv:2002.05202) multiplies in a third one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        bias, self.activate = config.mlp_bias, ACTIVATIONS[config.activation]
        self.up = Projection("BTD,DF->BTF", config, rngs, bias=bias)
        self.gate = Projection("BTD,DF->BTF", config, rngs, bias=bias) if config.gated_mlp else None
        self.down = Projection("BTF,FD->BTD", config, rngs, bias=bias, residual=True)

    def __call__(self, x_BTD: Array) -> tuple[Array, None]:
        """The result, and that there are no losses of a router."""
        # Made again for the gradient, as norms are: `tiny` learns 1.1 times as fast, in 238 MiB instead of 402.
        hidden = jax.checkpoint(lambda up, gate: self.activate(up) if gate is None else self.activate(gate) * up)
        return self.down(hidden(self.up(x_BTD), None if self.gate is None else self.gate(x_BTD))), None


class Experts(nnx.Module):
    """Several gated feed-forward networks, of which a router takes a few for each token."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.activate, self.normalize = ACTIVATIONS[config.activation], config.normalize_experts
        self.count, self.router = config.experts_per_token, Projection("BTD,DE->BTE", config, rngs, bias=False)
        self.gate = Projection("BTD,EDF->BTEF", config, rngs, bias=False)
        self.up = Projection("BTD,EDF->BTEF", config, rngs, bias=False)
        self.down = Projection("BTEF,EFD->BTD", config, rngs, bias=False, residual=True)

    def __call__(self, x_BTD: Array) -> tuple[Array, Array]:
        """The result, and the losses [2] of `router_losses`. The router works in float32."""
        logits_BTE = self.router(x_BTD.astype(jnp.float32))
        weights_BTM, experts_BTM = route(logits_BTE, self.count, self.normalize)
        gate, up, down = (weight(p.kernel, p.kernel_axes, x_BTD.dtype) for p in (self.gate, self.up, self.down))
        y_BTD = mixture(x_BTD, weights_BTM, experts_BTM, (gate, up, down), self.activate)
        return y_BTD, router_losses(logits_BTE, experts_BTM)


class Block(nnx.Module):
    """Attention and feed-forward, each with its norms, added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.norm_position, after = config.norm_position, config.norm_position == "both"
        self.attention_norm = Norm("D", config)
        self.attention = Attention(config, rngs)
        self.attention_output_norm = Norm("D", config) if after else None
        self.mlp_norm = Norm("D", config)
        self.mlp = Experts(config, rngs) if config.n_experts else FeedForward(config, rngs)
        self.mlp_output_norm = Norm("D", config) if after else None
        self.dropout = config.dropout

    def __call__(
        self, x_BTD: Array, attend: Callable, rotation: Rotation | None, dropout_key: Array | None
    ) -> tuple[Array, LayerCache | None, Array | None]:
        """The residual stream, the cache, and the losses [2] of the router where there are experts."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        attention = lambda x_BTD: self.attention(x_BTD, attend, rotation)  # noqa: E731
        x_BTD, cache = self._add(x_BTD, attention, self.attention_norm, self.attention_output_norm, keys[0])
        x_BTD, losses = self._add(x_BTD, self.mlp, self.mlp_norm, self.mlp_output_norm, keys[1])
        return x_BTD, cache, losses

    def _add(self, x_BTD: Array, f: Callable, norm: Norm, after: Norm | None, key: Array | None) -> tuple[Array, Any]:
        """The stream with what `f` makes of it, and what else `f` gives."""
        y_BTD, more = f(norm(x_BTD) if self.norm_position in ("pre", "both") else x_BTD)
        if self.norm_position in ("output", "both"):
            y_BTD = (after or norm)(y_BTD)
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, key)
        return norm(x_BTD) if self.norm_position == "post" else x_BTD, more
