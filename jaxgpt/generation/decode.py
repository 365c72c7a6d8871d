"""The jitted part of generation: a fixed number of slots, filled with prompts and continued until each is complete.

All that changes is one pytree, `Slots`. `admit` puts requests into free slots, `prefill` runs a chunk of their prompts
through the model to fill the cache, and `decode` feeds the newest token of every slot through the model, which writes
its keys and values in place, and appends what `choose` takes: many steps in one `while_loop` on the device. What a slot
computes depends on its own request alone. Prefill leaves out the last token of a prompt: decoding begins with it, so
there is one place where a token is chosen.
Letters: B slots, Q parts that the mesh cuts them into, P slots of a part that are filled at once, C tokens of a chunk,
S places of the cache and of the text, N alternatives."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.generation.sampling import MAX_ALTERNATIVES, Rules, SamplingParams, choose
from jaxgpt.model import Cache, Transformer
from jaxgpt.model import new_cache as empty_cache
from jaxgpt.model_config import ModelConfig
from jaxgpt.sharding import out_sharding, shard


class Slots(NamedTuple):
    """Texts in the making, and what is known of them."""

    cache: Cache
    tokens_BS: Array  # prompt and completion, int32; what is behind a slot's length means nothing
    logprobs_BS: Array  # of each generated token, where the slot's rules record them; so are the next two
    top_ids_BSN: Array
    top_logprobs_BSN: Array
    lengths_B: Array  # tokens of each slot so far
    done_B: Array  # True once a text is complete, and in a free slot
    failed_B: Array  # whether it ended because its logits were not finite
    rules: Rules
    steps: Array  # that the last dispatch took


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_slots(config: ModelConfig, slots: int, length: int) -> Slots:
    """Free slots for texts of up to `length` tokens."""

    def zeros(axes: str, *more: int, dtype: Any = jnp.int32) -> Array:
        return jnp.zeros((slots, *more), dtype, out_sharding=out_sharding(axes))

    example = Rules.of(SamplingParams(), 1, 1, (), 0)
    rules = jax.tree.map(lambda x: zeros("B_"[: 1 + x.ndim], *x.shape, dtype=x.dtype), example)
    return Slots(
        cache=empty_cache(config, slots, length), tokens_BS=zeros("BS", length),
        logprobs_BS=zeros("BS", length, dtype=jnp.float32), top_ids_BSN=zeros("BSN", length, MAX_ALTERNATIVES),
        top_logprobs_BSN=zeros("BSN", length, MAX_ALTERNATIVES, dtype=jnp.float32), lengths_B=zeros("B"),
        done_B=jnp.ones_like(zeros("B"), bool), failed_B=zeros("B", dtype=bool), rules=rules, steps=jnp.int32(0),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="length")
def resize(slots: Slots, length: int) -> Slots:
    """The same slots with room for texts of up to `length` tokens: attention reads all the places that there are."""

    def fit(x: Array) -> Array:
        grown = max(length - x.shape[1], 0)
        return jnp.pad(x[:, :length], ((0, 0), (0, grown), *[(0, 0)] * (x.ndim - 2)))

    names = ("cache", "tokens_BS", "logprobs_BS", "top_ids_BSN", "top_logprobs_BSN")
    return slots._replace(**{name: jax.tree.map(fit, getattr(slots, name)) for name in names})


@functools.partial(jax.jit, donate_argnames="slots")
def admit(slots: Slots, new_B: Array, tokens_BS: Array, rules: Rules) -> Slots:
    """Begin new texts in the slots that `new_B` marks: their prompts, as yet without a cache, and their rules."""

    def put(new: Array, old: Array) -> Array:
        return jnp.where(new_B.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return slots._replace(
        tokens_BS=put(tokens_BS, slots.tokens_BS),
        lengths_B=put(rules.prompt_length, slots.lengths_B),
        done_B=slots.done_B & ~new_B,
        failed_B=slots.failed_B & ~new_B,
        rules=jax.tree.map(put, rules, slots.rules),
    )


@functools.partial(jax.jit, static_argnames="chunk", donate_argnames="slots")
def prefill(model: Transformer, slots: Slots, chosen_QP: Array, start: Array, chunk: int) -> Slots:
    """Fill the cache of some slots with their tokens from place `start` on, `chunk` of them. `chosen_QP` numbers the
    slots within each part of the mesh; a number beyond them stands for none."""
    parts, rows = chosen_QP.shape
    S = slots.tokens_BS.shape[1]

    def take(x: Array) -> Array:
        taken = jax.vmap(lambda x, chosen: x.at[chosen].get(mode="clip"))(_by_part(x, parts), chosen_QP)
        return _joined(taken)

    def put(old: Array, new: Array) -> Array:
        write = jax.vmap(lambda old, chosen, new: old.at[chosen].set(new, mode="drop"))
        return _joined(write(_by_part(old, parts), chosen_QP, _by_part(new, parts)))

    places_R = start + jnp.arange(chunk)
    positions_RC = jnp.broadcast_to(places_R[None], (parts * rows, chunk))
    missing = positions_RC >= (take(slots.lengths_B) - 1)[:, None]  # the last token is left to `decode`
    positions_RC = shard(jnp.where(missing, S, positions_RC), "BT")  # which is not written
    tokens_RC = take(slots.tokens_BS).at[:, places_R].get(mode="clip", out_sharding=out_sharding("BT"))
    _, cache = model(tokens_RC, positions_BT=positions_RC, cache=jax.tree.map(take, slots.cache))
    return slots._replace(cache=jax.tree.map(put, slots.cache, cache))


def _by_part(x: Array, parts: int) -> Array:
    """[B, ...] -> [Q, B / Q, ...], each part on the devices that have it."""
    first, *rest = jax.typeof(x).sharding.spec
    return x.reshape(parts, -1, *x.shape[1:], out_sharding=jax.P(first, None, *rest))


def _joined(x: Array) -> Array:
    first, _, *rest = jax.typeof(x).sharding.spec
    return x.reshape(-1, *x.shape[2:], out_sharding=jax.P(first, *rest))


@functools.partial(jax.jit, donate_argnames="slots")
def decode(model: Transformer, slots: Slots, stopped_B: Array, enough: Array, steps: Array) -> Slots:
    """Append up to `steps` tokens to each text that is not complete; fewer once `enough` more texts are. `stopped_B`
    marks those that the host has found complete, for example by a stop text."""

    def step(slots: Slots) -> Slots:
        rules, lengths_B = slots.rules, slots.lengths_B
        newest_B = jax.vmap(lambda tokens_S, length: tokens_S[length - 1])(slots.tokens_BS, lengths_B)
        places_B1 = jnp.maximum(lengths_B - 1, 0)[:, None]
        x_B1D, cache = model(newest_B[:, None], positions_BT=places_B1, cache=slots.cache)
        assert cache is not None
        logits_BV = model.logits(x_B1D)[:, 0]
        token_B = choose(logits_BV, rules, slots.tokens_BS, lengths_B)
        failed_B = ~slots.done_B & ~jnp.isfinite(logits_BV.sum(-1))
        live_B = ~slots.done_B & ~failed_B
        place_B = jnp.where(live_B, lengths_B, slots.tokens_BS.shape[1])  # else it is not written
        slots = _record(slots, live_B & rules.logprobs, place_B, token_B, logits_BV)
        lengths_B = lengths_B + live_B
        ends_B = (token_B[:, None] == rules.end_ids_E).any(-1) & (lengths_B > rules.first_end)
        return slots._replace(
            cache=cache,
            tokens_BS=_write(slots.tokens_BS, place_B, token_B),
            lengths_B=lengths_B,
            done_B=slots.done_B | failed_B | (live_B & (ends_B | (lengths_B >= rules.end))),
            failed_B=slots.failed_B | failed_B,
            steps=slots.steps + 1,
        )

    slots = slots._replace(done_B=slots.done_B | stopped_B, steps=jnp.int32(0))
    complete = slots.done_B.sum()

    def go_on(slots: Slots) -> Array:
        return (slots.steps < steps) & ~slots.done_B.all() & (slots.done_B.sum() < complete + enough)

    return jax.lax.while_loop(go_on, step, slots)


def _write(x: Array, place_B: Array, new: Array) -> Array:
    return jax.vmap(lambda row, place, value: row.at[place].set(value, mode="drop"))(x, place_B, new)


def _record(slots: Slots, wanted_B: Array, place_B: Array, token_B: Array, logits_BV: Array) -> Slots:
    def record(old: tuple) -> tuple:
        log_p_BV = jax.nn.log_softmax(logits_BV)
        chosen_B = jax.vmap(lambda log_p, token: log_p[token])(log_p_BV, token_B)
        top_BN, ids_BN = jax.lax.top_k(log_p_BV, min(MAX_ALTERNATIVES, log_p_BV.shape[-1]))
        pad = ((0, 0), (0, MAX_ALTERNATIVES - top_BN.shape[-1]))
        new = chosen_B, jnp.pad(ids_BN, pad), jnp.pad(top_BN, pad, constant_values=-jnp.inf)
        return tuple(_write(x, place_B, value) for x, value in zip(old, new, strict=True))

    old = slots.logprobs_BS, slots.top_ids_BSN, slots.top_logprobs_BSN
    logprobs_BS, ids_BSN, top_BSN = jax.lax.cond(wanted_B.any(), record, lambda old: old, old)
    return slots._replace(logprobs_BS=logprobs_BS, top_ids_BSN=ids_BSN, top_logprobs_BSN=top_BSN)
