"""The jitted part of generation: fill the cache with the prompts, then append one token after the other.

All that changes is one pytree, `DecodeState`. Every step feeds the newest token of each row through the model, which
reads and writes the cache, and appends what `choose` takes; the loop is one `while_loop` on the device.
Letters: B rows, P padded prompt length, S slots of the cache and of the text."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.generation.sampling import choose
from jaxgpt.model import Cache, Transformer
from jaxgpt.model import new_cache as empty_cache
from jaxgpt.sharding import shard


class DecodeState(NamedTuple):
    """Rows of text in the making."""

    cache: Cache
    tokens_BS: jax.Array
    """Prompt and completion, int32; what is behind a row's length means nothing."""
    lengths_B: jax.Array
    """Tokens of each row so far."""
    done_B: jax.Array
    """True once a row is complete: its length does not change any more."""
    keys_B: jax.Array
    """Each row's random key; the draw at a position depends on it and the position alone."""


class Settings(NamedTuple):
    """What ends a row and how tokens are chosen; all arrays, so that other values run the same program."""

    ends_B: jax.Array
    """Length at which each row is complete."""
    end_ids: jax.Array
    """Tokens that end a text."""
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


@functools.partial(jax.jit, static_argnames="slots")
def start(
    model: Transformer, prompts_BP: jax.Array, lengths_B: jax.Array, keys_B: jax.Array, slots: int
) -> DecodeState:
    """Run all prompts through the model at once. What their padding leaves in the cache is overwritten by the token
    that comes to its slot before any query can see it."""
    rows, padded = prompts_BP.shape
    _, cache = model(prompts_BP, cache=empty_cache(model.config, rows, slots))
    tokens_BS = shard(jnp.pad(prompts_BP, ((0, 0), (0, slots - padded))), "BS")
    assert cache is not None
    return DecodeState(cache, tokens_BS, lengths_B, jnp.zeros_like(lengths_B, bool), keys_B)


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="state")
def decode(model: Transformer, state: DecodeState, settings: Settings, steps: int) -> DecodeState:
    """Append up to `steps` tokens to each row that is not done."""

    def append(tokens_S: jax.Array, length: jax.Array, key: jax.Array, logits_V: jax.Array) -> tuple:
        how = settings.temperature, settings.top_k, settings.top_p
        token = choose(logits_V, jax.random.fold_in(key, length), *how)
        return tokens_S.at[length].set(token, mode="drop"), token

    def step(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        count, (cache, tokens_BS, lengths_B, done_B, keys_B) = carry
        newest_B = jax.vmap(lambda tokens_S, length: tokens_S[length - 1])(tokens_BS, lengths_B)
        x_B1D, new_cache = model(newest_B[:, None], positions_BT=lengths_B[:, None] - 1, cache=cache)
        assert new_cache is not None
        appended_BS, token_B = jax.vmap(append)(tokens_BS, lengths_B, keys_B, model.logits(x_B1D)[:, 0])
        tokens_BS = jnp.where(done_B[:, None], tokens_BS, appended_BS)
        lengths_B = lengths_B + ~done_B
        done_B = done_B | (token_B[:, None] == settings.end_ids[None]).any(-1) | (lengths_B >= settings.ends_B)
        return count + 1, DecodeState(new_cache, tokens_BS, lengths_B, done_B, keys_B)

    def go_on(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        return (carry[0] < steps) & ~carry[1].done_B.all()

    return jax.lax.while_loop(go_on, step, (jnp.int32(0), state))[1]
