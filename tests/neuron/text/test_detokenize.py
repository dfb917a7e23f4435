"""Ids to events: characters, stop strings and tags that are cut by tokens, and the counts at the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cortex.wire.events import (
    Finished,
    FinishReason,
    InferenceEvent,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)
from cortex.wire.request import Tool
from neuron.device.jobs import SequenceEnd
from neuron.text.detokenize import Detokenizer
from neuron.text.forms import think
from neuron.text.forms.registry import FORMS


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """A tokenizer with a token for each byte, so that every character and tag is cut everywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {token: i + 1 for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def run(
    tokenizer: Tokenizer, text: str, step: int = 1, end: SequenceEnd = SequenceEnd.STOP, **options: object
) -> list[InferenceEvent]:
    ids = tokenizer.encode(text).ids
    detokenizer = Detokenizer(tokenizer, **options)
    events: list[InferenceEvent] = []
    for start in range(0, len(ids), step):
        events += detokenizer.feed(ids[start : start + step])
        if detokenizer.finished:
            return events
    return events + detokenizer.close(end)


def text_of(events: list[InferenceEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def finish_of(events: list[InferenceEvent]) -> Finished:
    assert isinstance(events[-1], Finished)
    assert sum(isinstance(event, Finished) for event in events) == 1
    return events[-1]


@given(st.text(max_size=30), st.integers(1, 7))
def test_text_survives_every_cut(byte_tokenizer: Tokenizer, text: str, step: int) -> None:
    events = run(byte_tokenizer, text, step)
    assert text_of(events) == text
    assert finish_of(events).output_tokens == len(text.encode())


def test_half_a_character_at_the_end_is_shown_as_one(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    events = detokenizer.feed(byte_tokenizer.encode("é").ids[:1]) + detokenizer.close(SequenceEnd.LENGTH)
    assert text_of(events) == "�"
    assert finish_of(events).reason is FinishReason.LENGTH


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "left", "hit"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["three", "two"], "one ", "two"),
        ("one two", ["twice"], "one two", None),
        ("aab", ["ab"], "a", "ab"),
        ("no st", ["stop"], "no st", None),
        ("stop", ["stop"], "", "stop"),
    ],
)
def test_stop_strings_never_leak(
    byte_tokenizer: Tokenizer, text: str, stop: list[str], left: str, hit: str | None, step: int
) -> None:
    events = run(byte_tokenizer, text, step, stop=stop)
    assert text_of(events) == left
    assert (finish_of(events).reason, finish_of(events).stop_string) == (FinishReason.STOP, hit)


@pytest.mark.parametrize("step", [1, 2, 100])
def test_a_stop_string_is_part_of_the_answer_where_that_is_asked_for(byte_tokenizer: Tokenizer, step: int) -> None:
    events = run(byte_tokenizer, "one two three", step, stop=["tw", "two"], includes_stop=True)
    assert text_of(events) == "one tw"
    assert finish_of(events).stop_string == "tw"


def test_a_stop_string_in_reasoning_does_not_stop(byte_tokenizer: Tokenizer) -> None:
    events = run(byte_tokenizer, "<think>stop here</think>answer stop", stop=["stop"], tags=think.FORM)
    assert "".join(event.text for event in events if isinstance(event, ReasoningDelta)) == "stop here"
    assert text_of(events) == "answer "


def test_reasoning_tokens_are_counted(byte_tokenizer: Tokenizer) -> None:
    events = run(byte_tokenizer, "abc</think>de", tags=think.FORM, starts_in_reasoning=True)
    finished = finish_of(events)
    assert finished.output_tokens == 13
    assert finished.reasoning_tokens == 3 + len("</think>")


@pytest.mark.parametrize("step", [1, 5, 100])
def test_a_call_ends_the_turn_with_tool_calls(byte_tokenizer: Tokenizer, step: int) -> None:
    text = 'I look.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    events = run(byte_tokenizer, text, step, tools=[Tool("f")])
    calls = [event for event in events if isinstance(event, ToolCallDelta)]
    assert (calls[0].name, {call.call for call in calls}) == ("f", {0})
    assert "".join(call.arguments for call in calls) == '{"x": 1}'
    assert not any(call.id or call.name for call in calls[1:])
    assert calls[0].id.startswith("call_")
    assert text_of(events) == "I look."
    assert finish_of(events).reason is FinishReason.TOOL_CALLS
    assert "<tool_call>" in text_of(run(byte_tokenizer, text, step))


@pytest.fixture(scope="module")
def fallback_tokenizer() -> Tokenizer:
    """Pieces of SentencePiece, and a token for each byte that has none."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "▁b": 257, "a": 258, "<unk>": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([0xC3, 0xA9, 0x80, 258], "é\ufffda"),
        ([0xC3, 0xA9, 0x80, 258, 257, 0xC3, 0xA9, 257], "é\ufffda bé b"),
        ([257, 0xC3, 0xA9, 0x80, 256, 257], "bé\ufffd a b"),
        ([0xC3] * 40 + [257, 256], "\ufffd" * 40 + " b a"),
        ([260] * 40 + [257, 256], "b a"),
        ([257] + [260] * 40 + [256, 0xC3], "b a\ufffd"),
        ([257] + [0xC3, 0xA9] * 40 + [256], "b" + "é" * 40 + " a"),
    ],
)
def test_bytes_that_are_no_character_and_tokens_that_are_no_text_break_no_answer(
    fallback_tokenizer: Tokenizer, ids: list[int], text: str
) -> None:
    for step in (1, 3, len(ids)):
        detokenizer = Detokenizer(fallback_tokenizer)
        events: list[InferenceEvent] = []
        for start in range(0, len(ids), step):
            events += detokenizer.feed(ids[start : start + step])
        assert text_of(events + detokenizer.close(SequenceEnd.STOP)) == text


def test_special_tokens_are_not_text(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    assert (
        text_of(detokenizer.feed([0, *byte_tokenizer.encode("x").ids, 0]) + detokenizer.close(SequenceEnd.STOP)) == "x"
    )


def test_a_special_token_that_marks_a_call_is_read(byte_tokenizer: Tokenizer) -> None:
    ids = [0, *byte_tokenizer.encode('f{"x": 1}').ids]
    detokenizer = Detokenizer(
        byte_tokenizer, tools=[Tool("f")], call_form=FORMS["mistral"], markers={0: "[TOOL_CALLS]"}
    )
    call, end = detokenizer.feed(ids) + detokenizer.close(SequenceEnd.STOP)
    assert isinstance(call, ToolCallDelta)
    assert (call.name, call.arguments) == ("f", '{"x": 1}')
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.TOOL_CALLS


def test_a_call_cut_by_the_limit_finishes_with_length(byte_tokenizer: Tokenizer) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": '
    call, *_, end = run(byte_tokenizer, text, 100, end=SequenceEnd.LENGTH, tools=[Tool("f")])
    assert isinstance(call, ToolCallDelta)
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.LENGTH


@pytest.mark.parametrize("step", [1, 7])
def test_log_probabilities_of_calls_are_dropped(byte_tokenizer: Tokenizer, step: int) -> None:
    text = 'I.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    ids = byte_tokenizer.encode(text).ids
    detokenizer = Detokenizer(byte_tokenizer, tools=[Tool("f")])
    events: list[InferenceEvent] = []
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        events += detokenizer.feed(some, [TokenLogprob(chr(0), b"", -1.0)] * len(some))
    events += detokenizer.close(SequenceEnd.STOP)
    num_scored = sum(len(event.logprobs) for event in events if isinstance(event, TextDelta))
    assert num_scored <= len("I.\n<tool") + step, "those of the text, and what was held back with its end"
