"""Translation by way of chat: requests and answers are the same, however a server writes its chunks."""

import json
import re
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex._fast.chat_events import ChatEvents
from cortex._fast.chat_stream import ChatStream
from cortex._fast.messages_stream import MessagesStream
from cortex._fast.responses_stream import ResponsesStream
from cortex.dialects.chat import request as chat_request
from cortex.dialects.chat.chunks import ChunkReader
from cortex.dialects.messages import request as messages_request
from cortex.dialects.registry import CHAT, COUNT_TOKENS, MESSAGES, RESPONSES
from cortex.dialects.responses import request as responses_request
from cortex.dialects.translate import chat_body, to_chat, translated_error
from cortex.wire.custom_tools import custom_input
from cortex.wire.errors import ApiError, ErrorInfo, RemoteError, UpstreamError
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
from cortex.wire.request import InferenceRequest, Message, Role

TEXT = st.text(max_size=6) | st.sampled_from(['"', "\\", '\\"', "\n", "content", '"content":"', "é", "☃", "𝟫", "id"])
LOGPROBS = (TokenLogprob("a", b"a", -0.5, (TokenLogprob("b", b"b", -1.5),)),)


@st.composite
def streams(draw: st.DrawFn) -> list[InferenceEvent]:
    """A whole answer: reasoning, text, calls, an end."""
    events: list[InferenceEvent] = [Started(draw(st.integers(0, 99)), 0)]
    events += [ReasoningDelta(text) for text in draw(st.lists(TEXT, max_size=4)) if text]
    events += [TextDelta(text) for text in draw(st.lists(TEXT, max_size=8)) if text]
    num_calls = draw(st.integers(0, 2))
    for call in range(num_calls):
        events.append(ToolCallDelta(call, f"call_{call}", "f", draw(TEXT)))
        events += [ToolCallDelta(call, arguments=text) for text in draw(st.lists(TEXT, max_size=3)) if text]
    reason = FinishReason.TOOL_CALLS if num_calls else draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
    stop = "</s>" if reason is FinishReason.STOP and draw(st.booleans()) else None
    return [*events, Finished(reason, draw(st.integers(0, 99)), draw(st.integers(0, 9)), stop)]


def chat_sse_events(events: list[InferenceEvent]) -> bytes:
    stream = ChatStream("c", "m", 1, include_usage=True)
    return b"".join(stream.sse_events([event]) for event in events)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = sorted(place % (len(data) + 1) for place in places)
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


@given(streams(), st.lists(st.integers(0, 5000), max_size=6))
def test_events_come_back_out_of_chat_sse_events_however_they_are_cut(
    events: list[InferenceEvent], places: list[int]
) -> None:
    reader = ChatEvents()
    found = [event for data in cut(chat_sse_events(events), places) for event in reader.feed(data)]
    assert reader.ended
    # There are two start events: counts come last in chat.
    assert [event for event in found if not isinstance(event, Started)] == events[1:]
    assert [event for event in found if isinstance(event, Started)] == [Started(0, 0), events[0]]


@given(streams(), st.lists(st.integers(0, 5000), max_size=6))
def test_translated_sse_events_have_the_shape_of_native_ones(events: list[InferenceEvent], places: list[int]) -> None:
    reader = ChatEvents()
    pieces = [reader.feed(data) for data in cut(chat_sse_events(events), places)]
    ordered = [Started(0), *events[1:-1], events[0], events[-1]]  # the counts are known at the end
    for make in (lambda: MessagesStream("msg_1", "m"), lambda: ResponsesStream("resp_1", "m", 1, b"{}")):
        made, native = make(), make()
        translated = b"".join(made.sse_events(piece) for piece in pieces)
        assert shape(translated) == shape(b"".join(native.sse_events([event]) for event in ordered))


def shape(sse_events: bytes) -> list[Any]:
    """Return a stream's events, without the time at which each was completed."""
    found = [line.removeprefix(b"data: ") for line in sse_events.split(b"\n") if line.startswith(b"data: ")]
    timeless = re.sub(rb'"completed_at":\d+', b'"completed_at":0', b",".join(found))
    return json.loads(b"[" + timeless + b"]")  # type: ignore[no-any-return]


@given(streams())
def test_whole_answers(events: list[InferenceEvent]) -> None:
    chat = ChatStream("c", "m", 1, keeps=True)
    chat.sse_events(events)
    made, native = MessagesStream("msg_1", "m"), MessagesStream("msg_1", "m")
    made.sse_events(ChunkReader().read_whole(chat.whole()))
    native.sse_events(events)
    assert json.loads(made.whole()) == json.loads(native.whole())


