"""Input of chat templates, with real templates: strict about roles, tools and thinking."""

import json
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from cortex.wire.errors import InvalidRequestError
from cortex.wire.request import InferenceRequest, Message, Role, TextPart, Tool, ToolCall, ToolChoice, ToolMode
from neuron.errors import NoTemplateError, TemplateError
from neuron.text.prompt import PromptFormat
from neuron.text.tokenizer import TextFiles

# One that shows what it is given, and takes a system message at the beginning only.
STRICT = """
{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}
{%- endif %}
{{- '[' + message.role + ']' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '(' + call.function.name + ':' }}
{%- for key, value in call.function.arguments.items() %}{{ key ~ '=' ~ value }}{% endfor %}{{ ')' }}{% endfor %}
{%- endfor %}
{%- if tools %}{{ '{' + tools | map(attribute='function.name') | join(',') + '}' }}{% endif %}"""

# As Gemma's: no tools, alternating users and assistants, the system's text before the first user's.
ALTERNATING = """
{%- if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '/' %}{% set rest = messages[1:] %}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate.') }}{% endif %}
{{- '[' + message['role'] + ']' + (first if loop.first else '') + message['content'] }}
{%- endfor %}"""

WEATHER = Tool("weather", "Tells it.", {"type": "object"})
CALLS = (ToolCall("c1", "weather", '{"city": "Rome"}'), ToolCall("c2", "weather", ""))
HI = Message(Role.USER, "hi")


def prompts(template: str | None) -> PromptFormat:
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PromptFormat(TextFiles(tokenizer, template, {"bos_token": "<s>"}))


def render(template: str, *messages: Message, **fields: Any) -> str:
    return prompts(template).render(InferenceRequest("m", messages, **fields))


def test_system_messages_of_any_number_and_place_become_one_at_the_front() -> None:
    system = Message(Role.SYSTEM, (TextPart("a"), TextPart("b")))
    assert render(STRICT, system, Message(Role.SYSTEM, ""), HI, Message(Role.SYSTEM, "c")) == "[system]ab\n\nc[user]hi"
    assert render(STRICT, Message(Role.SYSTEM, ""), HI) == "[user]hi"


@pytest.mark.parametrize(
    ("param", "request_"),
    [
        ("prompt", InferenceRequest("m", prompt="")),
        ("messages", InferenceRequest("m", messages=(Message(Role.USER, ""),))),
    ],
)
def test_an_empty_prompt_is_an_error_of_what_it_came_from(param: str, request_: InferenceRequest) -> None:
    with pytest.raises(InvalidRequestError, match=f"'{param}': the prompt is empty") as caught:
        prompts("{% for message in messages %}{{ message.content }}{% endfor %}").build(request_)
    assert caught.value.param == param


def test_arguments_are_an_object_to_a_template() -> None:
    assert render(STRICT, HI, Message(Role.ASSISTANT, "", CALLS), tools=(WEATHER,)) == (
        "[user]hi[assistant](weather:city=Rome)(weather:){weather}"
    )


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    assert render(STRICT, HI, tools=(WEATHER,), tool_choice=ToolChoice(ToolMode.NONE)) == "[user]hi"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no tools here') if tools }}{{ messages[0].content }}", "no tools here"),
        ("{{ (tools or [[]])[0].nothing.at_all }}{{ messages[0].content }}", "nothing"),
        ("{{ 1 // 0 if tools }}{{ messages[0].content }}", "zero"),
        ("{{ '{5}'.format(1) if tools }}{{ messages[0].content }}", "out of range"),
    ],
)
def test_a_template_that_fails_with_tools_is_an_error_and_is_not_tried_without(template: str, words: str) -> None:
    with pytest.raises(TemplateError, match=f"failed with tools: .*{words}") as caught:
        render(template, HI, tools=(WEATHER,))
    assert caught.value.status == 422


def test_consecutive_messages_of_a_role_are_joined_for_a_template_of_alternating_roles() -> None:
    """As agents send them: a reminder before the question, and the results of several calls before more words."""
    answer, more = Message(Role.ASSISTANT, "yes"), Message(Role.ASSISTANT, "no")
    assert render(ALTERNATING, Message(Role.SYSTEM, "s"), HI, HI, answer, more, HI) == (
        "[user]s/hi\n\nhi[assistant]yes\n\nno[user]hi"
    )
    called = Message(Role.ASSISTANT, "I look.", CALLS)
    results = [Message(Role.TOOL, text, tool_call_id=f"c{i}") for i, text in enumerate(("rain", "sun"), 1)]
    text = render(ALTERNATING, HI, called, *results, HI, tools=(WEATHER,))
    assert text.count("[user]") == 2
    assert json.dumps({"name": "weather", "arguments": {"city": "Rome"}}) in text
    assert text.endswith("<tool_response>\nrain\n</tool_response>\n\n<tool_response>\nsun\n</tool_response>\n\nhi"), (
        "nothing is lost"
    )
    # A template that takes them as they are gets them as they are.
    assert render(STRICT, HI, HI) == "[user]hi[user]hi"


