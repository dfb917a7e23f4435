"""Outputs in each form of calls: the right calls, for any split of the text, and arguments that never look complete.

Calls are written here as the models' templates write them, and read by the forms.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest

from cortex.wire.request import Tool
from neuron.text.forms.form import CallForm
from neuron.text.forms.registry import FORMS, REASONING_FORMS, form_of, reasoning_of

from ..test_tools import parse_with

EDIT = Tool(
    "edit",
    parameters={
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "line": {"type": "integer"},
            "ratio": {"type": "number"},
            "all": {"type": ["boolean", "null"]},
            "tags": {"type": "array"},
            "more": {"type": "object"},
        },
    },
)
TOOLS = [EDIT, Tool("ping", parameters={"type": "object", "properties": {}})]

Arguments = dict[str, Any]
Calls = list[tuple[str, Arguments]]

ARGUMENTS: list[Arguments] = [
    {},
    {"path": "a.py"},
    {"path": ""},
    {"path": "say \"x\" and 'y'"},
    {"path": "two\nlines\n"},
    {"path": "  spaces  "},
    {"path": "\\ back \\n slash"},
    {"path": "é ü 漢字 🙂"},
    {"path": "{not: json}"},
    {"path": "[1, 2"},
    {"path": "true"},
    {"path": "007"},
    {"path": "a, b) c] d}"},
    {"path": "x = f(y='z')"},
    {"path": "<b>bold</b> & 1 < 2 > 0"},
    {"path": "`code` ```block```"},
    {"line": 3},
    {"line": -12},
    {"ratio": 0.5},
    {"ratio": -1.5e-07},
    {"all": True},
    {"all": False},
    {"all": None},
    {"tags": []},
    {"tags": ["a", "b c", "d,e", "f]"]},
    {"tags": [1, [2, [3]], {"k": "v"}]},
    {"more": {}},
    {"more": {"a": {"b": [True, None, "x"]}, "c": "}"}},
    {"path": "a", "line": 1, "ratio": 2.5, "all": True, "tags": ["x"], "more": {"k": 1}},
    {"path": "x" * 3000},
]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _bare(value: object) -> str:
    return value if isinstance(value, str) else _json(value)


def _gemma(value: object) -> str:
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{key}:{_gemma(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ",".join(map(_gemma, value)) + "]"
    return _json(value)


def hermes(calls: Calls) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {_json(given)}}}\n</tool_call>' for name, given in calls
    )


def xml(calls: Calls) -> str:
    def written(name: str, given: Arguments) -> str:
        values = "".join(f"<parameter={key}>\n{_bare(value)}\n</parameter>\n" for key, value in given.items())
        return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"

    return "\n".join(written(*call) for call in calls)


def glm(calls: Calls, newline: str = "\n") -> str:
    def written(name: str, given: Arguments) -> str:
        values = "".join(
            f"<arg_key>{key}</arg_key>{newline}<arg_value>{_bare(value)}</arg_value>{newline}"
            for key, value in given.items()
        )
        return f"<tool_call>{name}{newline}{values}</tool_call>"

    return "\n".join(written(*call) for call in calls)


def minimax(calls: Calls) -> str:
    def written(name: str, given: Arguments) -> str:
        values = "".join(f'<parameter name="{key}">{_bare(value)}</parameter>\n' for key, value in given.items())
        return f'<invoke name="{name}">\n{values}</invoke>\n'

    return "<minimax:tool_call>\n" + "".join(written(*call) for call in calls) + "</minimax:tool_call>"


def dsml(calls: Calls) -> str:
    def written(name: str, given: Arguments) -> str:
        values = "".join(
            f'<｜DSML｜parameter name="{key}" string="{_json(isinstance(value, str))}">{_bare(value)}'
            "</｜DSML｜parameter>\n"
            for key, value in given.items()
        )
        return f'<｜DSML｜invoke name="{name}">\n{values}</｜DSML｜invoke>\n'

    return "<｜DSML｜function_calls>\n" + "".join(written(*call) for call in calls) + "</｜DSML｜function_calls>"


def deepseek_v3(calls: Calls) -> str:
    written = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{_json(given)}\n```<｜tool▁call▁end｜>"
        for name, given in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Calls) -> str:
    written = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{_json(given)}<｜tool▁call▁end｜>" for name, given in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def kimi(calls: Calls) -> str:
    written = "".join(
        f"<|tool_call_begin|>functions.{name}:{at}<|tool_call_argument_begin|>{_json(given)}<|tool_call_end|>"
        for at, (name, given) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{written}<|tool_calls_section_end|>"


def listed(calls: Calls) -> str:
    return _json([{"name": name, "arguments": given} for name, given in calls])


def pythonic(calls: Calls) -> str:
    return (
        "["
        + ", ".join(f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls)
        + "]"
    )


def gemma4(calls: Calls) -> str:
    return "".join(f"<|tool_call>call:{name}{_gemma(given)}<tool_call|>" for name, given in calls)


def mistral(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{_json(given)}" for name, given in calls)


def llama(calls: Calls) -> str:
    return "<|python_tag|>" + "; ".join(f'{{"name": "{name}", "parameters": {_json(given)}}}' for name, given in calls)


WRITERS: dict[str, tuple[str, Callable[[Calls], str]]] = {
    "hermes": ("hermes", hermes),
    "xml": ("xml", xml),
    "glm 4.5": ("glm", glm),
    "glm 4.7": ("glm", lambda calls: glm(calls, "")),
    "minimax": ("minimax", minimax),
    "dsml": ("dsml", dsml),
    "deepseek v3": ("deepseek", deepseek_v3),
    "deepseek v3.1": ("deepseek", deepseek_v31),
    "kimi": ("kimi", kimi),
    "phi": ("phi", lambda calls: f"<|tool_call|>{listed(calls)}<|/tool_call|>"),
    "granite 3": ("phi", lambda calls: f"<|tool_call|>{listed(calls)}"),
    "lfm": ("lfm", lambda calls: f"<|tool_call_start|>{pythonic(calls)}<|tool_call_end|>"),
    "llama 4": ("llama4", pythonic),
    "llama 3": ("llama", llama),
    "gemma 4": ("gemma4", gemma4),
    "mistral": ("mistral", mistral),
    "mistral, listed": ("mistral", lambda calls: f"[TOOL_CALLS] {listed(calls)}"),
}
"""Writers of calls, with the form that reads them."""


def read(text: str, form: CallForm, step: int = 0, *, cut: bool = False) -> list[Any]:
    """Return text and calls with their arguments decoded where they are whole."""
    pieces = [text[at : at + step] for at in range(0, len(text), step)] if step else [text]
    found = parse_with(TOOLS, pieces, form, cut=cut)
    return [each if isinstance(each, str) or len(each) > 2 else (each[0], json.loads(each[1])) for each in found]


@pytest.mark.parametrize("name", WRITERS)
def test_each_output_in_any_split(name: str) -> None:
    form_name, write = WRITERS[name]
    form, at_start = FORMS[form_name], bool(FORMS[form_name].bare and name == "llama 4")
    calls: Calls = [("edit", given) for given in ARGUMENTS]
    cases: list[Calls] = [[call] for call in calls]
    cases += [[call, ("ping", {})] for call in calls[:15]]
    cases += [[("ping", {}), call, ("edit", {"line": 1})] for call in calls[15:]]
    assert len(cases) >= 60
    for case in cases:
        text = write(case)
        for step in (0, 1, 2, 3, 7):
            if step and len(text) > 1000 and step < 7:
                continue
            assert read(text, form, step) == case, (step, text)
        if not at_start:
            assert read(f"Now.\n{text}", form, 5) == ["Now.", *case], text


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_is_cut_never_looks_complete(name: str) -> None:
    form_name, write = WRITERS[name]
    form = FORMS[form_name]
    call = ("edit", {"path": 'a "b"\nc', "line": 12, "tags": ["x", {"y": 1}], "all": None})
    text = write([call])
    for end in range(1, len(text)):
        found = read(text[:end], form, 4, cut=True)
        if found and not isinstance(found[-1], str):
            assert len(found) == 1
            assert found[0] == call or (len(found[0]) == 3 and found[0][0] == "edit"), text[:end]
        else:
            assert "".join(found) == text[:end].rstrip("\n") or "".join(found) == text[:end]
        whole = read(text[:end], form, 4, cut=True)
        assert whole == read(text[:end], form, 0, cut=True), text[:end]


HOSTILE = [
    "I would write {0} here.",
    "{0}nothing of the kind",
    "{0}\n\n{0}",
    "{0}[1, 2]",
    "{0}{{}}",
    "{0}" + "x" * 2000,
    "{0}\x00\ud83d?".encode("utf-8", "replace").decode(),
    "a < b and {0} > c",
]


@pytest.mark.parametrize("name", FORMS)
def test_a_marker_without_a_call_is_text(name: str) -> None:
    form = FORMS[name]
    for pattern in HOSTILE:
        text = pattern.format(form.marker)
        for step in (0, 1, 3):
            found = read(text, form, step)
            assert all(isinstance(piece, str) for piece in found), (text, found)
            assert "".join(found) == text


TEMPLATES = {
    "glm": "{% if tools %}<tool_call>{{ name }}<arg_key>",
    "minimax": "{% if tools %}<minimax:tool_call>",
    "dsml": "{% if tools %}<｜DSML｜function_calls>",
    "deepseek": "{% if tools %}<｜tool▁calls▁begin｜>",
    "kimi": "{% if tools %}<|tool_calls_section_begin|>",
    "phi": "{% if tools %}<|tool_call|>",
    "lfm": "{% if tools %}<|tool_call_start|>",
    "llama4": "{% if tools %}<|header_start|>",
    "gemma4": "{% if tools %}<|tool_call>call:",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_shows_the_form(name: str) -> None:
    assert form_of(TEMPLATES[name]) is FORMS[name]


@pytest.mark.parametrize(
    ("template", "name"),
    [("<|channel>thought\n<channel|>", "gemma4"), ("[THINK]", "mistral"), ("<think>", "think")],
)
def test_the_template_shows_the_reasoning(template: str, name: str) -> None:
    assert reasoning_of(template) is REASONING_FORMS[name]
