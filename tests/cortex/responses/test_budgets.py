"""Limits of stored responses, over HTTP and WebSockets; a response that is not stored has ``store: false``."""

import asyncio
import json
import pathlib
import random
import time
from typing import Any

import msgspec
import orjson
import pytest
from answers import RESPONSE, USAGE, event
from conversation_steps import Checker, steps
from fake_node import FakeNode, Line, Received
from gateway_rig import Rig, rig, until

from cortex.config import StoreSettings
from cortex.responses.socket_memory import SocketMemory

SMALL = StoreSettings(path=":memory:", max_bytes=16_384, max_bytes_per_key=8_192)


def responds(num_bytes: int) -> FakeNode:
    """Return a node whose responses are so large, and have the ``store`` that the gateway sent."""

    async def script(received: Received, line: Line) -> None:
        stores = '"store":true' in received.headers.get("x-cortex-response", "").replace(" ", "")
        text = [
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "x" * num_bytes}],
            }
        ]
        done = RESPONSE | {
            "id": "resp_" + "1" * 48,
            "status": "completed",
            "usage": USAGE,
            "store": stores,
            "output": text,
        }
        if not orjson.loads(received.body).get("stream"):
            await line.reply(200, orjson.dumps(done))
            return
        await line.start_stream()
        await line.chunk(event("response.created", 0, response=RESPONSE | {"store": stores}))
        await line.chunk(event("response.completed", 1, response=done))
        await line.end()

    return FakeNode(script=script).ready("m")


def last(call: Any) -> Any:
    body = call.body.decode()
    if not body.startswith("event:"):
        return orjson.loads(body)
    return orjson.loads([line[6:] for line in body.split("\n") if line.startswith("data: ")][-1])["response"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{}, {"store": True}])
async def test_a_response_that_could_not_be_stored_has_store_false(stream: bool, more: dict[str, Any]) -> None:
    for num_bytes, is_kept in ((10, True), (9_000, False)):
        async with rig(responds(num_bytes), store=SMALL) as gateway:
            body = {"model": "m", "input": "Hi", "stream": stream, **more}
            call = await gateway.call("POST", "/v1/responses", body).end()
            assert call.status == 200
            response = last(call)
            found = await gateway.call("GET", f"/v1/responses/{response['id']}").end()
            assert (response["store"], found.status) == ((True, 200) if is_kept else (False, 404))


async def test_an_unstorable_response_is_refused_before_a_node_is_tried() -> None:
    neuron = responds(10)
    async with rig(neuron, store=SMALL) as gateway:
        large = {"model": "m", "input": "x" * 9_000}
        for stream in (False, True):
            call = await gateway.call("POST", "/v1/responses", {**large, "store": True, "stream": stream}).end()
            assert (call.status, call.json()["error"]["code"]) == (507, "store_full")
        assert not neuron.requests
        call = await gateway.call("POST", "/v1/responses", large).end()
        assert (call.status, call.json()["store"]) == (200, False), "no client asked for it to be stored"
        call = await gateway.call(
            "POST", "/v1/conversations", {"items": [{"role": "user", "content": "x" * 9_000}]}
        ).end()
        assert (call.status, call.json()["error"]["code"]) == (507, "store_full")


async def test_a_nodes_id_takes_the_place_of_no_conversation() -> None:
    async def script(received: Received, line: Line) -> None:
        await line.reply(200, orjson.dumps(RESPONSE | {"id": id, "status": "completed", "output": [], "store": True}))

    async with rig(FakeNode(script=script).ready("m"), store=SMALL) as gateway:
        id = await conversation(gateway)
        call = await gateway.call("POST", "/v1/responses", {"model": "m", "input": "Hi"}).end()
        assert (call.status, call.json()["store"]) == (200, False)
        assert (await gateway.call("GET", f"/v1/conversations/{id}").end()).json()["object"] == "conversation"
        call = await gateway.call(
            "POST", "/v1/responses", {"model": "m", "input": "", "previous_response_id": id}
        ).end()
        assert call.json()["error"]["code"] == "previous_response_not_found"