def test_log_probabilities_go_along() -> None:
    events = [Started(3), TextDelta("a", logprobs=LOGPROBS), Finished(FinishReason.STOP, 1)]
    assert TextDelta("a", logprobs=LOGPROBS) in ChatEvents().feed(chat_sse_events(events))


def chunk(*choices: Any, **fields: Any) -> bytes:
    return b"data: " + orjson.dumps({"id": "c", "choices": list(choices), **fields}) + b"\n\n"


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"index": 0, "delta": fields, "finish_reason": finish}


DONE = b"data: [DONE]\n\n"
END = Finished(FinishReason.STOP, 0)
START = Started(0)


@pytest.mark.parametrize(
    ("sse_events", "expected"),
    [
        # content beside an empty list of calls is content
        ([chunk(delta(content="a", tool_calls=[])), chunk(delta("stop")), DONE], [START, TextDelta("a"), START, END]),
        # the whole call in one chunk, with its end
        (
            [chunk(delta("tool_calls", tool_calls=[{"index": 0, "id": "x",
                                                    "function": {"name": "f", "arguments": "{}"}}])), DONE],
            [START, ToolCallDelta(0, "x", "f", "{}"), START, Finished(FinishReason.TOOL_CALLS, 0)],
        ),
        # several calls in one chunk; names repeated as empty ones; an index that does not begin at 0
        (
            [chunk(delta(tool_calls=[{"index": 3, "id": "x", "function": {"name": "f"}},
                                     {"index": 4, "id": "y", "function": {"name": "g", "arguments": "{"}}])),
             chunk(delta(tool_calls=[{"index": 4, "function": {"name": "", "arguments": "}"}}])),
             chunk(delta(tool_calls=[{"index": 3, "id": "", "function": {"name": None, "arguments": "{}"}}])),
             chunk(delta("stop")), DONE],
            [START, ToolCallDelta(0, "x", "f"), ToolCallDelta(1, "y", "g", "{"), ToolCallDelta(1, arguments="}"),
             ToolCallDelta(0, arguments="{}"), START, Finished(FinishReason.TOOL_CALLS, 0)],
        ),
        # no index at all, and an object for arguments
        (
            [chunk(delta(tool_calls=[{"id": "x", "function": {"name": "f", "arguments": {"a": 1}}}])),
             chunk(delta(tool_calls=[{"id": "y", "function": {"name": "g", "arguments": ""}}])),
             chunk(delta(tool_calls=[{"function": {"arguments": "{}"}}])), chunk(delta("tool_calls")), DONE],
            [START, ToolCallDelta(0, "x", "f", '{"a":1}'), ToolCallDelta(1, "y", "g"), ToolCallDelta(1, arguments="{}"),
             START, Finished(FinishReason.TOOL_CALLS, 0)],
        ),
        # reasoning under its other name; null beside it
        ([chunk(delta(reasoning="r", content=None)), chunk(delta("stop")), DONE],
         [START, ReasoningDelta("r"), START, END]),
        # usage with the last choice, with every chunk, after the end; cached and reasoning tokens
        ([chunk(delta(content="a"), usage={"prompt_tokens": 3, "completion_tokens": 1}),
          chunk(delta("stop"), usage={"prompt_tokens": 3, "completion_tokens": 2}), DONE],
         [Started(3), TextDelta("a"), Started(3), Finished(FinishReason.STOP, 2)]),
        ([chunk(delta("length", content="a")),
          chunk(usage={"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1},
                       "completion_tokens_details": {"reasoning_tokens": 1}}), DONE],
         [START, TextDelta("a"), Started(3, 1), Finished(FinishReason.LENGTH, 2, 1)]),
        # the string that stopped it
        ([chunk({**delta("stop"), "stop_reason": "END"}), DONE],
         [START, START, Finished(FinishReason.STOP, 0, stop_string="END")]),
        ([chunk({**delta("stop"), "stop_reason": 2}), DONE], [START, START, END]),
        ([chunk(delta(refusal="no")), chunk(delta("content_filter")), DONE], [START, TextDelta("no"), START, END]),
        ([b": ping\n\n", chunk(delta(role="assistant")), chunk({"index": 1, "delta": {"content": "x"}}),
          chunk(delta("stop")), DONE, chunk(delta(content="late"))], [START, START, END]),
        # errors in the middle
        ([chunk(delta(content="a")), b'data: {"error":{"message":"gone","code":"lost","param":"p"}}\n\n'],
         [START, TextDelta("a"), Failed(ErrorInfo(502, "lost", "gone", "p"))]),
        ([b'data: {"error":{"message":"gone","code":503}}\n\n'], [Failed(ErrorInfo(503, "upstream_error", "gone"))]),
        ([b'data: {"error":"gone"}\n\n'], [Failed(ErrorInfo(502, "upstream_error", "gone"))]),
        ([b'data: {"error":3}\n\n'], [Failed(ErrorInfo(502, "upstream_error", "The node failed."))]),
    ],
)  # fmt: skip
def test_chunks_of_other_servers(sse_events: list[bytes], expected: list[InferenceEvent]) -> None:
    reader = ChatEvents()
    assert [event for sse_event in sse_events for event in reader.feed(sse_event)] == expected
    assert reader.ended
    assert reader.close() == []


