"""The devices that a model is loaded on, and the models evicted for it: a pure decision over fresh figures.

It works on bytes, pins and times of last use. When an eviction happens, and the unload itself, belong to
:mod:`neuron.load.eviction`.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cortex.wire.node import EvictionStrategy
from neuron.harness import Requirement


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded model, and the memory that its unload frees on each of its devices."""

    model: str
    bytes_on: Mapping[str, int]
    last_used_at: float
    priority: int = 0
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """Devices that have enough memory once the models of ``to_evict`` are unloaded, in that order."""

    devices: tuple[str, ...]
    to_evict: tuple[str, ...] = ()


def plan_eviction(
    need: Requirement,
    free_bytes: Mapping[str, int],
    residents: Iterable[Resident] = (),
    strategy: EvictionStrategy = EvictionStrategy.LRU,
    priority: int = 0,
) -> EvictionPlan | None:
    """Return where a model of ``priority`` is loaded, with the fewest evictions; ``None`` if it fits nowhere.

    Without evictions the freest devices are taken. Under ``lru`` the least recently used model is evicted first; under
    ``priority`` the lowest, among equals the least recently used, and never one above ``priority``. Pinned models are
    not evicted.
    """
    able = sorted(
        (device for device in need.bytes_on if device in free_bytes), key=lambda device: (-free_bytes[device], device)
    )
    fitting = [device for device in able if need.bytes_on[device] <= free_bytes[device]]
    if len(fitting) >= need.num_devices:
        return EvictionPlan(tuple(fitting[: need.num_devices]))
    by_priority = strategy is EvictionStrategy.PRIORITY
    order = _by_priority if by_priority else _by_use
    evictable = sorted(
        (r for r in residents if not r.pinned and not (by_priority and r.priority > priority)), key=order
    )
    options = []
    for devices in itertools.combinations(able, need.num_devices):
        to_evict = _to_evict(need, free_bytes, devices, evictable)
        if to_evict is not None:
            dearest = max(order(resident) for resident in to_evict)
            options.append((dearest[:-1], len(to_evict), devices, to_evict))
    if not options:
        return None
    _, _, devices, to_evict = min(options, key=lambda option: option[:3])
    return EvictionPlan(devices, tuple(resident.model for resident in to_evict))


def _by_use(resident: Resident) -> tuple[float, ...]:
    return (resident.last_used_at, *map(float, resident.model.encode()))


def _by_priority(resident: Resident) -> tuple[float, ...]:
    return (resident.priority, *_by_use(resident))


def _to_evict(
    need: Requirement, free_bytes: Mapping[str, int], devices: Sequence[str], evictable: Sequence[Resident]
) -> list[Resident] | None:
    """Return the fewest of ``evictable``, taken from its beginning, that free enough memory on all of ``devices``."""

    def fits(evicted: Iterable[Resident]) -> bool:
        freed = dict.fromkeys(devices, 0)
        for resident in evicted:
            for device, size_bytes in resident.bytes_on.items():
                if device in freed:
                    freed[device] += size_bytes
        return all(need.bytes_on[device] <= free_bytes[device] + freed[device] for device in devices)

    chosen: list[Resident] = []
    for resident in evictable:
        if fits(chosen):
            break
        if any(device in resident.bytes_on for device in devices):
            chosen.append(resident)
    if not fits(chosen):
        return None
    for resident in reversed(chosen[:]):  # the last ones may have made some of the first superfluous
        others = [other for other in chosen if other is not resident]
        if fits(others):
            chosen = others
    return chosen