def test_an_order_that_joining_cannot_mend_is_the_templates_own_error() -> None:
    with pytest.raises(TemplateError, match="Roles must alternate"):
        render(ALTERNATING, Message(Role.ASSISTANT, "first"), HI, HI)


@pytest.mark.parametrize(
    ("end", "starts", "ends"),
    [("", False, False), ("<think>\n", True, False), ("<think>\n\n</think>\n\n", False, True)],
)
def test_a_tag_that_the_template_opens_means_that_the_answer_begins_in_reasoning(
    end: str, starts: bool, ends: bool
) -> None:
    template = "{{ messages[0].content }}{# <think> #}{{ '" + end.replace("\n", "\\n") + "' }}"
    prompt = prompts(template).build(InferenceRequest("m", (HI,)))
    assert (prompt.starts_in_reasoning, prompt.ends_reasoning) == (starts, ends)


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(NoTemplateError) as caught:
        prompts(None).render(InferenceRequest("m", (HI,)))
    assert caught.value.status == 422


GENERATION = """
{%- for message in messages %}[{{ message.role }}]
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}{% endfor %}"""

FEATURES = [
    GENERATION,
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{{ messages | tojson(indent=2, sort_keys=true, separators=(', ', ': ')) }}{{ 'ä<&>' | tojson }}",
    "{{ ['ä🦙', 1.0, none, true] | tojson(ensure_ascii=true) }}",
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% set ns.found = m.role %}{% endfor %}{{ ns.found }}",
    "{% if tools is none and documents is none %}none{% endif %}{{ tools is defined }}{{ x is defined }}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
    "{% macro show(m) %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endmacro %}{{ show(messages[0]) }}",
    "    {%- if true %}\n    a\n    {% endif %}\n  b {{ dict(a=1) | tojson }}{{ strftime_now('%Y') }}",
    "{{ messages[0]['content'][::-1] }}{{ messages | length }}{{ 'a-b'.split('-') | join('+') }}{{ '%s' | format(1) }}",
]


@pytest.mark.parametrize("template", FEATURES)
def test_templates_render_as_the_reference_implementation_renders_them(template: str) -> None:
    history = (Message(Role.USER, " hi "), Message(Role.ASSISTANT, "so"), Message(Role.USER, "b"))
    expected, _ = render_jinja_template(
        [[{"role": str(message.role), "content": message.content} for message in history]],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<s>",
    )
    assert render(template, *history) == expected[0]


@pytest.mark.parametrize("template", ["{% generation %}", "{% generation %}x{% endfor %}", "{{ a b }}"])
def test_a_syntax_error_of_a_template_has_its_line(template: str) -> None:
    with pytest.raises(TemplateError, match="syntax error in line 1"):
        prompts(template)


def test_a_template_is_sandboxed() -> None:
    for template in ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "{{ ''.__class__.__mro__[1] }}x"):
        with pytest.raises(TemplateError, match="failed"):
            render(template, HI)


ARGUMENTS = [
    ("", {}), ("  \n", {}), ("null", {}), ("{}", {}), ('{"a": 1}', {"a": 1}), ('"{\\"a\\": 1}"', {"a": 1}),
    ('"null"', {}), ('{"a":', {"arguments": '{"a":'}), ("[1]", {"arguments": "[1]"}), ("3", {"arguments": 3}),
    ("text", {"arguments": "text"}),
    ("[" * 3000, {"arguments": "[" * 3000}), ("9" * 5000, {"arguments": "9" * 5000}),
    ('{"a":' * 100 + "1" + "}" * 100, {"arguments": '{"a":' * 100 + "1" + "}" * 100}),
]  # fmt: skip


