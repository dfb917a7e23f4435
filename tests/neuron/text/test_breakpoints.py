"""Cache breakpoints: where a chat's next prompt parts from its last one, for templates of all habits."""

import itertools

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cortex.wire.node import SpecialTokensInText
from cortex.wire.request import InferenceRequest, Message, Role, Tool, ToolCall
from neuron.text.breakpoints import common_prefix
from neuron.text.prompt import PromptFormat
from neuron.text.tokenizer import TextFiles

# As Qwen's: reasoning is kept behind the last question only, and results are parts of a user's turn.
DROPS_REASONING = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\\n' }}{{ tools | tojson }}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and m.reasoning_content %}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content }}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>' }}{{ c.function | tojson }}{{ '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
KEEPS_ALL = DROPS_REASONING.replace("loop.index0 > ns.last and", "")
# As Mistral's: the tools stand before the last question.
TOOLS_LAST = """
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.last %}{{ '<|tools|>' }}{{ tools | tojson }}{{ '<|im_end|>' }}{% endif %}
{{- '<|im_start|>' + m.content + '<|im_end|>' }}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}
{%- endfor %}"""
# Without special tokens, and strict about roles.
PLAIN = """
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate.') }}{% endif %}
{{- '### ' + m.role + ':\\n' + m.content + '\\n\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"""
LOOK = Tool("look", "Looks.", {"type": "object"})
SHORT = "Be brief. "


def prompts(template: str, special: SpecialTokensInText = SpecialTokensInText.TEXT) -> PromptFormat:
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    return PromptFormat(TextFiles(tokenizer, template, {}), special, finds_breakpoints=True)


def agent(num_turns: int, *, returns_reasoning: bool) -> list[list[Message]]:
    """Return the messages of each request of an agent: a question, two calls, an answer, and so on."""
    messages: list[Message] = [Message(Role.SYSTEM, SHORT * 9)]
    found = []
    for turn in range(num_turns):
        messages = [*messages, Message(Role.USER, f"Question {turn}: 🦙 <|im_start|> " + SHORT * 5)]
        found.append(messages)
        for step in range(2):
            thoughts = f"Thoughts {turn}.{step}. " * 9 if returns_reasoning else None
            call = ToolCall(f"c{turn}{step}", "look", f'{{"at": "{turn}{step}"}}')
            result = Message(Role.TOOL, f"Result {turn}.{step}. " * 7, tool_call_id=call.id)
            messages = [*messages, Message(Role.ASSISTANT, "", (call,), reasoning=thoughts), result]
            found.append(messages)
        thoughts = "Last thoughts. " * 9 if returns_reasoning else None
        messages = [*messages, Message(Role.ASSISTANT, f"Answer {turn}.", reasoning=thoughts)]
    return found


def common(ids: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))


@pytest.mark.parametrize("special", SpecialTokensInText)
@pytest.mark.parametrize("returns_reasoning", [True, False])
@pytest.mark.parametrize("template", [DROPS_REASONING, KEEPS_ALL, TOOLS_LAST])
def test_each_prompt_parts_from_the_one_before_it_at_a_breakpoint_or_its_end(
    template: str, returns_reasoning: bool, special: SpecialTokensInText
) -> None:
    form = prompts(template, special)
    built = [
        form.build(InferenceRequest("m", tuple(messages), tools=(LOOK,)))
        for messages in agent(3, returns_reasoning=returns_reasoning)
    ]
    ends = 0
    for before, after in itertools.pairwise(built):
        parts = common(before.ids, after.ids)
        missed = min(parts - at for at in (*before.breakpoints, len(before.ids)) if at <= parts)
        assert missed <= 1
        assert list(before.breakpoints) == sorted(set(before.breakpoints))
        assert len(before.breakpoints) <= 3
        ends += parts == len(before.ids)
    assert bool(ends) == (returns_reasoning or template is TOOLS_LAST)


def test_a_loop_of_calls_keeps_the_place_before_its_reasoning() -> None:
    """A later question drops the reasoning of the whole loop, so that its prompt parts at the loop's first answer."""
    form = prompts(DROPS_REASONING)
    question, _, last, following, *_ = agent(2, returns_reasoning=True)
    ids, *others = (
        form.build(InferenceRequest("m", tuple(messages), tools=(LOOK,))) for messages in (last, question, following)
    )
    parts = [common(ids.ids, other.ids) for other in others]
    assert parts[0] < len(ids.ids) / 2
    assert any(parts[1] - 1 <= at <= parts[1] for at in ids.breakpoints)


def test_conversations_share_what_is_before_the_first_question() -> None:
    form = prompts(DROPS_REASONING)
    system = Message(Role.SYSTEM, SHORT * 20)
    one, other = (
        form.build(InferenceRequest("m", (system, Message(Role.USER, text)), tools=(LOOK,))) for text in ("one", "two")
    )
    shared = common(one.ids, other.ids)
    assert shared - 1 <= one.breakpoints[0] <= shared
    assert one.breakpoints[0] == other.breakpoints[0]
    assert one.breakpoints[0] < one.breakpoints[-1]


def test_a_template_without_special_tokens_that_refuses_some_conversations() -> None:
    form = prompts(PLAIN)
    answered = (Message(Role.USER, "one"), Message(Role.ASSISTANT, "so"))
    whole = form.build(InferenceRequest("m", (answered[0],)))
    assert whole.breakpoints[-1] == len(whole.ids) - 1
    # With an answer begun, only another conversation and joined messages can follow.
    begun = form.build(InferenceRequest("m", answered))
    assert 0 < begun.breakpoints[0] < begun.breakpoints[-1] < len(begun.ids)


def test_there_are_none_for_raw_prompts_and_none_unless_asked_for() -> None:
    form = prompts(PLAIN)
    assert form.build(InferenceRequest("m", prompt="### user:\n")).breakpoints == ()
    request = InferenceRequest("m", (Message(Role.USER, "one"),))
    assert form.build(request).breakpoints
    assert PromptFormat(form._files).build(request).breakpoints == ()


def test_common_prefixes() -> None:
    assert [common_prefix("abc", other) for other in ("", "x", "a", "abx", "abc", "abcd", "🦙")] == [
        0,
        0,
        1,
        2,
        3,
        3,
        0,
    ]
