"""The decoder-only transformer: tokens to hidden states to logits.

The layers' parameters are stacked, [L, ...], and scanned. `Transformer` is a pytree: `jax.jit`, `jax.grad`
and Optax take it as it is. Letters: `jaxgpt/sharding.py`."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgpt.config import ModelConfig
from jaxgpt.kernels.attention import LayerCache, attention_mask, cached_attention, causal_attention, chosen_form
from jaxgpt.kernels.cross_entropy import output_logits
from jaxgpt.model.layers import Block, Norm, Projection, dropout, normal, sinusoids, weight
from jaxgpt.model.rotary import rotations_of
from jaxgpt.sharding import out_sharding, shard

Cache = tuple[LayerCache, ...]  # a pair of arrays [B, S, G, K] for each layer, so that each is updated in place
_KEPT: dict[str, Callable | None] = {  # for the backward pass, by `config.remat`
    # All but weights that were gathered over fsdp: all layers' together are the whole model.
    "none": lambda primitive, *_, **__: primitive.name != "reshard",
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}
_run_cached = jax.jit(Block.__call__)  # of SmolLM2's 30 layers one is traced: a second less before its first token


class Transformer(nnx.Module):
    """A GPT. `layers` is one Block whose parameters carry a leading axis L, or a tuple of L Blocks (`unstacked`)."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        """Draw the parameters as GPT-2 or nanoGPT does. `config.vocab_size` must be set."""
        if config.vocab_size is None:
            raise ValueError("config.vocab_size is not set: take it from the tokenizer")
        self.config, self.few_rows = config, False
        layers_key, rest_key = jax.random.split(key)
        rngs = nnx.Rngs(rest_key)
        self.token_embedding = normal(rngs, "VD", config)
        learned, std = config.positions == "learned", 0.01 if config.init == "gpt2" else 0.02
        self.position_embedding = normal(rngs, "SD", config, std) if learned else None
        keys = jax.random.split(layers_key, config.n_layers)
        self.layers: Block | tuple[Block, ...] = jax.vmap(lambda k: Block(config, nnx.Rngs(k)))(keys)
        self.final_norm = None if config.norm_position == "post" else Norm("D", config)
        self.unembedding = None if config.tie_embeddings else normal(rngs, "VD", config)

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        segments_BT: Array | None = None,
        cache: Cache | None = None,
        dropout_key: Array | None = None,
        lengths_B: Array | None = None,
    ) -> tuple[Array, Cache | None, Array | None]:
        """Hidden states [B, T, D] after the last norm, the cache with this call's keys and values, and the mean over
        the layers of `router_losses` [2]: None without experts or with a cache. A token sees what stands before it in
        its document; `segments_BT` numbers those of a row. With a cache, which has one a row, positions say into which
        slots keys and values go, and what is seen; a position beyond it is not written. `lengths_B` says how long each
        text will be, which counts for longrope; by default as long as the row, or the cache."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
            positions_BT = shard(positions_BT, "BT")
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x_BTD = dropout(self._embed(tokens_BT, positions_BT), self.config.dropout, keys[0])
        length = tokens_BT.shape[1] if cache is None else cache[0][0].shape[1]
        rotations: tuple = None, (0,) * self.config.n_layers  # of all kinds, and the kind of each layer
        if self.config.positions == "rotary":
            rotations = rotations_of(self.config, positions_BT, length if lengths_B is None else lengths_B)
        losses = None
        if cache is None:
            segments_BT = jnp.zeros_like(positions_BT) if segments_BT is None else segments_BT
            x_BTD, losses = self._train_layers(x_BTD, segments_BT, rotations, keys[1])
        elif segments_BT is not None or dropout_key is not None:
            raise ValueError("a cache holds one document a row and is not for training: no segments, no dropout")
        else:
            x_BTD, cache = self._cached_layers(x_BTD, positions_BT, rotations, cache)
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD), cache, losses

    def _embed(self, tokens_BT: Array, positions_BT: Array) -> Array:
        dtype, where = jnp.dtype(self.config.dtype), out_sharding("BTD")
        # Cast after the look-up: the gradient adds up all uses of a token, and bfloat16 cannot count past 256.
        x_BTD = shard(self.token_embedding[...], "VD").at[tokens_BT].get(out_sharding=where).astype(dtype)
        if self.config.scale_embeddings:
            x_BTD *= jnp.asarray(self.config.d_model**0.5, dtype)
        if self.position_embedding is not None:
            table_SD = shard(self.position_embedding[...], "SD")
            x_BTD += table_SD.at[positions_BT].get(out_sharding=where).astype(dtype)
        if self.config.positions == "sinusoidal":
            x_BTD += sinusoids(positions_BT, self.config.d_model).astype(dtype)
        return x_BTD

    def _train_layers(
        self, x_BTD: Array, segments_BT: Array, rotations: tuple, key: Array | None
    ) -> tuple[Array, Array | None]:
        """All layers over whole sequences, scanned or unrolled; the backward pass recomputes as `config.remat` says."""
        config, (rotations, kinds) = self.config, rotations
        form, _ = chosen_form(config, x_BTD.shape[1])

        def run(x_BTD: Array, layer: Block, window: Any, kind: Any, key: Any) -> tuple:
            rotation = jax.tree.map(lambda each: each[kind], rotations)
            attend = functools.partial(causal_attention, form, segments_BT=segments_BT, window=window)
            whole: Callable = functools.partial(Block.__call__, attend=attend)  # no argument, so that an int stays one
            if config.remat != "none" or jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1:
                whole = jax.checkpoint(whole, policy=_KEPT[config.remat])
            return whole(layer, x_BTD, rotation=rotation, dropout_key=key)[::2]  # there is no cache

        windows, keys = config.layer_windows, None if key is None else jax.random.split(key, config.n_layers)
        if not config.scan_layers or isinstance(self.layers, tuple):
            each = []
            for i, layer in enumerate(self.unstacked().layers):  # type: ignore[arg-type]
                x_BTD, losses = run(x_BTD, layer, windows[i], kinds[i], None if keys is None else keys[i])
                each.append(losses)
            return x_BTD, jnp.stack(each).mean(0) if config.n_experts else None
        # What all layers share is a constant of the compiled layer.
        window_L, kind_L = (None if len(set(each)) == 1 else jnp.array(each) for each in (windows, kinds))

        def step(x_BTD: Array, inputs: tuple) -> tuple[Array, Array | None]:
            layer, window, kind, key = inputs
            return run(x_BTD, layer, windows[0] if window is None else window, 0 if kind is None else kind, key)

        x_BTD, losses_L2 = jax.lax.scan(step, x_BTD, (self.layers, window_L, kind_L, keys))
        return x_BTD, None if losses_L2 is None else losses_L2.mean(0)

    def _cached_layers(self, x_BTD: Array, positions_BT: Array, rotations: tuple, cache: Cache) -> tuple[Array, Cache]:
        """All layers, unrolled: a scan would copy each layer's weights and its whole cache at every token."""
        slots_BS = jnp.arange(cache[0][0].shape[1], dtype=jnp.int32)[None]
        new, layers, windows = [], self.unstacked().layers, self.config.layer_windows
        masks = {window: attention_mask(positions_BT, slots_BS, None, window) for window in set(windows)}
        turns = {kind: jax.tree.map(lambda each, kind=kind: each[kind], rotations[0]) for kind in set(rotations[1])}
        for layer, w, kind, old in zip(layers, windows, rotations[1], cache, strict=True):  # type: ignore[arg-type]
            attend = jax.tree_util.Partial(cached_attention, cache=old, positions_BT=positions_BT, mask_BTS=masks[w])
            x_BTD, layer_cache, _ = _run_cached(layer, x_BTD, attend, turns[kind], None)
            new.append(layer_cache)
        return x_BTD, tuple(new)

    def unstacked(self) -> "Transformer":
        """The same model with a tuple of layers, for decoding: each layer's weights are arrays of their own."""
        if isinstance(self.layers, tuple):
            return self
        model = copy.copy(self)
        model.layers = tuple(jax.tree.map(lambda p, i=i: p[i], self.layers) for i in range(self.config.n_layers))
        return model

    def turn(self) -> None:
        """Let `matrix_first` multiply, in place: for layers that are not stacked."""
        self.few_rows = True
        is_projection = lambda each: isinstance(each, Projection)  # noqa: E731
        for projection in filter(is_projection, jax.tree.leaves(self.layers, is_leaf=is_projection)):
            projection.turn()

    def output_embedding(self) -> Array:
        """The output projection [V, D], gathered, in the compute dtype; its rows beyond the vocabulary mean nothing."""
        table = self.token_embedding if self.unembedding is None else self.unembedding
        return weight(table, "VD", jnp.dtype(self.config.dtype))

    def logits(self, x_BTD: Array) -> Array:
        """Float32 scores [B, T, V] of the next token, V the true vocabulary."""
        logits_BTV = output_logits(x_BTD, self.output_embedding(), self.config.logit_softcap, self.few_rows)
        return shard(logits_BTV, "BT_")[..., : self.config.vocab_size]


def new_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
    """An empty cache for `batch_size` sequences of up to `length` tokens, in the compute dtype."""
    shape = (batch_size, length, config.kv_heads, config.key_dim)
    empty = lambda: jnp.zeros(shape, jnp.dtype(config.dtype), out_sharding=out_sharding("BSGK"))  # noqa: E731
    return tuple((empty(), empty()) for _ in range(config.n_layers))


def parameter_name(path: tuple) -> str:
    """A parameter's name, such as `layers.attention.query.kernel`, from its path (which ends in Param's `value`)."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def parameter_count(model: Transformer) -> int:
    """Number of parameters, without the rows that round the vocabulary up."""
    config = model.config
    padding = (config.vocab_rows - (config.vocab_size or 0)) * config.d_model * (1 if config.tie_embeddings else 2)
    return sum(leaf.size for leaf in jax.tree.leaves(model)) - padding
