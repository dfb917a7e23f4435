"""Where a model that is loaded nowhere should go: a ranking of nodes, best first.

Pure: it reads a state and a profile, asks nobody and changes nothing. Figures may be a poll old, so the ranking is a
wish; the node decides with its own figures when it is asked. Ranks, in order: pinned here, preferred, fits in free
memory, fits once idle models are gone, most free memory, name. A node that failed this model before comes last, not
never: what failed may have been mended.
"""

from dataclasses import dataclass
from enum import IntEnum

from cortex.config import ModelProfile
from cortex.fleet.state import FleetState, Node
from cortex.wire.node import Device, ModelState, ModelStatus, NodeState, WorkerState

USABLE_WORKERS = frozenset({WorkerState.READY, WorkerState.STARTING, WorkerState.RECOVERING})


class Fit(IntEnum):
    """How a model's memory compares with a node's, best first."""

    FREE = 0
    UNKNOWN = 1
    """Its size is not known; the node's preflight will tell."""
    AFTER_EVICTION = 2
    NO = 3
    """Not even then: too large for the node, or what lies there is pinned or busy."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may load a model. ``free_bytes`` is of the devices it would use."""

    node: str
    fit: Fit
    free_bytes: int
    is_pinned: bool
    is_preferred: bool
    has_failed: bool

    @property
    def rank(self) -> tuple[bool, bool, bool, Fit, int, str]:
        """What candidates are sorted by."""
        return (
            self.has_failed,
            not self.is_pinned,
            not self.is_preferred,
            self.fit,
            -self.free_bytes,
            self.node,
        )


def choose(
    state: FleetState, profile: ModelProfile, excluded: frozenset[str] = frozenset(), pins: frozenset[str] = frozenset()
) -> tuple[Candidate, ...]:
    """Return the nodes that may load ``profile``, best first; those where it does not fit are left out.

    ``pins`` are the ids of models that are not evicted anywhere.
    """
    needed_bytes = profile.memory_bytes or _known_size(state, profile.id)
    found = []
    for node in state.nodes.values():
        if node.name in excluded or not _takes_loads(node, profile.id):
            continue
        devices = usable_devices(node, profile)
        if not devices:
            continue
        free_bytes = sum(device.memory_free_bytes for device in devices)
        fit = _fit(node, devices, free_bytes, needed_bytes, pins)
        if fit is Fit.NO:
            continue
        status = node.models.get(profile.id)
        found.append(
            Candidate(
                node.name,
                fit,
                free_bytes,
                is_pinned=node.name in profile.pinned,
                is_preferred=node.name in profile.preferred_nodes,
                has_failed=status is not None and status.state is ModelState.FAILED,
            )
        )
    return tuple(sorted(found, key=lambda candidate: candidate.rank))


def usable_devices(node: Node, profile: ModelProfile) -> tuple[Device, ...]:
    """Return the devices a load would use: the named ones, or the freest ``tensor_parallel``; empty if it cannot."""
    if node.discovery is None or profile.harness not in node.discovery.harnesses:
        return ()
    working = [device for device in node.discovery.devices if device.worker in USABLE_WORKERS]
    if profile.devices:
        named = tuple(device for device in working if device.id in profile.devices)
        return named if len(named) == len(profile.devices) else ()
    # Shards of one model lie on devices of one kind.
    groups: dict[tuple[str, str], list[Device]] = {}
    for device in working:
        groups.setdefault((device.kind, device.name if profile.tensor_parallel > 1 else ""), []).append(device)
    best: tuple[Device, ...] = ()
    for group in groups.values():
        freest = sorted(group, key=lambda device: (-device.memory_free_bytes, device.id))[: profile.tensor_parallel]
        if len(freest) == profile.tensor_parallel and _free(freest) > _free(best):
            best = tuple(freest)
    return best


def _free(devices: tuple[Device, ...] | list[Device]) -> int:
    return sum(device.memory_free_bytes for device in devices) if devices else -1


def _takes_loads(node: Node, model: str) -> bool:
    if not node.up or node.health is None or node.health.state is NodeState.DRAINING:
        return False
    status = node.models.get(model)
    return status is None or status.state is not ModelState.DRAINING


def _fit(node: Node, devices: tuple[Device, ...], free_bytes: int, needed_bytes: int, pins: frozenset[str]) -> Fit:
    if not needed_bytes:
        return Fit.UNKNOWN
    if needed_bytes <= free_bytes:
        return Fit.FREE
    ids = {device.id for device in devices}
    evictable_bytes = sum(
        status.weights_bytes + status.kv_cache_bytes
        for status in node.models.values()
        if status.state is ModelState.READY
        and status.id not in pins
        and not status.running + status.waiting
        and set(status.devices) <= ids
    )
    return Fit.AFTER_EVICTION if needed_bytes <= free_bytes + evictable_bytes else Fit.NO


def _known_size(state: FleetState, model: str) -> int:
    """Return the least that any node has reported for the weights of a model; 0 if none has."""
    sizes = (status.weights_bytes for status in _statuses(state, model))
    return min((size for size in sizes if size), default=0)


def _statuses(state: FleetState, model: str) -> list[ModelStatus]:
    return [node.models[model] for node in state.listing.get(model, ())]
