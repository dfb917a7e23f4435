"""Memory for a load on a node: order of loads, choice of evictions, and models that are never evicted."""

import asyncio
import math
import pathlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from scripted_model import GIB, ScriptedHarness, describe

from cortex.wire.errors import ModelNotFoundError, UnprocessableError
from cortex.wire.node import Eviction, EvictionStrategy, ModelSpec, ModelState
from neuron.errors import GenerationConflictError, ModelNotReadyError, NoRoomError
from neuron.harness import Model
from neuron.load.entry import Entry, Retention
from neuron.load.eviction import EvictionTimeouts, Evictor
from neuron.load.table import ModelTable
from neuron.models.errors import DoesNotFitError

LRU = Eviction()
QUICK = EvictionTimeouts(hold_s=0.2, linger_s=0.02, patience_s=0.2)


class Node:
    """A table over one fake device of 10 GiB, or over ``devices`` (GiB each)."""

    def __init__(self, folder: pathlib.Path, timeouts: EvictionTimeouts = QUICK, **devices: int) -> None:
        self.folder = folder
        self.harness = ScriptedHarness(
            total_bytes={name.replace("_", ":"): gib * GIB for name, gib in (devices or {"cuda_0": 10}).items()}
        )
        self.recycled: list[str] = []
        self.gone: list[str] = []
        self.num_loading = self.most_loading = 0
        self.models = ModelTable(self._load, self.gone.append)
        self.evictor = Evictor(self.models, timeouts, self._recycle)

    async def _load(self, entry: Entry) -> Model:
        path = pathlib.Path(entry.spec.source)
        need = await entry.harness.measure(entry.spec, path)
        async with self.evictor.devices_for(entry, need) as devices:
            start = asyncio.get_running_loop().time()
            self.num_loading += 1
            self.most_loading = max(self.most_loading, self.num_loading)
            try:
                model = await entry.harness.load(
                    msgspec.structs.replace(entry.spec, devices=devices), path, lambda fraction: None
                )
            finally:
                self.num_loading -= 1
            entry.load_s = asyncio.get_running_loop().time() - start
            return model

    async def _recycle(self, device: str) -> None:
        self.recycled.append(device)
        for name, model in tuple(self.harness.models.items()):
            if device in model.devices:
                await self.harness.unload(model)
                assert self.models.find(name).state is ModelState.RECOVERING

    async def load(
        self,
        name: str,
        gib: float = 6,
        *,
        evict: Eviction | None = LRU,
        retention: Retention | None = None,
        **options: Any,
    ) -> Any:
        path = describe(self.folder, name, gib, **{"load_s": 0.01, **options})
        return await self.models.load(ModelSpec(name, str(path)), self.harness, retention, evict)

    async def use(self, name: str, seconds: float = 0) -> None:
        with self.models.use(name):
            await asyncio.sleep(seconds)

    def here(self) -> set[str]:
        return {status.id for status in self.models.statuses() if status.state is ModelState.READY}


def story(test: Callable[..., Awaitable[None]]) -> Callable[[pathlib.Path], None]:
    def run(tmp_path: pathlib.Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), 60))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@story
async def test_a_load_evicts_an_idle_model_and_reports_its_need(folder: pathlib.Path) -> None:
    node = Node(folder)
    await node.load("a")
    await node.use("a")
    status = await node.load("b")
    assert (status.state, status.required_bytes, status.devices) == (ModelState.READY, 6 * GIB, ("cuda:0",))
    assert node.here() == {"b"}
    assert node.gone == ["a"], "on_leave was called"
    assert node.models.find("a").status().required_bytes == 6 * GIB, "measured, though not loaded"


@story
async def test_memory_of_idle_models_counts_for_a_fit_but_not_that_of_others(folder: pathlib.Path) -> None:
    node = Node(folder, cuda_0=10, cuda_1=10)
    await node.load("idle", 3)
    await node.load("pinned", 4, retention=Retention(pinned=True))
    await node.load("higher", 1, retention=Retention(priority=1))
    await node.load("busy", 2)
    await node.load("both", 2, devices=2)
    with node.models.use("busy"):
        found = node.evictor.evictable_bytes()
    assert sum(found.values()) == 5 * GIB
    assert set(found) == {"cuda:0", "cuda:1"}


