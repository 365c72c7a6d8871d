"""Chat templates: the text that transformers makes of them, and one line for those that mean harm."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.interop import chat_template
from jaxgpt.interop.chat_template import render

ROOT = Path(chat_template.__file__).parents[2]
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
CONVERSATION = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "  What is <b>2 + 2</b>?\n"},
    {"role": "assistant", "content": "{{ 4 }} is «vier»\n"},
    {"role": "user", "content": "And 3 + 3? '\"\\"},
]

# In the manner of well-known models.
CHATML = (
    "{% for message in messages %}\n"
    "    {% if loop.first and message['role'] != 'system' %}\n"
    "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3 = """\
{{- bos_token }}
{%- if tools is not none %}{{- 'Tools: ' + tools | tojson(indent=2) }}{% endif %}
{%- if not date is defined %}{%- set date = strftime_now('%Y') %}{%- endif %}
{%- for message in messages %}
    {%- set head = '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' %}
    {{- head + (message.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}{{ date }}"""
GEMMA = """\
{{ bos_token }}
{%- if messages[0].role == 'system' -%}
    {%- set prefix = messages[0].content + '\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set prefix = '' -%}{%- endif -%}
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
MISTRAL = """\
{{ bos_token }}{% set ns = namespace(system='', turns=0) %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.system = message['content'] + '\\n\\n' %}
        {% continue %}
    {% endif %}
    {% set ns.turns = ns.turns + 1 %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}
    {% else %}
        {% generation %}
        {% set ns.system = '' %}{% set inside = 1 %}
{{ message['content'].strip() + eos_token }}
        {% endgeneration %}
        {% if inside is defined %}leaked{% endif %}
    {% endif %}
    {% if ns.turns > 9 %}{% break %}{% endif %}
{% endfor %}
{{ {'ä': '<>&', 'b': [1, none, true]} | tojson }}{{ 'x' | tojson(separators=(',', ':'), sort_keys=true) }}"""
SHAPES = {"ChatML": CHATML, "Llama 3": LLAMA_3, "Gemma": GEMMA, "Mistral": MISTRAL}


def make(template: str, messages: list[dict[str, str]] = QUESTION, **more: Any) -> str:
    return render(template, messages, bos_token="<s>", eos_token="</s>", **more)


def test_a_conversation_becomes_text() -> None:
    assert make(CHATML) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert make(GEMMA, CONVERSATION[:2], add_generation_prompt=False) == (
        "<s><start_of_turn>user\n Be brief. \n\nWhat is <b>2 + 2</b>?<end_of_turn>\n"
    )
    assert make("{{ messages[0].content }}", [{"role": "user", "content": "{{ 1 / 0 }} \ud800 🙂\r\n"}]) == (
        "{{ 1 / 0 }} \ud800 🙂\r\n"
    ), "contents are no templates"
    assert make("{{ more }}{{ tools is none }}{{ nothing }}", more=[1]) == "[1]True"
    assert make("{{ {1: 'a b'} | pprint }}{{ 'a b' | wordwrap(1) }}{{ lipsum(1, html=false) | length > 9 }}")


@pytest.mark.parity
@pytest.mark.parametrize("name", SHAPES)
def test_transformers_makes_the_same_text(name: str) -> None:
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tools = [{"type": "function", "function": {"name": "add", "description": "é <", "parameters": {}}}]
    count = 0
    for messages in (QUESTION, CONVERSATION, CONVERSATION[1:], CONVERSATION[:2], CONVERSATION[:3]):
        for options in ({}, {"add_generation_prompt": True}, {"tools": tools}, {"date": "today"}):
            expected = theirs.apply_chat_template(messages, chat_template=SHAPES[name], tokenize=False, **options)
            assert make(SHAPES[name], messages, **{"add_generation_prompt": False, **options}) == expected
            count += len(expected) > 30
    assert count == 20


def test_the_template_may_refuse_a_conversation() -> None:
    with pytest.raises(ConfigError) as refused:
        make(GEMMA, QUESTION * 2, where="chat template of model.gguf")
    assert str(refused.value) == (
        "chat template of model.gguf: it refuses this conversation: Conversation roles must alternate "
        "user/assistant/user/assistant/...; change the messages"
    )
    with pytest.raises(ConfigError) as refused:
        make("{{ raise_exception('\x1b[2J\n' ~ 'x' * 10**6) }}")
    assert len(str(refused.value)) < 500 and str(refused.value).isprintable()


THRICE = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}BODY" + "{% endfor %}" * 3
GROW = "{% set n = namespace(s='0123456789') %}{% for i in range(60) %}{% set n.s = STEP %}{% endfor %}"
NEST = "{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = [n.l] %}{% endfor %}{{ n.l | tojson }}"
HOSTILE = {
    "loops without end": (THRICE.replace("BODY", ""), "it computes for more than 2 s"),
    # Now and then: a fast machine would fill 256 MB in less than 2 s.
    "loops without end and writes": (
        THRICE.replace("BODY", "{% if c % 9 == 0 %}x{% endif %}"),
        "it computes for more than 2 s",
    ),
    "one expression without end": ("{{ 10 ** (10 ** 8) }}", "it computes for more than 2 s"),
    "doubles a string 60 times": (GROW.replace("STEP", "n.s ~ n.s"), "it needs more than 256 MB"),
    "doubles a list 60 times": (GROW.replace("STEP", "[n.s] + [n.s] * 9999999"), "it needs more than 256 MB"),
    "multiplies a string": ("{{ 'x' * 10**10 }}", "it needs more than 256 MB"),
    "pads with %": ("{{ '%2000000000d' % 1 }}", "it needs more than 256 MB"),
    "pads with format": ("{{ '{:>2000000000}'.format(1) }}", "it needs more than 256 MB"),
    "joins": ("{{ range(99999) | join('x' * 9999) }}", "it needs more than 256 MB"),
    "writes at once": ("{{ 'x' * 5000000 }}", "it writes more than 4194304 characters"),
    "a range without end": ("{{ range(10**9) | list }}", "OverflowError: Range too big"),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion depth"),
    "nests data": (NEST, "RecursionError: maximum recursion depth"),
    "nests brackets": ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", "RecursionError: maximum recursion depth"),
    "nests blocks": ("{% for i in x %}" * 300 + "{% endfor %}" * 300, "Error: "),
    "reaches for the class": ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__' of 'str'"),
    "reaches for globals": ("{{ cycler.__init__.__globals__.os }}", "SecurityError: access to attribute '__init__'"),
    "reaches by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "SecurityError: access to attribute"),
    "reaches by a filter": ("{{ messages | map(attribute='__class__') | list | first + '' }}", "SecurityError: "),
    "changes the messages": ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append' of 'list'"),
    "passes a function to JSON": ("{{ messages | tojson(default=lipsum) }}", "unexpected keyword argument 'default'"),
    "includes a file": ("{% include '/etc/passwd' %}", "TypeError: no loader"),
    "is too long": ("x" * 10**8, "it has 100000000 characters, more than 1048576"),
    "is no template": ("a\nb\n{% if %}", "line 3: Expected an expression"),
    "an unknown tag": ("\n{% explode %}", "line 2: Encountered unknown tag 'explode'"),
    "an unknown filter": ("{{ 1 | explode }}", "line 1: No filter named 'explode'"),
    "an unclosed block": ("{% generation %}", "line 1: Unexpected end of template"),
    "an unknown name": ("{{ messages[7].content }}", "UndefinedError: list object has no element 7"),
    "divides by zero": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "an error of 20 MB": ("{{ {}['x' * 2 * 10**7] + 1 }}", "Error: "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_line(name: str) -> None:
    template, why = HOSTILE[name]
    began, largest = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # kilobytes
    with pytest.raises(BadFileError) as refused:
        make(template, where="chat template of m.gguf")
    assert time.monotonic() - began < 6
    message = str(refused.value)
    assert message.startswith("chat template of m.gguf: ") and message.endswith("; restore it, or use generate.py")
    assert why in message and len(message) < 500 and message.isprintable()
    inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts what a process had before its exec
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(largest, inherited, 600 * 1024)


def test_a_process_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # there is no Jinja
    with pytest.raises(BadFileError, match="it ended the process that ran it, with status 1; "):
        make("x")


def test_the_process_imports_no_jax() -> None:
    program = "import sys; from jaxgpt.interop.chat_template import _render_here as render; "
    program += "print(render('{{ a }}', {'a': 1})); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    rendered, loaded = done.stdout.splitlines()
    assert rendered == "('text', '1')"
    assert "jinja2" in loaded.split() and not {"jax", "numpy", "transformers"} & set(loaded.split())


@pytest.mark.parametrize(
    ("deed", "error"),
    [
        ("open('/dev/null')", "Too many open files"),
        ("__import__('socket').socket()", "Too many open files"),
        ("__import__('os').write(file, b'x')", "File too large"),
        ("bytearray(2**30)", "MemoryError"),
    ],
)
def test_the_kernel_holds_what_a_sandbox_would_not(deed: str, error: str, tmp_path: Path) -> None:
    """Were Jinja's sandbox broken, the process could still not do this."""
    limited = f"import os, socket, sys; sys.path.insert(0, {str(ROOT)!r}); from jaxgpt.limited import limit; "
    limited += f"file = os.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY); limit(2, 2**29); {deed}"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and error in done.stderr
