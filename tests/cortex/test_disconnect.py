"""A client's disconnect ends the work behind its answer, wherever that is."""

import asyncio
import random
import time

import pytest
from answers import CHAT_ANSWER, CHAT_STREAM, chat_chunk
from fake_node import FakeNode, Line, Received, answer
from gateway_rig import rig, until

from cortex.config import ModelProfile
from cortex.dialects.dialect import Dialect
from cortex.dialects.registry import CHAT, COMPLETIONS, COUNT_TOKENS, EMBEDDINGS, MESSAGES, RESPONSES

BOUND_S = 1.0
ASKED = CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS


@pytest.mark.parametrize("dialect", [*ASKED, COUNT_TOKENS], ids=lambda dialect: dialect.path)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["before the first byte", "after the first byte"])
async def test_leaving_reaches_the_node(dialect: Dialect, stream: bool, when: str) -> None:
    if stream and not dialect.streams:
        return
    sent = asyncio.Event()

    async def script(received: Received, line: Line) -> None:
        if when == "after the first byte":
            if stream:
                await line.start_stream()
                await line.chunk(CHAT_STREAM[0])
            else:
                await line.head(200, "content-type: application/json", f"content-length: {len(CHAT_ANSWER)}")
                await line.send(CHAT_ANSWER[:10])
        sent.set()
        await asyncio.sleep(60)

    neuron = FakeNode(script=script, dialects=tuple(kind.name for kind in ASKED)).ready("m")
    async with rig(neuron) as gateway:
        call = gateway.call("POST", dialect.path, {"model": "m", "stream": stream})
        await sent.wait()
        if stream and when == "after the first byte":
            await call.until(lambda call: call.body)
        assert gateway.in_flight == 1
        call.leave()
        left_at = time.monotonic()
        await until(lambda: neuron.num_left == 1)
        assert time.monotonic() - left_at < BOUND_S
        await call.end()
        assert gateway.in_flight == 0
        labels = {"model": "m", "node": "a", "dialect": dialect.name, "status": "499"}
        assert gateway.metric("cortex_requests_total", **labels) == 1
        pool = gateway.gateway.service.pools["a"]
        await until(lambda: pool.num_connections == 0)


async def test_leaving_while_not_reading_reaches_the_node() -> None:
    async def flood(received: Received, line: Line) -> None:
        await line.start_stream()
        while True:
            await line.chunk(chat_chunk({"content": "x" * 1000}))

    neuron = FakeNode(script=flood).ready("m")
    async with rig(neuron) as gateway:
        call = gateway.chat(stream=True)
        await call.until(lambda call: call.body)
        call.hold()
        (line,) = neuron.lines
        written = -1
        while written != line.written_bytes:
            written = line.written_bytes
            await asyncio.sleep(0.1)
        assert written < 32 * 1024 * 1024, "a reader that stalls must stop the node"
        call.leave()
        await until(lambda: neuron.num_left == 1)
        await call.end()
        assert gateway.in_flight == 0


async def test_leaving_a_cold_load_leaves_the_load_to_the_others() -> None:
    go = asyncio.Event()
    neuron = FakeNode()

    async def load(spec: object) -> object:
        await go.wait()
        return neuron.ready("m").models["m"]

    neuron.load = load  # type: ignore[assignment]
    async with rig(neuron, models=(ModelProfile(id="m", source="/w"),)) as gateway:
        calls = [gateway.chat(stream=bool(i % 2)) for i in range(20)]
        await until(lambda: neuron.loads)
        for call in calls[:19]:
            call.leave()
        for call in calls[:19]:
            await call.end()
        go.set()
        await calls[19].end()
        assert calls[19].status == 200
        assert len(neuron.loads) == 1
        assert len(neuron.requests) == 1
        assert gateway.in_flight == 0


async def test_many_clients_that_leave_at_random_leave_nothing() -> None:
    random_numbers = random.Random(5)

    async def script(received: Received, line: Line) -> None:
        await asyncio.sleep(random_numbers.random() * 0.02)
        await line.start_stream()
        for _ in range(20):
            await line.chunk(CHAT_STREAM[1])
            await asyncio.sleep(random_numbers.random() * 0.01)
        for sse_event in CHAT_STREAM[3:]:
            await line.chunk(sse_event)
        await line.end()

    neurons = FakeNode("a", script=script).ready("m"), FakeNode("b", script=script).ready("m")
    async with rig(*neurons) as gateway:

        async def one() -> None:
            call = gateway.chat(stream=True)
            await asyncio.sleep(random_numbers.random() * 0.25)
            call.leave()
            await call.end()

        await asyncio.gather(*(one() for _ in range(300)))
        assert gateway.in_flight == 0
        for name in "ab":
            pool = gateway.gateway.service.pools[name]
            await until(lambda pool=pool: pool.num_connections == len(pool._idle))
            assert gateway.metric("cortex_in_flight_requests", node=name) == 0
        for neuron in neurons:
            neuron.script = answer
        assert (await gateway.chat().end()).status == 200
