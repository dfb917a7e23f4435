"""Requests of which nodes die: how often such a request is sent again, so that it takes no fleet down."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from asgi_call import Call
from fake_node import FakeNode, Line, Received, answer, chat_only, error
from gateway_rig import CHAT, Rig, rig, until

from cortex.config import BreakerSettings
from cortex.fleet.deaths import MAX_BODIES, REMEMBER_S, Deaths

NEVER_OPENS = BreakerSettings(failures=10**6)
DEADLY = {**CHAT, "user": "deadly"}

PATHS: Sequence[tuple[str, dict[str, Any]]] = (
    ("/v1/chat/completions", DEADLY),
    ("/v1/chat/completions", {**DEADLY, "stream": True}),
    ("/v1/completions", {"model": "m", "prompt": "deadly"}),
    ("/v1/embeddings", {"model": "m", "input": "deadly"}),
    ("/v1/messages", {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "deadly"}]}),
    ("/v1/responses", {"model": "m", "input": "deadly"}),
    ("/v1/responses", {"model": "m", "input": "deadly", "stream": True}),
)


def test_requests_that_are_lost_together_are_one_death() -> None:
    deaths = Deaths()
    assert not deaths
    assert not deaths.record(b"x", sent_at=1, now=5)
    assert not deaths.record(b"x", sent_at=4, now=5), "it had been sent before the node died"
    assert not deaths.is_deadly(b"x", 6)
    assert deaths.record(b"x", sent_at=6, now=7)
    assert deaths.is_deadly(b"x", 8)
    assert not deaths.is_deadly(b"y", 8)


def test_deaths_are_forgotten_by_an_answer_and_in_time() -> None:
    deaths = Deaths()
    for body in (b"x", b"y"):
        deaths.record(body, 1, 2)
        deaths.record(body, 3, 4)
    deaths.forget(b"x")
    assert not deaths.is_deadly(b"x", 5)
    assert deaths.is_deadly(b"y", 4 + REMEMBER_S)
    assert not deaths.is_deadly(b"y", 5 + REMEMBER_S)
    assert not deaths, "expired entries take no memory"


def test_the_number_of_bodies_is_bounded() -> None:
    deaths = Deaths()
    for i in range(MAX_BODIES + 10):
        deaths.record(b"%d" % i, 1, 2)
    assert len(deaths._known) == MAX_BODIES


class Mortal(FakeNode):
    """A node that dies of every request with a word in it, and is there again at once."""

    def __init__(self, name: str) -> None:
        super().__init__(name, script=self._die)
        self.dialects = (*self.dialects, "openai-embeddings")
        self.num_deaths = 0
        self.ready("m")

    async def _die(self, received: Received, line: Line) -> None:
        if b"deadly" not in received.body:
            await answer(received, line)
            return
        self.num_deaths += 1
        for other in self.lines:
            other.reset()


async def warm(gateway: Rig, num: int) -> None:
    """Have connections to every node that wait for a request."""
    for call in [gateway.chat(seed=i) for i in range(num)]:
        assert (await call.end()).status == 200


@pytest.mark.parametrize("warmed", [False, True], ids=["fresh", "kept"])
@pytest.mark.parametrize("num_nodes", [1, 4])
@pytest.mark.parametrize(("path", "body"), PATHS)
async def test_a_request_kills_two_at_most_however_often_it_comes(
    path: str, body: dict[str, Any], num_nodes: int, warmed: bool
) -> None:
    nodes = [Mortal(f"n{i}") for i in range(num_nodes)]
    async with rig(*nodes, breaker=NEVER_OPENS) as gateway:
        if warmed:
            await warm(gateway, 2 * num_nodes)
        calls = [await gateway.call("POST", path, body).end() for _ in range(5)]
        assert sum(node.num_deaths for node in nodes) == 2
        last = calls[-1]
        assert last.status in {500, 502}
        error = last.json()["error"]
        assert (error.get("code") or error["details"]["error_code"]) == "upstream_died"
        assert last.headers["x-should-retry"] == "false"
        assert gateway.in_flight == 0
        assert (await gateway.chat(user="harmless").end()).status == 200


async def test_a_translated_request_kills_two_at_most() -> None:
    nodes = [chat_only(f"n{i}") for i in range(4)]
    killed = []

    async def die(received: Received, line: Line) -> None:
        killed.append(received)
        line.reset()

    for node in nodes:
        node.script = die
    async with rig(*nodes, breaker=NEVER_OPENS) as gateway:
        for _ in range(4):
            await gateway.call("POST", "/v1/messages", {**DEADLY, "max_tokens": 5}).end()
            await gateway.call("POST", "/v1/messages", {**DEADLY, "max_tokens": 5, "stream": True}).end()
    assert len(killed) == 4, "two for each of the two bodies"


async def test_a_background_response_kills_two_at_most() -> None:
    nodes = [Mortal(f"n{i}") for i in range(4)]
    async with rig(*nodes, breaker=NEVER_OPENS) as gateway:
        body = {"model": "m", "input": "deadly", "background": True}
        for _ in range(3):
            id = (await gateway.call("POST", "/v1/responses", body).end()).json()["id"]

            async def ended(id: str = id) -> Call | None:
                call = await gateway.call("GET", f"/v1/responses/{id}").end()
                return call if call.json()["status"] == "failed" else None

            async with asyncio.timeout(10):
                while not await ended():
                    await asyncio.sleep(0.01)
    assert sum(node.num_deaths for node in nodes) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_kills_in_the_middle_of_its_answer_is_refused_the_third_time(stream: bool) -> None:
    nodes = [FakeNode(f"n{i}").ready("m") for i in range(4)]

    async def die_late(received: Received, line: Line) -> None:
        if stream:
            await line.start_stream()
            await line.chunk(b'data: {"choices":[]}\n\n')
        else:
            await line.head(200, "content-type: application/json", "content-length: 100")
            await line.send(b'{"choices"')
        line.reset()

    for node in nodes:
        node.script = die_late
    async with rig(*nodes, breaker=NEVER_OPENS) as gateway:
        for _ in range(5):
            call = await gateway.chat(stream=stream).end()
        assert (call.status, call.json()["error"]["code"]) == (502, "upstream_died")
    assert sum(len(node.requests) for node in nodes) == 2


@pytest.mark.parametrize("early", [True, False], ids=["before", "within"])
async def test_a_request_that_kills_the_process_behind_a_node_counts_too(early: bool) -> None:
    nodes = [FakeNode(f"n{i}").ready("m") for i in range(4)]
    lost = json.dumps({"error": {"message": "gone", "type": "server_error", "code": "device_worker_lost"}}).encode()

    async def lose(received: Received, line: Line) -> None:
        if early:
            await line.reply(503, lost)
            return
        await line.start_stream()
        await line.chunk(b"data: " + lost + b"\n\n")
        await line.end()

    for node in nodes:
        node.script = lose
    async with rig(*nodes, breaker=NEVER_OPENS) as gateway:
        for _ in range(5):
            call = await gateway.chat(stream=True).end()
        assert (call.status, call.json()["error"]["code"]) == (502, "upstream_died")
    assert sum(len(node.requests) for node in nodes) == 2


async def test_other_requests_of_a_dead_node_are_served_elsewhere() -> None:
    first, second = FakeNode("a").ready("m"), FakeNode("b").ready("m")
    go = asyncio.Event()

    async def wait(received: Received, line: Line) -> None:
        await go.wait()
        line.reset()

    first.script = second.script = wait
    async with rig(first, second, breaker=NEVER_OPENS, affinity_slack=100) as gateway:
        calls = [gateway.chat() for _ in range(8)]  # of one body, as monitors send it
        await until(lambda: len(first.requests) + len(second.requests) == 8)
        second.script = first.script = answer
        go.set()
        for call in calls:
            assert (await call.end()).status == 200
        assert (await gateway.chat().end()).status == 200


async def test_a_connection_that_could_not_be_made_is_no_death() -> None:
    nodes = [FakeNode(f"n{i}").ready("m") for i in range(4)]
    async with rig(*nodes, breaker=NEVER_OPENS) as gateway:
        for pool in list(gateway.gateway.service.pools.values())[:3]:
            pool._port = 1  # without a listener
        assert (await gateway.chat().end()).status == 200
        assert not gateway.gateway.service.dispatcher.deaths


async def test_a_kept_connection_that_was_just_closed_is_no_death() -> None:
    neuron = FakeNode().ready("m")
    async with rig(neuron, breaker=NEVER_OPENS) as gateway:
        for _ in range(6):
            assert (await gateway.chat().end()).status == 200

            async def close(received: Received, line: Line) -> None:
                neuron.script = answer
                line.reset()

            neuron.script = close
        assert (await gateway.chat().end()).status == 200


async def test_an_error_that_is_no_death_is_forwarded() -> None:
    neuron = FakeNode(script=error(500, "internal_error")).ready("m")
    async with rig(neuron) as gateway:
        for _ in range(4):
            call = await gateway.chat().end()
            assert (call.status, call.json()["error"]["code"]) == (500, "internal_error")
            assert "x-should-retry" not in call.headers