@story
async def test_loads_on_different_gpus_run_side_by_side(folder: pathlib.Path) -> None:
    """A third load waits for the first two; nothing is evicted meanwhile."""
    node = Node(folder, cuda_0=10, cuda_1=10)
    loads = [asyncio.ensure_future(node.load(name, 4, load_s=0.2)) for name in "abcd"]
    await asyncio.gather(*loads)
    assert node.most_loading == 2, "two and two, not one by one"
    assert node.here() == set("abcd")
    assert not node.gone


@story
async def test_cpu_devices_share_their_memory(folder: pathlib.Path) -> None:
    node = Node(folder, cpu_0=10, cpu_1=10)
    loads = [asyncio.ensure_future(node.load(name, 4, load_s=0.1)) for name in "ab"]
    while not all(load.done() for load in loads):
        taken = sum(node.harness.used_bytes.values()) // (4 * GIB)
        assert taken - len(node.harness.models) <= 1, "one load at a time"
        await asyncio.sleep(0.01)
    assert node.here() == set("ab")


@story
async def test_a_load_that_may_not_evict_is_refused(folder: pathlib.Path) -> None:
    node = Node(folder)
    await node.load("a")
    with pytest.raises(NoRoomError, match=r"cuda:0: needs 6.00 GiB, free 4.00 GiB"):
        await node.load("b", evict=None)
    with pytest.raises(DoesNotFitError):
        await node.load("c", 11)
    assert node.here() == {"a"}


@story
async def test_pinned_and_more_important_models_are_kept(folder: pathlib.Path) -> None:
    node = Node(folder)
    await node.load("a", retention=Retention(pinned=True))
    with pytest.raises(NoRoomError, match="pinned or matters more"):
        await node.load("b")
    node.models.pin("a", pinned=False, priority=5)
    by_priority = Eviction(EvictionStrategy.PRIORITY)
    with pytest.raises(NoRoomError, match="pinned or matters more"):
        await node.load("b", evict=by_priority)
    await node.load("b", evict=by_priority, retention=Retention(priority=5))
    assert node.here() == {"b"}


@pytest.mark.parametrize(("strategy", "evicted"), [(EvictionStrategy.LRU, "a"), (EvictionStrategy.PRIORITY, "b")])
def test_the_model_evicted_first(tmp_path: pathlib.Path, strategy: EvictionStrategy, evicted: str) -> None:
    async def run() -> None:
        node = Node(tmp_path)
        await node.load("a", 5, retention=Retention(priority=1))
        await node.load("b", 5)
        await node.use("a")
        await node.use("b")
        await node.load("c", 5, evict=Eviction(strategy), retention=Retention(priority=1))
        assert {"a", "b", "c"} - node.here() == {evicted}

    asyncio.run(run())


@story
async def test_a_running_request_is_never_cut_and_new_ones_stop_after_a_while(folder: pathlib.Path) -> None:
    node = Node(folder)
    await node.load("a")
    running = asyncio.ensure_future(node.use("a", 0.6))
    await asyncio.sleep(0)
    load = asyncio.ensure_future(node.load("b"))
    await asyncio.sleep(0.05)
    await node.use("a")  # still accepted
    while node.models.find("a").state is ModelState.READY:
        await asyncio.sleep(0.01)
    with pytest.raises(ModelNotReadyError):
        await node.use("a")
    assert not running.done()
    assert not node.harness.unloads
    await load
    assert running.done()
    assert node.here() == {"b"}


@story
async def test_a_model_is_kept_until_it_has_been_used(folder: pathlib.Path) -> None:
    node = Node(folder, EvictionTimeouts(hold_s=30, linger_s=0, patience_s=0))
    await node.load("a")
    load = asyncio.ensure_future(node.load("b"))
    await asyncio.sleep(0.05)
    assert node.here() == {"a"}
    await node.use("a")
    await load
    assert node.here() == {"b"}


@story
async def test_a_hold_ends_by_itself(folder: pathlib.Path) -> None:
    node = Node(folder)
    await node.load("a")
    await node.load("b")
    assert node.here() == {"b"}


@story
async def test_a_load_waits_for_the_end_of_an_unload(folder: pathlib.Path) -> None:
    node = Node(folder)
    await node.load("a")
    running = asyncio.ensure_future(node.use("a", 0.1))
    await asyncio.sleep(0)
    unload = asyncio.ensure_future(node.models.unload("a", math.inf))
    await asyncio.sleep(0)
    loads = [asyncio.ensure_future(node.load("a")) for _ in range(5)]
    await asyncio.gather(unload, running, *loads)
    assert node.here() == {"a"}
    assert node.harness.num_loads["a"] == 2