async def test_a_background_response_without_room_says_so_and_does_not_stay_queued() -> None:
    async with rig(responds(9_000), store=SMALL) as gateway:
        body = {"model": "m", "input": "Hi", "background": True}
        followed = last(await gateway.call("POST", "/v1/responses", {**body, "stream": True}).end())
        assert (followed["status"], followed["store"]) == ("completed", False), "a follower has all of it"
        path = f"/v1/responses/{(await gateway.call('POST', '/v1/responses', body).end()).json()['id']}"
        await until(lambda: not gateway.gateway._background._runs)
        found = (await gateway.call("GET", path).end()).json()
        assert (found["status"], found["output"], found["error"]["code"]) == ("failed", [], "server_error")
        assert "no room" in found["error"]["message"]
        inner = gateway.gateway
        sse_events = await inner._background.follow(inner._responses, path.rpartition("/")[2], -1)
        again = b"".join([some async for some in sse_events])
        assert again.count(b"event: response.created") == again.count(b"event: response.failed") == 1
        assert b"store_full" in again
        assert len((await gateway.call("GET", f"{path}/input_items").end()).json()["data"]) == 1


# ------------------------------------------------------------------ conversations


async def conversation(gateway: Rig) -> str:
    return str((await gateway.call("POST", "/v1/conversations", {}).end()).json()["id"])


@pytest.mark.parametrize("num_items", [21, 1_300_000])
async def test_items_are_counted_before_anything_is_made_of_them(num_items: int) -> None:
    async with rig(FakeNode()) as gateway:
        body = b'{"items":[' + b",".join([b"{}"] * num_items) + b"]}"
        id = await conversation(gateway)
        for path in ("/v1/conversations", f"/v1/conversations/{id}/items"):
            began = time.perf_counter()
            call = await gateway.call("POST", path, body).end()
            assert (call.status, call.json()["error"]["code"]) == (400, "too_many_items")
            assert time.perf_counter() - began < 5
        assert (await gateway.call("GET", f"/v1/conversations/{id}/items").end()).json()["data"] == []


async def test_the_limit_of_a_body_is_that_of_the_last_reload() -> None:
    async with rig(FakeNode()) as gateway:
        inner = gateway.gateway
        limits = msgspec.structs.replace(inner.settings.gateway, max_body_bytes=1024)
        settings = msgspec.structs.replace(inner.settings, gateway=limits)
        inner.reconfigure(settings, inner.offered, inner.authenticator.keys)
        for path in ("/v1/conversations", "/v1/responses", "/v1/messages", "/v1/embeddings"):
            assert (await gateway.call("POST", path, b" " * 1025).end()).status == 413, path


async def test_twenty_items_are_taken_at_a_time() -> None:
    async with rig(FakeNode()) as gateway:
        items = [{"role": "user", "content": f"{i}"} for i in range(20)]
        made = await gateway.call("POST", "/v1/conversations", {"items": items}).end()
        assert made.status == 200
        listed = await gateway.call("GET", f"/v1/conversations/{made.json()['id']}/items").end()
        ids = [item["id"] for item in listed.json()["data"]]
        assert len(set(ids)) == 20


async def test_values_within_an_item_are_counted_too() -> None:
    async with rig(FakeNode()) as gateway:
        body = b'{"items":[{"type":"message","role":"user","content":[' + b",".join([b"{}"] * 200_000) + b"]}]}"
        call = await gateway.call("POST", "/v1/conversations", body).end()
        assert (call.status, call.json()["error"]["code"]) == (400, "too_many_items")


# ------------------------------------------------------------------ memory of a connection


