"""Placement of a model that is loaded nowhere: a ranking of nodes, best first.

Pure: a function of a state and a profile. The figures may be a poll old, so the ranking is advice, and the node decides
with its own. The order: pinned here, preferred, fits in free memory, fits after eviction of idle models, most free
memory, name. A node where this model failed before comes last, since the cause may be gone.
"""

from dataclasses import dataclass
from enum import IntEnum

from cortex.config import ModelProfile
from cortex.fleet.state import FleetState, Node
from cortex.wire.node import Device, DeviceKind, ModelState, ModelStatus, NodeState, WorkerState

CAPABILITY_OF_DTYPE = {"bfloat16": "8.0"}
"""Compute capability that a GPU needs for a dtype."""

HOLDS_MEMORY = frozenset({ModelState.READY, ModelState.DRAINING, ModelState.RECOVERING})
USABLE_WORKERS = frozenset({WorkerState.READY, WorkerState.STARTING, WorkerState.RECOVERING})


class Fit(IntEnum):
    """Fit of a model's memory on a node, best first."""

    FREE = 0
    UNKNOWN = 1
    """Its size is not known; the node's preflight decides."""
    AFTER_EVICTION = 2
    AFTER_WAITING = 3
    """Fits after models that are in use now are unloaded."""
    NO = 4
    """Never: too large for the node, or its memory is held by pinned models."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may load a model. ``free_bytes`` is the free memory of the devices it would use."""

    node: str
    fit: Fit
    free_bytes: int
    is_pinned: bool
    is_preferred: bool
    has_failed: bool

    @property
    def rank(self) -> tuple[bool, bool, bool, Fit, int, str]:
        """Sort key."""
        return (
            self.has_failed,
            not self.is_pinned,
            not self.is_preferred,
            self.fit,
            -self.free_bytes,
            self.node,
        )


def choose(state: FleetState, profile: ModelProfile, excluded: frozenset[str] = frozenset()) -> tuple[Candidate, ...]:
    """Return the nodes that may load ``profile``, best first, without the nodes where it does not fit."""
    elsewhere_bytes = _known_size(state, profile.id)
    found = []
    for node in state.nodes.values():
        if node.name in excluded or not _takes_loads(node):
            continue
        devices = usable_devices(node, profile)
        if not devices:
            continue
        free_bytes = sum(device.memory_free_bytes for device in devices)
        status = node.models.get(profile.id)
        measured_bytes = status.required_bytes if status is not None else 0
        fit = _fit(node, devices, free_bytes, measured_bytes or profile.memory_bytes or elsewhere_bytes)
        if fit is Fit.NO:
            continue
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
    """Return the devices of a load: the named ones, or the freest ``tensor_parallel``; empty if there are none."""
    if node.discovery is None or profile.harness not in node.discovery.harnesses:
        return ()
    working = [
        device for device in node.discovery.devices if device.worker in USABLE_WORKERS and is_able(device, profile)
    ]
    if profile.devices:
        named = tuple(device for device in working if device.id in profile.devices)
        return named if len(named) == len(profile.devices) else ()
    # Shards of one model need devices of one kind.
    groups: dict[tuple[str, str], list[Device]] = {}
    for device in working:
        groups.setdefault((device.kind, device.name if profile.tensor_parallel > 1 else ""), []).append(device)
    best: tuple[Device, ...] = ()
    for group in groups.values():
        freest = sorted(group, key=lambda device: (-device.memory_free_bytes, device.id))[: profile.tensor_parallel]
        if len(freest) == profile.tensor_parallel and _free(freest) > _free(best):
            best = tuple(freest)
    return best


def is_able(device: Device, profile: ModelProfile) -> bool:
    """Return whether a device has the compute capability that a model needs."""
    if device.kind is not DeviceKind.CUDA or not device.compute_capability:
        return True
    needed = profile.min_compute_capability or CAPABILITY_OF_DTYPE.get(profile.dtype, "")
    return not needed or _version(device.compute_capability) >= _version(needed)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _free(devices: tuple[Device, ...] | list[Device]) -> int:
    return sum(device.memory_free_bytes for device in devices) if devices else -1


def _takes_loads(node: Node) -> bool:
    """Return whether a node accepts loads; a load of a model that is being unloaded waits there."""
    return node.up and node.health is not None and node.health.state is not NodeState.DRAINING


def _fit(node: Node, devices: tuple[Device, ...], free_bytes: int, needed_bytes: int) -> Fit:
    if not needed_bytes:
        return Fit.UNKNOWN
    if needed_bytes <= free_bytes:
        return Fit.FREE
    ids = {device.id for device in devices}
    there = [
        status
        for status in node.models.values()
        if status.state in HOLDS_MEMORY and not status.pinned and set(status.devices) & ids
    ]
    idle_bytes = sum(
        status.weights_bytes + status.kv_cache_bytes
        for status in there
        if status.state is ModelState.READY and not status.running + status.waiting
    )
    if needed_bytes <= free_bytes + idle_bytes:
        return Fit.AFTER_EVICTION
    all_bytes = sum(status.weights_bytes + status.kv_cache_bytes for status in there)
    is_coming = any(status.state is ModelState.LOADING for status in node.models.values())  # of a size not known yet
    return Fit.AFTER_WAITING if is_coming or needed_bytes <= free_bytes + all_bytes else Fit.NO


def _known_size(state: FleetState, model: str) -> int:
    """Return the least size that a node has measured or holds of a model; 0 if none has."""
    sizes = (status.required_bytes or status.weights_bytes for status in _statuses(state, model))
    return min((size for size in sizes if size), default=0)


def _statuses(state: FleetState, model: str) -> list[ModelStatus]:
    return [node.models[model] for node in state.listing.get(model, ())]
