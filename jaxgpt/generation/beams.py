"""Beam search: the continuations of a text that are the most probable as a whole, as far as a few beams find them.

Letters: B beams, each in a slot, S places of a text, V vocabulary. All but the model's work is done on every device."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.generation.decode import Slots
from jaxgpt.generation.sampling import edit
from jaxgpt.model import Transformer
from jaxgpt.sharding import shard


@jax.jit
def beam_search(model: Transformer, slots: Slots, length_penalty: Array) -> tuple[Array, Array, Array]:
    """Continue the text of slot 0 by as many beams as there are slots. Returns complete texts [B, S], the best first,
    their lengths [B], and whether logits were not finite, which ends the search. A score is the sum of the new tokens'
    log-probabilities over their number to the power of `length_penalty`. The rule is that of transformers: of all
    continuations the best B are taken; those among them that end are complete, and the best B that do not end go on,
    for as long as the first of these, as it is, scores more than the last of B complete texts."""
    whole = lambda x: shard(x, "____"[: x.ndim])  # noqa: E731
    rules = jax.tree.map(lambda x: jnp.broadcast_to(whole(x)[0], x.shape), slots.rules)
    (B, S), V, end = slots.tokens_BS.shape, model.config.vocab_size or 0, rules.end[0]
    ends_V = jnp.zeros(V, bool).at[jnp.where(rules.end_ids_E[0] < 0, V, rules.end_ids_E[0])].set(True, mode="drop")

    def step(carry: tuple) -> tuple:
        texts_BS, length, totals_B, cache, complete, _ = carry
        places_BT = jnp.full((B, 1), length - 1)
        read_BT = shard(jnp.take_along_axis(texts_BS, places_BT, 1), "BT")
        x_BTD, cache, _ = model(read_BT, shard(places_BT, "BT"), cache=cache, lengths_B=slots.rules.end)
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
        totals_B, from_B, _, texts_BS = best(jnp.where(is_last_V, -jnp.inf, totals_BV))
        cache = jax.tree.map(lambda x: x.at[from_B].get(out_sharding=jax.typeof(x).sharding.spec), cache)
        complete = texts_NS[order_B], lengths_N[order_B], scores_B
        return texts_BS, length + 1, totals_B, cache, complete, totals_B[0] * per_token > scores_B[-1]

    texts_BS, none_B = jnp.broadcast_to(whole(slots.tokens_BS)[0], (B, S)), jnp.full(B, -jnp.inf)
    complete = texts_BS, rules.prompt_length, none_B
    begin = texts_BS, rules.prompt_length[0], none_B.at[0].set(0), slots.caches[0], complete, jnp.array(True)
    *_, totals_B, _, (texts_BS, lengths_B, _), _ = jax.lax.while_loop(lambda carry: carry[-1], step, begin)
    return texts_BS, lengths_B, jnp.isnan(totals_B[0])
