"""Routing and placement: pure functions, their table and their laws."""

from collections.abc import Mapping
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex.config import ModelProfile
from cortex.fleet import placement
from cortex.fleet.placement import Fit
from cortex.fleet.router import Busy, Decision, Load, Serve, Unknown, route
from cortex.fleet.state import FleetState, Node
from cortex.wire.node import (
    Device,
    DeviceKind,
    Discovery,
    Health,
    ModelState,
    ModelStatus,
    NodeState,
    WorkerState,
)

GIB = 1024**3
PROFILE = ModelProfile(id="m", source="/w")


def device(name: str = "cuda:0", free_gib: float = 10, worker: WorkerState | None = WorkerState.READY) -> Device:
    return Device(name, DeviceKind.CUDA, "gpu", 24 * GIB, int(free_gib * GIB), worker=worker)


def status(state: ModelState = ModelState.READY, model: str = "m", **fields: Any) -> ModelStatus:
    given = {"weights_bytes": 4 * GIB, "kv_cache_bytes": GIB, "source": "/w", "devices": ("cuda:0",), **fields}
    return ModelStatus(model, state, **given)


def node(
    name: str,
    *models: ModelStatus,
    up: bool = True,
    state: NodeState = NodeState.READY,
    devices: tuple[Device, ...] = (device(),),
    activating: tuple[str, ...] = (),
    harnesses: tuple[str, ...] = ("torch",),
    foreign_load: int = 0,
) -> Node:
    return Node(
        name,
        f"http://{name}",
        up=up,
        polled=True,
        discovery=Discovery(name, "0", "h", "linux", None, None, devices, harnesses, ()),
        health=Health(state, 1.0, (), activating),
        models={model.id: model for model in models},
        foreign_load=foreign_load,
    )


def decide(*nodes: Node, profile: ModelProfile | None = PROFILE, **arguments: Any) -> Decision:
    in_flight = arguments.pop("in_flight", {})
    return route(FleetState.of(nodes), "m", profile, in_flight, **arguments)


def test_the_least_loaded_replica_serves_and_ties_go_by_name() -> None:
    replicas = node("b", status()), node("a", status())
    assert decide(*replicas) == Serve("a")
    assert decide(*replicas, in_flight={"a": 1}) == Serve("b")
    assert decide(*replicas, in_flight={"a": 1, "b": 1}) == Serve("a")
    assert decide(node("a", status(), foreign_load=3), node("b", status()), in_flight={"b": 2}) == Serve("b")


@pytest.mark.parametrize(
    "cannot",
    [
        node("a", status(), up=False),
        node("a", status(), state=NodeState.DRAINING),
        node("a", status(), state=NodeState.STARTING),
        node("a", status(ModelState.LOADING)),
        node("a", status(ModelState.DRAINING)),
        node("a", status(ModelState.FAILED)),
        node("a", status(kv_cache_bytes=0)),
    ],
)
def test_a_node_that_cannot_serve_is_no_candidate(cannot: Node) -> None:
    assert decide(cannot, node("b", status()), in_flight={"b": 100}) == Serve("b")


def test_a_model_that_no_node_has_is_loaded_or_unknown() -> None:
    assert decide(node("a"), node("b", devices=(device(free_gib=12),))) == Load(("b", "a"))
    assert decide(node("a"), profile=None) == Unknown()
    assert decide(node("a", status(ModelState.AVAILABLE)), profile=None) == Load(("a",))
    assert isinstance(decide(node("a", status(ModelState.AVAILABLE, source="")), profile=None), Busy)


def test_a_load_under_way_is_joined() -> None:
    assert decide(node("a"), node("b", status(ModelState.LOADING))) == Load(("b",))
    assert decide(node("a"), node("b", activating=("m",), state=NodeState.STARTING)) == Load(("b",))
    assert isinstance(decide(node("a"), node("b", status(ModelState.LOADING)), excluded=frozenset("b")), Busy)


