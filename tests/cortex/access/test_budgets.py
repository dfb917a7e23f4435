"""Limits over HTTP: reservations, the cost of a disconnect, and requests without inference."""

import asyncio
from typing import Any

import orjson
import pytest
from answers import chat_chunk
from fake_node import FakeNode, Line, Received, answer_after, never_answer
from gateway_rig import Rig, rig, until
from key_rig import KEY, ring

from cortex._fast.peek import peek
from cortex.access.authenticator import need_of
from cortex.access.keys import Limits, Principal
from cortex.config import Timeouts

SIGNED = {"x-api-key": KEY}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COUNTERS = pytest.mark.parametrize("counters", ["memory", "valkey"])


def access(counters: str, url: str) -> dict[str, str]:
    return {"counters": "memory"} if counters == "memory" else {"counters": "valkey", "url": url}


def alice(name: str, **limits: Any) -> Any:
    return ring((KEY, Principal(name, limits=Limits(**limits))))


async def used(gateway: Rig) -> Any:
    call = await gateway.call("GET", "/admin/keys").end()
    return call.json()["keys"][0]["used"]


@COUNTERS
async def test_a_nested_field_reserves_nothing(counters: str, valkey: str) -> None:
    keys = alice(f"nested-{counters}", tokens_per_window=1000)
    go = asyncio.Event()

    neuron = FakeNode(script=answer_after(go)).ready("m")
    async with rig(neuron, keys=keys, access=access(counters, valkey)) as gateway:
        body = {"metadata": {"max_tokens": 1}, **CHAT, "max_tokens": 600}
        first = gateway.call("POST", "/v1/chat/completions", body, SIGNED)
        await until(lambda: neuron.requests)
        second = await gateway.call("POST", "/v1/chat/completions", body, SIGNED).end()
        assert (second.status, second.json()["error"]["code"]) == (429, "token_budget_exceeded")
        go.set()
        assert (await first.end()).status == 200
        several = {**CHAT, "max_tokens": 600, "n": 2}  # as much as the whole budget, of which a part is used
        assert (await gateway.call("POST", "/v1/chat/completions", several, SIGNED).end()).status == 429


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"])
@pytest.mark.parametrize("tokens", [600, 2_000_000_000])
def test_every_name_of_a_token_limit_reserves(name: str, tokens: int) -> None:
    for fields, num_answers in ({}, 1), ({"max_tokens": None, "n": 2}, 2):
        body = orjson.dumps({**CHAT, **fields, name: tokens})
        assert need_of(len(body), peek(body).bounds, 5).output_tokens == num_answers * tokens


@COUNTERS
async def test_answers_at_a_time_are_counted_and_not_requests(counters: str, valkey: str) -> None:
    keys = alice(f"several-{counters}", max_concurrent=3)
    go = asyncio.Event()

    neuron = FakeNode(script=answer_after(go)).ready("m")
    async with rig(neuron, keys=keys, access=access(counters, valkey)) as gateway:
        first = gateway.call("POST", "/v1/chat/completions", {**CHAT, "n": 2}, SIGNED)
        await until(lambda: neuron.requests)
        assert (await used(gateway))["running"] == 2
        for more, with_wait in ((2, True), (4, False)):
            call = await gateway.call("POST", "/v1/chat/completions", {**CHAT, "n": more}, SIGNED).end()
            assert (call.status, call.json()["error"]["code"]) == (429, "concurrency_exceeded")
            assert ("retry-after" in call.headers) is with_wait
        prompts = {"model": "m", "prompt": ["a", "b"]}
        assert (await gateway.call("POST", "/v1/completions", prompts, SIGNED).end()).status == 429
        third = gateway.call("POST", "/v1/chat/completions", CHAT, SIGNED)
        await until(lambda: len(neuron.requests) == 2)
        go.set()
        assert [(await call.end()).status for call in (first, third)] == [200, 200]
        assert (await used(gateway))["running"] == 0


@COUNTERS
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_a_client_that_disconnects_early_pays(counters: str, valkey: str, path: str) -> None:
    keys = alice(f"leaves-{counters}-{path.replace('/', '-').strip('-')}", balance_tokens=100_000)

    neuron = FakeNode(script=never_answer).ready("m")
    async with rig(neuron, keys=keys, access=access(counters, valkey)) as gateway:
        body = (
            {**CHAT, "max_tokens": 500}
            if path != "/v1/responses"
            else {"model": "m", "input": "Hi", "max_output_tokens": 500}
        )
        call = gateway.call("POST", path, body, SIGNED)
        await until(lambda: neuron.requests)
        call.leave()
        await call.end()
        spent = (await used(gateway))["spent_tokens"]
        assert 500 < spent < 600, "the whole reservation"


