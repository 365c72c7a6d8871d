"""A conversation in the terminal, in the model's own chat template."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

from jaxgpt.errors import ConfigError, note
from jaxgpt.generation.engine import Engine
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.interop.chat_template import render
from jaxgpt.tokenizer import Tokenizer


def encode_chat(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], **more: Any) -> list[int]:
    """The ids of a conversation in the model's chat template, up to where its answer begins. They are transformers'
    ids, unless a message spells a special token such as `<|im_end|>`: that stays text, so that nobody can write a turn
    of another role. The template then sees another character for the first of the spelling, and text after a special
    token begins with a space where the tokenizer puts one before every text. Raises ConfigError without a template."""
    template, special = tokenizer.chat_template, tokenizer.special_tokens
    if not template:
        raise ConfigError(f"{tokenizer.where}: there is no chat template, so it cannot chat; use generate.py")
    spelling = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)"
    known = template + "".join(text for message in messages for text in message.values())
    unused = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in known)  # for private use
    disguise = dict(zip(sorted({name[0] for name in special}), unused, strict=False))
    hide = lambda text: re.sub(f"(?={spelling}).", lambda found: disguise[found[0]], text, flags=re.DOTALL)  # noqa: E731
    hidden = [{key: hide(text) for key, text in message.items()} for message in messages]
    bos, eos = tokenizer.pieces[tokenizer.bos_id], tokenizer.pieces[tokenizer.eos_id]
    bos = bos if tokenizer.bos_ids or bos != eos else ""  # without one, the end's stands in for it
    where = f"chat template of {tokenizer.where.removeprefix('tokenizer ')}"
    rendered = render(template, hidden, bos_token=bos, eos_token=eos, where=where, **more)
    ids, parts = tokenizer.encode(rendered, allow_special=True), re.split(f"({spelling})", rendered)
    forged = sum(map(set(special.values()).__contains__, ids)) > len(parts) // 2  # where text is normalised
    if hidden == messages and not forged:
        return ids
    shown = str.maketrans({private: character for character, private in disguise.items()})
    encoded = ([special[part]] if part in special else tokenizer.encode(part.translate(shown)) for part in parts)
    return [token for part in encoded for token in part]


def chat(engine: Engine, tokenizer: Tokenizer, params: SamplingParams, system: str = "") -> None:
    """Answer each line of standard input, on standard output, until it ends; in a terminal, hold a conversation. Raises
    what `encode_chat` and `Engine.stream` raise; in a terminal a message that is refused is only reported."""
    start = [{"role": "system", "content": system}] if system else []
    encode_chat(tokenizer, [*start, {"role": "user", "content": "?"}])  # a template that cannot work says so at once
    messages, terminal = start, sys.stdin.isatty() and sys.stdout.isatty()
    stop, refusal = ((KeyboardInterrupt,), ConfigError) if terminal else ((), ())  # elsewhere they end it all
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (`input` edits lines with it)
        note("Ctrl-C stops an answer; /reset begins anew, also when the context is full; /exit or Ctrl-D leaves")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # which the tokenizer refuses by name
    try:
        while (line := input("> " if terminal else "")) != "/exit":
            if line == "/reset":
                messages = start
            elif line.strip():
                asked, answer = [*messages, {"role": "user", "content": line}], list[str]()
                try:
                    ids = encode_chat(tokenizer, asked)
                    if 0 < (room := engine.room(ids)) < params.max_new_tokens:
                        note(f"{room} tokens of the context are left, so the answer ends there at the latest")
                    for _, text in engine.stream(ids, params):
                        print(text, end="", flush=True)
                        answer.append(text)
                except stop:
                    pass
                except refusal as error:
                    note(str(error))
                    continue
                print()
                messages = [*asked, {"role": "assistant", "content": "".join(answer)}]
    except (EOFError, *stop):
        print(end="\n" if terminal else "")
