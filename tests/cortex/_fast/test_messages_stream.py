"""Messages SSE events: valid to the official SDK, in the one right order, and the same as the message not streamed."""

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2 as httpx
import orjson
import pytest
from anthropic.types import ErrorResponse, Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from cortex._fast.messages_stream import SIGNATURE, MessagesStream
from cortex._fast.sse import SseDecoder
from cortex._fast.usage_scanner import UsageScanner
from cortex.wire.errors import ErrorInfo, RemoteError, UpstreamError
from cortex.wire.events import (
    Failed,
    Finished,
    FinishReason,
    InferenceEvent,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCallDelta,
)

EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
MESSAGE = TypeAdapter(Message)
STORY: list[InferenceEvent] = [
    Started(9, 4),
    ReasoningDelta("why "),
    ReasoningDelta('not?"\n'),
    TextDelta("Let me "),
    TextDelta("see. ☃"),
    ToolCallDelta(0, "toolu_1", 'f"g', '{"a": "'),
    ToolCallDelta(0, arguments='\\n"}'),
    ToolCallDelta(1, "toolu_2", "h"),
    Finished(FinishReason.TOOL_CALLS, 12, 3),
]


def stream() -> MessagesStream:
    return MessagesStream("msg_1", 'org/"model"')


def payloads(sse_events: bytes) -> list[Any]:
    """Return the data of every SSE event; each checked against the SDK's type, its name and the grammar of a stream."""
    decoder = SseDecoder()
    found: list[Any] = []
    open_block: int | None = None
    num_blocks = 0
    for sse_event in decoder.feed(sse_events):
        data = orjson.loads(sse_event.data)
        assert sse_event.event is not None
        assert sse_event.event.decode() == data["type"]
        found.append(data)
        if data["type"] == "error":
            TypeAdapter(ErrorResponse).validate_json(sse_event.data, strict=True)
            continue
        EVENT.validate_json(sse_event.data, strict=True)
        match data["type"]:
            case "message_start":
                assert len(found) == 1
            case "content_block_start":
                assert open_block is None
                assert data["index"] == num_blocks
                open_block = num_blocks
                num_blocks += 1
            case "content_block_delta":
                assert data["index"] == open_block
            case "content_block_stop":
                assert data["index"] == open_block
                open_block = None
            case "message_delta":
                assert open_block is None
    assert decoder.close() == b""
    return found


def as_the_sdk_reads(sse_events: bytes) -> Message:
    """Return the message that the SDK's stream helper puts together."""

    def reply(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=sse_events, headers={"content-type": "text/event-stream"})

    client = anthropic.Anthropic(
        api_key="none",
        max_retries=0,
        http_client=httpx.Client(transport=httpx.MockTransport(reply)),
        _strict_response_validation=True,
    )
    with client.messages.stream(model="m", max_tokens=1, messages=[{"role": "user", "content": "hi"}]) as events:
        return events.get_final_message()


def test_the_whole_story() -> None:
    found = payloads(stream().sse_events(STORY))
    assert [data["type"].removeprefix("content_block_") for data in found] == [
        "message_start",
        *("start", "delta", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("start", "stop"),
        "message_delta",
        "message_stop",
    ]
    message = found[0]["message"]
    assert message["content"] == []
    assert message["usage"] == {
        "input_tokens": 5,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 0,
    }
    assert [data["content_block"] for data in found if data["type"] == "content_block_start"] == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
        {"type": "tool_use", "id": "toolu_1", "name": 'f"g', "input": {}},
        {"type": "tool_use", "id": "toolu_2", "name": "h", "input": {}},
    ]
    assert found[4]["delta"] == {"type": "signature_delta", "signature": SIGNATURE}
    assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None, "stop_details": None}
    assert found[-2]["usage"] == {
        **message["usage"],
        "output_tokens": 12,
        "output_tokens_details": {"thinking_tokens": 3},
    }


