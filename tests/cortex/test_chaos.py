"""A node whose bytes are split, delayed and broken off at random, against a slow and obvious reading of them."""

import asyncio
import json
import random
from dataclasses import dataclass

import pytest
from answers import CHAT_STREAM, chat_chunk
from fake_node import FakeNode, Line, Received
from gateway_rig import Rig, rig

from cortex.config import BreakerSettings
from cortex.dialects.dialect import COMMENT

NUM_STREAMS = 80
AT_ONCE = 16
DONE = b"data: [DONE]\n\n"


@dataclass
class Story:
    """The bytes sent on one connection, their pieces, and its end."""

    pieces: list[bytes]
    delays_s: list[float]
    is_reset: bool

    @classmethod
    def of(cls, seed: int) -> "Story":
        dice = random.Random(seed)
        texts = [dice.choice(["a", "\\n\\n", "data: [DONE]", "é" * 40, "x" * 1500]) for _ in range(dice.randrange(15))]
        sse_events = [CHAT_STREAM[0], *(chat_chunk({"content": text}) for text in texts), *CHAT_STREAM[3:]]
        chunks = split(b"".join(sse_events), dice, 1 + dice.randrange(400))
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        wire = head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        if dice.random() < 0.6:
            wire = wire[: dice.randrange(1, len(wire))]
        pieces = split(wire, dice, dice.choice([10, 100, 1000, 100_000]))
        return cls(pieces, [dice.choice([0, 0, 0, 0.001]) for _ in pieces], dice.random() < 0.3)


@dataclass
class WholeStory:
    """The same of an answer that is no stream."""

    body: bytes
    pieces: list[bytes]
    delays_s: list[float]
    is_cut: bool
    is_reset: bool

    @classmethod
    def of(cls, seed: int) -> "WholeStory":
        dice = random.Random(seed)
        body = json.dumps({"choices": [], "text": "é" * dice.choice([0, 10, 5000, 100_000])}).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        if dice.random() < 0.5:
            wire = head + b"content-length: %d\r\n\r\n" % len(body) + body
        else:
            chunks = split(body, dice, 1 + dice.randrange(20_000))
            wire = head + b"transfer-encoding: chunked\r\n\r\n"
            wire += b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        is_cut = dice.random() < 0.4
        if is_cut:
            wire = wire[: dice.randrange(1, len(wire))]
        pieces = split(wire, dice, max(dice.choice([10, 100, 100_000]), len(wire) // 200))
        return cls(body, pieces, [dice.choice([0, 0, 0, 0.001]) for _ in pieces], is_cut, dice.random() < 0.3)


def split(data: bytes, dice: random.Random, most: int) -> list[bytes]:
    pieces = []
    while data:
        size = dice.randint(1, most)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def read_slowly(wire: bytes) -> bytes:
    """Return the whole SSE events that a connection's bytes hold."""
    _, _, rest = wire.partition(b"\r\n\r\n")
    body = b""
    while b"\r\n" in rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body[: body.rfind(b"\n\n") + 2] if b"\n\n" in body else b""


INTERFACES = pytest.mark.parametrize("interface", ["asgi", "rsgi"])


@INTERFACES
@pytest.mark.parametrize("first_seed", [0, 1000])
async def test_the_result_is_that_of_a_reference_parser(first_seed: int, interface: str) -> None:
    async def script(received: Received, line: Line) -> None:
        story = Story.of(json.loads(received.body)["seed"])
        for piece, delay_s in zip(story.pieces, story.delays_s, strict=True):
            await asyncio.sleep(delay_s)  # not behind the last: a client may use again a connection that answered whole
            await line.send(piece)
        if story.is_reset:
            line.reset()
        else:
            line.cut()

    async def one(gateway: Rig, seed: int) -> str:
        story = Story.of(seed)
        sse_events = read_slowly(b"".join(story.pieces))
        async with slots:
            call = await gateway.chat(stream=True, seed=seed).end()
        if call.status != 200:  # nothing had gone out: the error has a status, and the SSE events are not half there
            assert call.json()["error"]["code"], seed
            assert story.is_reset or not sse_events, seed
            return "error"
        body = call.body.replace(COMMENT, b"")
        assert call.complete, seed
        if DONE in body:
            assert body == sse_events or (story.is_reset and sse_events.startswith(body)), seed
            return "whole"
        *_, last, rest = body.split(b"\n\n")
        assert not rest, seed
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"], seed
        passed = body[: len(body) - len(last) - 2]
        assert sse_events.startswith(passed), seed
        assert DONE not in sse_events or story.is_reset, seed
        assert story.is_reset or passed == sse_events, seed
        return "broken"

    slots = asyncio.Semaphore(AT_ONCE)
    neuron = FakeNode(script=script).ready("m")
    async with rig(neuron, breaker=BreakerSettings(failures=10**6), interface=interface) as gateway:
        seeds = range(first_seed, first_seed + NUM_STREAMS)
        outcomes = await asyncio.gather(*(one(gateway, seed) for seed in seeds))
        assert gateway.in_flight == 0
    for outcome in ("whole", "broken", "error"):
        assert outcomes.count(outcome) >= NUM_STREAMS // 40, outcomes


@INTERFACES
async def test_an_answer_arrives_whole_or_as_an_error(interface: str) -> None:
    async def script(received: Received, line: Line) -> None:
        story = WholeStory.of(json.loads(received.body)["seed"])
        for piece, delay_s in zip(story.pieces, story.delays_s, strict=True):
            await asyncio.sleep(delay_s)  # not behind the last: a client may use again a connection that answered whole
            await line.send(piece)
        if story.is_reset:
            line.reset()
        elif story.is_cut:
            line.cut()

    async def one(gateway: Rig, seed: int) -> str:
        story = WholeStory.of(seed)
        async with slots:
            call = await gateway.chat(seed=seed).end()
        assert call.complete, seed
        if call.status == 200:
            assert not story.is_cut, seed
            assert call.body == story.body, seed
            return "whole"
        assert call.json()["error"]["code"], seed
        assert story.is_cut or story.is_reset, seed
        return "error"

    slots = asyncio.Semaphore(AT_ONCE)
    neuron = FakeNode(script=script).ready("m")
    async with rig(neuron, breaker=BreakerSettings(failures=10**6), interface=interface) as gateway:
        outcomes = await asyncio.gather(*(one(gateway, seed) for seed in range(2 * NUM_STREAMS)))
        assert gateway.in_flight == 0
    for outcome in ("whole", "error"):
        assert outcomes.count(outcome) >= NUM_STREAMS // 4, outcomes
