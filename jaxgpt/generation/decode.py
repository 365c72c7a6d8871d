"""The jitted part of generation: a fixed number of slots, filled with prompts and continued until each is complete.

All that changes is one pytree, `Slots`. `admit` puts requests into free slots, `prefill` runs a chunk of their prompts
through the model to fill the cache, and `decode` feeds the newest token of every slot through the model, which writes
its keys and values in place, and appends what `choose` takes: many steps in one `while_loop` on the device. What a slot
computes depends on its own request alone. Decoding begins with the last token of a prompt, so tokens are chosen there
alone. Letters: B slots, Q parts that the mesh cuts them into, C tokens of a chunk, S places of the cache and of the
text, G guesses, T = 1 + G, N alternatives, or states of automata."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.config import ModelConfig
from jaxgpt.generation.sampling import MAX_ALTERNATIVES, NO_RULES, Rules, choose, edit
from jaxgpt.kernels.attention import write_rows
from jaxgpt.model import Cache, Transformer, new_cache
from jaxgpt.sharding import out_sharding, shard

# For each state of all automata [N, V] that of the same automaton which a token leads to, or -1 where the token may not
# come; and the first state of the one that each text follows [B]. State 0 is an automaton of its own, and allows all.
Forms = tuple[Array, Array]
# Log-probabilities of tokens, ids of the N most probable ones at their places, and those of these ids.
Recorded = tuple[Array, Array, Array]
Models = tuple[Transformer, ...]  # the one that writes, and behind it a smaller one where that is to guess
_read = jax.vmap(lambda row, places: row.at[places].get(mode="clip"))


class Slots(NamedTuple):
    """Texts in the making, and what is known of them."""

    caches: tuple[Cache, ...]  # one for each of the models
    tokens_BS: Array  # prompt and completion, int32; what is behind a slot's length means nothing
    recorded: Recorded  # [B, S], [B, S, N] twice: where a request wants them
    lengths_B: Array  # tokens of each slot so far
    states_B: Array  # of the automaton that each text follows
    done_B: Array  # True once a text is complete, and in a free slot
    failed_B: Array  # whether it ended because its logits were not finite
    rules: Rules
    steps: Array  # that the last dispatch took


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_slots(configs: tuple[ModelConfig, ...], slots: int, length: int) -> Slots:
    """Free slots for texts of up to `length` tokens; `configs` are those of the models."""

    def zeros(axes: str, *more: int, dtype: Any = jnp.int32) -> Array:
        return jnp.zeros((slots, *more), dtype, out_sharding=out_sharding(axes))

    rules = jax.tree.map(lambda x: zeros("B_"[: 1 + x.ndim], *x.shape, dtype=x.dtype), NO_RULES)
    top = length, min(MAX_ALTERNATIVES, configs[0].vocab_size or 0)
    recorded = zeros("BS", length, dtype=jnp.float32), zeros("BSN", *top), zeros("BSN", *top, dtype=jnp.float32)
    return Slots(
        caches=tuple(new_cache(config, slots, length) for config in configs), tokens_BS=zeros("BS", length),
        recorded=recorded, lengths_B=zeros("B"), states_B=zeros("B", dtype=jnp.int16),
        done_B=jnp.ones_like(zeros("B"), bool), failed_B=zeros("B", dtype=bool), rules=rules, steps=jnp.int32(0),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="length")
def resize(slots: Slots, length: int) -> Slots:
    """The same slots with room for texts of up to `length` tokens: attention reads all the places that there are."""

    def fit(x: Array) -> Array:
        grown = max(length - x.shape[1], 0)
        return jnp.pad(x[:, :length], ((0, 0), (0, grown), *[(0, 0)] * (x.ndim - 2)))

    caches, tokens_BS, recorded = jax.tree.map(fit, (slots.caches, slots.tokens_BS, slots.recorded))
    return slots._replace(caches=caches, tokens_BS=tokens_BS, recorded=recorded)


@functools.partial(jax.jit, donate_argnames="slots")
def admit(slots: Slots, new_B: Array, tokens_BS: Array, rules: Rules) -> Slots:
    """Begin new texts in the slots that `new_B` marks: their prompts, as yet without a cache, and their rules."""

    def put(new: Array, old: Array) -> Array:
        return jnp.where(new_B.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return slots._replace(
        tokens_BS=put(tokens_BS, slots.tokens_BS),
        lengths_B=put(rules.prompt_length, slots.lengths_B),
        states_B=put(jnp.zeros_like(slots.states_B), slots.states_B),
        done_B=slots.done_B & ~new_B,
        failed_B=slots.failed_B & ~new_B,
        rules=jax.tree.map(put, rules, slots.rules),
    )


@functools.partial(jax.jit, static_argnames=("chunk", "places", "score"), donate_argnames="slots")
def prefill(models: Models, slots: Slots, which: tuple[Array, ...], chunk: int, places: int, score: bool) -> Slots:
    """Fill the caches of one slot in each part of the mesh with `chunk` of its tokens, from its own place on; what is
    before that is copied from a donor, a slot of that part whose text begins with the same tokens. `which` are slot,
    donor and place [Q]; slots are numbered within their part, and a number beyond them stands for none. One at a time:
    more would change a row's bits on a CPU. Nothing behind `places` of the cache is read: attention over all 1536 would
    take twice the time of all else. To `score` is to record the tokens' log-probabilities, too."""
    chosen_Q, donors_Q, starts_Q = which
    parts = len(chosen_Q)

    @jax.jit  # traced once for all layers, which takes half as long
    def take(x: Array, which_Q: Array) -> Array:
        return jax.vmap(lambda x, which: x.at[which].get(mode="clip"))(_by_part(x, parts), which_Q)

    @jax.jit
    def put(old: Array, new: Array) -> Array:
        new = jnp.pad(new, ((0, 0), (0, old.shape[1] - new.shape[1]), *[(0, 0)] * (new.ndim - 2)))
        written = jax.vmap(lambda old, chosen, new: old.at[chosen].set(new, mode="drop"))
        whole = written(_by_part(old, parts), chosen_Q, new)
        return whole.reshape(old.shape, out_sharding=jax.typeof(old).sharding.spec)

    places_QC = starts_Q[:, None] + jnp.arange(chunk + 1)[None]
    read_QC = _read(take(slots.tokens_BS, chosen_Q), places_QC)
    tokens_QC, labels_QC, places_QC = read_QC[:, :-1], read_QC[:, 1:], places_QC[:, :-1]
    missing = places_QC >= (take(slots.lengths_B, chosen_Q) - 1)[:, None]  # the last token is left to `decode`
    positions_QC = jnp.where(missing, slots.tokens_BS.shape[1], places_QC)  # which is not written
    # Nothing of another text stays: what is masked has weight 0, and 0 times NaN is NaN.
    shared_QS = (jnp.arange(places)[None] < starts_Q[:, None])[:, :, None, None]
    known = jax.tree.map(lambda x: jnp.where(shared_QS, take(x, donors_Q)[:, :places], 0), slots.caches)
    tokens_QC, positions_QC = shard(tokens_QC, "BT"), shard(positions_QC, "BT")
    ends_Q = take(slots.rules.end, chosen_Q)
    read = [model(tokens_QC, positions_QC, cache=c, lengths_B=ends_Q) for model, c in zip(models, known, strict=True)]
    recorded = slots.recorded
    if score:  # a program of its own: the last layer's products, but for its keys and values, are for this alone
        of_each = jax.vmap(functools.partial(_log_probabilities, count=recorded[1].shape[-1]))
        told = of_each(models[0].logits(read[0][0]), labels_QC)
        written = lambda x, new: put(x, write_rows(take(x, chosen_Q), positions_QC + 1, new))  # noqa: E731
        recorded = jax.tree.map(written, recorded, told)
    caches = jax.tree.map(put, slots.caches, tuple(cache for _, cache, _ in read))
    return slots._replace(caches=caches, recorded=recorded)


