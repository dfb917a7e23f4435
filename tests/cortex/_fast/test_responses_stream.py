"""Responses SSE events: valid to the official SDK, in the exact order that clients rely on, ids and numbers stable."""

from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from cortex._fast.responses_stream import ResponsesStream
from cortex._fast.sse import SseDecoder
from cortex._fast.usage_scanner import UsageScanner
from cortex.dialects.responses.sealed import unseal
from cortex.wire.errors import ErrorInfo, RemoteError, UpstreamError
from cortex.wire.events import (
    Failed,
    Finished,
    FinishReason,
    InferenceEvent,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)
from cortex.wire.responses_events import DELTAS, LAST, ResponsesEvent

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
RESPONSE = TypeAdapter(Response)
ERROR = ErrorInfo(502, "worker_lost", 'the worker "died"')
LOGPROBS = (TokenLogprob("H", b"H", -0.25, (TokenLogprob("H", b"H", -0.25),)), TokenLogprob("i", b"i", -1.5))
CREATED = 1_700_000_000

NON_NULL = [
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
    "store",
    "background",
    "service_tier",
    "truncation",
    "tool_choice",
    "tools",
    "text",
    "parallel_tool_calls",
    "metadata",
]
PRESENT = [
    "completed_at",
    "incomplete_details",
    "previous_response_id",
    "instructions",
    "error",
    "reasoning",
    "usage",
    "max_output_tokens",
    "max_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
]


def stream(echo: bytes = b"{}", **options: Any) -> ResponsesStream:
    return ResponsesStream("resp_7f", 'org/"model"', CREATED, echo=echo, **options)


def payloads(sse_events: bytes) -> list[dict[str, Any]]:
    """Return the data of every SSE event, decoded; each checked against the SDK's type of that name."""
    decoder = SseDecoder()
    found = []
    for sse_event in decoder.feed(sse_events):
        data = orjson.loads(sse_event.data)
        assert sse_event.event is not None
        assert sse_event.event.decode() == data["type"]
        assert EVENT.validate_json(sse_event.data, strict=True).type == data["type"]
        if "response" in data:
            check_response(data["response"])
        found.append(data)
    assert decoder.close() == b""
    return found


def check_response(response: dict[str, Any]) -> None:
    RESPONSE.validate_json(orjson.dumps(response), strict=True)
    assert not [name for name in NON_NULL if response[name] is None]
    assert set(PRESENT) <= set(response)


def story(events: list[dict[str, Any]]) -> list[str]:
    """Return the events in short: the name and, where there is one, the index of the item."""
    return [
        e["type"].removeprefix("response.") + (f" {e['output_index']}" if "output_index" in e else "") for e in events
    ]


CALLS = [
    ToolCallDelta(0, "call_a", "first", '{"a":'),
    ToolCallDelta(1, "call_b", "second"),
    ToolCallDelta(0, arguments="1}"),
    ToolCallDelta(1, arguments="{}"),
]
TEXT_STORY = [
    "output_item.added {0}",
    "content_part.added {0}",
    "output_text.delta {0}",
    "output_text.delta {0}",
    "output_text.done {0}",
    "content_part.done {0}",
    "output_item.done {0}",
]
REASONING_STORY = [line.replace("output_text", "reasoning_text") for line in TEXT_STORY]


