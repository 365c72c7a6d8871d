"""The parts of a transformer block: projections, norms, rotary positions, attention, feed-forward.

Modules are dataclasses with initialisers: parameters are float32 `nnx.Param`s, made from a key, and every
method is a pure function. Letters: B batch, T query length, S key length, D model width, H query heads,
G key/value heads, K head width, F feed-forward width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import ModelConfig
from jaxgpt.kernels.attention import attention
from jaxgpt.sharding import out_sharding, parameter_sharding, shard


def weight(parameter: nnx.Param, axes: str, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A parameter ready for use: cast, then gathered over fsdp (in this order: half the bytes move in bfloat16)."""
    return shard(parameter[...].astype(dtype), axes)


def normal(rngs: nnx.Rngs, axes: str, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A parameter drawn from N(0, std), laid out over the mesh by the letters of its axes."""
    drawn = jax.random.normal(rngs(), shape, jnp.float32, out_sharding=parameter_sharding(axes))  # in parts, not whole
    return nnx.Param(std * drawn)


def constant(axes: str, shape: tuple[int, ...], value: float) -> nnx.Param:
    """A parameter that starts as one value."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=parameter_sharding(axes)))


def dropout(x_BTD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of x and scale the rest up; the identity without a key."""
    if key is None or rate == 0:
        return x_BTD
    keep = jax.random.bernoulli(key, 1 - rate, x_BTD.shape, out_sharding=out_sharding("BTD"))
    return jnp.where(keep, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


class Projection(nnx.Module):
    """A linear map written as an einsum, such as `BTD,DHK->BTHK`: its letters give kernel, bias and sharding."""

    def __init__(
        self, equation: str, config: ModelConfig, rngs: nnx.Rngs, *, bias: bool, residual: bool = False
    ) -> None:
        """`residual` marks a projection back into the residual stream: its std is divided by sqrt(2L), as in GPT-2."""
        size = dict(D=config.d_model, H=config.n_heads, G=config.kv_heads, K=config.key_dim, F=config.ff_dim)
        self.equation = equation
        self.kernel_axes = equation.split("->")[0].split(",")[1]
        self.out_axes = equation.split("->")[1]
        self.bias_axes = "".join(letter for letter in self.out_axes if letter in self.kernel_axes)
        std = 0.02 / (2 * config.n_layers) ** 0.5 if residual else 0.02
        self.kernel = normal(rngs, self.kernel_axes, tuple(size[a] for a in self.kernel_axes), std)
        self.bias = constant(self.bias_axes, tuple(size[a] for a in self.bias_axes), 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = weight(self.kernel, self.kernel_axes, x.dtype)
        y = jnp.einsum(self.equation, x, kernel, out_sharding=out_sharding(self.out_axes))
        if self.bias is None:
            return y
        # In float32: the gradient adds up all tokens, and bfloat16 cannot count past 256.
        bias = weight(self.bias, self.bias_axes, jnp.float32)
        return (y.astype(jnp.float32) + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))).astype(x.dtype)


class Norm(nnx.Module):
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last axis, computed in float32."""

    def __init__(self, axes: str, width: int, kind: str, epsilon: float, bias: bool) -> None:
        self.axes, self.kind, self.epsilon = axes, kind, epsilon
        self.scale = constant(axes, (width,), 1.0)
        self.bias = constant(axes, (width,), 0.0) if bias and kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        if self.kind == "layernorm":
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        leading = tuple(range(x.ndim - 1))
        wide = wide * jnp.expand_dims(weight(self.scale, self.axes, jnp.float32), leading)
        if self.bias is not None:
            wide = wide + jnp.expand_dims(weight(self.bias, self.axes, jnp.float32), leading)
        return wide.astype(x.dtype)


Rotation = tuple[jax.Array, jax.Array]
"""Cosines and sines [B, T, 1, K / 2]: how far the queries and keys of each position are turned."""


def rotation_of(positions_BT: jax.Array, width: int, theta: float) -> Rotation:
    """Cosines and sines of the angles position * theta^(-2i / width) (arXiv:2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHK: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotary positions: turn the pairs (x[i], x[i + K/2]), Llama's order, by the angles of their position."""
    cos, sin = rotation
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHK.dtype)


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """Fixed sine and cosine positions [B, T, width] (arXiv:1706.03762, section 3.5), sines first."""
    cos, sin = rotation_of(positions_BT, width, 10_000.0)
    return jnp.concatenate([sin, cos], axis=-1)[:, :, 0]


LayerCache = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, both [B, S, G, K]; the token at position p lives in slot p."""


class Attention(nnx.Module):
    """Causal multi-head, grouped-query or multi-query attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        bias = config.attention_bias
        self.query = Projection("BTD,DHK->BTHK", config, rngs, bias=bias)
        self.key = Projection("BTD,DGK->BTGK", config, rngs, bias=bias)
        self.value = Projection("BTD,DGK->BTGK", config, rngs, bias=bias)
        self.output = Projection("BTHK,HKD->BTD", config, rngs, bias=bias, residual=True)
        qk_norm = config.qk_norm
        self.query_norm = Norm("K", config.key_dim, "rmsnorm", config.norm_epsilon, False) if qk_norm else None
        self.key_norm = Norm("K", config.key_dim, "rmsnorm", config.norm_epsilon, False) if qk_norm else None
        self.softcap = config.attention_softcap

    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTS: jax.Array,
        rotation: Rotation | None,
        positions_BT: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend; with a cache, first write this call's keys and values into the slots of their positions."""
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        if rotation is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rotation), rotate(k_BTGK, rotation)
        if cache is not None:
            write = jax.vmap(lambda old, slots, new: old.at[slots].set(new, mode="drop"))
            k_BSGK, v_BSGK = (write(old, positions_BT, new) for old, new in zip(cache, (k_BTGK, v_BTGK), strict=True))
            cache = (k_BSGK, v_BSGK)
        else:
            k_BSGK, v_BSGK = k_BTGK, v_BTGK
        return self.output(attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS, self.softcap)), cache


