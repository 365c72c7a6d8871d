"""Prompts to completions: requests wait in a queue for slots, which the device fills and continues.

Finished slots are refilled while the others go on. Texts are put together, and given to the caller, while the device
computes. A request's tokens depend on its prompt, its settings and the model alone, not on what else is in the slots:
on a CPU a row's bits are the same in every place, but other numbers of rows may take other kernels, so the number of
slots and the size of a chunk stay as they are while an engine lives."""

import codecs
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.errors import ConfigError, require
from jaxgpt.generation.automaton import token_table
from jaxgpt.generation.decode import Forms, Slots, admit, beam_search, decode, empty_slots, prefill, resize
from jaxgpt.generation.sampling import MAX_ENDS, NO_RULES, Rules, SamplingParams
from jaxgpt.model import Transformer, parameter_name
from jaxgpt.sharding import batch_parts, out_sharding, place
from jaxgpt.tokenizer import Tokenizer

STEPS_PER_DISPATCH = 8  # between two looks from the host: a stream moves at least this often
CHUNK = 64  # tokens of a prompt that are run through the model at once
_SHORTEST = 128  # places of the cache at least: 128, 192, 256, 384 ... so that few programs are compiled
Prompt = str | list[int]


class Completion(NamedTuple):
    """What was generated for one sample of a prompt."""

    text: str
    token_ids: list[int]
    # stop: the model or a stop text ended it; length: `max_new_tokens` or the context did; error: logits not finite
    finish_reason: Literal["stop", "length", "error"]
    prompt_tokens: int
    logprobs: list[float] | None = None  # log-probability of each token, where the request asked for it
    top_logprobs: list[dict[int, float]] | None = None  # those of the most probable tokens at each place
    prompt_logprobs: list[dict[int, float | None] | None] | None = None  # and of the top ones; None: not finite


class Request(NamedTuple):
    """A prompt as ids, how to continue it, and the tokens that end it; `tag`, another for each prompt, comes back."""

    ids: list[int]
    params: SamplingParams
    ends: tuple[int, ...] = ()
    form: np.ndarray | None = None  # the automaton that its completion follows
    sample: int = 0
    tag: int = 0


class Progress(NamedTuple):
    """What one dispatch brought for one request: more text, and at the end its completion."""

    request: Request
    text: str
    completion: Completion | None


