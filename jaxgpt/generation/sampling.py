"""How the next token is chosen. Letter: V vocabulary."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxgpt.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for; illegal values are refused when it is made."""

    max_new_tokens: int = 100
    """Stop after this many tokens."""
    temperature: float = 1.0
    """Divides the logits: 0 takes the most probable token, large values come near to an even choice."""
    top_k: int = 0
    """Choose among the k most probable tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the most probable tokens that together have this probability (arXiv:1904.09751)."""
    seed: int = 0
    """The same seed gives the same text."""
    num_samples: int = 1
    """Samples of each prompt."""

    def __post_init__(self) -> None:
        legal = {
            "max_new_tokens": (1 <= self.max_new_tokens <= 2**20, "between 1 and 1048576"),
            "temperature": (self.temperature == 0 or 0.001 <= self.temperature <= 1000, "0, or between 0.001 and 1000"),
            "top_k": (0 <= self.top_k < 2**31, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "seed": (0 <= self.seed < 2**32, "between 0 and 4294967295"),
            "num_samples": (1 <= self.num_samples <= 1024, "between 1 and 1024"),
        }
        for name, (is_legal, bounds) in legal.items():
            if not is_legal:  # NaN is not legal either
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be {bounds}")


def choose(
    logits_V: jax.Array, key: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """One token id, int32: temperature, then top-k, then top-p, then a draw.

    The settings are arrays, so that other values need no other program. Of equal logits the lowest id comes first."""

    def draw(logits_V: jax.Array) -> jax.Array:
        order_V = jnp.argsort(-logits_V, stable=True)
        sorted_V = logits_V[order_V] / temperature
        ranks_V = jnp.arange(logits_V.size)
        sorted_V = jnp.where(ranks_V < jnp.where(top_k > 0, top_k, logits_V.size), sorted_V, -jnp.inf)
        probabilities_V = jax.nn.softmax(sorted_V)
        before_V = jnp.cumsum(probabilities_V) - probabilities_V  # of all more probable tokens together
        sorted_V = jnp.where((before_V < top_p) | (ranks_V == 0), sorted_V, -jnp.inf)
        return order_V[jax.random.categorical(key, sorted_V)].astype(jnp.int32)

    # Sorting 49152 logits takes 12 ms on a CPU, half of a greedy step of a model with 135 M parameters.
    return jax.lax.cond(temperature > 0, draw, lambda logits_V: logits_V.argmax().astype(jnp.int32), logits_V)