def test_a_stream_without_a_terminator() -> None:
    reader = ChatEvents()
    reader.feed(chunk(delta("stop", content="a")))
    assert not reader.ended
    assert reader.close() == [START, END]
    assert ChatEvents().close() == []


@pytest.mark.parametrize(
    "data", [b"x", b"[]", b'{"choices":3}', b'{"choices":[{"delta":{"content":3}}]}', b'{"choices":[{"index":"a"}]}']
)
def test_streams_that_are_no_chat(data: bytes) -> None:
    with pytest.raises(UpstreamError, match="something else"):
        ChatEvents().feed(b"data: " + data + b"\n\n")


@given(st.lists(st.binary(max_size=8) | st.sampled_from([b"data: ", b"\n\n", b'{"choices":[{"delta":{"content":"a"}}]}',
                                                        b'"', b"\\ud800", b"[DONE]"]), max_size=9))  # fmt: skip
def test_no_bytes_are_anything_but_events_or_a_typed_error(pieces: list[bytes]) -> None:
    reader = ChatEvents()
    try:
        for piece in pieces:
            reader.feed(piece)
        reader.close()
    except ApiError:
        pass


ODD_TEXT = st.text(max_size=4) | st.sampled_from(["\ud800", "\udc00", '"', "\\"])


@given(st.lists(ODD_TEXT, min_size=1, max_size=6), st.booleans())
def test_text_is_read_the_same_on_either_way(texts: list[str], ascii_only: bool) -> None:
    def sse_event(text: str) -> bytes:
        body = {"choices": [{"index": 0, "delta": {"content": text}}]}
        return b"data: " + json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "replace") + b"\n\n"

    quick = ChatEvents()
    for text in texts:
        data = sse_event(text)
        try:
            expected = [event for event in ChatEvents().feed(data) if isinstance(event, TextDelta)]
        except UpstreamError:
            with pytest.raises(UpstreamError):
                quick.feed(data)
            continue
        assert [event for event in quick.feed(data) if isinstance(event, TextDelta)] == expected


SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}}
REQUESTS: list[tuple[Any, dict[str, Any]]] = [
    (messages_request.decode, {
        "model": "m", "max_tokens": 5, "system": "s", "temperature": 0.5, "top_k": 3, "stop_sequences": ["a"],
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "t"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"},
                                              {"type": "tool_use", "id": "c", "name": "f", "input": {"x": [1]}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "r"}]},
            {"role": "system", "content": "more"},
        ],
        "tools": [{"name": "f", "input_schema": SCHEMA, "strict": True}],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 9},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    }),
    (responses_request.decode, {
        "model": "m", "instructions": "i", "top_p": 0.5, "max_output_tokens": 4, "top_logprobs": 2,
        "include": ["message.output_text.logprobs"], "reasoning": {"effort": "none"},
        "text": {"format": {"type": "json_object"}},
        "input": [{"role": "developer", "content": "d"}, {"role": "user", "content": "u"},
                  {"type": "function_call", "call_id": "c", "name": "f", "namespace": "n", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "x"}],
        "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]},
                  {"type": "custom", "name": "p"}],
        "tool_choice": "required",
    }),
    (chat_request.decode, {
        "model": "m", "messages": [{"role": "user", "content": "u", "name": "n"}], "n": 2, "seed": 3, "min_p": 0.1,
        "logit_bias": {"1": 2.0}, "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.5,
        "ignore_eos": True, "chat_template_kwargs": {"a": 1}, "stop": ["x", "y"],
    }),
]  # fmt: skip


@pytest.mark.parametrize(("decode", "body"), REQUESTS)
def test_a_chat_body_asks_for_the_same(decode: Any, body: dict[str, Any]) -> None:
    request: InferenceRequest = decode(orjson.dumps(body)).request
    found = chat_request.decode(chat_body(request, stream=True))
    assert (found.stream, found.include_usage) == (True, True)
    assert comparable(found.request) == comparable(request)