def at(index: int, lines: list[str]) -> list[str]:
    return [line.format(index) for line in lines]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (
            [Started(1), TextDelta("a"), TextDelta("b"), Finished(FinishReason.STOP, 2)],
            [*at(0, TEXT_STORY), "completed"],
        ),
        (
            [ReasoningDelta("a"), ReasoningDelta("b"), TextDelta("c"), TextDelta("d"), Finished(FinishReason.STOP, 4)],
            [*at(0, REASONING_STORY), *at(1, TEXT_STORY), "completed"],
        ),
        (
            [Started(1), *CALLS, Finished(FinishReason.TOOL_CALLS, 5)],
            [
                "output_item.added 0",
                "function_call_arguments.delta 0",
                "output_item.added 1",
                "function_call_arguments.delta 0",
                "function_call_arguments.delta 1",
                "function_call_arguments.done 0",
                "output_item.done 0",
                "function_call_arguments.done 1",
                "output_item.done 1",
                "completed",
            ],
        ),
        (
            [
                TextDelta("a"),
                TextDelta("b"),
                ToolCallDelta(0, "call_a", "f", "{}"),
                Finished(FinishReason.TOOL_CALLS, 5),
            ],
            [
                *at(0, TEXT_STORY),
                "output_item.added 1",
                "function_call_arguments.delta 1",
                "function_call_arguments.done 1",
                "output_item.done 1",
                "completed",
            ],
        ),
        (
            [ReasoningDelta("a"), ReasoningDelta("b"), Finished(FinishReason.LENGTH, 2, 2)],
            [*at(0, REASONING_STORY), "incomplete"],
        ),
        ([Started(1), Finished(FinishReason.STOP, 1)], ["completed"]),
        ([Started(1), TextDelta(""), ReasoningDelta(""), Finished(FinishReason.STOP, 1)], ["completed"]),
        ([Failed(ERROR)], ["error", "failed"]),
        (
            [Started(1), TextDelta("a"), Failed(ERROR)],
            ["output_item.added 0", "content_part.added 0", "output_text.delta 0", "error", "failed"],
        ),
    ],
)
def test_order(events: list[InferenceEvent], expected: list[str]) -> None:
    once = payloads(stream().sse_events(events))
    assert story(once) == ["created", "in_progress", *expected]
    assert [event["sequence_number"] for event in once] == list(range(len(once)))
    one_by_one = stream()
    again = payloads(b"".join(one_by_one.sse_events([event]) for event in events))
    assert story(again) == story(once)
    assert one_by_one.finished


def test_a_custom_call_has_an_input() -> None:
    pieces = [ToolCallDelta(0, "call_a", "patch", '{"input": "a\\n'), ToolCallDelta(0, arguments='\\"b\\""}')]
    projector = stream(custom_tools=frozenset({"patch"}))
    streamed = payloads(projector.sse_events([Started(1), *pieces, Finished(FinishReason.TOOL_CALLS, 5)]))
    assert story(streamed)[2:] == [
        "output_item.added 0",
        "custom_tool_call_input.delta 0",
        "custom_tool_call_input.done 0",
        "output_item.done 0",
        "completed",
    ]
    assert streamed[3]["delta"] == streamed[4]["input"] == 'a\n"b"'
    assert streamed[2]["item"] | {"input": 'a\n"b"', "status": "completed"} == streamed[5]["item"]
    assert streamed[2]["item"] == {
        "id": "ctc_7f_0",
        "type": "custom_tool_call",
        "call_id": "call_a",
        "name": "patch",
        "input": "",
        "status": "in_progress",
    }


@pytest.mark.parametrize("arguments", ["", "{}", '{"input": 3}', '{"input": "cut', "free text", "\ud800"])
def test_a_custom_call_that_is_not_in_form_loses_nothing(arguments: str) -> None:
    projector = stream(custom_tools=frozenset({"patch"}))
    projector.sse_events([ToolCallDelta(0, "a", "patch", arguments), Finished(FinishReason.LENGTH, 5)])
    content = orjson.loads(projector.whole())["output"][0]["input"]
    assert content == arguments.replace("\ud800", content[:1])


def test_a_namespaced_tool_comes_back_under_the_clients_name() -> None:
    projector = stream(namespaces={"ns__g": ("ns", "g")})
    calls = [ToolCallDelta(0, "a", "ns__g", "{}"), ToolCallDelta(1, "b", "f", "{}")]
    last = payloads(projector.sse_events([*calls, Finished(FinishReason.TOOL_CALLS, 5)]))[-1]["response"]
    assert [(item["name"], item.get("namespace")) for item in last["output"]] == [("g", "ns"), ("f", None)]


def test_reasoning_as_a_summary() -> None:
    events: list[InferenceEvent] = [ReasoningDelta("a"), ReasoningDelta("b"), Finished(FinishReason.STOP, 2)]
    streamed = payloads(stream(summarises=True).sse_events(events))
    assert story(streamed)[2:] == [
        "output_item.added 0",
        "reasoning_summary_part.added 0",
        "reasoning_summary_text.delta 0",
        "reasoning_summary_text.delta 0",
        "reasoning_summary_text.done 0",
        "reasoning_summary_part.done 0",
        "output_item.done 0",
        "completed",
    ]
    item = streamed[-1]["response"]["output"][0]
    assert item["summary"] == [{"type": "summary_text", "text": "ab"}]
    assert "content" not in item


