"""Requests of low priority get spare capacity only, in the order of their priority, and evict nothing."""

import asyncio

from fake_node import FakeNode, answer_after
from gateway_rig import rig, until
from key_rig import KEY, ring

from cortex.access.keys import Principal
from cortex.config import ModelProfile
from cortex.fleet.spare_capacity import SpareCapacity

ANYBODY = Principal("anonymous", priority=-100)
LOW = Principal("low", priority=-1)
KEYS = ring((KEY, Principal("alice")), ("low", LOW), anonymous=ANYBODY)
BODY = {"model": "m", "messages": []}


async def test_anonymous_callers_wait_for_a_spare_slot_and_the_others_do_not() -> None:
    go = asyncio.Event()
    neuron = FakeNode().ready("m", max_sequences=3)

    neuron.script = answer_after(go)
    async with rig(neuron, keys=KEYS, access={"spare_capacity_wait_s": 5}) as gateway:

        def ask(key: str | None) -> object:
            headers = {"x-api-key": key} if key else {}
            return gateway.call("POST", "/v1/chat/completions", BODY, headers)

        keyed = [ask(KEY) for _ in range(2)]
        await until(lambda: len(neuron.requests) == 2)
        waiting = [ask(None), ask("low")]
        keyed.append(ask(KEY))
        await until(lambda: len(neuron.requests) == 3)
        await asyncio.sleep(0.1)
        assert len(neuron.requests) == 3, "one slot is free, and kept so"
        go.set()
        for call in (*keyed, *waiting):
            assert (await call.end()).status == 200  # type: ignore[attr-defined]
        names = [received.headers["x-cortex-principal"] for received in neuron.requests]
        assert names[:3] == ["alice"] * 3
        assert sorted(names[3:]) == ["anonymous", "low"]


async def test_waiting_requests_go_by_priority_and_then_by_arrival() -> None:
    neuron = FakeNode().ready("m", max_sequences=2)
    async with rig(neuron) as gateway:
        fleet = gateway.gateway.fleet
        queue, order = SpareCapacity(fleet), []
        held = [fleet.in_flight.add("a", "m") for _ in range(2)]

        async def wait(name: str, priority: int) -> None:
            await queue.wait("m", priority, 5)
            order.append(name)
            held.append(fleet.in_flight.add("a", "m"))

        waiting = [asyncio.ensure_future(wait(*who)) for who in (("c", -9), ("a", -1), ("d", -9), ("b", -1))]
        await asyncio.sleep(0)
        for _ in waiting:
            while held:
                held.pop().release()
            await until(lambda: held)
        await asyncio.gather(*waiting)
        assert order == ["a", "b", "c", "d"]


async def test_a_wait_is_bounded() -> None:
    neuron = FakeNode().ready("m", max_sequences=2, running=2)
    async with rig(neuron, keys=KEYS, access={"spare_capacity_wait_s": 0.1}) as gateway:
        call = await gateway.call("POST", "/v1/chat/completions", BODY).end()
        assert (call.status, "retry-after" in call.headers) == (429, True)
        assert (await gateway.call("POST", "/v1/chat/completions", BODY, {"x-api-key": KEY}).end()).status == 200


async def test_nothing_is_evicted_for_them() -> None:
    neuron = FakeNode()
    async with rig(neuron, keys=KEYS, models=(ModelProfile(id="m", source="/w"),)) as gateway:
        assert (await gateway.call("POST", "/v1/chat/completions", BODY).end()).status == 200
    assert [request.evict for request in neuron.load_requests] == [None]
