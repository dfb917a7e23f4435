"""Cold loads: one for all waiting requests, without a deadline while there is progress, and never a 404."""

import asyncio

import msgspec
import pytest
from fake_node import FakeNode, Line, Received, Script, answer, error
from gateway_rig import QUICK, Rig, rig, until

from cortex.config import ModelProfile, Timeouts
from cortex.errors import LoadFailedError, LoadRefusedError
from cortex.fleet import warmer
from cortex.fleet.loader import Loader
from cortex.wire.node import ModelList, ModelSpec, ModelState, ModelStatus, NodeState

PROFILE = ModelProfile(id="m", source="/w", context_tokens=512)


def loader(gateway: Rig) -> Loader:
    return gateway.gateway.service.dispatcher._loader


async def test_fifty_callers_make_one_load() -> None:
    go = asyncio.Event()
    first, second = FakeNode("a"), FakeNode("b", free_bytes=1)

    async def load(spec: ModelSpec) -> ModelStatus:
        await go.wait()
        return first.ready(spec.id).models[spec.id]

    first.load = load
    async with rig(first, second, models=(PROFILE,)) as gateway:
        calls = [gateway.chat(stream=bool(i % 2)) for i in range(50)]
        await until(lambda: first.loads)
        go.set()
        assert {(await call.end()).status for call in calls} == {200}
        assert first.loads == [PROFILE.spec()]
        assert not second.loads
        assert len(first.requests) == 50
        assert gateway.metric("cortex_model_loads_total", model="m", outcome="ok") == 1


async def test_a_spec_is_the_catalogues_without_placement() -> None:
    profile = ModelProfile(id="m", source="/w", dtype="bf16", priority=3, preferred_nodes=("a",))
    neuron = FakeNode()
    async with rig(neuron, models=(profile,)) as gateway:
        assert (await gateway.chat().end()).status == 200
    assert neuron.loads == [ModelSpec("m", "/w", dtype="bf16")]


@pytest.mark.parametrize(
    ("first", "second", "status", "code"),
    [
        ([error(422, "does_not_fit")], [None], 200, None),
        ([error(503, "draining", "retry-after: 9")], [None], 200, None),
        ([error(422, "does_not_fit")], [error(422, "does_not_fit")], 422, "model_load_refused"),
        ([error(422, "does_not_fit")], [error(503, "draining", "retry-after: 9")], 503, "model_load_failed"),
        ([error(404, "unknown_url")], [error(404, "model_not_found")], 503, "model_load_failed"),
        ([error(500, "internal_error")], [error(500, "internal_error")], 503, "model_load_failed"),
    ],
)
async def test_a_refusal_goes_on_to_the_next_candidate(
    first: list[Script | None], second: list[Script | None], status: int, code: str | None
) -> None:
    neurons = FakeNode("a"), FakeNode("b", free_bytes=1)

    def set_script(neuron: FakeNode, script: Script | None) -> None:
        async def load(spec: ModelSpec) -> ModelStatus | Script:
            return script or neuron.ready(spec.id).models[spec.id]

        neuron.load = load

    set_script(neurons[0], first[0])
    set_script(neurons[1], second[0])
    async with rig(*neurons, models=(PROFILE,)) as gateway:
        call = await gateway.chat().end()
        assert call.status == status
        assert len(neurons[0].loads) == len(neurons[1].loads) == 1
        if code is not None:
            assert call.json()["error"]["code"] == code
            assert "a: error" in call.json()["error"]["message"]
            assert "b: error" in call.json()["error"]["message"]
            assert ("retry-after" in call.headers) == (status == 503)
            if "draining" in call.json()["error"]["message"]:
                assert call.headers["retry-after"] == "9"


async def test_the_next_request_tries_a_failed_load_again() -> None:
    neuron = FakeNode()
    outcomes: list[Script | None] = [error(500, "bad_disk"), None]

    async def load(spec: ModelSpec) -> ModelStatus | Script:
        set_script = outcomes.pop(0)
        if set_script:
            neuron.models["m"] = ModelStatus("m", ModelState.FAILED, source="/w", error="bad disk")
        return set_script or neuron.ready(spec.id).models[spec.id]

    neuron.load = load
    async with rig(neuron, models=(PROFILE,)) as gateway:
        assert (await gateway.chat().end()).status == 503
        await until(lambda: gateway.gateway.fleet.state.status("a", "m"))
        assert (await gateway.chat().end()).status == 200


