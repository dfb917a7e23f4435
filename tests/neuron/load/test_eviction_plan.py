"""Devices for a model and evictions for it: properties of the plan, for all figures."""

from hypothesis import given
from hypothesis import strategies as st

from cortex.wire.node import EvictionStrategy
from neuron.harness import Requirement
from neuron.load.eviction_plan import Resident, plan_eviction

DEVICES = ("cuda:0", "cuda:1", "cuda:2")
LRU, PRIORITY = EvictionStrategy.LRU, EvictionStrategy.PRIORITY


@st.composite
def situations(draw: st.DrawFn) -> dict[str, object]:
    num_devices = draw(st.integers(1, 3))
    free = {device: draw(st.integers(0, 20)) for device in DEVICES}
    names = draw(st.lists(st.sampled_from("abcdefg"), unique=True))
    residents = [
        Resident(
            name,
            dict.fromkeys(draw(st.lists(st.sampled_from(DEVICES), min_size=1, unique=True)), draw(st.integers(0, 15))),
            draw(st.integers(0, 5)),
            draw(st.integers(-1, 1)),
            draw(st.booleans()),
        )
        for name in names
    ]
    return {
        "need": Requirement({device: draw(st.integers(1, 25)) for device in DEVICES}, num_devices),
        "free_bytes": free,
        "residents": residents,
        "strategy": draw(st.sampled_from([LRU, PRIORITY])),
        "priority": draw(st.integers(-1, 1)),
    }


def freed(residents: list[Resident], to_evict: tuple[str, ...], device: str) -> int:
    return sum(r.bytes_on.get(device, 0) for r in residents if r.model in to_evict)


@given(situations())
def test_a_plan_frees_enough_and_evicts_no_pinned_or_higher_model_nor_too_many(case: dict) -> None:
    plan = plan_eviction(**case)
    assert plan == plan_eviction(**{**case, "residents": list(reversed(case["residents"]))})
    if plan is None:
        return
    need, residents = case["need"], case["residents"]
    assert len(set(plan.devices)) == need.num_devices
    for device in plan.devices:
        assert need.bytes_on[device] <= case["free_bytes"][device] + freed(residents, plan.to_evict, device)
    by_name = {resident.model: resident for resident in residents}
    for evicted in plan.to_evict:
        assert not by_name[evicted].pinned
        assert case["strategy"] is LRU or by_name[evicted].priority <= case["priority"]
        others = tuple(other for other in plan.to_evict if other != evicted)
        assert any(
            need.bytes_on[device] > case["free_bytes"][device] + freed(residents, others, device)
            for device in plan.devices
        ), "one eviction too many"


@given(situations())
def test_there_is_no_plan_only_where_no_eviction_helps(case: dict) -> None:
    if plan_eviction(**case) is not None:
        return
    need, by_priority = case["need"], case["strategy"] is PRIORITY
    evictable = tuple(
        r.model for r in case["residents"] if not r.pinned and not (by_priority and r.priority > case["priority"])
    )
    able = [d for d in DEVICES if need.bytes_on[d] <= case["free_bytes"][d] + freed(case["residents"], evictable, d)]
    assert len(able) < need.num_devices


@given(situations(), st.sampled_from(DEVICES), st.integers(0, 30))
def test_more_free_memory_never_causes_an_eviction(case: dict, device: str, more: int) -> None:
    plan = plan_eviction(**case)
    with_more = plan_eviction(
        **{**case, "free_bytes": {**case["free_bytes"], device: case["free_bytes"][device] + more}}
    )
    if plan is not None:
        assert with_more is not None
        assert plan.to_evict or not with_more.to_evict


def one_device(*residents: Resident, strategy: EvictionStrategy = LRU, priority: int = 0, needs: int = 8) -> object:
    plan = plan_eviction(Requirement({"cuda:0": needs}), {"cuda:0": 0}, residents, strategy, priority)
    return plan and plan.to_evict


def test_the_order_of_eviction() -> None:
    def resident(name: str, used: float, priority: int = 0, pinned: bool = False, size: int = 8) -> Resident:
        return Resident(name, {"cuda:0": size}, used, priority, pinned)

    assert one_device(resident("old", 1), resident("new", 2)) == ("old",)
    assert one_device(resident("old", 1, pinned=True), resident("new", 2)) == ("new",)
    assert one_device(resident("old", 1, priority=5), resident("new", 2)) == ("old",)
    assert one_device(resident("old", 1, priority=5), resident("new", 2), strategy=PRIORITY, priority=9) == ("new",)
    assert one_device(resident("high", 1, priority=5), strategy=PRIORITY) is None
    assert one_device(resident("equal", 1), strategy=PRIORITY) == ("equal",), "else two models deadlock a node"
    small = [resident(f"s{i}", i, size=4) for i in range(4)]
    assert one_device(*small) == ("s0", "s1")
    assert one_device(resident("tiny", 1, size=1), resident("big", 2, size=8)) == ("big",), (
        "evicting tiny would not help"
    )


def test_shards_are_placed_on_the_freest_devices() -> None:
    need = Requirement(dict.fromkeys(DEVICES, 10), 2)
    plan = plan_eviction(need, {"cuda:0": 12, "cuda:1": 9, "cuda:2": 30})
    assert plan is not None
    assert plan.devices == ("cuda:2", "cuda:0")
    assert plan_eviction(need, {"cuda:0": 12, "cuda:1": 9, "cuda:2": 9}) is None