def test_arguments_are_byte_exact() -> None:
    found = payloads(stream().sse_events(STORY))
    pieces = [d["delta"]["partial_json"] for d in found if d.get("delta", {}).get("type") == "input_json_delta"]
    assert "".join(pieces) == '{"a": "\\n"}'


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        (Finished(FinishReason.STOP, 1), "end_turn", None),
        (Finished(FinishReason.STOP, 1, stop_string='</"x">'), "stop_sequence", '</"x">'),
        (Finished(FinishReason.LENGTH, 1), "max_tokens", None),
        (Finished(FinishReason.TOOL_CALLS, 1), "tool_use", None),
    ],
)
def test_why_it_ended(end: Finished, reason: str, sequence: str | None) -> None:
    sse_events = stream()
    delta = payloads(sse_events.sse_events([Started(1), TextDelta("a"), end]))[-2]["delta"]
    message = MESSAGE.validate_json(sse_events.whole(), strict=True)
    assert (delta["stop_reason"], delta["stop_sequence"]) == (reason, sequence)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_the_sdk_assembles_the_stream_into_the_message() -> None:
    sse_events = stream()
    streamed = as_the_sdk_reads(sse_events.sse_events(STORY))
    whole = MESSAGE.validate_json(sse_events.whole(), strict=True)
    assert streamed.to_dict() == whole.to_dict()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def stories(draw: st.DrawFn) -> list[InferenceEvent]:
    """Events of one answer: any order of reasoning, text and calls, each call's arguments cut anywhere."""
    events: list[InferenceEvent] = [Started(draw(st.integers(4, 99)), draw(st.integers(0, 4)))]
    num_calls = 0
    for kind in draw(st.lists(st.sampled_from("rtc"), max_size=8)):
        if kind == "c":
            value = draw(st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=3))
            text = orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode() if _fits(value) else "{}"
            cut = draw(st.integers(0, len(text)))
            events.append(ToolCallDelta(num_calls, f"toolu_{num_calls}", draw(TEXT) or "f", text[:cut]))
            events.append(ToolCallDelta(num_calls, arguments=text[cut:]))
            num_calls += 1
        else:
            events.append(ReasoningDelta(draw(TEXT)) if kind == "r" else TextDelta(draw(TEXT)))
    reason = FinishReason.TOOL_CALLS if num_calls else draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
    return [*events, Finished(reason, draw(st.integers(0, 99)), 0)]


def _fits(value: dict[str, Any]) -> bool:
    return all(not isinstance(v, int) or abs(v) < 1 << 53 for v in value.values())


def batches(events: list[InferenceEvent], sizes: list[int]) -> Iterator[list[InferenceEvent]]:
    at = 0
    for size in sizes:
        yield events[at : at + size]
        at += size
    yield events[at:]


@given(stories(), st.lists(st.integers(0, 4), max_size=8))
def test_any_story_in_any_batches(events: list[InferenceEvent], sizes: list[int]) -> None:
    at_once, in_batches = stream(), stream()
    sse_events = at_once.sse_events(events)
    payloads(sse_events)
    assert b"".join(in_batches.sse_events(batch) for batch in batches(events, sizes)) == sse_events
    assert in_batches.whole() == at_once.whole()
    streamed, whole = as_the_sdk_reads(sse_events), MESSAGE.validate_json(at_once.whole(), strict=True)
    assert streamed.to_dict() == whole.to_dict()


def test_a_failure_in_the_middle_reaches_the_sdk() -> None:
    sse_events = stream()
    sent = sse_events.sse_events(
        [Started(1), TextDelta("a"), Failed(ErrorInfo(503, "worker_lost", 'it "died"')), *STORY]
    )
    assert payloads(sent)[-1] == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": 'it "died"', "details": {"error_code": "worker_lost"}},
    }
    assert sse_events.finished
    with pytest.raises(anthropic.APIStatusError, match="died"):
        as_the_sdk_reads(sent)
    with pytest.raises(RemoteError, match="died"):
        sse_events.whole()


