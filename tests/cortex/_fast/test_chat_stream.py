"""A chat's SSE events: valid to the official SDK, in the right order, the same answer as without streaming."""

from collections.abc import Sequence
from typing import Any

import httpx
import openai
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from cortex._fast.chat_stream import ChatStream
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
    TokenLogprob,
    ToolCallDelta,
)

CHUNK = TypeAdapter(ChatCompletionChunk)
COMPLETION = TypeAdapter(ChatCompletion)
ERROR = ErrorInfo(502, "worker_lost", 'the worker "died"\n', retry_after_s=2.0)
LOGPROBS = (
    TokenLogprob("H", b"H", -0.25, (TokenLogprob("H", b"H", -0.25), TokenLogprob('"', b'"', float("-inf")))),
    TokenLogprob("\ufffd", b"\xe4\xbd", -1e-7),
)


def stream(**options: Any) -> ChatStream:
    return ChatStream("chatcmpl-1", 'org/"model"', 1_700_000_000, **options)


def payloads(sse_events: bytes) -> list[Any]:
    """Return the data of every SSE event, decoded; each chunk checked against the SDK's type."""
    decoder = SseDecoder()
    found: list[Any] = []
    for sse_event in decoder.feed(sse_events):
        assert sse_event.event is None
        if sse_event.data == b"[DONE]":
            found.append("[DONE]")
            continue
        found.append(orjson.loads(sse_event.data))
        if "error" not in found[-1]:
            CHUNK.validate_json(sse_event.data, strict=True)
    assert decoder.close() == b""
    return found


def deltas(sse_events: bytes) -> list[Any]:
    return [p["choices"][0]["delta"] for p in payloads(sse_events) if p != "[DONE]" and p.get("choices")]