@story
async def test_an_unload_of_another_generation_is_refused(folder: pathlib.Path) -> None:
    node = Node(folder)
    first = await node.load("a")
    await node.models.unload("a", 1)
    second = await node.load("a")
    assert second.generation > first.generation
    with pytest.raises(GenerationConflictError):
        await node.models.unload("a", 1, first.generation)
    assert node.here() == {"a"}
    await node.models.unload("a", 1, second.generation)
    assert not node.here()


@story
async def test_alternating_callers_neither_starve_nor_thrash(folder: pathlib.Path) -> None:
    """Four callers, 200 requests, two models of which one fits: each request is served, with far fewer swaps."""
    node = Node(folder)
    served = 0

    async def caller(names: str) -> None:
        nonlocal served
        for index in range(50):
            name = names[index % len(names)]
            while True:
                await node.load(name)
                try:
                    await node.use(name, 0.002)
                except (ModelNotReadyError, ModelNotFoundError):
                    continue  # it was evicted between the load and the use; the gateway retries too
                served += 1
                break

    await asyncio.gather(*(caller(names) for names in ("a", "b", "ab", "ba")))
    assert served == 200
    swaps = sum(node.harness.num_loads.values())
    assert swaps <= 100, swaps


@story
async def test_two_loads_for_the_same_memory_do_not_take_each_others(folder: pathlib.Path) -> None:
    node = Node(folder)
    await node.load("old")
    await node.use("old")

    async def gateway(name: str) -> None:
        await node.load(name)
        await node.use(name)

    await asyncio.gather(*(gateway(name) for name in "abab"))
    assert node.harness.num_loads == {"old": 1, "a": 1, "b": 1}
    assert node.harness.unloads == ["old", "a"]


@story
async def test_idle_models_are_unloaded(folder: pathlib.Path) -> None:
    node = Node(folder)
    await node.load("a", 2, retention=Retention(idle_ttl_s=0.05))
    await node.load("b", 2, retention=Retention(pinned=True, idle_ttl_s=0.05))
    await node.load("c", 2)
    with node.models.use("a"):
        await asyncio.sleep(0.08)
        assert await node.models.unload_idle() == []
    await asyncio.sleep(0.08)
    assert await node.models.unload_idle() == ["a"]
    assert node.here() == {"b", "c"}


@story
async def test_a_worker_is_replaced_after_enough_unloads(folder: pathlib.Path) -> None:
    node = Node(folder)
    often = Eviction(defrag_after_cycles=2)
    for name in ("a", "b", "c", "d"):
        await node.load(name, evict=often)
        await node.use(name)
    assert node.recycled == ["cuda:0"], "before c was loaded, with nothing on the device"
    await node.load("e", 2, evict=often)
    await node.models.unload("e", 1)
    assert node.here() == {"d"}
    await node.evictor.tidy(60)
    assert node.recycled == ["cuda:0"], "d was used a moment ago"
    await node.evictor.tidy(0)
    assert node.recycled == ["cuda:0"] * 2
    assert node.here() == {"d"}, "it was loaded again"


@story
async def test_a_model_over_two_devices(folder: pathlib.Path) -> None:
    node = Node(folder, cuda_0=10, cuda_1=10)
    await node.load("a", 6)
    await node.use("a")
    status = await node.load("wide", 16, devices=2)
    assert status.devices == ("cuda:0", "cuda:1")
    assert node.here() == {"wide"}


@story
async def test_many_random_swaps(folder: pathlib.Path) -> None:
    """The harness raises on a double load and on memory in excess."""
    dice = random.Random(7)
    node = Node(folder, EvictionTimeouts(hold_s=0.05, linger_s=0, patience_s=0.01), cuda_0=10, cuda_1=8)
    sizes = {name: dice.choice([2, 4, 6, 8]) for name in "abcdefgh"}

    async def caller(number: int) -> None:
        for _ in range(40):
            name = dice.choice(list(sizes))
            try:
                await node.load(name, sizes[name], load_s=0.001, fails="no" if dice.random() < 0.05 else "")
                await node.use(name, dice.random() * 0.005)
            except (ModelNotReadyError, ModelNotFoundError):
                pass
            except UnprocessableError as error:
                assert str(error) == "no"

    await asyncio.gather(*(caller(number) for number in range(6)))
    used = dict.fromkeys(node.harness.total_bytes, 0)
    for name, model in node.harness.models.items():
        for device in model.devices:
            used[device] += sizes[name] * GIB
    assert used == node.harness.used_bytes
    assert node.here() == set(node.harness.models)
