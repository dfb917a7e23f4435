"""What a chat template is given, with templates as models bring them: strict about turns, tools and thinking."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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

# As Gemma's: no tools, users and assistants in turns, the system's words before the first user's.
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
def test_a_template_that_fails_with_tools_says_so_and_is_not_tried_without(template: str, words: str) -> None:
    with pytest.raises(TemplateError, match=f"failed with tools: .*{words}") as caught:
        render(template, HI, tools=(WEATHER,))
    assert caught.value.status == 422


def test_turns_that_follow_one_another_are_joined_for_a_template_that_wants_them_to_alternate() -> None:
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


def test_what_no_order_of_turns_makes_right_is_the_templates_own_words() -> None:
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