def _log_probabilities(logits_BV: Array, tokens_B: Array, count: int) -> Recorded:
    """Of tokens; and the ids and log-probabilities of the most probable ones."""
    log_p_BV = jax.nn.log_softmax(logits_BV)
    top_BN, ids_BN = jax.lax.top_k(log_p_BV, count)
    return jax.vmap(lambda log_p_V, token: log_p_V[token])(log_p_BV, tokens_B), ids_BN, top_BN


def _by_part(x: Array, parts: int) -> Array:
    """[B, ...] -> [Q, B / Q, ...], each part on the devices that have it."""
    first, *rest = jax.typeof(x).sharding.spec
    return x.reshape(parts, -1, *x.shape[1:], out_sharding=jax.P(first, None, *rest))


@functools.partial(jax.jit, static_argnames="guesses", donate_argnames="slots")
def decode(
    models: Models, slots: Slots, forms: Forms, stopped_B: Array, enough: Array, steps: Array, guesses: int = 0
) -> Slots:
    """Append tokens to each text that is not complete, in up to `steps` passes; fewer once `enough` more texts are.
    `stopped_B` marks those that the host has found complete, for example by a stop text. A pass also reads `guesses`
    more tokens, and goes on for as long as they are what is chosen: the text stays the same, but for rounding."""
    model, *drafts = models

    def step(slots: Slots) -> Slots:
        tokens_BT = jax.vmap(functools.partial(_guess, count=guesses))(slots.tokens_BS, slots.lengths_B)
        drafted: tuple[Cache, ...] = ()
        if drafts:
            tokens_BT, drafted = _draft(drafts[0], slots, tokens_BT[:, :1], guesses)
        places_BT = jnp.maximum(slots.lengths_B - 1, 0)[:, None] + jnp.arange(1 + guesses)[None]
        x_BTD, cache, _ = model(tokens_BT, places_BT, cache=slots.caches[0], lengths_B=slots.rules.end)
        assert cache is not None
        expected_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (model.logits(x_BTD), expected_BT))
        (slots, _), _ = jax.lax.scan(go_further, (slots._replace(caches=()), ~slots.done_B), inputs)
        return slots._replace(caches=(cache, *drafted), steps=slots.steps + 1)

    def go_further(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        return jax.lax.cond(carry[1].any(), functools.partial(_append, forms), lambda old, _: old, carry, inputs), None

    def without(done: Array, rules: Rules) -> Rules:  # or what a complete text asked for would be done for the others
        return jax.tree.map(lambda none, own: jnp.where(done, none, own), NO_RULES, rules)

    done_B = slots.done_B | stopped_B
    slots = slots._replace(done_B=done_B, rules=jax.vmap(without)(done_B, slots.rules), steps=jnp.int32(0))
    complete = slots.done_B.sum()

    def go_on(slots: Slots) -> Array:
        return (slots.steps < steps) & ~slots.done_B.all() & (slots.done_B.sum() < complete + enough)

    return jax.lax.while_loop(go_on, step, slots)


def _draft(model: Transformer, slots: Slots, newest_B1: Array, count: int) -> tuple[Array, tuple[Cache, ...]]:
    """The newest tokens, and behind them what a smaller model chooses by the same rules and random numbers
    (arXiv:2211.17192, with guesses that are right or wrong, not weighed); and its cache."""

    def further(carry: tuple, nothing: None) -> tuple[tuple, Array]:
        tokens_BS, lengths_B, cache = carry
        places_BT = lengths_B[:, None] + jnp.arange(-2, 0)[None]  # it has not read the last token of its last guess
        tokens_BT = _read(tokens_BS, jnp.maximum(places_BT, 0))
        places_BT = jnp.where(places_BT < 0, tokens_BS.shape[1], places_BT)  # which is not written
        x_BTD, cache, _ = model(tokens_BT, places_BT, cache=cache, lengths_B=slots.rules.end)
        token_B = choose(model.logits(x_BTD[:, 1:])[:, 0], slots.rules, tokens_BS, lengths_B)
        return (write_rows(tokens_BS, lengths_B, token_B), lengths_B + 1, cache), token_B

    begin = slots.tokens_BS, slots.lengths_B, slots.caches[1]
    (*_, cache), guessed_GB = jax.lax.scan(further, begin, length=count)
    return jnp.concatenate([shard(newest_B1, "BT"), shard(guessed_GB.T, "BT")], 1), (cache,)


def _guess(tokens_S: Array, length: Array, count: int) -> Array:
    """The newest token, and what followed it the last time that the text had its newest three tokens, or else two, or
    one (prompt look-up decoding); if that runs into the end, the same again."""
    places_S = jnp.arange(len(tokens_S))
    same_S, matches_S = places_S < length - 1, jnp.zeros_like(places_S)
    for back in range(3):
        same_S &= (tokens_S[places_S - back] == tokens_S[length - 1 - back]) & (places_S >= back)
        matches_S += same_S
    begin = jnp.minimum((matches_S * len(tokens_S) + places_S).argmax() + 1, length - 1)
    return tokens_S[begin + jnp.arange(-1, count) % (length - begin)]  # -1 is the newest one's place


def _append(forms: Forms, carry: tuple[Slots, Array], inputs: tuple[Array, Array]) -> tuple[Slots, Array]:
    """One more token to each text that goes on; it goes on further if the token is the expected one."""
    (slots, going_B), (logits_BV, expected_B) = carry, inputs
    rules, recorded = slots.rules, slots.recorded
    next_NV, begins_B = forms
    states_B = begins_B + slots.states_B

    def allow(x_BV: Array) -> Array:
        return jnp.where(next_NV.at[states_B].get(out_sharding=out_sharding("B_")) >= 0, x_BV, -jnp.inf)

    allowed_BV = jax.lax.cond((begins_B > 0).any(), allow, lambda x_BV: x_BV, logits_BV)
    token_B = choose(allowed_BV, rules, slots.tokens_BS, slots.lengths_B)
    next_B = next_NV.at[states_B, token_B].get(out_sharding=out_sharding("B"))
    failed_B = going_B & ~jnp.isfinite(logits_BV.sum(-1))
    live_B = going_B & ~failed_B
    place_B = jnp.where(live_B, slots.lengths_B, slots.tokens_BS.shape[1])  # else it is not written

    def record(old: Recorded) -> Recorded:
        new = _log_probabilities(logits_BV, token_B, old[1].shape[-1])
        return jax.tree.map(lambda x, value: write_rows(x, place_B, value), old, new)

    recorded = jax.lax.cond((live_B & rules.logprobs).any(), record, lambda old: old, recorded)
    lengths_B = slots.lengths_B + live_B
    ends_B = (token_B[:, None] == rules.end_ids_E).any(-1) & (lengths_B > rules.first_end)
    done_B = slots.done_B | failed_B | (live_B & (ends_B | (lengths_B >= rules.end)))
    slots = slots._replace(
        tokens_BS=write_rows(slots.tokens_BS, place_B, token_B), recorded=recorded, lengths_B=lengths_B, done_B=done_B,
        states_B=jnp.where(live_B, next_B, slots.states_B), failed_B=slots.failed_B | failed_B,
    )  # fmt: skip
    return slots, live_B & ~done_B & (token_B == expected_B)


@jax.jit
def beam_search(model: Transformer, slots: Slots, length_penalty: Array) -> tuple[Array, Array, Array]:
    """Continue the text of slot 0 by as many beams as there are slots: complete texts [B, S], the best first, their
    lengths [B], and whether logits were not finite, which ends it. A score is the sum of the new tokens'
    log-probabilities over their number to the power of `length_penalty`. The rule is that of transformers: of all
    continuations the best B are taken; those of them that end are complete, and the best B that do not end go on, while
    the first of these, as it is, scores more than the last of B complete texts."""
    whole = lambda x: shard(x, "____"[: x.ndim])  # noqa: E731
    rules = jax.tree.map(lambda x: jnp.broadcast_to(whole(x)[0], x.shape), slots.rules)
    (B, S), V, end = slots.tokens_BS.shape, model.config.vocab_size or 0, rules.end[0]
    ends_V = jnp.zeros(V, bool).at[jnp.where(rules.end_ids_E[0] < 0, V, rules.end_ids_E[0])].set(True, mode="drop")

    def step(carry: tuple) -> tuple:
        texts_BS, length, totals_B, cache, complete, _ = carry
        places_BT = jnp.full((B, 1), length - 1)
        read_BT = shard(jnp.take_along_axis(texts_BS, places_BT, 1), "BT")
        x_BTD, cache, _ = model(read_BT, shard(places_BT, "BT"), cache=cache, lengths_B=shard(rules.end, "B"))
        logits_BV = whole(model.logits(x_BTD)[:, 0])
        log_p_BV = edit(jax.nn.log_softmax(logits_BV), rules, texts_BS, jnp.full(B, length))
        totals_BV = totals_B[:, None] + log_p_BV + 0 * logits_BV.sum()  # NaN, which ends it, where one is not finite

        def best(totals_BV: Array) -> tuple[Array, Array, Array, Array]:
            totals_B, at_B = jax.lax.top_k(totals_BV.reshape(-1), B)
            return totals_B, at_B // V, at_B % V, texts_BS[at_B // V].at[:, length].set(at_B % V)

        per_token = 1 / (length + 1 - rules.prompt_length[0]) ** length_penalty
        is_last_V = ends_V | (length + 1 >= end)
        sums_B, _, tokens_B, ended_BS = best(totals_BV)
        scores_B = jnp.where(is_last_V[tokens_B], sums_B * per_token, -jnp.inf)
        ended = ended_BS, jnp.full(B, length + 1), scores_B
        texts_NS, lengths_N, scores_N = jax.tree.map(lambda *each: jnp.concatenate(each), complete, ended)
        scores_B, order_B = jax.lax.top_k(scores_N, B)
        totals_B, from_B, _, texts_BS = best(jnp.where(is_last_V, totals_BV - jnp.inf, totals_BV))  # NaN stays
        cache = jax.tree.map(lambda x: x.at[from_B].get(out_sharding=jax.typeof(x).sharding.spec), cache)
        complete = texts_NS[order_B], lengths_N[order_B], scores_B
        return texts_BS, length + 1, totals_B, cache, complete, totals_B[0] * per_token > scores_B[-1]

    texts_BS, none_B = jnp.broadcast_to(whole(slots.tokens_BS)[0], (B, S)), jnp.full(B, -jnp.inf)
    complete = texts_BS, rules.prompt_length, none_B
    begin = texts_BS, rules.prompt_length[0], none_B.at[0].set(0), slots.caches[0], complete, jnp.array(True)
    *_, totals_B, _, (texts_BS, lengths_B, _), _ = jax.lax.while_loop(lambda carry: carry[-1], step, begin)
    return texts_BS, lengths_B, jnp.isnan(totals_B[0])
