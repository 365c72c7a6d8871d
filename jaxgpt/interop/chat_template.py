"""Chat templates: programs in Jinja's language that come with a model, so they run where they can do no harm.

A sandbox alone bounds neither time nor memory, so each rendering is a process of its own (60 ms) with limits that the
kernel holds; that is why this file imports no JAX."""

import json
import re
from collections.abc import Sequence
from typing import Any

from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.limited import in_process, limit

MAX_TEMPLATE, MAX_TEXT = 2**20, 4 * 2**20  # characters of a template (the longest have 2**15), of what it writes
SECONDS, MEMORY = 2, 256 * 2**20  # of computing, since nothing in a template can wait; address space (Python: 30 MB)


def render(template: str, messages: Sequence[dict[str, str]], *, where: str = "chat template", **more: Any) -> str:
    """The text of a conversation, as transformers' `apply_chat_template(tokenize=False)` makes it. messages are
    {"role": ..., "content": ...}; `more` is what else the template sees, such as bos_token, of JSON's types; `where`
    names it in errors. Raises BadFileError when the template is wrong, unsafe or needs too much time, memory or room,
    and ConfigError when it refuses the conversation, as one whose roles do not alternate."""
    context = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **more}
    try:
        if len(template) > MAX_TEMPLATE:
            raise ValueError(f"it has {len(template)} characters, more than {MAX_TEMPLATE}")
        kind, text = in_process(_render_here, SECONDS, template=template, context=context)
    except ValueError as error:
        kind, text = "error", str(error)
    if kind == "text":
        return text
    why = "".join(character if character.isprintable() else " " for character in text)[:300]
    if kind == "refusal":
        raise ConfigError(f"{where}: it refuses this conversation: {why}; change the messages")
    raise BadFileError(f"{where}: {why}; restore it, or use generate.py")


def _render_here(template: str, context: dict[str, Any]) -> tuple[str, str]:
    """("text", text), ("refusal", the template's own words) or ("error", why)."""
    import datetime

    import jinja2.debug  # noqa: F401  (what an error in a template needs)
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: object) -> None:
        raise ConfigError(str(message)[:1000])

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    # Jinja's own filter escapes what HTML would; more of json.dumps would let a template call functions.
    jinja.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    # Jinja imports some modules, and Python this codec, when a template asks for them: nothing can be opened then.
    jinja.from_string("{{ '1'|pprint|wordwrap(9) }}{{ lipsum(1) }}{{ strftime_now('%Z') }}").render()
    # What {% generation %} marks, what the model says, matters to training: here it is a block like any other.
    template = re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", template)
    limit(SECONDS, MEMORY)
    try:
        text = jinja.from_string(template).render(context)
        return ("text", text) if len(text) <= MAX_TEXT else ("error", f"it writes more than {MAX_TEXT} characters")
    except ConfigError as refusal:
        return "refusal", str(refusal)
    except MemoryError:
        return "error", f"it needs more than {MEMORY >> 20} MB"
    except TemplateSyntaxError as error:
        return "error", f"line {error.lineno}: {error.message}"
    except Exception as error:  # whatever a program can raise
        return "error", f"{type(error).__name__}: {str(error)[:1000]}"