def test_the_start_is_made_up_and_the_end_is_final() -> None:
    sse_events = stream()
    assert payloads(sse_events.sse_events([TextDelta("a")]))[0]["type"] == "message_start"
    assert sse_events.sse_events([Finished(FinishReason.STOP, 1)])
    assert sse_events.sse_events([TextDelta("b"), Failed(ErrorInfo(500, "c", "m"))]) == b""
    assert orjson.loads(sse_events.whole())["content"] == [{"type": "text", "text": "a"}]


def test_an_answer_without_an_end_is_an_error() -> None:
    sse_events = stream()
    sse_events.sse_events([Started(1), TextDelta("a")])
    with pytest.raises(UpstreamError, match="not complete"):
        sse_events.whole()


def test_arguments_that_the_limit_cut_are_an_empty_object() -> None:
    sse_events = stream()
    sse_events.sse_events([Started(1), ToolCallDelta(0, "t", "f", '{"a": '), Finished(FinishReason.LENGTH, 3)])
    assert MESSAGE.validate_json(sse_events.whole(), strict=True).content[0].to_dict()["input"] == {}


@pytest.mark.parametrize(
    "events",
    [
        [TextDelta("a", choice=1)],
        [Finished(FinishReason.STOP, 1, choice=1)],
    ],
)
def test_a_second_choice_is_a_value_error(events: list[InferenceEvent]) -> None:
    with pytest.raises(ValueError, match="choice"):
        stream().sse_events(events)


@pytest.mark.parametrize(
    "events",
    [
        [ToolCallDelta(1, "t", "f")],
        [ToolCallDelta(0, "", "f")],
        [ToolCallDelta(0, "t", "f", "{}"), ToolCallDelta(1, "u", "g"), ToolCallDelta(0, arguments="{}")],
        [ToolCallDelta(0, "t", "f"), TextDelta("a"), ToolCallDelta(0, arguments="{}")],
    ],
)
def test_a_malformed_call_is_the_nodes_error(events: list[InferenceEvent]) -> None:
    with pytest.raises(UpstreamError, match="out of turn"):
        stream().sse_events(events)


def test_interleaved_calls_are_streamed_one_after_another() -> None:
    pieces = [
        ToolCallDelta(0, "t", "f"),
        ToolCallDelta(1, "u", "g"),
        ToolCallDelta(0, arguments='{"a":'),
        ToolCallDelta(1, arguments='{"b":'),
        ToolCallDelta(2, "v", "h", "{}"),
        ToolCallDelta(0, arguments="1}"),
        ToolCallDelta(1, arguments="2}"),
    ]
    for end in ([TextDelta("after")], []):
        sse_events = stream()
        streamed = sse_events.sse_events([*pieces, *end, Finished(FinishReason.TOOL_CALLS, 1)])
        content = orjson.loads(sse_events.whole())["content"]
        assert [block["input"] for block in content[:3]] == [{"a": 1}, {"b": 2}, {}]
        events = [orjson.loads(sse_event.data) for sse_event in SseDecoder().feed(streamed)]
        contents: list[str] = []
        opened = -1
        for event in events:
            if event["type"] == "content_block_start":
                opened += 1
                contents.append("")
                empty = {"input": {}} if content[opened]["type"] == "tool_use" else {"text": ""}
                assert (event["index"], event["content_block"]) == (opened, content[opened] | empty)
            elif event["type"] == "content_block_delta":
                assert event["index"] == opened
                contents[-1] += event["delta"].get("partial_json") or event["delta"].get("text") or ""
        assert contents == ['{"a":1}', '{"b":2}', "{}", *(["after"] if end else [])]


def test_the_usage_scanner_reads_it() -> None:
    sse_events, scanner = stream().sse_events(STORY), UsageScanner()
    assert b"".join(scanner.feed(sse_events[i : i + 1]) for i in range(len(sse_events))) == sse_events
    assert scanner.first_token
    assert scanner.terminated
    assert not scanner.failed
    assert orjson.loads(scanner.usage or b"")["output_tokens"] == 12
