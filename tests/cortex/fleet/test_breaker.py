"""Circuits: what opens one, what does not, and how it closes."""

import pytest
from fake_node import FakeNode, Line, Received, answer, error
from gateway_rig import rig, until

from cortex.config import BreakerSettings, Timeouts
from cortex.fleet.breaker import Breakers

SETTINGS = BreakerSettings(failures=3, open_s=10, max_open_s=30)


def opened() -> Breakers:
    breakers = Breakers(SETTINGS)
    for _ in range(3):
        breakers.fail("a", "m", 100)
    return breakers


def test_a_circuit_opens_after_failures_in_a_row_and_for_one_model_only() -> None:
    breakers = Breakers(SETTINGS)
    breakers.fail("a", "m", 0)
    breakers.fail("a", "m", 0)
    breakers.succeed("a", "m")
    breakers.fail("a", "m", 0)
    breakers.fail("a", "m", 0)
    assert not breakers.blocked("m", 0)
    breakers.fail("a", "m", 0)
    assert breakers.blocked("m", 0) == {"a"}
    assert not breakers.blocked("n", 0)
    assert breakers.retry_after_s("m", 4) == 6


def test_one_request_tries_an_open_circuit_and_its_outcome_decides() -> None:
    breakers = opened()
    assert breakers.blocked("m", 109.9)
    assert not breakers.blocked("m", 110)
    breakers.ask("a", "m")
    assert breakers.blocked("m", 111), "one is trying"
    breakers.let_go("a", "m")
    assert not breakers.blocked("m", 111), "it ended without an outcome"
    breakers.ask("a", "m")
    breakers.fail("a", "m", 112)
    assert breakers.blocked("m", 131.9)
    assert not breakers.blocked("m", 132), "twice as long"
    breakers.fail("a", "m", 132)
    breakers.fail("a", "m", 132)
    assert not breakers.blocked("m", 162), "30 s at most"
    breakers.succeed("a", "m")
    breakers.fail("a", "m", 200)
    assert not breakers.blocked("m", 200)


def test_nodes_that_are_gone_are_forgotten() -> None:
    breakers = opened()
    breakers.keep(frozenset("b"))
    assert not breakers.blocked("m", 100)


@pytest.mark.parametrize(
    ("script", "opens"),
    [
        (error(503, "device_worker_lost"), True),
        (error(503, "no_harness"), True),
        (error(401, "invalid_api_key"), True),
        (error(500, "internal_error"), False),
        (error(502, "x"), False),
        (error(504, "x"), False),
        (error(400, "invalid_value"), False),
        (error(404, "unknown_url"), False),
        (error(422, "x"), False),
        (error(429, "rate_limit_exceeded", "retry-after: 1"), False),
        (error(503, "service_unavailable", "retry-after: 1"), False),
    ],
)
async def test_faults_open_a_circuit_and_clients_and_back_pressure_do_not(script: object, opens: bool) -> None:
    neuron = FakeNode().ready("m")
    neuron.script = script  # type: ignore[assignment]
    async with rig(neuron, breaker=BreakerSettings(failures=3, open_s=0.2)) as gateway:
        for i in range(6):
            await gateway.chat(seed=i).end()
        assert len(neuron.requests) == (3 if opens else 6)
        neuron.script = answer
        if opens:
            call = await gateway.chat().end()
            assert (call.status, call.json()["error"]["code"]) == (503, "no_node")
            assert int(call.headers["retry-after"]) >= 1
        breakers = gateway.gateway.service.dispatcher.breakers
        await until(lambda: not breakers.blocked("m", __import__("time").monotonic()))
        assert (await gateway.chat().end()).status == 200


def test_doubts_are_of_different_requests_in_a_row_and_pass() -> None:
    breakers = Breakers(SETTINGS)
    for _ in range(9):
        breakers.suspect("a", "m", b"same", 0)
    assert not breakers.suspects("m", 0)
    breakers.suspect("a", "m", b"other", 0)
    breakers.succeed("a", "m")
    for i in range(3):
        assert not breakers.suspects("m", 0)
        breakers.suspect("a", "m", b"%d" % i, 0)
    assert breakers.suspects("m", 0) == {"a"}
    assert not breakers.suspects("n", 0)
    assert not breakers.blocked("m", 0)
    assert not breakers.suspects("m", 10)


async def test_requests_that_make_nodes_answer_500_open_no_circuit() -> None:
    async def picky(received: Received, line: Line) -> None:
        await (error(500, "internal_error") if b"bad" in received.body else answer)(received, line)

    neuron = FakeNode(script=picky).ready("m")
    async with rig(neuron, breaker=BreakerSettings(failures=3, open_s=60)) as gateway:
        for i in range(10):
            assert (await gateway.chat(user=f"bad {i}").end()).status == 500
        for stream in (False, True):
            assert (await gateway.chat(stream=stream).end()).status == 200


async def test_a_failing_replica_is_tried_where_there_is_no_other() -> None:
    broken, sound = FakeNode("a", script=error(500, "x")).ready("m"), FakeNode("b").ready("m")
    async with rig(broken, sound, breaker=BreakerSettings(failures=3, open_s=60)) as gateway:
        statuses = [(await gateway.chat(seed=i).end()).status for i in range(20)]
        assert statuses.count(500) == 3
        sound.script = error(503, "busy")
        assert (await gateway.chat().end()).status == 500
        assert len(broken.requests) == 4


async def test_a_broken_replica_is_left_alone_and_the_other_serves() -> None:
    broken, sound = FakeNode("a").ready("m"), FakeNode("b").ready("m")

    async def hang_up(received: Received, line: Line) -> None:
        line.reset()

    broken.script = hang_up
    async with rig(broken, sound, breaker=BreakerSettings(failures=2, open_s=60)) as gateway:
        assert {(await gateway.chat().end()).status for _ in range(10)} == {200}
        assert len(broken.requests) <= 4  # each of two may be tried again once on a fresh connection


async def test_silence_and_broken_streams_count() -> None:
    neuron = FakeNode().ready("m")

    async def mute(received: Received, line: Line) -> None:
        await line.left.wait()

    async def cut(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(b'data: {"x":1}\n\n')
        line.cut()

    timeouts = Timeouts(first_byte_s=0.1, answer_s=0.1)
    async with rig(neuron, timeouts=timeouts, breaker=BreakerSettings(failures=2, open_s=60)) as gateway:
        neuron.script = mute
        assert (await gateway.chat().end()).status == 504
        neuron.script = cut
        await gateway.chat(stream=True).end()
        assert (await gateway.chat().end()).json()["error"]["code"] == "no_node"
