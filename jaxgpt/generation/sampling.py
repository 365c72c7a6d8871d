"""Sampling: what a request may ask for, and the rule that picks each next token on the device.

Every setting is an array over the slots, so that any mix of requests runs one program; what no slot asks for is skipped
by a `cond` over all of them. A filter is a cut: the lowest score that stays. It is found by bisection over the bits of
float32, 32 passes over the scores, where sorting 49152 of them takes XLA 12 ms for each row on a CPU.
Letters: B slots, V vocabulary, S places of a text, E end ids, N biased ids."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.config import Section
from jaxgpt.errors import require

Numbers = Any  # NumPy's, of one request on the host; JAX's on the devices, with a leading axis B
MAX_ENDS, MAX_BIASED, MAX_ALTERNATIVES = 32, 300, 20
_FILTERS, _FORMS = ("top_k", "top_p", "min_p", "typical_p"), ("choice", "regex", "json_schema")
_NOT_OF_BEAMS = (*_FILTERS, *_FORMS, "stop", "logprobs", "prompt_logprobs", "best_of")


@dataclass(frozen=True)
class SamplingParams(Section):
    """How to choose each next token, and when to stop."""

    max_new_tokens: int = 100  # Most tokens to generate.
    temperature: float = 1.0  # Divides the logits; 0 always takes the most probable token.
    top_k: int = 0  # Choose among this many most probable tokens (more where several are equal); 0 is all.
    top_p: float = 1.0  # Choose among the most probable tokens that together reach this (arXiv:1904.09751).
    min_p: float = 0.0  # Choose among tokens of at least this share of the largest probability (arXiv:2407.01082).
    typical_p: float = 1.0  # Choose among tokens nearest to the expected surprise that reach this (arXiv:2202.00666).
    repetition_penalty: float = 1.0  # Divides positive logits of tokens so far, multiplies negative (arXiv:1909.05858).
    presence_penalty: float = 0.0  # Subtracted from the logits of tokens that were generated.
    frequency_penalty: float = 0.0  # Subtracted from a token's logit for each time that it was generated.
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), at most 300.
    seed: int = 0  # Random numbers come from it, the number of the sample and the position alone.
    num_samples: int = 1  # Samples of the prompt.
    best_of: int = 0  # Make this many, and keep the num_samples whose tokens have the highest mean log-probability.
    beam_width: int = 0  # Search with so many beams for the num_samples most probable texts, instead of sampling.
    length_penalty: float = 1.0  # Beams compete by their log-probability over their new tokens to the power of this.
    choice: tuple[str, ...] = ()  # The completion is one of these texts,
    regex: str = ""  # or such that all of it matches this,
    json_schema: str = ""  # or JSON that this schema, as JSON, allows. These need the extra `constrain`.
    # Cut a prompt that leaves no room for max_new_tokens, on the left or right, to half the context at the least.
    truncate: Literal["no", "left", "right"] = "no"
    stop: tuple[str, ...] = ()  # Texts that end a completion, which goes up to where one begins.
    stop_token_ids: tuple[int, ...] = ()  # Tokens that end a completion, beside the model's own.
    min_new_tokens: int = 0  # No token ends a completion before this many.
    ignore_eos: bool = False  # Go on after the model's own end of a text.
    logprobs: int | None = None  # Log-probabilities of each token and so many alternatives, before any of the above.
    prompt_logprobs: int | None = None  # The same of the tokens of the prompt but the first, with the first sample.

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("best_of", 1024), ("beam_width", 64)):
            self.within(self.num_samples if getattr(self, name) else 0, most, name)
        odd = [name for name in _NOT_OF_BEAMS if getattr(self, name) != getattr(SamplingParams, name)]
        odd += [] if self.temperature in (0, 1) else ["temperature"]
        require(not (self.beam_width and odd), f"{', '.join(odd)}: beam search has no use for it; leave it out")
        legal = self.temperature == 0 or 0.001 <= self.temperature <= 1000  # so NaN is not
        require(legal, f"temperature is {self.temperature}: it must be 0, or between 0.001 and 1000")
        self.within(0, self.max_new_tokens, "min_new_tokens")
        few = len(self.logit_bias) <= MAX_BIASED and all(abs(by) <= 1000 for _, by in self.logit_bias)
        require(few, f"logit_bias is {self.logit_bias!r:.50}: it must be 300 ids at most, values from -1000 to 1000")
        forms = sum(bool(getattr(self, name)) for name in _FORMS)
        legal = all(self.choice) and (not forms or (forms == 1 and not self.min_new_tokens))
        require(legal, "choice, regex, json_schema: one of them, without empty texts, and no min_new_tokens beside it")
        require(len(self.stop) <= 16 and all(self.stop), f"stop is {self.stop!r:.50}: it must be 16 texts, none empty")


class Rules(NamedTuple):
    """The settings of each slot."""

    prompt_length: Numbers
    end: Numbers  # length at which the text is complete
    first_end: Numbers  # length from which a token may end it
    end_ids_E: Numbers  # tokens that end it, -1 where there are no more
    seed: Numbers
    sample: Numbers
    temperature: Numbers
    top_k: Numbers
    top_p: Numbers
    min_p: Numbers
    typical_p: Numbers
    repetition_penalty: Numbers
    presence_penalty: Numbers
    frequency_penalty: Numbers
    bias_ids_N: Numbers
    bias_N: Numbers
    logprobs: Numbers  # whether log-probabilities are recorded

    @classmethod
    def of(cls, params: SamplingParams, prompt_length: int, context: int, ends: tuple, sample: int) -> "Rules":
        """The rules of one sample of a request that `ends` end."""
        bias, floats = dict(params.logit_bias), ("temperature", "top_p", "min_p", "typical_p")
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")

        def padded(values: Iterable[float], size: int, fill: float, dtype: type) -> np.ndarray:
            return np.array([*values, *[fill] * size][:size], dtype)

        return cls(
            prompt_length=np.int32(prompt_length), end=np.int32(min(prompt_length + params.max_new_tokens, context)),
            first_end=np.int32(prompt_length + params.min_new_tokens), end_ids_E=padded(ends, MAX_ENDS, -1, np.int32),
            seed=np.uint32(params.seed), sample=np.int32(sample), top_k=np.int32(params.top_k),
            bias_ids_N=padded(bias, MAX_BIASED, 2**31 - 1, np.int32),
            bias_N=padded(bias.values(), MAX_BIASED, 0, np.float32), logprobs=np.bool_(params.logprobs is not None),
            **{name: np.float32(getattr(params, name)) for name in (*floats, *penalties)},
        )  # fmt: skip


NO_RULES = Rules.of(SamplingParams(temperature=0), 0, 1, (), 0)  # of a slot without a text that goes on


def choose(logits_BV: Array, rules: Rules, tokens_BS: Array, lengths_B: Array) -> Array:
    """The next token of each slot, int32 [B]: greedy (of equal scores the lowest id), or a draw. The order is that of
    transformers: bias, penalties, no end too early; temperature, top-k, top-p, min-p, typical-p."""
    scores_BV = edit(logits_BV, rules, tokens_BS, lengths_B)
    greedy_B = scores_BV.argmax(-1).astype(jnp.int32)

    def noise(seed: Array, sample: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.random.gumbel(key, scores_BV.shape[1:])

    def draw(scores_BV: Array) -> Array:
        scores_BV = scores_BV / jnp.where(rules.temperature > 0, rules.temperature, 1)[:, None]
        scores_BV = _filter(scores_BV, rules)
        noise_BV = jax.vmap(noise)(rules.seed, rules.sample, lengths_B)
        drawn_B = (scores_BV + noise_BV).argmax(-1).astype(jnp.int32)  # Gumbel-max: exactly softmax's distribution
        return jnp.where(rules.temperature > 0, drawn_B, greedy_B)

    return jax.lax.cond((rules.temperature > 0).any(), draw, lambda _: greedy_B, scores_BV)


def edit(logits_BV: Array, rules: Rules, tokens_BS: Array, lengths_B: Array) -> Array:
    """Scores [B, V] with the bias and the penalties of each slot, and no end where it would be too early."""
    same = lambda x_BV: x_BV  # noqa: E731

    def bias(x_BV: Array) -> Array:
        return jax.vmap(lambda x, ids, by: x.at[ids].add(by, mode="drop"))(x_BV, rules.bias_ids_N, rules.bias_N)

    def penalise(x_BV: Array) -> Array:
        places_S = jnp.arange(tokens_BS.shape[1])[None]
        written_BS = places_S < lengths_B[:, None]
        count = jax.vmap(lambda tokens, here: jnp.zeros(x_BV.shape[-1]).at[tokens].add(here.astype(jnp.float32)))
        generated_BV = count(tokens_BS, written_BS & (places_S >= rules.prompt_length[:, None]))
        by = rules.repetition_penalty[:, None]
        repeated_BV = jnp.where(x_BV > 0, x_BV / by, x_BV * by)
        x_BV = jnp.where(count(tokens_BS, written_BS) > 0, repeated_BV, x_BV)
        x_BV -= rules.presence_penalty[:, None] * (generated_BV > 0)
        return x_BV - rules.frequency_penalty[:, None] * generated_BV

    def go_on(x_BV: Array) -> Array:
        ids_BE = jnp.where((rules.end_ids_E < 0) | (lengths_B >= rules.first_end)[:, None], 2**31 - 1, rules.end_ids_E)
        return jax.vmap(lambda x, ids: x.at[ids].set(-jnp.inf, mode="drop"))(x_BV, ids_BE)

    penalised_B = (rules.repetition_penalty != 1) | (rules.presence_penalty != 0) | (rules.frequency_penalty != 0)
    x_BV = jax.lax.cond((rules.bias_N != 0).any(), bias, same, logits_BV)
    x_BV = jax.lax.cond(penalised_B.any(), penalise, same, x_BV)
    return jax.lax.cond((lengths_B < rules.first_end).any(), go_on, same, x_BV)


def _filter(x_BV: Array, rules: Rules) -> Array:
    def top(x_BV: Array) -> Array:
        ones_BV, all_B = jnp.ones_like(x_BV), jnp.full_like(rules.top_p, x_BV.shape[-1])
        cut_B = lowest_kept(x_BV, ones_BV, jnp.where(rules.top_k > 0, jnp.minimum(rules.top_k, all_B), all_B))
        highest_B = x_BV.max(-1)
        odds_BV = jnp.where(x_BV >= cut_B[:, None], jnp.exp(x_BV - highest_B[:, None]), 0)
        wanted_B = jnp.where(rules.top_p < 1, rules.top_p * odds_BV.sum(-1), 0)
        cut_B = jnp.maximum(cut_B, jnp.where(rules.top_p < 1, lowest_kept(x_BV, odds_BV, wanted_B), -jnp.inf))
        cut_B = jnp.maximum(cut_B, highest_B + jnp.log(rules.min_p))
        return jnp.where(x_BV >= cut_B[:, None], x_BV, -jnp.inf)

    def typical(x_BV: Array) -> Array:
        log_p_BV = jax.nn.log_softmax(x_BV)
        p_BV = jnp.exp(log_p_BV)
        entropy_B = -jnp.where(p_BV > 0, p_BV * log_p_BV, 0).sum(-1)
        nearness_BV = -jnp.abs(-log_p_BV - entropy_B[:, None])
        kept_BV = nearness_BV >= lowest_kept(nearness_BV, p_BV, rules.typical_p)[:, None]
        return jnp.where(kept_BV | (rules.typical_p >= 1)[:, None], x_BV, -jnp.inf)

    filtered_B = (rules.top_k > 0) | (rules.top_p < 1) | (rules.min_p > 0)
    x_BV = jax.lax.cond(filtered_B.any(), top, lambda x_BV: x_BV, x_BV)
    return jax.lax.cond((rules.typical_p < 1).any(), typical, lambda x_BV: x_BV, x_BV)


def lowest_kept(x_BV: Array, weights_BV: Array, wanted_B: Array) -> Array:
    """The largest cut [B] such that the weights of all x >= cut add up to at least `wanted`. Bisection over the
    integers whose order is that of float32, so it is exact but for the rounding of the sum."""

    def ordered(x: Array) -> Array:  # its own inverse, on int32
        return x ^ ((x >> 31) & 0x7FFFFFFF)

    keys_BV = ordered(jax.lax.bitcast_convert_type(x_BV, jnp.int32))

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds  # enough is above low, not above high
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean, without overflow
        enough_B = jnp.where(keys_BV >= middle_B[:, None], weights_BV, 0).sum(-1) >= wanted_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    infinity = np.float32(math.inf).view(np.int32)
    low_B, high_B = jnp.full_like(wanted_B, -infinity - 1, jnp.int32), jnp.full_like(wanted_B, infinity, jnp.int32)
    low_B, _ = jax.lax.fori_loop(0, 32, halve, (low_B, high_B))
    return jax.lax.bitcast_convert_type(ordered(low_B), jnp.float32)