def test_socket_memory_is_bounded_per_key_and_in_total() -> None:
    memory = SocketMemory(10_000, 4_000)
    alice, again, bob = memory.connection("alice"), memory.connection("alice"), memory.connection("bob")
    item = (b"x" * 936,)  # 1,000 with what an item costs
    for i in range(4):
        (alice, again)[i % 2][f"resp_{i}"] = item
    bob["resp_b"] = item
    assert memory.num_bytes == 5_000
    again["resp_4"] = item
    assert (list(alice), list(again)) == (["resp_2"], ["resp_1", "resp_3", "resp_4"]), "her oldest went"
    assert list(bob) == ["resp_b"]
    alice["resp_large"] = (b"x" * 5_000,)
    assert "resp_large" not in alice
    for number in range(3):
        other = memory.connection(f"other{number}")
        for i in range(3):
            other[f"resp_{number}{i}"] = item
    assert memory.num_bytes <= 10_000
    assert list(bob) == ["resp_b"], "a smaller connection keeps its own"
    alice.clear()
    again.clear()
    assert list(memory.connection("alice")) == []


async def test_a_connection_that_ends_is_forgotten_and_one_that_is_too_large_not_remembered() -> None:
    small = StoreSettings(kind="none", socket_bytes=8_192, socket_bytes_per_key=4_096)  # type: ignore[arg-type]
    async with rig(responds(10), store=small) as gateway:
        memory = gateway.gateway._socket_memory
        coming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        sent: list[Any] = []

        async def send(message: Any) -> None:
            if message["type"] == "websocket.send":
                sent.append(json.loads(message["text"]))

        def ask(**fields: Any) -> None:
            text = json.dumps({"type": "response.create", "model": "m", "store": False, **fields})
            coming.put_nowait({"type": "websocket.receive", "text": text})

        coming.put_nowait({"type": "websocket.connect"})
        scope = {"type": "websocket", "path": "/v1/responses", "headers": [], "client": ("127.0.0.1", 1)}
        serving = asyncio.create_task(gateway.gateway.handle_socket(scope, coming.get, send))
        ask(input="Hi")
        await until(lambda: sent and sent[-1]["type"] == "response.completed")
        assert 0 < memory.num_bytes < 4_096
        before = memory.num_bytes
        sent.clear()
        ask(input="x" * 5_000)
        await until(lambda: sent and sent[-1]["type"] == "response.completed")
        assert memory.num_bytes in (0, before)
        coming.put_nowait({"type": "websocket.disconnect"})
        await serving
        assert memory.num_bytes == 0


# ------------------------------------------------------------------ findings of a fuzzer


def test_steps_at_random_end_as_typed_errors() -> None:
    kept = pathlib.Path(__file__).parents[2] / "fuzz" / "corpus" / "conversations"
    inputs = [path.read_bytes() for path in sorted(kept.iterdir())]
    inputs += [steps(random.Random(seed)) for seed in range(300)]
    checker = Checker()
    try:
        for data in inputs:
            checker.check(data)
    finally:
        checker.close()


# ------------------------------------------------------------------ continued responses


async def add(gateway: Rig, id: str, *texts: str) -> Any:
    items = [{"role": "user", "content": text} for text in texts]
    return await gateway.call("POST", f"/v1/conversations/{id}/items", {"items": items}).end()


async def test_a_continued_history_is_bounded_as_a_body_is() -> None:
    async with rig(responds(10), max_body_bytes=16_384) as gateway:
        id = await conversation(gateway)
        for _ in range(4):
            assert (await add(gateway, id, "x" * 5_000)).status == 200
        body = {"model": "m", "input": "Hi", "conversation": id}
        call = await gateway.call("POST", "/v1/responses", body).end()
        assert (call.status, call.json()["error"]["code"]) == (400, "conversation_too_large")
        assert call.json()["error"]["param"] == "conversation"
        listed = (await gateway.call("GET", f"/v1/conversations/{id}/items").end()).json()
        assert len(listed["data"]) == 4, "and what is in it can be seen"
        for item in listed["data"][:2]:
            path = f"/v1/conversations/{id}/items/{item['id']}"
            assert (await gateway.call("GET", path).end()).json() == item
            assert (await gateway.call("DELETE", path).end()).status == 200
            assert (await gateway.call("GET", path).end()).status == 404
        assert (await gateway.call("POST", "/v1/responses", body).end()).status == 200