async def test_a_load_may_take_long_but_not_stand_still() -> None:
    neuron = FakeNode()
    standing_still = asyncio.Event()

    async def load(spec: ModelSpec) -> ModelStatus:
        for i in range(12):
            neuron.models["m"] = ModelStatus("m", ModelState.LOADING, source="/w", progress=i / 12)
            await asyncio.sleep(0.1)
        await standing_still.wait()
        return neuron.ready("m").models["m"]

    neuron.load = load
    async with rig(neuron, models=(PROFILE,), timeouts=Timeouts(load_stall_s=0.5)) as gateway:
        started = asyncio.get_running_loop().time()
        call = await gateway.chat().end()
        assert asyncio.get_running_loop().time() - started > 1.1, "progress keeps a load alive"
        assert call.status == 503
        assert "no progress for 0.5 s" in call.json()["error"]["message"]


async def test_a_node_that_goes_down_in_a_load_ends_it() -> None:
    neuron = FakeNode()

    async def load(spec: ModelSpec) -> ModelStatus:
        async def mute(received: Received, line: Line) -> None:
            await asyncio.sleep(60)

        neuron.control = mute
        await asyncio.sleep(60)
        raise AssertionError

    neuron.load = load
    quick = msgspec.structs.replace(QUICK, timeout_s=0.1)
    async with rig(neuron, models=(PROFILE,), polling=quick) as gateway:
        call = await gateway.chat().end()
        assert call.status == 503
        assert "went down" in call.json()["error"]["message"]


@pytest.mark.parametrize("after", [ModelState.READY, ModelState.LOADING])
async def test_a_broken_connection_is_no_answer(after: ModelState) -> None:
    """The load goes on in the node: no second copy is asked for anywhere."""
    first, second = FakeNode("a"), FakeNode("b", free_bytes=1)

    async def load(spec: ModelSpec) -> ModelStatus | Script:
        first.ready("m")
        if len(first.loads) > 1:
            return first.models["m"]
        first.models["m"] = msgspec.structs.replace(first.models["m"], state=after)

        async def break_off(received: Received, line: Line) -> None:
            await line.send(b"HTTP/1.1 200 OK\r\n")
            line.cut()

        return break_off

    first.load = load
    async with rig(first, second, models=(PROFILE,)) as gateway:
        assert (await gateway.chat().end()).status == 200
        assert len(first.loads) == (1 if after is ModelState.READY else 2)
        assert not second.loads


async def test_a_load_outlives_its_waiters() -> None:
    go = asyncio.Event()
    neuron = FakeNode()

    async def load(spec: ModelSpec) -> ModelStatus:
        await go.wait()
        return neuron.ready("m").models["m"]

    neuron.load = load
    async with rig(neuron, models=(PROFILE,)) as gateway:
        waiting = [asyncio.ensure_future(loader(gateway).load(PROFILE, ("a",))) for _ in range(5)]
        await until(lambda: neuron.loads)
        for task in waiting[:4]:
            task.cancel()
        await asyncio.gather(*waiting[:4], return_exceptions=True)
        go.set()
        assert await waiting[4] == "a"
        assert len(neuron.loads) == 1


async def test_errors_have_their_status() -> None:
    assert LoadRefusedError("x").status == 422
    assert LoadFailedError("x").status == 503


@pytest.mark.parametrize(
    ("full", "asked"),
    [
        ((), [("a", False)]),
        (("a",), [("a", False), ("b", False)]),
        (("a", "b"), [("a", False), ("b", False), ("a", True)]),
    ],
)
async def test_eviction_is_requested_only_when_no_node_has_free_memory(
    full: tuple[str, ...], asked: list[tuple[str, bool]]
) -> None:
    neurons = FakeNode("a"), FakeNode("b", free_bytes=1)
    seen = []
    for neuron in neurons:

        async def load(spec: ModelSpec, neuron: FakeNode = neuron) -> ModelStatus | Script:
            may_evict = neuron.load_requests[-1].evict is not None
            seen.append((neuron.name, may_evict))
            if neuron.name in full and not may_evict:
                return error(503, "no_room")
            return neuron.ready(spec.id).models[spec.id]

        neuron.load = load
    async with rig(*neurons, models=(PROFILE,)) as gateway:
        assert (await gateway.chat().end()).status == 200
    assert seen == asked


