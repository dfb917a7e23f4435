"""Polling of nodes: the failure threshold, back-off, recovery, and no wait for a slow node."""

import asyncio

import msgspec
import pytest
from fake_node import FakeNode, Line, Received, answer_after, error
from gateway_rig import QUICK, rig, until

from cortex.wire.node import NodeState


async def hang(received: Received, line: Line) -> None:
    await asyncio.sleep(60)


async def nonsense(received: Received, line: Line) -> None:
    await line.reply(200, b'{"models": 5}')


async def test_one_missed_poll_is_not_a_dead_node() -> None:
    neuron = FakeNode().ready("m")
    async with rig(neuron) as gateway:
        fleet = gateway.gateway.fleet
        struck = asyncio.Event()
        failures = 0

        async def fail_once(received: Received, line: Line) -> None:
            nonlocal failures
            failures += 1
            if failures >= 3:  # one poll is three calls
                neuron.control = None
                struck.set()
            await error(500, "x")(received, line)

        neuron.control = fail_once
        await struck.wait()
        seen = set()
        while neuron.num_polls < 3 or fleet.state.nodes["a"].failed_polls:
            seen.add(fleet.state.nodes["a"].up)
            await fleet.changed()
        assert seen <= {True}
        assert fleet.state.nodes["a"].up


@pytest.mark.parametrize("fault", [hang, nonsense, error(500, "x")])
async def test_a_node_is_down_after_three_failed_polls_and_recovers(fault: object) -> None:
    neuron = FakeNode().ready("m")
    quick = msgspec.structs.replace(QUICK, timeout_s=0.1)
    async with rig(neuron, polling=quick) as gateway:
        fleet = gateway.gateway.fleet
        neuron.control = fault  # type: ignore[assignment]
        failed_polls_when_down = None
        while failed_polls_when_down is None:
            await fleet.changed()
            known = fleet.state.nodes["a"]
            assert known.up == (known.failed_polls < 3)
            if not known.up:
                failed_polls_when_down = known.failed_polls
        assert failed_polls_when_down == 3
        assert fleet.state.nodes["a"].fault
        assert not fleet.state.serving
        call = await gateway.chat().end()
        assert (call.status, call.headers["retry-after"]) == (503, "5"), "known, though its node is down"
        neuron.control = None
        await until(lambda: fleet.state.nodes["a"].up)
        assert fleet.state.nodes["a"].failed_polls == 0
        assert (await gateway.chat().end()).status == 200


async def test_a_failed_poll_leaves_no_cancellation_behind() -> None:
    """Before Python 3.11.3 a mark of cancellation that stays ends the next wait with a limit, and the task with it."""
    neuron = FakeNode().ready("m")
    async with rig(neuron) as gateway:
        neuron.control = error(500, "x")
        await gateway.gateway.service.poller.poll("a")
        assert gateway.gateway.fleet.state.nodes["a"].failed_polls >= 1
        current = asyncio.current_task()
        assert current is not None
        assert current.cancelling() == 0


async def test_a_slow_node_delays_no_other() -> None:
    slow, quick = FakeNode("slow", control=hang), FakeNode("quick").ready("m")
    async with rig(slow, quick, wait=False, polling=msgspec.structs.replace(QUICK, timeout_s=2)) as gateway:
        call = await gateway.chat().end(timeout_s=1)
        assert call.status == 200
        await until(lambda: quick.num_polls >= 5, timeout_s=1)
        assert not gateway.gateway.fleet.state.nodes["slow"].polled


async def test_models_are_not_denied_while_a_node_was_never_polled() -> None:
    """404 is for good: clients do not ask again."""
    away, here = FakeNode("away", control=error(500, "x")), FakeNode("here").ready("other")
    away.ready("m")
    async with rig(away, here) as gateway:
        call = await gateway.chat().end()
        assert (call.status, call.json()["error"]["code"]) == (503, "no_node")
        assert "away has not answered yet" in call.json()["error"]["message"]
        away.control = None
        await until(lambda: gateway.gateway.fleet.state.nodes["away"].up)
        assert (await gateway.chat().end()).status == 200
        assert (await gateway.chat(model="none").end()).status == 404


async def test_a_node_that_is_down_is_polled_less_often() -> None:
    neuron = FakeNode(control=error(500, "x"))
    async with rig(neuron) as gateway:
        poller, fleet = gateway.gateway.service.poller, gateway.gateway.fleet
        await until(lambda: fleet.state.nodes["a"].failed_polls >= 6)
        assert poller._pause_s("a") == pytest.approx(QUICK.max_backoff_s)
        neuron.control = None
        poller.poll_soon("a")
        await until(lambda: fleet.state.nodes["a"].up, timeout_s=QUICK.max_backoff_s)


async def test_polls_never_touch_the_counts_in_flight() -> None:
    go = asyncio.Event()

    neuron = FakeNode(script=answer_after(go)).ready("m")
    async with rig(neuron) as gateway:
        calls = [gateway.chat() for _ in range(5)]
        await until(lambda: len(neuron.requests) == 5)
        polls = neuron.num_polls
        neuron.models["m"] = msgspec.structs.replace(neuron.models["m"], running=7, waiting=1)
        await until(lambda: neuron.num_polls >= polls + 3)
        assert gateway.in_flight == 5
        assert gateway.gateway.fleet.state.nodes["a"].foreign_load == 3
        go.set()
        for call in calls:
            await call.end()
        assert gateway.in_flight == 0


async def test_polls_do_not_stand_behind_requests() -> None:
    go = asyncio.Event()

    neuron = FakeNode(script=answer_after(go)).ready("m")
    async with rig(neuron, max_connections_per_node=1) as gateway:
        call = gateway.chat()
        await until(lambda: neuron.requests)
        full = await gateway.chat().end()
        assert (full.status, "retry-after" in full.headers) == (429, True), "no connection is left for requests"
        polls = neuron.num_polls
        await until(lambda: neuron.num_polls >= polls + 3)
        assert gateway.gateway.fleet.state.nodes["a"].up
        go.set()
        assert (await call.end()).status == 200


async def test_a_draining_node_gets_no_requests() -> None:
    first, second = FakeNode("a", state=NodeState.DRAINING).ready("m"), FakeNode("b").ready("m")
    async with rig(first, second) as gateway:
        for _ in range(3):
            assert (await gateway.chat().end()).status == 200
        assert len(second.requests) == 3


async def test_a_node_that_is_down_from_the_start_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    neuron = FakeNode(control=error(500, "x"))
    async with rig(neuron) as gateway:
        await until(lambda: gateway.gateway.fleet.state.nodes["a"].failed_polls >= 6)
    assert len([record for record in caplog.records if "node=a down" in record.getMessage()]) == 1


async def test_the_fault_of_a_node_is_truncated() -> None:
    neuron = FakeNode().ready("m")
    async with rig(neuron) as gateway:
        fleet = gateway.gateway.fleet
        neuron.control = error(500, "x" * 500_000)
        while fleet.state.nodes["a"].up:
            await fleet.changed()
        assert 0 < len(fleet.state.nodes["a"].fault or "") <= 8192