@pytest.mark.parametrize(("written", "seen"), ARGUMENTS)
@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[1].tool_calls[0].function.arguments | tojson }}{# tools #}",
        "a{% for k, v in messages[1].tool_calls[0].function.arguments.items() %}{{ k ~ v }}{% endfor %}{# tools #}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_no_arguments_of_an_earlier_call_end_a_conversation(template: str, written: str, seen: dict[str, Any]) -> None:
    """A call that was cut at the limit of tokens comes back with every later request."""
    call = Message(Role.ASSISTANT, "", (ToolCall("c", "weather", written),))
    for content in ("", "so"):
        history = (HI, msgspec.structs.replace(call, content=content), Message(Role.TOOL, "rain", tool_call_id="c"), HI)
        request = InferenceRequest("m", history, tools=(WEATHER,))
        text = prompts(template).render(request)
        assert prompts(template).build(request).ids
        if "tojson }}{# tools" in template:
            assert json.loads(text) == seen


def test_halves_of_characters_are_no_end_of_a_conversation() -> None:
    half = Message(Role.ASSISTANT, "\ud800", (ToolCall("c", "\udc00", '{"a": "\\ud83e"}'),))
    assert prompts(STRICT).build(InferenceRequest("m", (HI, half))).ids
    assert prompts(None).build(InferenceRequest("m", prompt="a\ud800")).ids


def test_a_result_is_named_after_its_call() -> None:
    named = "{% for m in messages %}{{ m.role ~ '/' ~ (m.name or '-') }} {% endfor %}{# tools #}"
    history = (HI, Message(Role.ASSISTANT, "", CALLS), Message(Role.TOOL, "rain", tool_call_id="c1"))
    orphan = Message(Role.TOOL, "sun", tool_call_id="unknown")
    assert render(named, *history, orphan) == "user/- assistant/- tool/weather tool/- "


def test_ids_of_calls_have_the_form_a_template_requires() -> None:
    """As Mistral's: `call_...` of other servers, and of this one, would be refused."""
    template = """{% for m in messages %}{% for call in m.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}{{ call.id }}
{%- endfor %}{% if m.tool_call_id %}{{ '=' ~ m.tool_call_id }}{% endif %}{% endfor %}{# tools #}"""
    call = Message(Role.ASSISTANT, "", (ToolCall("call_0123456789abcdef", "weather", "{}"),))
    text = render(template, HI, call, Message(Role.TOOL, "rain", tool_call_id="call_0123456789abcdef"))
    made, _, answered = text.partition("=")
    assert made == answered
    assert made.isalnum()
    kept = Message(Role.ASSISTANT, "", (ToolCall("abcDEF123", "weather", "{}"),))
    assert render(template, HI, kept) == "abcDEF123"


def test_reserved_template_variables_cannot_be_replaced() -> None:
    for name in ("messages", "tools"):
        with pytest.raises(InvalidRequestError, match=f"'{name}' cannot be given"):
            render(STRICT, HI, template_arguments={name: []})
    assert render("{{ add_generation_prompt }}", HI, template_arguments={"add_generation_prompt": False}) == "False"


# As Qwen3.5's and later ones: thinking is opened or closed for the model, old thoughts are kept on demand, and an
# effort that is not known is an error.
THINKING = """
{%- if reasoning_effort is defined and reasoning_effort not in ['low', 'medium', 'xhigh'] %}
{{- raise_exception('Unknown effort.') }}{% endif %}
{{- '(' + reasoning_effort + ')' if reasoning_effort is defined else '' }}
{%- set last = namespace(at=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}{{- '[' + message.role + ']' }}
{%- if message.reasoning_content and (preserve_thinking | default(false) or loop.index0 > last.at) %}
{{- '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{- message.content }}{% endfor %}
{%- if add_generation_prompt %}{{- '[assistant]<think>\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '\\n</think>\\n\\n' }}{% endif %}{% endif %}"""


def thinking(*messages: Message, **fields: Any) -> str:
    return render(THINKING, *(messages or (HI,)), **fields)


def test_thinking_is_opened_or_closed_as_the_template_does() -> None:
    assert thinking() == thinking(thinking=True) == "[user]hi[assistant]<think>\n"
    assert thinking(thinking=False) == "[user]hi[assistant]<think>\n\n</think>\n\n"
    format = prompts(THINKING)
    opened = format.build(InferenceRequest("m", (HI,)))
    assert (opened.starts_in_reasoning, opened.ends_reasoning) == (True, False)
    closed = format.build(InferenceRequest("m", (HI,), thinking=False))
    assert (closed.starts_in_reasoning, closed.ends_reasoning) == (False, True)


def test_an_effort_is_one_that_the_template_takes() -> None:
    for asked, given in (("low", "low"), ("medium", "medium"), ("high", "xhigh"), ("max", "xhigh")):
        assert thinking(thinking=True, effort=asked).startswith(f"({given})")
    assert thinking(effort="high", template_arguments={"reasoning_effort": "low"}).startswith("(low)")
    with pytest.raises(TemplateError, match="Unknown effort"):
        thinking(template_arguments={"reasoning_effort": "high"})
    assert render(STRICT, HI, effort="high") == "[user]hi", "a template without efforts gets none"


def test_old_thoughts_are_kept_on_demand() -> None:
    turns = HI, Message(Role.ASSISTANT, "hello", reasoning="a greeting"), Message(Role.USER, "again")
    assert "a greeting" not in thinking(*turns)
    assert "<think>a greeting</think>hello" in thinking(*turns, template_arguments={"preserve_thinking": True})
    assert "a greeting" in thinking(*turns[:2]), "behind the last question they are always there"