def comparable(request: InferenceRequest) -> InferenceRequest:
    """Return a request as it is where thinking is an argument of the template, and there is one system message."""
    arguments = dict(request.template_arguments)
    if request.thinking is not None:
        arguments["enable_thinking"] = request.thinking
    system = "\n\n".join(str(m.content) for m in request.messages if m.role is Role.SYSTEM)
    messages = tuple(m for m in request.messages if m.role is not Role.SYSTEM)
    tools = tuple(msgspec.structs.replace(tool, parameters=tool.parameters or {"type": "object", "properties": {}})
                  for tool in request.tools)  # fmt: skip
    return msgspec.structs.replace(
        request,
        messages=(Message(Role.SYSTEM, system), *messages),
        tools=tools,
        thinking=None,
        template_arguments=arguments,
        output_format=msgspec.structs.replace(request.output_format, name=""),
    )


def test_which_dialects_are_translated() -> None:
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "u"}], "input": "u"})
    assert to_chat(CHAT, body) is None
    for dialect in (MESSAGES, RESPONSES, COUNT_TOKENS):
        translation = to_chat(dialect, body)
        assert translation is not None
        assert orjson.loads(translation.body())["messages"] == [{"role": "user", "content": "u"}]


def test_a_count_is_the_engines_own() -> None:
    translation = to_chat(COUNT_TOKENS, b'{"model":"m","messages":[{"role":"user","content":"u"}],"max_tokens":99}')
    assert translation is not None
    assert orjson.loads(translation.body())["max_tokens"] == 1
    answer = {"choices": [{"message": {"content": "a"}, "finish_reason": "length"}], "usage": {"prompt_tokens": 41}}
    assert translation.begin().whole(orjson.dumps(answer)) == b'{"input_tokens":41}'
    with pytest.raises(UpstreamError, match="how many tokens"):
        translation.begin().whole(orjson.dumps(answer | {"usage": None}))


def test_whole_answers_that_are_none() -> None:
    translation = to_chat(MESSAGES, b'{"model":"m","messages":[{"role":"user","content":"u"}]}')
    assert translation is not None
    with pytest.raises(UpstreamError, match="no choice"):
        translation.begin().whole(b'{"choices":[]}')
    with pytest.raises(RemoteError, match="gone"):
        translation.begin().whole(b'{"error":{"message":"gone"},"choices":[{"finish_reason":"stop"}]}')


@pytest.mark.parametrize(
    ("message", "lengths"),
    [
        ("maximum context length is 100 tokens. However, your messages resulted in 150 tokens.", (100, 150)),
        ("maximum context length is 100 tokens. However, you requested 150 tokens (140 in the ...", (100, 150)),
        ("the request exceeds the available context size, try increasing it", (0, 0)),
        ("something else", None),
    ],
)  # fmt: skip
def test_a_prompt_that_is_too_long_is_recognised(message: str, lengths: tuple[int, int] | None) -> None:
    error = ErrorInfo(400, "BadRequestError", message)
    found = translated_error(error)
    if lengths is None:
        assert found is error
    else:
        assert (found.code, found.context_tokens, found.prompt_tokens) == ("context_length_exceeded", *lengths)


# ------------------------------------------------------------------ calls, however a server counts them