async def test_a_client_that_leaves_a_stream_pays_for_the_prompt_and_the_tokens_sent() -> None:
    keys = alice("streams", balance_tokens=100_000)
    sends = False

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        for _ in range(3 if sends else 0):
            await line.chunk(chat_chunk({"content": "x"}))
        await line.left.wait()

    neuron = FakeNode(script=script).ready("m")
    async with rig(neuron, keys=keys) as gateway:
        body = {**CHAT, "stream": True, "messages": [{"role": "user", "content": "x" * 4000}], "max_tokens": 500}
        call = gateway.call("POST", "/v1/chat/completions", body, SIGNED)
        await until(lambda: neuron.requests)
        call.leave()
        await call.end()
        before = (await used(gateway))["spent_tokens"]
        assert 1000 <= before < 1100, "the prompt"
        sends = True
        call = gateway.call("POST", "/v1/chat/completions", body, SIGNED)
        await call.until(lambda call: call.body.count(b'"x"') == 3)
        call.leave()
        await call.end()
        assert (await used(gateway))["spent_tokens"] == 2 * before + 3


async def test_a_client_that_disconnects_pays_no_more_than_was_reserved() -> None:
    neuron = FakeNode(script=never_answer).ready("m")
    async with rig(neuron, keys=alice("capped", tokens_per_window=1000)) as gateway:
        call = gateway.call("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 900_000}, SIGNED)
        await until(lambda: neuron.requests)
        call.leave()
        await call.end()
        assert (await used(gateway))["spent_tokens"] == 1000


async def test_an_answer_that_timed_out_costs_the_reservation() -> None:
    keys = alice("slow", balance_tokens=100_000)
    neuron = FakeNode(script=never_answer).ready("m")
    async with rig(neuron, keys=keys, timeouts=Timeouts(answer_s=0.2)) as gateway:
        call = await gateway.call("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 500}, SIGNED).end()
        assert call.status == 504
        assert 500 < (await used(gateway))["spent_tokens"] < 600


async def test_an_error_of_the_nodes_costs_nothing() -> None:
    async def script(received: Received, line: Line) -> None:
        await line.reply(503, b'{"error":{"message":"no","type":"t","param":null,"code":"no_room"}}')

    async with rig(FakeNode(script=script).ready("m"), keys=alice("errors", balance_tokens=1000)) as gateway:
        assert (await gateway.call("POST", "/v1/chat/completions", CHAT, SIGNED).end()).status == 503
        assert (await used(gateway))["spent_tokens"] == 0


@COUNTERS
async def test_a_request_that_is_sent_to_no_node_is_counted(counters: str, valkey: str) -> None:
    everything: list[tuple[str, str, Any]] = [
        ("POST", "/v1/conversations", {}),
        ("GET", "/v1/conversations/conv_0", b""),
        ("POST", "/v1/conversations/conv_0", {"metadata": {}}),
        ("DELETE", "/v1/conversations/conv_0", b""),
        ("GET", "/v1/conversations/conv_0/items", b""),
        ("POST", "/v1/conversations/conv_0/items", {"items": []}),
        ("GET", "/v1/conversations/conv_0/items/msg_0", b""),
        ("DELETE", "/v1/conversations/conv_0/items/msg_0", b""),
        ("GET", "/v1/responses/resp_0", b""),
        ("DELETE", "/v1/responses/resp_0", b""),
        ("GET", "/v1/responses/resp_0/input_items", b""),
        ("POST", "/v1/responses/resp_0/cancel", b""),
        ("POST", "/v1/responses", {"model": "m", "input": "Hi", "previous_response_id": "resp_0"}),
        ("POST", "/v1/responses/compact", {"model": "m", "input": "Hi", "previous_response_id": "resp_0"}),
        ("POST", "/v1/responses/input_tokens", {"model": "m", "input": "Hi", "previous_response_id": "resp_0"}),
        ("POST", "/v1/messages/count_tokens", CHAT),
    ]
    keys = alice(f"counts-{counters}", requests_per_minute=len(everything))
    async with rig(FakeNode().ready("m"), keys=keys, access=access(counters, valkey)) as gateway:
        for number, (method, path, body) in enumerate(everything, 1):
            assert (await gateway.call(method, path, body, SIGNED).end()).status != 429
            assert (await used(gateway))["requests"] == number, path
        assert (await used(gateway))["running"] == 0
        for method, path, body in everything:
            call = await gateway.call(method, path, body, SIGNED).end()
            assert (call.status, call.json()["error"].get("code", "requests_per_minute_exceeded")) == (
                429,
                "requests_per_minute_exceeded",
            ), path
