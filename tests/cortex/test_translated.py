"""Nodes of the chat dialect alone: requests in the node's dialect, and answers and errors in the client's."""

from typing import Any

import orjson
import pytest
from answers import CHAT_STREAM, chat_chunk
from fake_node import FakeNode, Line, Received, answer, chat_only, error
from gateway_rig import rig

MESSAGES = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
RESPONSES = {"model": "m", "input": "Hi"}
PATHS = [("/v1/messages", MESSAGES), ("/v1/responses", RESPONSES)]


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_it_is_asked_in_chat(path: str, body: dict[str, Any], stream: bool) -> None:
    node = chat_only()
    async with rig(node) as gateway:
        call = await gateway.call("POST", path, {**body, "stream": stream}).end()
        assert call.status == 200
        assert b"Hello" in call.body or b"Hel" in call.body
    assert [received.path for received in node.requests] == ["/v1/chat/completions"]
    sent = orjson.loads(node.requests[0].body)
    assert sent["messages"] == [{"role": "user", "content": "Hi"}]
    assert sent.get("stream", False) is stream
    labels = {"model": "m", "node": "a", "dialect": "anthropic-messages" if "messages" in path else "openai-responses"}
    assert gateway.metric("cortex_requests_total", status="200", **labels) == 1


@pytest.mark.parametrize(("path", "body"), PATHS)
async def test_a_node_of_the_dialect_gets_the_bytes(path: str, body: dict[str, Any]) -> None:
    node = FakeNode().ready("m")
    async with rig(node) as gateway:
        text = orjson.dumps(body)
        await gateway.call("POST", path, text).end()
    assert [(received.path, received.body) for received in node.requests] == [(path, text)]


async def test_a_count_is_asked_for_in_chat() -> None:
    node = chat_only()
    async with rig(node) as gateway:
        call = await gateway.call("POST", "/v1/messages/count_tokens", MESSAGES).end()
    assert call.json() == {"input_tokens": 7}
    assert orjson.loads(node.requests[0].body)["max_tokens"] == 1


async def test_the_other_replica_is_tried_in_its_own_dialect() -> None:
    first, second = chat_only("a"), FakeNode("b").ready("m")
    first.script = error(503, "busy")
    async with rig(first, second) as gateway:
        for _ in range(4):
            call = await gateway.call("POST", "/v1/messages", {**MESSAGES, "stream": True}).end()
            assert call.status == 200
            assert call.data().endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert {received.path for received in first.requests} <= {"/v1/chat/completions"}
    assert {received.path for received in second.requests} == {"/v1/messages"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "client_status", "expected"),
    [
        ("/v1/messages", MESSAGES, 400, "bad", 400, {"type": "invalid_request_error", "message": "error bad"}),
        ("/v1/messages", MESSAGES, 429, "slow", 429, {"type": "rate_limit_error", "message": "error slow"}),
        ("/v1/messages", MESSAGES, 503, "busy", 529, {"type": "overloaded_error", "message": "error busy"}),
        ("/v1/responses", RESPONSES, 400, "bad", 400, {"code": "bad", "message": "error bad"}),
        ("/v1/messages", {**MESSAGES, "top_p": 3}, 400, "", 400, {"type": "invalid_request_error"}),
        ("/v1/responses", {"model": "m", "input": 3}, 400, "", 400, {"param": "input"}),
    ],
)
async def test_errors_are_in_the_callers_dialect(
    path: str, body: dict[str, Any], status: int, code: str, client_status: int, expected: dict[str, str]
) -> None:
    node = chat_only()
    node.script = error(status, code)
    async with rig(node) as gateway:
        call = await gateway.call("POST", path, body).end()
    assert call.status == client_status
    assert expected.items() <= call.json()["error"].items()
    assert gateway.in_flight == 0


@pytest.mark.parametrize(("path", "body"), PATHS)
async def test_a_stream_that_breaks_is_an_error(path: str, body: dict[str, Any]) -> None:
    async def cut(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(chat_chunk({"content": "Hel"}))
        await line.end()

    node = chat_only()
    node.script = cut
    async with rig(node) as gateway:
        call = await gateway.call("POST", path, {**body, "stream": True}).end()
    assert (b"event: error" if "messages" in path else b"response.failed") in call.body


async def test_a_stream_without_its_terminator_is_whole() -> None:
    async def without(received: Received, line: Line) -> None:
        await line.start_stream()
        for sse_event in CHAT_STREAM[:4]:
            await line.chunk(sse_event)
        await line.end()

    node = chat_only()
    node.script = without
    async with rig(node) as gateway:
        call = await gateway.call("POST", "/v1/messages", {**MESSAGES, "stream": True}).end()
    assert b"message_stop" in call.body


async def test_a_translated_response_is_stored_and_continued() -> None:
    node = chat_only()
    async with rig(node) as gateway:
        first = (await gateway.call("POST", "/v1/responses", RESPONSES).end()).json()
        assert first["store"] is True
        node.script = answer
        again = {**RESPONSES, "previous_response_id": first["id"]}
        second = (await gateway.call("POST", "/v1/responses", again).end()).json()
    assert second["previous_response_id"] == first["id"]
    received = [message["content"] for message in orjson.loads(node.requests[-1].body)["messages"]]
    assert received == ["Hi", "Hello", "Hi"]


async def test_a_node_of_neither_dialect_is_not_tried() -> None:
    async with rig(FakeNode(dialects=("openai-completions",)).ready("m")) as gateway:
        call = await gateway.call("POST", "/v1/messages", MESSAGES).end()
    assert call.status == 529


AUDIO = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "A"}}


@pytest.mark.parametrize("stream", [False, True])
async def test_content_without_a_chat_content_part_is_a_line_of_text(stream: bool) -> None:
    node = chat_only()
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    history = [{"role": "user", "content": [AUDIO, image]}, {"role": "assistant", "content": "b"}]
    body = {"model": "m", "stream": stream, "messages": [*history, {"role": "user", "content": "c"}]}
    async with rig(node) as gateway:
        call = await gateway.call("POST", "/v1/messages", body).end()
        assert (call.status, call.headers["x-cortex-omitted-parts"]) == (200, "1")
        refused = await gateway.call("POST", "/v1/messages", {**body, "messages": history[:1]}).end()
        assert refused.status == 400
    sent = orjson.loads(node.requests[0].body)["messages"][0]["content"]
    assert sent == [
        {"type": "text", "text": "[document omitted: this model takes text and images]"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "auto"}},
    ]


async def test_interleaved_calls_arrive_whole() -> None:
    """As servers send them that generate several calls beside one another."""

    def piece(index: int, arguments: str, **more: Any) -> bytes:
        call = {"index": index, "function": {"arguments": arguments, **more}, **({"id": f"c{index}"} if more else {})}
        return chat_chunk({"tool_calls": [call]})

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        for data in (
            piece(0, "", name="f"),
            piece(1, "", name="g"),
            piece(0, '{"a":'),
            piece(1, '{"b":2}'),
            piece(0, "1}"),
        ):
            await line.chunk(data)
        await line.chunk(chat_chunk({}, "tool_calls"))
        await line.chunk(b"data: [DONE]\n\n")
        await line.end()

    for path, body in PATHS:
        node = chat_only()
        node.script = script
        async with rig(node) as gateway:
            call = await gateway.call("POST", path, {**body, "stream": True}).end()
            assert call.status == 200
            assert b"error" not in call.body.replace(b'"error":null', b"")
            received = [orjson.loads(text[6:]) for text in call.body.split(b"\n") if text.startswith(b"data: {")]
            if path == "/v1/messages":
                blocks: dict[int, str] = {}
                for event in received:
                    if event["type"] == "content_block_delta":
                        blocks[event["index"]] = blocks.get(event["index"], "") + event["delta"]["partial_json"]
                assert list(blocks.values()) == ['{"a":1}', '{"b":2}']
            else:
                output = received[-1]["response"]["output"]
                assert [item["arguments"] for item in output] == ['{"a":1}', '{"b":2}']


@pytest.mark.parametrize(("path", "body"), PATHS)
async def test_token_bytes_that_are_none_are_the_nodes_error(path: str, body: dict[str, Any]) -> None:
    token = {"token": "a", "logprob": -1, "bytes": [300]}

    async def script(received: Received, line: Line) -> None:
        choice = {"index": 0, "message": {"content": "a"}, "finish_reason": "stop", "logprobs": {"content": [token]}}
        await line.reply(200, orjson.dumps({"choices": [choice]}))

    node = chat_only()
    node.script = script
    async with rig(node) as gateway:
        call = await gateway.call("POST", path, body).end()
        assert call.status == 502
        assert b"something else than a chat" in call.body