class FeedForward(nnx.Module):
    """Two projections around a non-linearity; gated (arXiv:2002.05202) multiplies in a third one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        bias = config.mlp_bias
        self.activation = config.activation
        self.up = Projection("BTD,DF->BTF", config, rngs, bias=bias)
        self.gate = Projection("BTD,DF->BTF", config, rngs, bias=bias) if config.gated_mlp else None
        self.down = Projection("BTF,FD->BTD", config, rngs, bias=bias, residual=True)

    def _activate(self, x_BTF: jax.Array) -> jax.Array:
        match self.activation:
            case "gelu":
                return jax.nn.gelu(x_BTF, approximate=False)
            case "gelu_tanh":
                return jax.nn.gelu(x_BTF, approximate=True)
            case "silu":
                return jax.nn.silu(x_BTF)
            case _:
                return jax.nn.relu(x_BTF)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if self.gate is None:
            return self.down(self._activate(self.up(x_BTD)))
        return self.down(self._activate(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    """Attention and feed-forward, each with its norm, added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        norm = (config.norm, config.norm_epsilon, config.norm_bias)
        self.attention_norm = Norm("D", config.d_model, *norm)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm("D", config.d_model, *norm)
        self.mlp = FeedForward(config, rngs)
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTS: jax.Array,
        rotation: Rotation | None,
        positions_BT: jax.Array,
        cache: LayerCache | None,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        normed = self.attention_norm(x_BTD) if self.pre_norm else x_BTD
        y_BTD, cache = self.attention(normed, mask_BTS, rotation, positions_BT, cache)
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, keys[0])
        x_BTD = x_BTD if self.pre_norm else self.attention_norm(x_BTD)
        normed = self.mlp_norm(x_BTD) if self.pre_norm else x_BTD
        x_BTD = x_BTD + dropout(self.mlp(normed), self.dropout, keys[1])
        return x_BTD if self.pre_norm else self.mlp_norm(x_BTD), cache
