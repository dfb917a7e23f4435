"""Outputs of models that call tools as Qwen3-Coder, Qwen3.5 and those after them: what a client gets, however cut."""

import json
import random
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from cortex.wire.events import ReasoningDelta, TextDelta, ToolCallDelta
from cortex.wire.request import InferenceRequest, Tool, ToolChoice, ToolMode
from neuron.device.jobs import SequenceEnd
from neuron.text.detokenize import Detokenizer
from neuron.text.forms import think
from neuron.text.forms.registry import FORMS
from neuron.text.grammar import constraint_of

from ..test_detokenize import byte_tokenizer as byte_tokenizer
from ..test_schema import sampled
from ..test_tools import parse_with

EDIT = Tool(
    "edit",
    parameters={
        "type": "object",
        "properties": {
            "path": {"type": "string"}, "text": {"type": "string"}, "line": {"type": "integer"},
            "all": {"type": ["boolean", "null"]}, "edits": {"type": "array", "items": {"type": "object"}},
            "options": {"type": "object"}, "mode": {"enum": ["a", "b"]}, "ratio": {"type": "number"},
        },
        "required": ["path"],
    },
)  # fmt: skip
PING = Tool("ping")
TOOLS = [EDIT, PING]


def call(name: str, *parameters: tuple[str, str]) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def edit(**values: Any) -> tuple[str, str]:
    return "edit", json.dumps(values, ensure_ascii=False)