class _Text:
    """The completion of a request, as far as the host knows it."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request, self.length = request, len(request.ids)
        self._tokenizer, self._text, self._shown = tokenizer, "", 0
        # A character is shown when all its bytes are there.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, row_S: np.ndarray, length: int, done: bool, failed: bool) -> Progress:
        """Take the tokens that came since the last time; a stop text may complete it before the device does."""
        stop, reason = self.request.params.stop, None
        for token in row_S[self.length : length].tolist():
            self.length += 1
            at_end = done and self.length == length and token in self.request.ends
            # A model may have more tokens than its tokenizer: they have no text.
            raw = b"" if at_end else b"".join(self._tokenizer.token_bytes[token : token + 1])
            begin = max(len(self._text) - max(map(len, stop), default=0), 0)
            self._text += self._utf8.decode(raw, final=at_end)
            places = [place for each in stop if (place := self._text.find(each, begin)) >= 0]
            if places or at_end:
                reason, self._text = "stop", self._text[: min(places, default=None)]
                break
        if not reason and done:
            reason = "error" if failed else "length"
            self._text += self._utf8.decode(b"", final=True)
        held = 0 if reason else max((n for s in stop for n in range(len(s)) if self._text.endswith(s[:n])), default=0)
        text = self._text[self._shown : len(self._text) - held]
        self._shown += len(text)
        ids = row_S[len(self.request.ids) : self.length].tolist()
        completion = Completion(self._text, ids, reason, len(self.request.ids)) if reason else None  # type: ignore[arg-type]
        return Progress(self.request, text, completion)


def _shared(ids: list[int], other: list[int]) -> int:
    """Tokens, in whole chunks, that two prompts begin with; their last tokens are not in the cache."""
    most = (min(len(ids), len(other)) - 1) // CHUNK * CHUNK
    return next((i for i in range(0, most, CHUNK) if ids[i : i + CHUNK] != other[i : i + CHUNK]), max(most, 0))


class _Forms:
    """The automata that the texts in the slots follow, one behind the other on the device."""

    def __init__(self, vocabulary: int) -> None:
        self._begins: dict[int, int] = {}  # of each by its identity
        self.next_NV = place(np.zeros((1, vocabulary), np.int16), "__")

    def of(self, texts: dict[int, _Text], slots: int) -> Forms:
        forms = {slot: form for slot, text in texts.items() if (form := text.request.form) is not None}
        if any(id(form) not in self._begins for form in forms.values()):
            self._held = list({id(form): form for form in forms.values()}.values())
            *begins, used = np.cumsum([1, *map(len, self._held)]).tolist()
            self._begins = {id(form): begin for form, begin in zip(self._held, begins, strict=True)}
            rows = 2 ** math.ceil(math.log2(used))  # few sizes, each of which is compiled for
            table_NV = np.zeros((rows, self.next_NV.shape[1]), np.int16)
            table_NV[1:used] = np.concatenate(self._held)
            self.next_NV = place(table_NV, "__")
        begins = [self._begins[id(forms[slot])] if slot in forms else 0 for slot in range(slots)]
        return self.next_NV, place(np.array(begins, np.int32), "B")


class Engine:
    """A model and its tokenizer, ready to generate on the current mesh."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        slots: int = 8,
        speculate: int = 0,
        draft: Transformer | None = None,
    ) -> None:
        """`slots`: texts that are continued together; rounded up so that each part of the mesh has as many.
        `speculate`: tokens that are guessed for each pass, by `draft`, a smaller model for the same tokenizer, or from
        what a text repeats. Raises ConfigError."""
        for name, value, least, most in (("slots", slots, 1, 4096), ("speculate", speculate, 0, 64)):
            require(least <= value <= most, f"{name} is {value}: it must be between {least} and {most}")
        self._tokenizer = tokenizer
        self._models = tuple(m if isinstance(m.layers, tuple) else for_decoding(m) for m in (model, draft) if m)
        self._configs = tuple(each.config for each in self._models)
        self._context, self._vocabulary = model.config.context_length, model.config.vocab_size or 0
        for other in self._configs[1:]:
            given = f"draft: it has {other.vocab_size} tokens and a context of {other.context_length}"
            fits = other.vocab_size == self._vocabulary and other.context_length >= self._context
            require(fits, f"{given}, this model {self._vocabulary} and {self._context}; take one that has as many")
            require(speculate > 0, "draft: speculate, which says how many tokens it guesses, is 0; try 4")
        self._parts = batch_parts()
        self._slots, self._guesses = -(-slots // self._parts) * self._parts, speculate
        self._spelt = (*tokenizer.token_bytes, *[b""] * self._vocabulary)[: self._vocabulary]
        # The slots of the last run, and the prompts whose keys and values are in them, to begin others with.
        self._kept: tuple[Slots | None, list[list[int]]] = None, [[]] * self._slots
        self.truncated = self.reused = self.tokens = 0  # prompts cut; tokens of prompts that were there; generated ones
        self.places = self.used = 0  # slots times passes, and those that brought a text on

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | list[SamplingParams]) -> list[Completion]:
        """`num_samples` completions of each prompt, prompt after prompt. Raises ConfigError as `requests` does."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        paired = enumerate(zip(prompts, each, strict=True))
        waiting = [request for i, (prompt, own) in paired for request in self.requests(prompt, own, i)]
        found = {(p.request.tag, p.request.sample): p.completion for p in self.run(waiting) if p.completion}
        return [completion for _, completion in sorted(found.items(), key=lambda each: each[0])]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[tuple[int, str]]:
        """(sample, text) as it comes, for `params.num_samples` samples of one prompt; a character is never split.
        Raises ConfigError as `requests` does, and where log-probabilities are asked for."""
        for name in ("logprobs", "prompt_logprobs"):
            require(getattr(params, name) is None, f"{name}: a stream has none; use --input or Engine.generate")
        return ((more.request.sample, more.text) for more in self.run(self.requests(prompt, params)) if more.text)

    def room(self, prompt: Prompt) -> int:
        return self._context - len(self._ids(prompt))

    def _ids(self, prompt: Prompt) -> list[int]:
        return self._tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt

    def requests(self, prompt: Prompt, params: SamplingParams, tag: int = 0) -> list[Request]:
        """One for each sample, or for all beams. Raises ConfigError, naming it, for what this model cannot take."""
        ids, context, vocabulary = self._ids(prompt), self._context, self._vocabulary
        require(bool(ids), "the prompt is empty, and this model has no token that begins a text; give it some text")
        named = {"prompt": ids, "logit_bias": dict(params.logit_bias), "stop_token_ids": params.stop_token_ids}
        for name, mentioned in named.items():
            if strange := [token for token in mentioned if not 0 <= token < vocabulary]:
                raise ConfigError(f"{name}: token {strange[0]} has no embedding in this model; leave it out")
        room = max(context - params.max_new_tokens, context // 2)
        if params.truncate != "no" and len(ids) > room:
            bos = self._tokenizer.bos_ids
            first = len(bos) if ids[: len(bos)] == bos else 0  # what begins a text stays
            ids = ids[:first] + ids[first + len(ids) - room :] if params.truncate == "left" else ids[:room]
            self.truncated += 1
        if len(ids) >= context:
            raise ConfigError(f"prompt of {len(ids)} tokens: the context of {context} has no room; shorten the prompt")
        fits = params.beam_width <= vocabulary and not params.beam_width % self._parts
        require(fits, f"beam_width is {params.beam_width}: it must be a multiple of {self._parts}, up to {vocabulary}")
        require(params.top_k <= vocabulary, f"top_k is {params.top_k}: the vocabulary has {vocabulary} tokens")
        ends = (*(() if params.ignore_eos else self._tokenizer.end_ids), *params.stop_token_ids)
        require(len(ends) <= MAX_ENDS, f"stop_token_ids: with the model's own, {len(ends)} end a text; {MAX_ENDS} can")
        regex, schema = "|".join(map(re.escape, params.choice)) or params.regex, params.json_schema
        form = token_table(regex, schema, self._spelt, ends) if regex or schema else None
        params = replace(params, logprobs=params.logprobs or 0) if params.best_of else params
        count = 1 if params.beam_width else params.best_of or params.num_samples
        each = [params, *[replace(params, prompt_logprobs=None)] * (count - 1)]  # one scores the prompt
        return [Request(ids, own, ends, form, sample, tag) for sample, own in enumerate(each)]

    def run(self, requests: Iterable[Request]) -> Iterator[Progress]:
        """What comes of requests, in the order in which it comes. They are taken when there is a slot for them. With
        `best_of` the best samples come when all of a tag are there."""
        samples = defaultdict[int, dict[int, Completion]](dict)
        for more in self._run(requests):
            request, done = more.request, more.completion
            if not (wanted := request.params.best_of):
                yield more
            elif done:
                samples[request.tag][request.sample] = done
                if len(samples[request.tag]) == wanted:
                    every = [done for _, done in sorted(samples.pop(request.tag).items())]
                    best = sorted(every, key=_quality, reverse=True)[: request.params.num_samples]
                    best[0] = best[0]._replace(prompt_logprobs=every[0].prompt_logprobs)  # the first was asked for them
                    yield from (Progress(request._replace(sample=i), done.text, done) for i, done in enumerate(best))

    def _run(self, requests: Iterable[Request]) -> Iterator[Progress]:
        waiting, texts, unseen = iter(requests), dict[int, _Text](), list[Progress]()
        (slots, prompts), self._kept = self._kept, (None, [[]] * self._slots)  # another run meanwhile has its own
        forms, exhausted = _Forms(len(self._spelt)), False
        while texts or not exhausted:
            free = [slot for slot in range(self._slots) if slot not in texts]
            new = dict(zip(free, waiting, strict=False))
            exhausted = len(new) < len(free)
            for slot in [slot for slot, each in new.items() if each.params.beam_width]:
                yield from self._search(new.pop(slot))
            texts |= {slot: _Text(each, self._tokenizer) for slot, each in new.items()}
            if not texts:
                continue
            newest = max(text.length for text in texts.values())
            slots = self._fit(slots, prompts, newest + STEPS_PER_DISPATCH * (1 + self._guesses))
            slots = self._fill(slots, prompts, new) if new else slots
            enough = len(texts) if exhausted else self._parts
            stopped = place(np.array([slot not in texts for slot in range(self._slots)]), "B")
            steps = np.int32(STEPS_PER_DISPATCH if unseen else 1)  # the first token as soon as it is there
            slots = decode(self._models, slots, forms.of(texts, self._slots), stopped, enough, steps, self._guesses)
            yield from unseen  # while the device computes
            told = (slots.tokens_BS, slots.lengths_B, slots.done_B, slots.failed_B, slots.steps)
            tokens_BS, lengths, done, failed, passes = jax.device_get(told)
            self.places += int(passes) * self._slots
            unseen = []
            for slot, text in list(texts.items()):
                before = text.length
                more = text.push(tokens_BS[slot], int(lengths[slot]), bool(done[slot]), bool(failed[slot]))
                self.tokens += text.length - before
                self.used += min(text.length - before, int(passes))
                if more.completion:
                    more = more._replace(completion=_with_logprobs(more.completion, text.request, slots, slot))
                    del texts[slot]
                unseen.append(more)
        self._kept = slots, prompts
        yield from unseen

    def _search(self, request: Request) -> Iterator[Progress]:
        """The best that a beam search finds, in slots of its own."""
        ids, params = request.ids, request.params
        own = Engine(self._models[0], self._tokenizer, params.beam_width)
        slots = own._fit(None, own._kept[1], len(ids) + params.max_new_tokens)
        slots = own._fill(slots, own._kept[1], {0: request})
        texts_BS, lengths, failed = jax.device_get(beam_search(self._models[0], slots, float(params.length_penalty)))
        for sample in range(params.num_samples):
            text = _Text(request._replace(sample=sample), self._tokenizer)
            yield text.push(texts_BS[sample], len(ids) if failed else int(lengths[sample]), True, bool(failed))
            self.tokens += text.length - len(ids)

    def _fit(self, slots: Slots | None, prompts: list[list[int]], longest: int) -> Slots:
        longest = max(longest, _SHORTEST)
        power = 2 ** math.ceil(math.log2(longest))
        length = min(power * 3 // 4 if longest <= power * 3 // 4 else power, self._context)
        if slots is None:
            return empty_slots(self._configs, self._slots, length)
        if length <= slots.tokens_BS.shape[1] <= 4 * length:  # what prompts begin with stays when texts get shorter
            return slots
        prompts[:] = [ids[:length] for ids in prompts]
        return resize(slots, length)

    def _fill(self, slots: Slots, prompts: list[list[int]], new: dict[int, Request]) -> Slots:
        length = slots.tokens_BS.shape[1]
        tokens_BS, rules = np.zeros((self._slots, length), np.int32), [NO_RULES] * self._slots
        for slot, (ids, params, ends, _, sample, _) in new.items():
            tokens_BS[slot, : len(ids)] = ids
            rules[slot] = Rules.of(params, len(ids), self._context, ends, sample)
        stacked = jax.tree.map(lambda *each: place(np.stack(each), "B_"[: np.ndim(each[0]) + 1]), *rules)
        new_B = place(np.isin(np.arange(self._slots), list(new)), "B")
        slots = admit(slots, new_B, place(tokens_BS, "BS"), stacked)
        in_part = self._slots // self._parts
        by_part = ([slot for slot in new if slot // in_part == part] for part in range(self._parts))
        for now in itertools.zip_longest(*by_part):
            chosen_Q, donors_Q, starts_Q = (np.full(self._parts, n, np.int32) for n in (in_part, 0, 0))
            chunks, there = 1, [(part, slot) for part, slot in enumerate(now) if slot is not None]
            scored = [slot for _, slot in there if new[slot].params.prompt_logprobs is not None]
            for part, slot in there:
                ids, first = new[slot].ids, part * in_part
                alike = [[]] if slot in scored else prompts[first : first + in_part]  # what is copied is not scored
                shared = [_shared(ids, known) for known in alike]
                start = max(shared)
                chosen_Q[part], donors_Q[part], starts_Q[part] = slot - first, shared.index(start), start
                chunks = max(chunks, math.ceil((len(ids) - 1 - start) / CHUNK))
                self.reused += start
            for chunk in range(chunks):
                given = chosen_Q, chosen_Q if chunk else donors_Q, starts_Q + np.int32(chunk * CHUNK)
                end = max(int(starts_Q.max()) + (chunk + 1) * CHUNK, 2 * _SHORTEST)
                places = length >> max(math.floor(math.log2(length / end)), 0)  # few sizes, each is compiled for
                slots = prefill(self._models, slots, place(given, "B"), CHUNK, places, bool(scored))
            for _, slot in there:
                # Longrope's keys depend on the end of the text too.
                prompts[slot] = [] if any(each.rope_scaling == "longrope" for each in self._configs) else new[slot].ids
        return slots


def _quality(done: Completion) -> tuple[bool, float]:
    """Of the best sample this is the greatest: the mean of its log-probabilities; those that failed come last."""
    known = [-math.inf if x is None else x for x in done.logprobs or []]
    return done.finish_reason != "error", sum(known) / max(len(known), 1)


def _with_logprobs(done: Completion, request: Request, slots: Slots, slot: int) -> Completion:
    wanted, of_prompt = request.params.logprobs, request.params.prompt_logprobs
    if wanted is None and of_prompt is None:
        return done
    rows = (x.at[slot].get(out_sharding=out_sharding("__"[: x.ndim - 1])) for x in slots.recorded)
    here = range(done.prompt_tokens, done.prompt_tokens + len(done.token_ids))
    told = [row[: here.stop] for row in jax.device_get(tuple(rows))]  # None: JSON has no word for what is not finite
    chosen, ids, top = (np.where(np.isfinite(row), row, np.array(None)).tolist() for row in told)
    most = lambda place, n: dict(zip(ids[place][:n], top[place][:n], strict=True))  # noqa: E731
    if of_prompt is not None:
        scores = ({token: chosen[i]} | most(i, of_prompt) for i, token in enumerate(request.ids[1:], 1))
        done = done._replace(prompt_logprobs=[None, *scores])
    if wanted is not None:
        done = done._replace(logprobs=[chosen[i] for i in here], top_logprobs=[most(i, wanted) for i in here])
    return done


@jax.jit
def for_decoding(model: Transformer) -> Transformer:
    """A copy with a tuple of layers, matrices and tables in the compute dtype (half the bytes), on a CPU turned."""

    def cast(path: tuple, p: Array) -> Array:  # norms, biases and routers are used in float32
        name = parameter_name(path)
        used_so = name.endswith(("kernel", "embedding")) and not name.endswith("router.kernel")
        return p.astype(jnp.dtype(model.config.dtype)) if used_so else p

    copied = jax.tree_util.tree_map_with_path(cast, model.unstacked())
    if jax.default_backend() == "cpu":
        copied.turn()
    return copied