@pytest.mark.parametrize("summarises", [False, True])
def test_sealed_reasoning_opens_to_the_reasoning(summarises: bool) -> None:
    events: list[InferenceEvent] = [ReasoningDelta('wh"'), ReasoningDelta("y"), Finished(FinishReason.STOP, 2)]
    streamed = payloads(stream(summarises=summarises, seals=True).sse_events(events))
    item = streamed[-1]["response"]["output"][0]
    assert unseal(item["encrypted_content"]) == 'wh"y'
    assert streamed[-2]["item"] == item
    assert "encrypted_content" not in streamed[2]["item"]


def test_text_then_call_then_text() -> None:
    events: list[InferenceEvent] = [
        TextDelta("a"),
        ToolCallDelta(0, "call_a", "f", "{"),
        TextDelta("b"),
        ToolCallDelta(0, arguments="}"),
        ReasoningDelta("c"),
        Finished(FinishReason.LENGTH, 5),
    ]
    last = payloads(stream().sse_events(events))[-1]["response"]
    assert [(item["type"], item["id"], item["status"]) for item in last["output"]] == [
        ("message", "msg_7f_0", "completed"),
        ("function_call", "fc_7f_1", "completed"),
        ("message", "msg_7f_2", "completed"),
        ("reasoning", "rs_7f_3", "incomplete"),
    ]
    assert last["output"][1]["arguments"] == "{}"


def test_a_cut_answer_is_incomplete() -> None:
    last = payloads(stream().sse_events([Started(3, 2), TextDelta("a"), Finished(FinishReason.LENGTH, 7, 1)]))[-1]
    assert last["type"] == "response.incomplete"
    response = last["response"]
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["completed_at"] is None
    assert response["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 10,
    }
    calls = payloads(stream().sse_events([*CALLS[:2], Finished(FinishReason.LENGTH, 7)]))[-1]["response"]["output"]
    assert [call["status"] for call in calls] == ["completed", "incomplete"]


def test_a_failure_is_reported_twice() -> None:
    projector = stream(report_usage=True)
    error, failed = payloads(projector.sse_events([Started(1), TextDelta("a"), Failed(ERROR), TextDelta("b")]))[-2:]
    members = {"code": "worker_lost", "message": ERROR.message, "param": None}
    assert error == {
        "type": "error",
        **members,
        "error": members | {"type": "server_error"},
        "sequence_number": failed["sequence_number"] - 1,
    }
    assert failed["response"]["error"] == {"code": "server_error", "message": ERROR.message}
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["output"][0]["status"] == "incomplete"
    assert failed["response"]["output"][0]["content"][0]["text"] == "a"
    assert projector.finished
    with pytest.raises(RemoteError) as remote:
        projector.whole()
    assert remote.value.info() == ERROR
    refused = ErrorInfo(400, "invalid_value", "no", param="input")
    assert payloads(stream().sse_events([Failed(refused)]))[-2]["param"] == "input"


def test_log_probabilities_are_gathered() -> None:
    events = payloads(
        stream().sse_events(
            [
                TextDelta("H", logprobs=LOGPROBS[:1]),
                TextDelta("-"),
                TextDelta("i", logprobs=LOGPROBS[1:]),
                Finished(FinishReason.STOP, 2),
            ]
        )
    )
    top = [{"token": "H", "bytes": [72], "logprob": -0.25}]
    first = {"token": "H", "bytes": [72], "logprob": -0.25, "top_logprobs": top}
    second = {"token": "i", "bytes": [105], "logprob": -1.5, "top_logprobs": []}
    by_type = {event["type"]: event for event in events}
    pieces = [event["logprobs"] for event in events if event["type"] == ResponsesEvent.OUTPUT_TEXT_DELTA]
    assert pieces == [[first], [], [second]]
    assert by_type["response.output_text.done"]["logprobs"] == [first, second]
    assert by_type["response.content_part.done"]["part"]["logprobs"] == [first, second]
    assert by_type["response.completed"]["response"]["output"][0]["content"][0]["logprobs"] == [first, second]


