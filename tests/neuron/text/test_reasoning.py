"""Reasoning tags: found wherever they are cut, never leaked, never lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron.text.forms import think
from neuron.text.reasoning import ReasoningSplitter, Section, nearest_effort


def split(pieces: list[str], *, inside: bool = False, call: str = "") -> tuple[str, str]:
    splitter = ReasoningSplitter(think.FORM, starts_inside=inside, call=call)
    found = [piece for text in pieces for piece in splitter.feed(text)] + splitter.close()
    assert all(text for _, text in found)
    reasoning = "".join(text for section, text in found if section is Section.REASONING)
    return reasoning, "".join(text for section, text in found if section is Section.ANSWER)


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "answer"),
    [
        ("plain", False, "", "plain"),
        ("<think>\nwhy\n</think>\n\nbecause", False, "why", "because"),
        ("\n <think>why</think>because", False, "why", "because"),
        ("why\n</think>\nbecause", True, "why", "because"),
        ("cut in mid-thought", True, "cut in mid-thought", ""),
        ("<think>cut </thin", False, "cut </thin", ""),
        ("a <think> later is text", False, "", "a <think> later is text"),
        ("<thinking> is no tag", False, "", "<thinking> is no tag"),
        ("<think></think>x", False, "", "x"),
        ("  lead", False, "", "  lead"),
        ("<thi", False, "", "<thi"),
        ("a < b <think", False, "", "a < b <think"),
        ("x</think>a</think>b", True, "x", "a</think>b"),
    ],
)
def test_whole_and_in_any_cut(text: str, inside: bool, reasoning: str, answer: str) -> None:
    assert split([text], inside=inside) == (reasoning, answer)
    assert split(list(text), inside=inside) == (reasoning, answer)
    for cut in range(len(text)):
        assert split([text[:cut], text[cut:]], inside=inside) == (reasoning, answer)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("why\n<tool_call>\n{}", "why", "<tool_call>\n{}"),
        ("<tool_call>\n{}", "", "<tool_call>\n{}"),
        ("why\n\n  <tool_call>a</think>b", "why", "<tool_call>a</think>b"),
        ("the tag <tool_call> of\nold</think>x", "the tag <tool_call> of\nold", "x"),
        ("a</think>\n<tool_call>", "a", "<tool_call>"),
        ("why\n<tool_cal", "why\n<tool_cal", ""),
    ],
)
def test_a_call_closes_reasoning_that_its_model_has_not_closed(text: str, reasoning: str, answer: str) -> None:
    for pieces in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))):
        assert split(pieces, inside=True, call="<tool_call>") == (reasoning, answer)
    assert split([text], inside=True)[1] == text.partition("</think>")[2].lstrip(), "without tools it is text"


@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "a", " ", "\n", "<", "/", "think", ">", "<tool_", "call>"]), max_size=12
    ),
    st.booleans(),
    st.sampled_from(["", "<tool_call>"]),
)
def test_cuts_never_matter(tokens: list[str], inside: bool, call: str) -> None:
    text = "".join(tokens)
    assert split(list(text), inside=inside, call=call) == split([text], inside=inside, call=call)


def test_an_effort_that_a_template_refuses_becomes_the_nearest() -> None:
    taken = ("low", "medium", "xhigh")
    assert [nearest_effort(asked, taken) for asked in ("low", "medium", "high", "xhigh", "max")] == [
        *("low", "medium", "xhigh", "xhigh", "xhigh")
    ]
    assert nearest_effort("low", ("high",)) == "high"
    assert nearest_effort("high", ()) == "high", "a template that takes none says why itself"