def test_a_model_in_recovery_is_loaded_elsewhere_if_nothing_has_to_go_for_it() -> None:
    assert decide(node("a", status(ModelState.RECOVERING)), node("b")) == Load(("b",))
    decision = decide(node("a", status(ModelState.RECOVERING)), node("b", up=False))
    assert isinstance(decision, Busy)
    assert decision.retry_after_s > 0
    assert decide(node("a", status(ModelState.RECOVERING)), node("b", status())) == Serve("b")


def test_replicas_that_are_gone_are_as_if_they_were_down() -> None:
    gone = frozenset("a")
    assert decide(node("a", status()), node("b", status()), gone=gone) == Serve("b")
    assert decide(node("a", status()), node("b"), gone=gone) == Load(("b",))
    assert isinstance(decide(node("a", status()), gone=gone), Busy)
    both = decide(node("a", status()), node("b", status()), node("c"), gone=gone, excluded=frozenset("b"))
    assert isinstance(both, Busy), "b is only busy"


def test_replicas_that_refused_are_left_alone_and_not_doubled() -> None:
    assert decide(node("a", status()), node("b", status()), excluded=frozenset("a")) == Serve("b")
    assert isinstance(decide(node("a", status()), node("b"), excluded=frozenset("a")), Busy)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ((node("a", up=False),), "no node is up"),
        ((node("a", harnesses=()),), "can load"),
        ((node("a", devices=()),), "can load"),
        ((node("a", devices=(device(worker=WorkerState.POISONED),)),), "can load"),
        ((node("a", devices=(device(worker=None),)),), "can load"),
        ((node("a", state=NodeState.DRAINING),), "can load"),
    ],
)
def test_busy_has_a_reason(nodes: tuple[Node, ...], reason: str) -> None:
    decision = decide(*nodes)
    assert isinstance(decision, Busy)
    assert reason in decision.reason


# ------------------------------------------------------------------ placement


def names(*nodes: Node, profile: ModelProfile = PROFILE, **arguments: Any) -> list[str]:
    return [found.node for found in placement.choose(FleetState.of(nodes), profile, **arguments)]


def test_the_ranks_in_their_order() -> None:
    profile = ModelProfile(
        id="m", source="/w", memory_bytes=8 * GIB, pinned=("pinned",), preferred_nodes=("preferred", "pinned")
    )
    idle = status(model="old", weights_bytes=6 * GIB, kv_cache_bytes=2 * GIB)
    fleet = (
        node("more", devices=(device(free_gib=20),)),
        node("less", devices=(device(free_gib=9),)),
        node("twin", devices=(device(free_gib=9),)),
        node("evict", idle, devices=(device(free_gib=2),)),
        node("small", devices=(device(free_gib=2),)),
        node("failed", status(ModelState.FAILED), devices=(device(free_gib=23),)),
        node("preferred", idle, devices=(device(free_gib=3),)),
        node("pinned", devices=(device(free_gib=8),)),
    )
    assert names(*fleet, profile=profile) == ["pinned", "preferred", "more", "less", "twin", "evict", "failed"]
    assert names(*fleet, profile=profile, excluded=frozenset({"more"}))[2] == "less"


def test_pinned_and_busy_models_are_not_evictable() -> None:
    profile = ModelProfile(id="m", source="/w", memory_bytes=8 * GIB)
    small = (device(free_gib=1),)
    old = status(model="old", weights_bytes=8 * GIB)
    (candidate,) = placement.choose(FleetState.of([node("a", old, devices=small)]), profile)
    assert candidate.fit is Fit.AFTER_EVICTION
    pinned = status(model="old", weights_bytes=8 * GIB, pinned=True)
    assert not names(node("a", pinned, devices=small), profile=profile)
    busy = status(model="old", weights_bytes=8 * GIB, running=1)
    (candidate,) = placement.choose(FleetState.of([node("a", busy, devices=small)]), profile)
    assert candidate.fit is Fit.AFTER_WAITING
    assert names(node("a", busy, devices=small), node("b", old, devices=small), profile=profile) == ["b", "a"]


def test_a_nodes_measurement_beats_the_configuration() -> None:
    profile = ModelProfile(id="m", source="/w", memory_bytes=8 * GIB)
    measured = status(ModelState.AVAILABLE, weights_bytes=0, kv_cache_bytes=0, required_bytes=12 * GIB)
    assert names(node("a", measured), node("b", devices=(device(free_gib=9),)), profile=profile) == ["b"]


