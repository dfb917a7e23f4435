"""Reasoning tags: found wherever they are cut, never leaked, never lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron.text.reasoning import ReasoningSplitter, ReasoningTags, Section


def split(pieces: list[str], *, inside: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(ReasoningTags(), starts_inside=inside)
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


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n", "<", "/", "think", ">"]), max_size=12),
    st.booleans(),
)
def test_cuts_never_matter(tokens: list[str], inside: bool) -> None:
    text = "".join(tokens)
    assert split(list(text), inside=inside) == split([text], inside=inside)