def calls_of(*pieces: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Return number, name and arguments of the calls that come in these pieces."""
    reader, found = ChunkReader(), dict[int, list[str]]()
    for piece in pieces:
        delta = {"choices": [{"index": 0, "delta": {"tool_calls": piece}}]}
        for event in reader.read(orjson.dumps(delta)):
            if isinstance(event, ToolCallDelta):
                if event.name:
                    assert event.call not in found
                    found[event.call] = [event.name, ""]
                found[event.call][1] += event.arguments
    return [(number, name, arguments) for number, (name, arguments) in found.items()]


def piece(arguments: str = "", **fields: Any) -> dict[str, Any]:
    name = fields.pop("name", None)
    return {**fields, "function": {"arguments": arguments, **({"name": name} if name else {})}}


TWO = [(0, "f", "{1}"), (1, "g", "{2}")]


@pytest.mark.parametrize(
    ("pieces", "calls"),
    [
        # Every call at index 0, distinguished by their ids.
        ([[piece("{1}", index=0, id="a", name="f")], [piece("{2}", index=0, id="b", name="g")]], TWO),
        ([[piece("{1}", index=0, id="a", name="f"), piece("{2}", index=0, id="b", name="g")]], TWO),
        (
            [
                [piece(index=0, id="a", name="f")],
                [piece("{1", index=0)],
                [piece("}", index=0)],
                [piece(index=0, id="b", name="g")],
                [piece("{2}", index=0)],
            ],
            TWO,
        ),
        # Their pieces alternate, with the id in each.
        (
            [
                [piece(index=0, id="a", name="f"), piece(index=0, id="b", name="g")],
                [piece("{2}", index=0, id="b")],
                [piece("{1}", index=0, id="a")],
            ],
            TWO,
        ),
        # An id and the name in every piece, a new id in every piece, and none at all.
        ([[piece("{", index=0, id="a", name="f")], [piece("1}", index=0, id="a", name="f")]], TWO[:1]),
        ([[piece("{", index=0, id="a", name="f")], [piece("1}", index=0, id="z")]], TWO[:1]),
        ([[piece("{1}", index=0, name="f")], [piece("{2}", index=1, name="g")]], TWO),
        ([[piece("{1}", id="a", name="f")], [piece("{2}", id="b", name="g")]], TWO),
        ([[piece("{", id="a", name="f")], [piece("1}")], [piece("{2}", id="b", name="g")]], TWO),
        # One id for two calls.
        ([[piece("{1}", index=0, id="a", name="f")], [piece("{2}", index=1, id="a", name="g")]], TWO),
    ],
)
def test_calls_come_apart(pieces: list[list[dict[str, Any]]], calls: list[tuple[int, str, str]]) -> None:
    assert calls_of(*pieces) == calls


def test_many_calls_are_read_in_one_pass() -> None:
    """Time that is quadratic in the calls would be minutes here."""
    pieces = [[piece("{}", id=f"c{n}", name="f")] for n in range(20_000)]
    assert len(calls_of(*pieces)) == 20_000


@pytest.mark.parametrize("strict", [True, False, None])
def test_strictness_goes_on_as_it_was_given(strict: bool | None) -> None:
    given = {} if strict is None else {"strict": strict}
    tools = [{"type": "function", "name": "f", "parameters": {}, **given}]
    form = {"type": "json_schema", "name": "n", "schema": {}, **given}
    body = orjson.dumps({"model": "m", "input": "a", "tools": tools, "text": {"format": form}})
    sent = orjson.loads(chat_body(responses_request.decode(body).request, stream=False))
    assert sent["tools"][0]["function"].get("strict") is strict
    assert sent["response_format"]["json_schema"].get("strict") is strict


# ------------------------------------------------------------------ streams of broken servers


@pytest.mark.parametrize(
    "token",
    [
        {"token": "a", "logprob": -1, "bytes": [300]},
        {"token": "a", "logprob": -1, "bytes": [-1]},
        {"token": "a", "logprob": -1, "top_logprobs": [{"token": "b", "logprob": -1, "bytes": [256]}]},
    ],
)
def test_bytes_that_are_none_are_the_nodes_error(token: dict[str, Any]) -> None:
    with pytest.raises(UpstreamError):
        ChunkReader().read(chunk({"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [token]}}))


def test_alternatives_have_no_alternatives() -> None:
    token = b'{"token":"a","logprob":-1,"top_logprobs":[' * 150 + b"]}" * 150
    data = b'{"choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"content":[' + token + b"]}}]}"
    ordered = [event for event in ChunkReader().read(data) if isinstance(event, TextDelta)]
    assert [alternative.top for alternative in ordered[0].logprobs[0].top] == [()]


@pytest.mark.parametrize(
    "words",
    [
        f"maximum context length is {'9' * 5000} tokens",
        f"maximum context length is 5 tokens, given {'9' * 5000}",
        "maximum context length " * 5000,
    ],
)
def test_lengths_that_nothing_has_are_not_read(words: str) -> None:
    found = translated_error(ErrorInfo(400, "x", words))
    assert found.code == "context_length_exceeded"
    assert found.prompt_tokens == 0


def test_arguments_nested_without_end_are_an_input_as_they_are() -> None:
    text = '{"a":' * 100_000
    assert custom_input(text) == text


def test_thoughts_go_on_by_both_names() -> None:
    messages = (Message(Role.USER, "hi"), Message(Role.ASSISTANT, "a", reasoning="why"), Message(Role.USER, "go on"))
    sent = orjson.loads(chat_body(InferenceRequest(model="m", messages=messages), stream=False))["messages"][1]
    assert (sent["reasoning_content"], sent["reasoning"]) == ("why", "why")