@pytest.mark.parametrize(
    ("changes", "able"),
    [
        ({}, ["new", "old", "cpu"]),
        ({"dtype": "bfloat16"}, ["new", "cpu"]),
        ({"dtype": "float16"}, ["new", "old", "cpu"]),
        ({"min_compute_capability": "8.9"}, ["new", "cpu"]),
        ({"min_compute_capability": "10.0"}, ["cpu"]),
    ],
)
def test_a_gpu_that_cannot_compute_a_model_is_no_candidate(changes: dict[str, Any], able: list[str]) -> None:
    def gpu(capability: str) -> tuple[Device, ...]:
        return (msgspec.structs.replace(device(), compute_capability=capability),)

    cpu = msgspec.structs.replace(device("cpu:0", 5), kind=DeviceKind.CPU)
    fleet = node("new", devices=gpu("9.0")), node("old", devices=gpu("7.5")), node("cpu", devices=(cpu,))
    assert names(*fleet, profile=ModelProfile(id="m", source="/w", **changes)) == able


def test_tensor_parallel_sums_devices_of_one_kind() -> None:
    two = (device("cuda:0", 5), device("cuda:1", 5))
    profile = ModelProfile(id="m", source="/w", memory_bytes=9 * GIB, tensor_parallel=2)
    assert names(node("one", devices=(device(free_gib=20),)), node("two", devices=two), profile=profile) == ["two"]
    named = ModelProfile(id="m", source="/w", devices=("cuda:1",))
    assert names(node("one"), node("two", devices=two), profile=named) == ["two"]


def test_a_size_that_a_node_has_reported_counts_where_none_is_configured() -> None:
    known = node("known", status(ModelState.AVAILABLE, weights_bytes=12 * GIB), devices=(device(free_gib=2),))
    assert names(known, node("big", devices=(device(free_gib=13),)), node("small")) == ["big"]


# ------------------------------------------------------------------ laws

STATES = st.sampled_from(list(ModelState))
NODES = st.builds(
    lambda name, models, up, state, devices, load: node(
        name, *models, up=up, state=state, devices=tuple(devices), foreign_load=load
    ),
    st.sampled_from("abcdef"),
    st.lists(
        st.builds(
            lambda state, model, kv, running, pinned: status(
                state, model, kv_cache_bytes=kv, running=running, pinned=pinned
            ),
            STATES,
            st.sampled_from(["m", "old"]),
            st.sampled_from([0, GIB]),
            st.integers(0, 2),
            st.booleans(),
        ),
        max_size=2,
    ),
    st.booleans(),
    st.sampled_from(list(NodeState)),
    st.lists(
        st.builds(device, st.just("cuda:0"), st.integers(0, 20), st.sampled_from([None, *WorkerState])), max_size=1
    ),
    st.integers(0, 5),
)
FLEETS = st.lists(NODES, max_size=6, unique_by=lambda node: node.name)
COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 20))
EXCLUDED = st.frozensets(st.sampled_from("abcdef"))
LAW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@LAW
@given(FLEETS, COUNTS, EXCLUDED, st.sampled_from([0, 8 * GIB]))
def test_a_decision_is_sound_and_depends_on_nothing_else(
    nodes: list[Node], counts: dict[str, int], excluded: frozenset[str], memory_bytes: int
) -> None:
    profile = ModelProfile(id="m", source="/w", memory_bytes=memory_bytes)
    state = FleetState.of(nodes)
    decision = route(state, "m", profile, counts, excluded)
    assert decision == route(FleetState.of(reversed(nodes)), "m", profile, dict(counts), excluded)
    states = [known.models["m"].state for known in nodes if known.up and "m" in known.models]
    match decision:
        case Serve(name):
            chosen = state.nodes[name]
            assert name not in excluded
            assert chosen.up
            assert chosen.health is not None
            assert chosen.health.state is NodeState.READY
            assert chosen.models["m"].state is ModelState.READY
            assert chosen.models["m"].kv_cache_bytes
            # One more request elsewhere never brings one back here.
            more = {**counts, name: counts.get(name, 0) + 1}
            other = route(state, "m", profile, more, excluded)
            assert isinstance(other, Serve)
        case Load(candidates):
            if ModelState.RECOVERING in states:
                ranked = placement.choose(state, profile)
                assert {found.node for found in ranked if found.fit <= placement.Fit.UNKNOWN} >= set(candidates)
            assert not excluded & set(candidates)
            assert len(set(candidates)) == len(candidates) > 0
            assert all(state.nodes[name].up for name in candidates)
        case Busy(retry_after_s, reason):
            assert retry_after_s > 0
            assert reason
        case Unknown():
            pytest.fail("the catalogue has it")