def accumulate(chunks: list[Any], num_choices: int) -> list[dict[str, Any]]:
    """Put chunks together as a client does."""
    choices: list[dict[str, Any]] = [
        {"content": "", "reasoning": "", "calls": [], "logprobs": [], "finish": None, "role": None}
        for _ in range(num_choices)
    ]
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice, delta = choices[piece["index"]], piece["delta"]
            assert choice["finish"] is None, "nothing follows the finish of a choice"
            if "role" in delta:
                assert choice["role"] is None
                choice["role"] = delta["role"]
            assert choice["role"] == "assistant", "the role comes first"
            choice["content"] += delta.get("content", "")
            choice["reasoning"] += delta.get("reasoning_content", "")
            choice["logprobs"] += (piece.get("logprobs") or {"content": []})["content"]
            for call in delta.get("tool_calls", []):
                if call["index"] == len(choice["calls"]):
                    assert call["type"] == "function"
                    choice["calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                else:
                    assert not {"id", "type"} & set(call)
                    assert set(call["function"]) == {"arguments"}
                choice["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            choice["finish"] = piece["finish_reason"]
    return choices


def replied(body: bytes) -> list[dict[str, Any]]:
    """Return the content of a reply in the same form."""
    return [
        {
            "content": choice["message"]["content"] or "",
            "reasoning": choice["message"].get("reasoning_content", ""),
            "calls": [
                {"id": call["id"], "name": call["function"]["name"], "arguments": call["function"]["arguments"]}
                for call in choice["message"].get("tool_calls", [])
            ],
            "logprobs": (choice["logprobs"] or {"content": []})["content"],
            "finish": choice["finish_reason"],
            "role": choice["message"]["role"],
        }
        for choice in orjson.loads(body)["choices"]
    ]


def test_sse_events_are_these_bytes() -> None:
    events = [Started(7, 3), TextDelta('"Hi"'), Finished(FinishReason.STOP, 2)]
    head = b'data: {"id":"c","object":"chat.completion.chunk","created":5,"model":"m","choices":['
    assert ChatStream("c", "m", 5).sse_events(events) == (
        head + b'{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
        + head + b'{"index":0,"delta":{"content":"\\"Hi\\""},"finish_reason":null}]}\n\n'
        + head + b'{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
        + b"data: [DONE]\n\n"
    )  # fmt: skip


def test_order_of_an_answer_with_everything() -> None:
    events = [
        Started(7, 3),
        ReasoningDelta("Hm"),
        TextDelta("Hi", logprobs=LOGPROBS),
        TextDelta(""),
        ReasoningDelta(""),
        ToolCallDelta(0, "call_a", "first", '{"a":'),
        ToolCallDelta(1, "call_b", "second"),
        ToolCallDelta(1),
        ToolCallDelta(0, arguments="1}"),
        ToolCallDelta(1, arguments="{}"),
        Finished(FinishReason.TOOL_CALLS, 9, 4),
    ]
    chat = stream(include_usage=True)
    *chunks, usage, done = payloads(chat.sse_events(events))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm", "reasoning": "Hm"},
        {"content": "Hi"},
        {"tool_calls": [_call(0, "call_a", "first", '{"a":')]},
        {"tool_calls": [_call(1, "call_b", "second", "")]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 7 + ["tool_calls"]
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 9,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
    assert done == "[DONE]"
    assert chat.finished


def _call(index: int, id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_log_probabilities() -> None:
    [_, chunk] = payloads(stream().sse_events([TextDelta("H", logprobs=LOGPROBS)]))
    assert chunk["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "H",
                "bytes": [72],
                "logprob": -0.25,
                "top_logprobs": [
                    {"token": "H", "bytes": [72], "logprob": -0.25},
                    {"token": '"', "bytes": [34], "logprob": -9999.0},
                ],
            },
            {"token": "\ufffd", "bytes": [0xE4, 0xBD], "logprob": -1e-7, "top_logprobs": []},
        ],
        "refusal": None,
    }


def test_a_token_without_text_still_has_its_probability() -> None:
    [_, delta] = deltas(stream().sse_events([TextDelta("", logprobs=LOGPROBS)]))
    assert delta == {"content": ""}


def test_the_start_is_made_up_once() -> None:
    chat = stream(include_usage=True)
    assert deltas(chat.sse_events([TextDelta("a")])) == [{"role": "assistant", "content": ""}, {"content": "a"}]
    assert chat.sse_events([Started(5, 1)]) == b""
    usage = payloads(chat.sse_events([Finished(FinishReason.STOP, 1)]))[-2]["usage"]
    assert usage["prompt_tokens"] == 5
    assert deltas(stream().sse_events([Finished(FinishReason.STOP, 0)])) == [{"role": "assistant", "content": ""}, {}]


def test_a_failure_is_the_last_sse_event() -> None:
    chat = stream(include_usage=True, report_usage=True)
    chat.sse_events([Started(1), TextDelta("a")])
    assert payloads(chat.sse_events([Failed(ERROR), TextDelta("b"), Finished(FinishReason.STOP, 1)])) == [
        {"error": {"message": ERROR.message, "type": "server_error", "param": None, "code": "worker_lost"}}
    ]
    assert chat.finished
    assert payloads(stream().sse_events([Failed(ERROR)]))[0]["error"]["code"] == "worker_lost"


def test_events_after_the_end_are_dropped() -> None:
    chat = stream(num_choices=2)
    chat.sse_events([Started(1), Finished(FinishReason.STOP, 1, choice=0)])
    assert not chat.finished
    late: list[InferenceEvent] = [TextDelta("x"), ReasoningDelta("x"), ToolCallDelta(0, "i", "n")]
    assert chat.sse_events([*late, Finished(FinishReason.LENGTH, 1, choice=0)]) == b""
    assert chat.sse_events([Finished(FinishReason.STOP, 1, choice=1)]).endswith(b"data: [DONE]\n\n")
    assert chat.finished
    assert chat.sse_events([*late, Failed(ERROR), Finished(FinishReason.STOP, 1)]) == b""


def test_the_usage_comment_comes_before_the_end() -> None:
    sse_events = stream(report_usage=True).sse_events([Started(7, 3), TextDelta("a"), Finished(FinishReason.LENGTH, 2)])
    assert sse_events.endswith(
        b': usage {"prompt_tokens":7,"completion_tokens":2,"cached_tokens":3}\n\ndata: [DONE]\n\n'
    )
    assert b'"usage"' not in sse_events


def test_usage_is_of_all_choices() -> None:
    chat = stream(num_choices=3, include_usage=True)
    finishes = [Finished(FinishReason.STOP, n + 1, n, choice=n) for n in range(3)]
    found = payloads(chat.sse_events([Started(10), *finishes]))
    assert [c["index"] for p in found[:6] for c in p["choices"]] == [0, 1, 2, 0, 1, 2]
    assert found[-2]["usage"]["completion_tokens"] == 6
    assert found[-2]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


@pytest.mark.parametrize(
    "event",
    [
        TextDelta("a", choice=1),
        ReasoningDelta("a", choice=-1),
        Finished(FinishReason.STOP, 1, choice=2),
        ToolCallDelta(0),
        ToolCallDelta(0, "id"),
        ToolCallDelta(1, "id", "name"),
    ],
)
def test_what_a_producer_may_not_do(event: InferenceEvent) -> None:
    chat = stream()
    chat.sse_events([Started(1)])
    with pytest.raises(ValueError, match=r"choice|tool call"):
        chat.sse_events([TextDelta("before"), event])
    # The stream can still be ended with an error, and has lost nothing.
    assert payloads(chat.sse_events([Failed(ERROR)]))[0]["choices"][0]["delta"] == {"content": "before"}


def test_only_events() -> None:
    with pytest.raises(TypeError, match="not an inference event: 'text'"):
        stream().sse_events(["text"])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        stream().sse_events([TextDelta(5)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one choice"):
        stream(num_choices=0)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CHOICE = st.integers(0, 1)
EVENTS = st.lists(
    st.one_of(
        st.builds(TextDelta, TEXT, CHOICE, st.sampled_from([(), (), LOGPROBS])),
        st.builds(ReasoningDelta, TEXT, CHOICE),
        st.builds(lambda text, choice: ToolCallDelta(0, arguments=text, choice=choice), TEXT, CHOICE),
    ),
    max_size=20,
)


@given(EVENTS, st.sampled_from(FinishReason), st.integers(1, 25))
@example([TextDelta("\u2028 \x7f 😀 \x00")], FinishReason.STOP, 1)
def test_the_stream_equals_the_reply(deltas: list[InferenceEvent], reason: FinishReason, batch: int) -> None:
    calls = [ToolCallDelta(0, f"call_{c}", "tool", "", c) for c in range(2)]
    ends = [Finished(reason, 3 + c, c, choice=c) for c in range(2)]
    events: list[InferenceEvent] = [Started(11, 2), *calls, *deltas, *ends]
    chat = stream(num_choices=2, include_usage=True, keeps=True)
    sse_events = b""
    for i in range(0, len(events), batch):
        sse_events += chat.sse_events(events[i : i + batch])
    *chunks, last, done = payloads(sse_events)
    body = chat.whole()
    COMPLETION.validate_json(body, strict=True)
    assert accumulate(chunks, 2) == replied(body)
    assert last["usage"] == orjson.loads(body)["usage"]
    assert done == "[DONE]"
    scanner = UsageScanner()
    assert scanner.feed(sse_events) == sse_events
    num_tokens = sum(
        any(piece["delta"].get(f) for f in ("content", "reasoning_content", "tool_calls"))
        for chunk in chunks
        for piece in chunk["choices"]
    )
    assert scanner.num_token_events == num_tokens
    assert (scanner.terminated, scanner.failed) == (True, False)
    assert orjson.loads(scanner.usage or b"") == last["usage"]


def client(sse_events: bytes) -> openai.OpenAI:
    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=sse_events)

    http_client = httpx.Client(transport=httpx.MockTransport(answer))
    return openai.OpenAI(api_key="k", base_url="http://x/v1", http_client=http_client, _strict_response_validation=True)


def through_the_sdk(events: Sequence[InferenceEvent]) -> Any:
    sse_events = stream(include_usage=True, report_usage=True).sse_events(events)
    with client(sse_events).chat.completions.stream(model="m", messages=[]) as chunks:
        return chunks.get_final_completion()


def test_the_sdk_puts_it_together() -> None:
    final = through_the_sdk(
        [
            Started(3),
            ReasoningDelta("Hm"),
            TextDelta("Hello"),
            TextDelta(" you"),
            ToolCallDelta(0, "call_a", "f", '{"a":'),
            ToolCallDelta(0, arguments="1}"),
            Finished(FinishReason.TOOL_CALLS, 4),
        ]
    )
    [choice] = final.choices
    assert choice.message.content == "Hello you"
    assert choice.message.tool_calls[0].function.arguments == '{"a":1}'
    assert choice.finish_reason == "tool_calls"
    assert final.usage.total_tokens == 7


def test_the_sdk_raises_on_a_failure() -> None:
    with pytest.raises(openai.APIError, match="died"):
        through_the_sdk([Started(3), TextDelta("Hello"), Failed(ERROR)])


def test_a_custom_tools_call_has_an_input_in_one_piece() -> None:
    chat = ChatStream("chatcmpl-1", "m", 1700000000, custom_tools=frozenset({"patch"}), keeps=True)
    events = [
        Started(1),
        ToolCallDelta(0, "a", "patch", '{"inp'),
        ToolCallDelta(1, "b", "f", "{}"),
        ToolCallDelta(0, arguments='ut": "x\\"y"}'),
        ToolCallDelta(2, "c", "patch", "not what was asked for"),
        Finished(FinishReason.TOOL_CALLS, 3),
    ]
    sse_events = b"".join(chat.sse_events([event]) for event in events)
    # The SDK has no type for such a chunk, though OpenAI sends it.
    chunks = [orjson.loads(sse_event.data) for sse_event in SseDecoder().feed(sse_events)[:-1]]
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert calls == [
        {"index": 0, "id": "a", "type": "custom", "custom": {"name": "patch", "input": ""}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"index": 2, "id": "c", "type": "custom", "custom": {"name": "patch", "input": ""}},
        {"index": 0, "custom": {"input": 'x"y'}},
        {"index": 2, "custom": {"input": "not what was asked for"}},
    ]
    calls = orjson.loads(chat.whole())["choices"][0]["message"]["tool_calls"]
    assert calls[0] == {"id": "a", "type": "custom", "custom": {"name": "patch", "input": 'x"y'}}
    assert calls[1]["type"] == "function"


def test_a_completion_without_text_has_null_content_if_it_has_calls() -> None:
    chat = stream(keeps=True)
    chat.sse_events([Started(1), ToolCallDelta(0, "i", "n", "{}"), Finished(FinishReason.TOOL_CALLS, 1)])
    assert orjson.loads(chat.whole())["choices"][0]["message"]["content"] is None
    chat = stream(keeps=True)
    chat.sse_events([Started(1), Finished(FinishReason.STOP, 1)])
    assert orjson.loads(chat.whole())["choices"][0]["message"]["content"] == ""


def test_a_completion_needs_an_end() -> None:
    chat = stream(num_choices=2, keeps=True)
    chat.sse_events([Started(1), TextDelta("a"), Finished(FinishReason.STOP, 1)])
    with pytest.raises(UpstreamError, match="not complete"):
        chat.whole()
    error = ErrorInfo(502, "worker_lost", "the worker died", retry_after_s=2.0)
    chat.sse_events([Failed(error)])
    with pytest.raises(RemoteError) as failed:
        chat.whole()
    assert failed.value.info() == error


def test_a_stream_keeps_nothing_for_a_completion() -> None:
    chat = stream()
    chat.sse_events([Started(1), Finished(FinishReason.STOP, 1)])
    with pytest.raises(ValueError, match="keep"):
        chat.whole()