async def test_a_chain_of_responses_is_no_more_than_a_body_may_be() -> None:
    async with rig(responds(3_000), max_body_bytes=16_384) as gateway:
        body = {"model": "m", "input": "x" * 14_000}
        first = (await gateway.call("POST", "/v1/responses", body).end()).json()
        call = await gateway.call("POST", "/v1/responses", {**body, "previous_response_id": first["id"]}).end()
        assert (call.status, call.json()["error"]["code"]) == (400, "conversation_too_large")


@pytest.mark.parametrize(
    ("num_references", "num_bytes", "code"),
    [(100, 10, None), (101, 10, "invalid_value"), (100, 2_000, "conversation_too_large")],
)
async def test_references_are_counted(num_references: int, num_bytes: int, code: str | None) -> None:
    item = f"msg_{'1' * 48}_0"
    done = RESPONSE | {
        "id": "resp_" + "1" * 48,
        "status": "completed",
        "output": [
            {
                "type": "message",
                "id": item,
                "role": "assistant",
                "content": [{"type": "output_text", "text": "x" * num_bytes}],
            }
        ],
    }

    async def script(received: Received, line: Line) -> None:
        await line.reply(200, orjson.dumps(done))

    async with rig(FakeNode(script=script).ready("m"), max_body_bytes=65_536) as gateway:
        assert (await gateway.call("POST", "/v1/responses", {"model": "m", "input": "Hi"}).end()).status == 200
        given = [{"type": "item_reference", "id": item}] * num_references
        call = await gateway.call("POST", "/v1/responses", {"model": "m", "input": given}).end()
        if code is None:
            assert call.status == 200
        else:
            assert call.status == 400
            assert (call.json()["error"]["code"], call.json()["error"]["param"]) == (code, "input")


async def test_adding_to_a_full_conversation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cortex.responses.chains.MAX_CHAIN", 3)
    async with rig(responds(10)) as gateway:
        id = await conversation(gateway)
        for _ in range(3):
            assert (await add(gateway, id, "x")).status == 200
        call = await add(gateway, id, "x")
        assert (call.status, call.json()["error"]["code"]) == (400, "conversation_full")
        call = await gateway.call("POST", "/v1/responses", {"model": "m", "input": "Hi", "conversation": id}).end()
        assert (call.status, call.json()["error"]["code"]) == (400, "conversation_full")
        listed = (await gateway.call("GET", f"/v1/conversations/{id}/items").end()).json()
        assert len(listed["data"]) == 3


async def test_a_name_within_a_schema_is_no_field_of_the_request() -> None:
    schema = {"type": "object", "properties": {"background": {"type": "string"}, "conversation": {"type": "string"}}}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    async with rig(responds(10), store=SMALL) as gateway:
        call = await gateway.call("POST", "/v1/responses", {"model": "m", "input": "x" * 9_000, "text": text}).end()
        assert (call.status, call.json()["store"]) == (200, False)


# ------------------------------------------------------------------ responses without end


@pytest.mark.parametrize("levels", [230, 900, 1500])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_could_not_be_listed_again_is_not_kept(levels: int, stream: bool) -> None:
    neuron = FakeNode("a", dialects=("openai-responses",)).ready("m")
    deep = b"[" * levels + b"]" * levels
    members = (
        b'"id":"resp_1","object":"response","status":"completed","output":[{"type":"message","content":' + deep + b"}]"
    )

    async def script(received: Received, line: Line) -> None:
        if not stream:
            await line.reply(200, b"{" + members + b"}")
            return
        await line.start_stream()
        data = b'{"type":"response.completed","response":{' + members + b"}}"
        await line.chunk(b"event: response.completed\ndata: " + data + b"\n\n")
        await line.end()

    neuron.script = script
    async with rig(neuron) as gateway:
        call = await gateway.call("POST", "/v1/responses", {"model": "m", "input": "hi", "stream": stream}).end()
        assert b"upstream_error" in call.body
        assert (call.status == 502) or b"response.failed" in call.body
        assert (await gateway.call("GET", "/v1/responses/resp_1").end()).status == 404