def test_the_echo_wins_over_the_defaults() -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False, "description": None}
    echo = {
        "temperature": 0.25,
        "instructions": "be \u00e9 \"brief\"",
        "tools": [tool],
        "tool_choice": {"type": "function", "name": "f"},
        "metadata": {"usage": "x"},
        "text": {"format": {"type": "json_object"}},
        "max_output_tokens": 9,
        "user": "u",
    }  # fmt: skip
    for encoded in (orjson.dumps(echo), b" \n" + orjson.dumps(echo, option=orjson.OPT_INDENT_2) + b"\n "):
        created, *_, last = payloads(stream(encoded).sse_events([Started(1), Finished(FinishReason.STOP, 1)]))
        for event in (created, last):
            assert {name: event["response"][name] for name in echo} == echo
            assert event["response"]["top_p"] == 1.0
            assert event["response"]["model"] == 'org/"model"'


@pytest.mark.parametrize("name", ["id", "status", "usage", "output", "error", "model"])
def test_the_echo_cannot_set_fields_of_the_stream(name: str) -> None:
    with pytest.raises(ValueError, match=f"not for the request to say: {name}"):
        stream(orjson.dumps({name: None, "temperature": 1}))


@pytest.mark.parametrize("echo", [b"", b"[]", b"{", b'{"a":1}x', b"null"])
def test_the_echo_is_an_object(echo: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        stream(echo)


def test_the_usage_comment_comes_before_the_last_event() -> None:
    sse_events = stream(report_usage=True).sse_events([Started(7, 3), TextDelta("a"), Finished(FinishReason.STOP, 2)])
    comment = b': usage {"prompt_tokens":7,"completion_tokens":2,"cached_tokens":3}\n\n'
    assert sse_events.count(comment) == 1
    assert sse_events.split(comment)[1].startswith(b"event: response.completed\n")


def test_the_response_needs_an_end() -> None:
    projector = stream()
    projector.sse_events([Started(1), TextDelta("a")])
    with pytest.raises(UpstreamError, match="not complete"):
        projector.whole()


@pytest.mark.parametrize(
    "event",
    [
        TextDelta("a", choice=1),
        ReasoningDelta("a", choice=1),
        ToolCallDelta(0, "id", "name", choice=1),
        Finished(FinishReason.STOP, 1, choice=1),
        ToolCallDelta(0),
        ToolCallDelta(1, "id", "name"),
    ],
)
def test_what_a_producer_may_not_do(event: InferenceEvent) -> None:
    projector = stream()
    with pytest.raises(ValueError, match=r"choice|tool call"):
        projector.sse_events([Started(1), TextDelta("before"), event])
    sse_events = payloads(projector.sse_events([Failed(ERROR)]))
    assert [sse_event["delta"] for sse_event in sse_events if "delta" in sse_event] == ["before"]
    assert [sse_event["sequence_number"] for sse_event in sse_events] == list(range(len(sse_events)))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
EVENTS = st.lists(
    st.one_of(
        st.builds(TextDelta, TEXT, st.just(0), st.sampled_from([(), (), LOGPROBS])),
        st.builds(ReasoningDelta, TEXT),
        st.builds(lambda call, text: ToolCallDelta(call, arguments=text), st.integers(0, 1), TEXT),
    ),
    max_size=20,
)
END = st.one_of(st.builds(Finished, st.sampled_from(FinishReason), st.just(9)), st.just(Failed(ERROR)))


OPTIONS = st.fixed_dictionaries(
    {
        "summarises": st.booleans(),
        "seals": st.booleans(),
        "custom_tools": st.sampled_from([frozenset(), frozenset({"first"}), frozenset({"first", "second"})]),
        "namespaces": st.sampled_from([None, {"second": ("ns", "own")}]),
    }
)


@given(EVENTS, END, st.integers(1, 25), OPTIONS)
def test_a_stream_is_consistent(
    deltas: list[InferenceEvent], end: InferenceEvent, batch: int, options: dict[str, Any]
) -> None:
    events: list[InferenceEvent] = [Started(11, 2), *CALLS[:2], *deltas, end]
    projector = stream(**options)
    sse_events = b"".join(projector.sse_events(events[i : i + batch]) for i in range(0, len(events), batch))
    streamed = payloads(sse_events)
    assert [event["sequence_number"] for event in streamed] == list(range(len(streamed)))
    assert [event["type"] for event in streamed[:2]] == ["response.created", "response.in_progress"]
    items = replay(streamed)
    response = streamed[-1]["response"]
    assert {event["response"]["id"] for event in streamed if "response" in event} == {"resp_7f"}
    assert response["output"] == items
    assert streamed[-1]["type"] in LAST
    assert not any(event["type"] in LAST for event in streamed[:-1])
    for kinds, event in ((["output_text"], TextDelta), (["reasoning_text", "summary_text"], ReasoningDelta)):
        parts = [part for item in items for part in [*item.get("content", ()), *item.get("summary", ())]]
        content = "".join(part["text"] for part in parts if part["type"] in kinds)
        assert content == "".join(e.text for e in events if isinstance(e, event))
    if isinstance(end, Finished):
        assert orjson.loads(projector.whole()) == response
    scanner = UsageScanner()
    assert scanner.feed(sse_events) == sse_events
    assert scanner.num_token_events == sum(event["type"] in DELTAS for event in streamed)
    assert (scanner.terminated, scanner.failed) == (True, isinstance(end, Failed))
    assert (None if scanner.usage is None else orjson.loads(scanner.usage)) == response["usage"]


def replay(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the items of a stream together from its deltas, refusing what a strict client refuses."""
    items: list[dict[str, Any]] = []
    open_parts: dict[str, dict[str, Any]] = {}
    done: set[str] = set()
    for event in events:
        index = event.get("output_index")
        if index is None:
            continue
        if event["type"] == ResponsesEvent.OUTPUT_ITEM_ADDED:
            assert index == len(items)
            items.append(event["item"])
            continue
        item = items[index]
        assert item["id"] not in done
        assert event.get("item_id", item["id"]) == item["id"]
        match event["type"].removeprefix("response."):
            case "content_part.added" | "reasoning_summary_part.added":
                parts = item["content"] if "content_index" in event else item["summary"]
                assert len(parts) == event.get("content_index", event.get("summary_index"))
                parts.append(event["part"])
                open_parts[item["id"]] = event["part"]
            case "output_text.delta" | "reasoning_text.delta" | "reasoning_summary_text.delta":
                part = open_parts[item["id"]]
                part["text"] += event["delta"]
                if "logprobs" in part:
                    part["logprobs"] += event["logprobs"]
            case "function_call_arguments.delta":
                item["arguments"] += event["delta"]
            case "custom_tool_call_input.delta":
                item["input"] += event["delta"]
            case "output_text.done" | "reasoning_text.done" | "reasoning_summary_text.done":
                assert event["text"] == open_parts[item["id"]]["text"]
            case "function_call_arguments.done":
                assert event["arguments"] == item["arguments"]
            case "custom_tool_call_input.done":
                assert event["input"] == item["input"]
            case "content_part.done" | "reasoning_summary_part.done":
                assert event["part"] == open_parts.pop(item["id"])
            case "output_item.done":
                assert item["id"] not in open_parts
                item["status"] = event["item"]["status"]
                if "encrypted_content" in event["item"]:
                    item["encrypted_content"] = event["item"]["encrypted_content"]
                assert event["item"] == item
                done.add(item["id"])
            case other:
                pytest.fail(f"unexpected {other}")
    if events[-1]["type"] == ResponsesEvent.FAILED:
        for item in items:
            item["status"] = "completed" if item["id"] in done else "incomplete"
    else:
        assert done == {item["id"] for item in items}
    return items


def test_the_names_are_the_sdks() -> None:
    schema = orjson.dumps(EVENT.json_schema())
    assert not [name for name in ResponsesEvent if b'"%b"' % name.encode() not in schema]


def through_the_sdk(events: Sequence[InferenceEvent]) -> Any:
    sse_events = stream(report_usage=True).sse_events(events)

    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=sse_events)

    http_client = httpx.Client(transport=httpx.MockTransport(answer))
    client = openai.OpenAI(
        api_key="k", base_url="http://x/v1", http_client=http_client, _strict_response_validation=True
    )
    with client.responses.stream(model="m", input="x") as streamed:
        return streamed.get_final_response()


def test_the_sdk_puts_it_together() -> None:
    final = through_the_sdk(
        [
            Started(3),
            ReasoningDelta("Hm"),
            TextDelta("Hello"),
            TextDelta(" you"),
            *CALLS,
            Finished(FinishReason.TOOL_CALLS, 4),
        ]
    )
    assert final.output_text == "Hello you"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert final.output[2].arguments == '{"a":1}'
    assert final.usage.total_tokens == 7


def test_the_sdk_raises_on_a_failure() -> None:
    with pytest.raises(openai.APIError, match="died"):
        through_the_sdk([Started(3), TextDelta("Hello"), Failed(ERROR)])