@LAW
@given(FLEETS, COUNTS)
def test_less_load_never_loses_a_request(nodes: list[Node], counts: dict[str, int]) -> None:
    state = FleetState.of(nodes)
    decision = route(state, "m", PROFILE, counts)
    if isinstance(decision, Serve):
        fewer = {**counts, decision.node: 0}
        assert route(state, "m", PROFILE, fewer) in (decision, *(Serve(name) for name in state.nodes))
        foreign = state.nodes[decision.node].foreign_load
        if foreign == 0:
            winner = route(state, "m", PROFILE, fewer)
            assert isinstance(winner, Serve)
            load = fewer.get(winner.node, 0) + state.nodes[winner.node].foreign_load
            assert load == 0


@LAW
@given(FLEETS, COUNTS, EXCLUDED, EXCLUDED, st.randoms())
def test_a_policy_changes_the_node_and_never_the_decision(
    nodes: list[Node], counts: dict[str, int], excluded: frozenset[str], gone: frozenset[str], rng: Random
) -> None:
    """It chooses among the ready replicas that are neither excluded nor gone, and is told the load of each."""
    state = FleetState.of(nodes)

    def choose(loads: Mapping[str, int]) -> str:
        assert set(loads) == {node.name for node in state.serving["m"]} - excluded - gone
        assert all(loads[name] == counts.get(name, 0) + state.nodes[name].foreign_load for name in loads)
        return rng.choice(sorted(loads))

    plain = route(state, "m", PROFILE, counts, excluded, gone)
    decision = route(state, "m", PROFILE, counts, excluded, gone, choose)
    if not isinstance(plain, Serve):
        assert decision == plain
        return
    assert isinstance(decision, Serve)
    assert decision.node in {node.name for node in state.serving["m"]} - excluded - gone


@LAW
@given(FLEETS, EXCLUDED, st.integers(1, 24))
def test_placement_names_only_nodes_that_could(nodes: list[Node], excluded: frozenset[str], gib: int) -> None:
    """Every candidate fits after eviction of its unpinned models, or its fit is unknown; less need is no loss."""
    state = FleetState.of(nodes)
    profile = ModelProfile(id="m", source="/w", memory_bytes=gib * GIB)
    found = placement.choose(state, profile, excluded)
    assert [candidate.rank for candidate in found] == sorted(candidate.rank for candidate in found)
    for candidate in found:
        chosen = state.nodes[candidate.node]
        assert chosen.up
        assert candidate.node not in excluded
        assert chosen.discovery is not None
        movable_bytes = sum(s.weights_bytes + s.kv_cache_bytes for s in chosen.models.values() if not s.pinned)
        is_coming = any(s.state is ModelState.LOADING for s in chosen.models.values())
        assert is_coming or gib * GIB <= candidate.free_bytes + movable_bytes
        if candidate.fit is Fit.AFTER_EVICTION:
            idle = [s for s in chosen.models.values() if not s.pinned and not s.running and s.state is ModelState.READY]
            assert gib * GIB <= candidate.free_bytes + sum(s.weights_bytes + s.kv_cache_bytes for s in idle)
    smaller = ModelProfile(id="m", source="/w", memory_bytes=max(1, gib - 1) * GIB)
    assert {c.node for c in found} <= {c.node for c in placement.choose(state, smaller, excluded)}
