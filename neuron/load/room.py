"""Which devices a model goes to, and which models must go for it: a pure decision over fresh figures.

It knows bytes, pins and when a model was last used. Whether a victim may go yet, and its going, are
:mod:`neuron.load.eviction`'s.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cortex.wire.node import EvictionStrategy
from neuron.harness import Requirement

_Order = Callable[["Resident"], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that is loaded, and what its going would free on each of its devices."""

    model: str
    bytes_on: Mapping[str, int]
    last_used_at: float
    priority: int = 0
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """Devices with enough memory once ``victims`` are gone, the one to go first coming first."""

    devices: tuple[str, ...]
    victims: tuple[str, ...] = ()


def find_room(
    need: Requirement,
    free_bytes: Mapping[str, int],
    residents: Iterable[Resident] = (),
    strategy: EvictionStrategy = EvictionStrategy.LRU,
    priority: int = 0,
) -> Room | None:
    """Return where a model of ``priority`` goes, with as few victims as will do; ``None`` if there is no room for it.

    Without victims the freest devices are taken. Under ``lru`` the least recently used model goes first; under
    ``priority`` the lowest, among equals the least recently used, and never one above the newcomer. Pinned models stay.
    """
    able = sorted(
        (device for device in need.bytes_on if device in free_bytes), key=lambda device: (-free_bytes[device], device)
    )
    roomy = [device for device in able if need.bytes_on[device] <= free_bytes[device]]
    if len(roomy) >= need.num_devices:
        return Room(tuple(roomy[: need.num_devices]))
    by_priority = strategy is EvictionStrategy.PRIORITY
    order = _by_priority if by_priority else _by_use
    movable = sorted((r for r in residents if not r.pinned and not (by_priority and r.priority > priority)), key=order)
    options = []
    for devices in itertools.combinations(able, need.num_devices):
        victims = _victims(need, free_bytes, devices, movable)
        if victims is not None:
            dearest = max(order(victim) for victim in victims)
            options.append((dearest[:-1], len(victims), devices, victims))
    if not options:
        return None
    _, _, devices, victims = min(options, key=lambda option: option[:3])
    return Room(devices, tuple(victim.model for victim in victims))


def _by_use(resident: Resident) -> tuple[float, ...]:
    return (resident.last_used_at, *map(float, resident.model.encode()))


def _by_priority(resident: Resident) -> tuple[float, ...]:
    return (resident.priority, *_by_use(resident))


def _victims(
    need: Requirement, free_bytes: Mapping[str, int], devices: Sequence[str], movable: Sequence[Resident]
) -> list[Resident] | None:
    """Return the fewest of ``movable``, taken from its beginning, that make room on all of ``devices``."""

    def fits(victims: Iterable[Resident]) -> bool:
        freed = dict.fromkeys(devices, 0)
        for victim in victims:
            for device, size_bytes in victim.bytes_on.items():
                if device in freed:
                    freed[device] += size_bytes
        return all(need.bytes_on[device] <= free_bytes[device] + freed[device] for device in devices)

    victims: list[Resident] = []
    for resident in movable:
        if fits(victims):
            break
        if any(device in resident.bytes_on for device in devices):
            victims.append(resident)
    if not fits(victims):
        return None
    for resident in reversed(victims[:]):  # the last ones may have made some of the first superfluous
        others = [victim for victim in victims if victim is not resident]
        if fits(others):
            victims = others
    return victims