PATH = ("path", "a.py")
NO_END = call("edit", PATH, ("text", "x")).removesuffix("</tool_call>")
TEXTS = [
    "", "one", "two\nlines", " spaces ", "\n", "tab\t", "emoji \N{SNOWMAN}", "\N{GRINNING FACE}", "ünïcødé", "中文",
    "e\u0301 joined", 'quote " and \\ backslash', "null", "true", "3", "{}", "[1, 2]", '{"a": "b"}', "a < b && c > d",
    "<div>\n  <p>x</p>\n</div>", "</parameter> inside", "<parameter=path> inside", "a </function> b",
    "a <tool_call> b", "x</tool_call>y", "<function=f>", "<think>no</think>", "```py\nprint('</parameter>')\n```",
    "line\r\nends", "\u2028 separator", "\x00 control", "</", "<", "<param", "</parameter", "\n\n\n", "a" * 300,
]  # fmt: skip
"""Values of a string, each of which comes as it is."""
CASES: list[tuple[str, list[Any]]] = [
    *((call("edit", PATH, ("text", text)), [edit(path="a.py", text=text)]) for text in TEXTS),
    # Types.
    (call("edit", PATH, ("line", "3")), [edit(path="a.py", line=3)]),
    (call("edit", PATH, ("line", "3.0")), [edit(path="a.py", line=3)]),
    (call("edit", PATH, ("line", "three")), [edit(path="a.py", line="three")]),
    (call("edit", PATH, ("all", "True")), [edit(path="a.py", all=True)]),
    (call("edit", PATH, ("all", "None")), [edit(path="a.py", all=None)]),
    (call("edit", PATH, ("mode", "b")), [edit(path="a.py", mode="b")]),
    (call("edit", PATH, ("ratio", "-1.5e3")), [("edit", '{"path": "a.py", "ratio": -1.5e3}')]),
    (
        call("edit", PATH, ("edits", '[{"old": "a", "new": "</x>"}]')),
        [edit(path="a.py", edits=[{"old": "a", "new": "</x>"}])],
    ),
    (
        call("edit", PATH, ("edits", "[{'old': 'a', 'n': None}]")),
        [("edit", '{"path": "a.py", "edits": [{"old":"a","n":null}]}')],
    ),
    (
        call("edit", PATH, ("options", '{"deep": {"er": [1, {"x": null}]}}')),
        [edit(path="a.py", options={"deep": {"er": [1, {"x": None}]}})],
    ),
    (call("edit", PATH, ("unknown", "5")), [edit(path="a.py", unknown="5")]),
    (call("other", ("x", "5"), ("y", "true")), [("other", '{"x": "5", "y": "true"}')]),
    (call("ping"), [("ping", "{}")]),
    # Several calls, and text around them.
    (f"Let me see.\n\n{call('ping')}", ["Let me see.", ("ping", "{}")]),
    (f"{call('ping')}\n{call('edit', PATH)}\n{call('ping')}", [("ping", "{}"), edit(path="a.py"), ("ping", "{}")]),
    (f"{call('ping')}\n\nDone.", [("ping", "{}"), "Done."]),
    (f"a{call('ping')}b{call('ping')}c", ["a", ("ping", "{}"), "b", ("ping", "{}"), "c"]),
    # Tags that are missing, or stand elsewhere.
    ("<tool_call><function=edit><parameter=path>a.py</parameter></function></tool_call>", [edit(path="a.py")]),
    ("<function=edit>\n<parameter=path>\na.py\n</parameter>\n</function>", [edit(path="a.py")]),
    (call("edit", PATH, ("line", "3")).replace("</parameter>\n", "", 1), [edit(path="a.py", line=3)]),
    ("<tool_call>\n<function=edit>\n<parameter=path>\na.py\n</parameter>\n</tool_call>", [edit(path="a.py")]),
    ("<tool_call>\n<function=edit>\n<parameter=path>\na.py\n</function>\n</tool_call>", [edit(path="a.py")]),
    (NO_END, [edit(path="a.py", text="x")]),
    (f"{NO_END}{call('ping')}", [edit(path="a.py", text="x"), ("ping", "{}")]),
    ("<tool_call>\n<function=edit>\n<parameter=path>\na.p", [edit(path="a.p")]),
    ("<tool_call>\n<function=ping>", [("ping", "{}")]),
    ('<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>', [("ping", "{}")]),
    # No calls.
    ("<tool_call>\n<function", ["<tool_call>\n<function"]),
    ("<tool_call>\n<function=>\n</function>\n</tool_call>", ["<tool_call>\n<function=>\n</function>\n</tool_call>"]),
    ("<tool_call>\n<function=a\nb>\n</tool_call>", ["<tool_call>\n<function=a\nb>\n</tool_call>"]),
    ("<tool_call>nothing", ["<tool_call>nothing"]),
    ("I would write <tool_call> here", ["I would write <tool_call> here"]),
    ("plain < text </function>", ["plain < text </function>"]),
]
CUT: list[tuple[str, list[Any]]] = [
    ("<tool_call>\n<function=edit>\n<parameter=path>\na.p", [("edit", '{"path": "a.p', "...")]),
    ("<tool_call>\n<function=edit>\n<parameter=line>\n3", [("edit", '{"line": ', "...")]),
    ("<tool_call>\n<function=edit>\n", [("edit", "", "...")]),
    (
        f"{call('ping')}\n<tool_call>\n<function=edit>\n<parameter=path>\n",
        [("ping", "{}"), ("edit", '{"path": "', "...")],
    ),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_each_output_in_any_cut(text: str, expected: list[Any]) -> None:
    check(text, expected, cut=False)


@pytest.mark.parametrize(("text", "expected"), CUT)
def test_an_output_that_is_cut_stays_open(text: str, expected: list[Any]) -> None:
    check(text, expected, cut=True)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_for_any_split_of_tokens(byte_tokenizer: Tokenizer, size: int) -> None:
    """Behind reasoning that is open, in steps of so many tokens: a token is a byte here."""
    for text, expected in CASES:
        ids = byte_tokenizer.encode(f"I see.\n</think>\n\n{text}").ids
        reader = Detokenizer(
            byte_tokenizer, tags=think.FORM, starts_in_reasoning=True, tools=TOOLS, call_form=FORMS["xml"]
        )
        events = [event for at in range(0, len(ids), size) for event in reader.feed(ids[at : at + size])]
        events += reader.close(SequenceEnd.STOP)
        calls: list[list[str]] = []
        for event in events:
            if isinstance(event, ToolCallDelta):
                calls += [[event.name, ""]] if event.name else []
                calls[event.call][1] += event.arguments
        answer = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert [tuple(call) for call in calls] == [each for each in expected if isinstance(each, tuple)]
        assert answer == "".join(each for each in expected if isinstance(each, str))
        assert "".join(event.text for event in events if isinstance(event, ReasoningDelta)) == "I see."


def check(text: str, expected: list[Any], *, cut: bool) -> None:
    assert parse_with(TOOLS, [text], FORMS["xml"], cut=cut) == expected
    assert parse_with(TOOLS, list(text), FORMS["xml"], cut=cut) == expected
    for at in range(1, len(text), 1 + len(text) // 100):
        assert parse_with(TOOLS, [text[:at], text[at:]], FORMS["xml"], cut=cut) == expected


# ------------------------------------------------------------------ forced calls


def schema(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


FORCED: dict[str, tuple[dict[str, Any], bool]] = {
    "text": (schema(["a"], a={"type": "string", "maxLength": 12}, b={"type": "string", "maxLength": 3}), True),
    "numbers": (schema(["a", "b"], a={"type": "integer", "minimum": 0, "maximum": 9}, b={"type": "boolean"}), True),
    "listed": (schema(["a"], a={"enum": ["x", "y", "1"]}, b={"const": 7}, c={"enum": [1, None]}), True),
    "pattern": (
        schema(
            ["a"],
            a={"type": "string", "pattern": "^[a-c]{2,4}/x$"},
            b={"type": "string", "pattern": "q", "maxLength": 5},
        ),
        True,
    ),
    "nested": (
        schema(["a"], a={"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}, b={"$ref": "#/$defs/B"})
        | {"$defs": {"B": {"type": "object", "properties": {"c": {"type": "null"}}, "additionalProperties": False}}},
        True,
    ),
    "none": ({"type": "object", "properties": {}, "additionalProperties": False}, True),
    "any": ({}, True),
    "either": (schema(["a"], a={"type": ["string", "null"], "maxLength": 4}), True),
    "format": (schema(["a"], a={"type": "string", "format": "date"}), False),
    "alternatives": (
        schema(["a"], a={"type": "integer", "maximum": 3, "minimum": 0})
        | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        False,
    ),
    "text of a reference": (
        schema(["a"], a={"$ref": "#/$defs/A"}) | {"$defs": {"A": {"type": "string", "maxLength": 5}}},
        False,
    ),
}
"""Schemas, and whether they are forced in bare values; all others as JSON within the tags."""


@pytest.mark.parametrize("name", FORCED)
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(("form", "head"), [("xml", "<function=f>"), ("glm", "f\\n")])
def test_a_forced_call_is_read_as_its_schema_has_it(name: str, parallel: bool, form: str, head: str) -> None:
    parameters, is_bare = FORCED[name]
    tool = Tool("f", "", parameters)
    choice = ToolChoice(ToolMode.REQUIRED, parallel=parallel)
    grammar = constraint_of(InferenceRequest("m", prompt="x", tools=(tool, PING), tool_choice=choice), FORMS[form])
    assert grammar is not None
    assert (f'"{head}' in grammar) == is_bare
    ended, names = 0, set()
    for seed in range(24):
        answer = sampled(grammar, random.Random(seed))
        if answer is None:
            continue
        ended += 1
        found = parse_with([tool, PING], [answer.decode("utf-8", "replace")], FORMS[form])
        assert parallel or len(found) == 1
        for called, arguments in found:
            names.add(called)
            if called == "f":
                jsonschema.Draft202012Validator(parameters).validate(json.loads(arguments))
    assert ended
    assert "f" in names or name == "any"