async def test_a_load_has_the_retention_of_its_model() -> None:
    profile = ModelProfile(id="m", source="/w", pinned=("a",), priority=3, idle_ttl_s=60)
    neuron = FakeNode()
    async with rig(neuron, models=(profile,)):
        (request,) = await until(lambda: neuron.load_requests)
    assert (request.pinned, request.priority, request.idle_ttl_s) == (True, 3, 60)
    assert request.evict is not None


async def test_pinned_models_are_loaded_at_start_and_again_after_a_restart() -> None:
    profiles = ModelProfile(id="m", source="/w", pinned=("a", "b")), ModelProfile(id="n", source="/w")
    first, second = FakeNode("a"), FakeNode("b").ready("m")
    async with rig(first, second, models=profiles) as gateway:
        await until(lambda: first.loads)
        await until(lambda: second.pins)
        assert not second.loads, "it is there and only pinned"
        first.models.clear()
        await until(lambda: len(first.loads) == 2)
        await until(lambda: gateway.gateway.fleet.state.status("a", "m"))
        assert {spec.id for spec in first.loads} == {"m"}


async def test_a_request_waits_for_a_model_that_is_on_its_way_out() -> None:
    neuron = FakeNode().ready("m")
    refusals = [error(503, "model_not_ready", "retry-after: 2")]

    async def script(received: Received, line: Line) -> None:
        await (refusals.pop() if refusals else answer)(received, line)

    neuron.script = script
    async with rig(neuron, models=(PROFILE,)) as gateway:
        assert (await gateway.chat().end()).status == 200
        assert len(neuron.loads) == 1


@pytest.mark.parametrize("how", ["connection", "worker"])
async def test_a_load_that_nodes_die_of_is_tried_twice_and_then_left_alone(how: str) -> None:
    async def die(received: Received, line: Line) -> None:
        if how == "worker":
            await error(503, "device_worker_lost")(received, line)
        else:
            line.reset()

    async def load(spec: ModelSpec) -> Script:
        return die

    nodes = [FakeNode(name, load=load) for name in "abcd"]
    async with rig(*nodes, models=(PROFILE,)) as gateway:
        for _ in range(3):
            call = await gateway.chat().end()
            assert (call.status, call.json()["error"]["code"]) == (503, "model_load_failed")
        assert "died while they loaded" in call.json()["error"]["message"]
        assert call.headers["retry-after"] == "120"
        assert sum(len(node.loads) for node in nodes) == 2


async def test_a_node_that_died_of_a_pinned_model_comes_back_to_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmer, "RETRY_FIRST_S", 0.001)

    async def die(received: Received, line: Line) -> None:
        line.reset()

    async def load(spec: ModelSpec) -> Script:
        return die

    node = FakeNode("a", load=load)
    profile = msgspec.structs.replace(PROFILE, pinned=("a",))
    async with rig(node, models=(profile,)) as gateway:
        await until(lambda: node.loads)
        for state in (NodeState.DRAINING, NodeState.READY):
            node.state = state
            await until(lambda state=state: gateway.gateway.fleet.state.nodes["a"].takes_requests is (state == "ready"))
        polls = node.num_polls
        await until(lambda: node.num_polls > polls + 5)
        assert len(node.loads) == 1


async def test_a_model_that_is_gone_before_its_pin_arrives_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmer, "RETRY_FIRST_S", 0.001)
    node = FakeNode("a").ready("m")
    profile = msgspec.structs.replace(PROFILE, pinned=("a",))
    listed, node.models = node.models, {}

    async def control(received: Received, line: Line) -> None:
        """List the model until its pin is asked for."""
        if received.path == "/models/pin":
            node.control = None
            line.reset()
        elif received.path == "/models":
            await line.reply(200, msgspec.json.encode(ModelList(tuple(listed.values()))))
        else:
            await node._control(received, line)

    node.control = control
    async with rig(node, models=(profile,)):
        await until(lambda: node.loads)
