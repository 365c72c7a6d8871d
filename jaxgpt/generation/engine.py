"""Prompts to completions: the host's side of generation."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import ConfigError
from jaxgpt.generation.decode import Settings, decode, start
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.model import Transformer, parameter_name
from jaxgpt.sharding import batch_parts, spec
from jaxgpt.tokenizer import StreamDecoder, Tokenizer

STEPS_PER_DISPATCH = 8
"""Tokens between two looks from the host: a stream moves at least this often, and dispatching costs 1 / 8."""
_BUCKET = 64
"""Prompt and text lengths are rounded up to a multiple of this, so that few programs are compiled."""


@dataclass(frozen=True)
class Completion:
    """What was generated for one sample of a prompt."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    """stop: the model ended the text; length: `max_new_tokens` or the context was used up."""
    prompt_tokens: int


class Engine:
    """A model and its tokenizer, ready to generate on the current mesh."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self._config = model.config
        self._tokenizer = tokenizer
        self._model = model if isinstance(model.layers, tuple) else for_decoding(model)

    def generate(self, prompts: Sequence[str | list[int]], params: SamplingParams) -> list[Completion]:
        """`params.num_samples` completions of each prompt (a text, or its ids), prompt after prompt.

        Raises ConfigError as `stream` does."""
        ids = [self._prompt_ids(prompt, params) for prompt in prompts]
        if not ids:
            return []
        (texts,) = deque(self._run(ids, params), maxlen=1)
        lengths = [len(prompt) for prompt in ids for _ in range(params.num_samples)]
        return [self._completion(row, length) for row, length in zip(texts, lengths, strict=True)]

    def stream(self, prompt: str | list[int], params: SamplingParams) -> Iterator[tuple[int, str]]:
        """(sample, text) as it comes, for `params.num_samples` samples of one prompt; a character is never split.

        Raises ConfigError for a prompt that leaves no room in the context, or a top_k above the vocabulary."""
        return self._stream(self._prompt_ids(prompt, params), params)

    def _stream(self, ids: list[int], params: SamplingParams) -> Iterator[tuple[int, str]]:
        decoders = [StreamDecoder(self._tokenizer) for _ in range(params.num_samples)]
        shown = [len(ids)] * params.num_samples
        for texts in self._run([ids], params):
            for sample, (row, decoder) in enumerate(zip(texts, decoders, strict=True)):
                if text := "".join(map(decoder.push, row[shown[sample] :])):
                    yield sample, text
                shown[sample] = len(row)
        for sample, decoder in enumerate(decoders):
            if text := decoder.flush():
                yield sample, text

    def room(self, prompt: str | list[int]) -> int:
        """Tokens that fit into the context after a prompt."""
        return self._config.context_length - len(self._ids(prompt))

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self._tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt

    def _prompt_ids(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        ids = self._ids(prompt)
        context = self._config.context_length
        if not ids:
            raise ConfigError("the prompt is empty, and this model has no token that begins a text; give it some text")
        if max(ids) >= (self._config.vocab_size or 0):
            raise ConfigError(f"prompt: token {max(ids)} has no embedding in this model; leave it out")
        if len(ids) >= context:
            raise ConfigError(f"prompt of {len(ids)} tokens: the context of {context} has no room; shorten the prompt")
        if params.top_k > self._tokenizer.vocab_size:
            raise ConfigError(f"top_k is {params.top_k}: the vocabulary has {self._tokenizer.vocab_size} tokens")
        return ids

    def _run(self, prompts: list[list[int]], params: SamplingParams) -> Iterator[list[list[int]]]:
        """Prompt and completion so far, of each row, after every dispatch."""
        rows = [(ids, sample) for ids in prompts for sample in range(params.num_samples)]
        wanted = len(rows)
        rows += rows[:1] * (-wanted % batch_parts())  # every device gets as many rows
        lengths = np.array([len(ids) for ids, _ in rows], np.int32)
        ends = np.minimum(lengths + params.max_new_tokens, self._config.context_length).astype(np.int32)
        padded, slots = (min(_round_up(int(n.max())), self._config.context_length) for n in (lengths, ends))
        prompts_BP = np.zeros((len(rows), padded), np.int32)
        for row, (ids, _) in zip(prompts_BP, rows, strict=True):
            row[: len(ids)] = ids
        key = jax.random.key(params.seed)
        keys_B = jax.vmap(lambda sample: jax.random.fold_in(key, sample))(jnp.array([sample for _, sample in rows]))
        prompts_BP, lengths_B, ends_B = jax.device_put((prompts_BP, lengths, ends), (spec("BS"), spec("B"), spec("B")))
        scalars = jnp.float32(params.temperature), jnp.int32(params.top_k), jnp.float32(params.top_p)
        settings = Settings(ends_B, jnp.array(self._tokenizer.end_ids, jnp.int32), *scalars)
        state = start(self._model, prompts_BP, lengths_B, jax.device_put(keys_B, spec("B")), slots)
        done = False
        while not done:
            state = decode(self._model, state, settings, STEPS_PER_DISPATCH)
            tokens, lengths, done_B = jax.device_get((state.tokens_BS, state.lengths_B, state.done_B))
            done = bool(done_B.all())
            yield [row[:length].tolist() for row, length in zip(tokens[:wanted], lengths[:wanted], strict=True)]

    def _completion(self, row: list[int], prompt_tokens: int) -> Completion:
        ids = row[prompt_tokens:]
        ended = ids[-1] in self._tokenizer.end_ids
        text = self._tokenizer.decode_bytes(ids).decode("utf-8", "replace")  # which goes on, so not `decode`
        return Completion(text, ids, "stop" if ended else "length", prompt_tokens)


@jax.jit
def for_decoding(model: Transformer) -> Transformer:
    """A copy with a tuple of layers, matrices and tables in the compute dtype: the same results for half the bytes."""
    dtype = jnp.dtype(model.config.dtype)
    used_so = ("kernel", "embedding")  # norms, biases and routers are used in float32

    def cast(path: tuple, p: jax.Array) -> jax.Array:
        name = parameter_name(path)
        return p.astype(dtype) if name.endswith(used_so) and not name.endswith("router.kernel") else p

    return jax.tree_util.tree_map_with_path(cast, model.unstacked())


def _round_up(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET
