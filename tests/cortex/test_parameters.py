"""Unknown members of a request: a header and a log line, or a refusal."""

import logging
from typing import Any

import orjson
import pytest
from answers import CHAT_STREAM
from fake_node import FakeNode, Line, Received
from gateway_rig import CHAT, rig
from key_rig import KEY, ring

from cortex.access.keys import Principal

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": "m", "prompt": "a"}),
    ("/v1/messages", {**CHAT, "max_tokens": 5}),
    ("/v1/messages/count_tokens", CHAT),
    ("/v1/responses", {"model": "m", "input": "a", "store": False}),
    ("/v1/embeddings", {"model": "m", "input": "a"}),
]
DIALECTS = (*FakeNode("a").dialects, "openai-embeddings")
EVERY = pytest.mark.parametrize(("path", "body"), BODIES)
BEARER = {"authorization": f"Bearer {KEY}"}


def node() -> FakeNode:
    return FakeNode("a", dialects=DIALECTS).ready("m")


@EVERY
async def test_an_answer_lists_ignored_parameters(
    caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    caplog.set_level(logging.INFO, "cortex")
    async with rig(node()) as gateway:
        for _ in range(2):  # the second one has a connection that is open, and could be sent at once
            plain = await gateway.call("POST", path, body).end()
            assert (plain.status, plain.headers.get("x-cortex-ignored")) == (200, None)
            call = await gateway.call("POST", path, {**body, "temprature": 1, "a\r\nb": 2}).end()
            assert (call.status, call.headers["x-cortex-ignored"]) == (200, "temprature, a?r?nb")
    lines = [record for record in caplog.records if record.name == "cortex.inference"]
    assert [line.getMessage().partition("ignored=")[2] for line in lines] == ["temprature, a?r?nb"] * 2


@pytest.mark.parametrize(("path", "body"), [BODIES[0], BODIES[1], BODIES[2], BODIES[4]])
async def test_a_stream_lists_them_before_the_nodes_first_byte(path: str, body: dict[str, Any]) -> None:
    neuron = node()

    async def late(received: Received, line: Line) -> None:
        await line.start_stream()
        for sse_event in CHAT_STREAM:
            await line.chunk(sse_event)
        await line.end()

    neuron.script = late
    async with rig(neuron) as gateway:
        call = await gateway.call("POST", path, {**body, "stream": True, "stream_options": {"odd": 1}, "x": 1}).end()
        assert call.status == 200
        assert set(call.headers["x-cortex-ignored"].split(", ")) >= {"x"}


async def test_a_nodes_ignored_parameters_are_forwarded_and_sanitized() -> None:
    neuron = node()

    async def script(received: Received, line: Line) -> None:
        await line.reply(200, b'{"choices":[]}', "x-cortex-ignored: y, tools[0].type=web_search, \"<b>\"",
                         "x-cortex-omitted-parts: 3")  # fmt: skip

    neuron.script = script
    async with rig(neuron) as gateway:
        for more in ({"x": 1}, {}, {}):
            call = await gateway.chat(**more).end()
            ours = "x, " if more else ""
            assert call.headers["x-cortex-ignored"] == f"{ours}y, tools[0].type=web_search, ??b??"
            assert call.headers["x-cortex-omitted-parts"] == "3"


@EVERY
async def test_a_strict_key_is_refused_unknown_parameters(path: str, body: dict[str, Any]) -> None:
    neuron = node()
    keys = ring((KEY, Principal("k", is_strict=True)))
    async with rig(neuron, keys=keys) as gateway:
        for _ in range(2):
            assert (await gateway.call("POST", path, body, BEARER).end()).status == 200
            neuron.requests.clear()
            call = await gateway.call("POST", path, {**body, "strem": True}, BEARER).end()
            assert call.status == 400
            assert b"unknown_parameter" in call.body
            assert b"Did you mean 'stream'?" in call.body or "embeddings" in path
            assert not neuron.requests


@pytest.mark.parametrize(("default", "own", "status"), [(True, None, 400), (True, False, 200), (False, None, 200)])
async def test_a_key_without_the_setting_is_as_strict_as_the_gateway(
    default: bool, own: bool | None, status: int
) -> None:
    keys = ring((KEY, Principal("k", is_strict=own)))
    async with rig(node(), keys=keys, access={"strict": default}) as gateway:
        call = await gateway.call("POST", "/v1/chat/completions", {**CHAT, "odd": 1}, BEARER).end()
        assert call.status == status


async def test_a_body_over_the_limits_is_refused_before_any_node_is_tried() -> None:
    neuron = node()
    async with rig(neuron) as gateway:
        for _ in range(2):
            call = await gateway.chat(messages=CHAT["messages"] * 20_001).end()
            assert call.status == 400
            assert orjson.loads(call.body)["error"]["code"] == "too_many_items"
            assert orjson.loads(call.body)["error"]["param"] == "messages"
        assert not neuron.requests


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *BODIES,
        ("/v1/responses", {"model": "m", "input": "a"}),
        ("/v1/responses/compact", {"model": "m", "input": "a"}),
        ("/v1/conversations", {}),
    ],
)
async def test_a_body_too_deep_to_re_encode_is_refused_before_any_node_is_tried(
    path: str, body: dict[str, Any]
) -> None:
    neuron = node()
    given = orjson.dumps(body)[:-1] + (b"," if body else b"")
    async with rig(neuron) as gateway:
        for levels in (260, 300, 900, 2000):
            deep = b"[" * levels + b"]" * levels
            message = b'[{"type":"message","role":"user","content":"x","metadata":' + deep + b"}]"
            for name in (b"metadata", b"vllm_xargs", b"items", b"input"):
                value = message if name in (b"items", b"input") else deep
                call = await gateway.call("POST", path, given + b'"' + name + b'":' + value + b"}").end()
                error = orjson.loads(call.body)["error"]
                assert call.status == 400
                assert error["message"].startswith("Too deeply nested")
        assert not neuron.requests
