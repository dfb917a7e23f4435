"""Makes room for a load: one at a time, on fresh figures, and never at the cost of a request that runs.

Loads are let in in order, and memory takes one at a time, so two callers that want the same are answered one after the
other, and neither takes what the other has just been given; loads on different GPUs run side by side. A model stays
until whoever it was loaded for has used it, or ``hold_s`` has passed. An idle model goes once nobody has come for
``linger_s``, so that callers who take turns are served together and not one swap each. A busy one keeps taking requests
for ``patience_s``; then it is closed to new ones, its running ones finish, however long that takes, and it goes. So
every model that is asked for has its turn, and nothing is cut.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cortex.wire.errors import ApiError
from cortex.wire.node import Eviction, ModelState
from neuron.errors import NoDeviceError, NoRoomError
from neuron.harness import Requirement
from neuron.load.room import Resident, Room, find_room
from neuron.models.errors import DoesNotFitError

if TYPE_CHECKING:
    from neuron.load.table import Entry, ModelTable

_log = logging.getLogger("neuron.models")

RETRY_AFTER_S = 5.0
GIB = 1 << 30

Recycle = Callable[[str], Awaitable[None]]
"""Replaces the worker of a device on which no model is loaded."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a loaded model is left where it is while another one waits for its room."""

    hold_s: float = 10.0
    """For those it was loaded for to come and use it."""
    linger_s: float = 0.5
    """After its last request. A model that loads faster than this lingers only as long as its load took."""
    patience_s: float = 20.0
    """While requests keep coming."""


class RoomMaker:
    """The one door through which models come in."""

    def __init__(self, table: "ModelTable", patience: Patience, recycle: Recycle | None) -> None:
        self._table = table
        self._patience = patience
        self._recycle = recycle
        self._turn = asyncio.Lock()
        self._taking: set[str] = set()
        """Devices onto which a load is under way: what is free there is not known."""
        self.unloads: dict[str, int] = {}
        """Models that have gone from each device since its worker was started."""

    @asynccontextmanager
    async def room(self, entry: "Entry", need: Requirement) -> AsyncIterator[tuple[str, ...]]:
        """Wait for this load's turn, make room, and have the devices to load on; the block is the load.

        Raises:
            NoRoomError: it does not fit beside what is here, and what is here stays.
            DoesNotFitError: it would not fit if everything else were gone.
            NoDeviceError: no device it could use takes loads now.
        """
        entry.need = need
        async with self._turn:
            devices = await self._clear(entry, need) if need.bytes_on else ()
            self._taking.update(devices)
        try:
            yield devices
        finally:
            self._taking.difference_update(devices)
            self._table.note_change()

    async def tidy(self, idle_s: float) -> None:
        """Replace the workers that are due for it and whose models nobody has used for ``idle_s``."""
        for device in [device for device in self.unloads if self._is_due(device)]:
            entries = self._table.on_device(device)
            now = time.monotonic()
            is_used = any(entry.running or now - entry.idle_at < idle_s for entry in entries)
            if is_used or self._turn.locked() or self._is_taken(device):
                continue
            async with self._turn:
                self._table.lose(device)
                await self._replace(device)
            await self._table.recover(device)

    async def _clear(self, entry: "Entry", need: Requirement) -> tuple[str, ...]:
        asked_at = time.monotonic()
        while True:
            idle = [device for device in need.bytes_on if not self._is_taken(device)]
            for device in idle:
                if self._is_due(device) and not self._table.on_device(device):
                    await self._replace(device)
            free_bytes = await entry.harness.free_bytes(idle) if idle else {}
            room = find_room(need, free_bytes)
            if room is not None:
                return room.devices
            if len(idle) < len(need.bytes_on):  # rather than evict: there may be room where a load is under way
                if any(map(self._is_taken, need.bytes_on)):
                    await self._table.changed()
                continue
            if not free_bytes:
                raise NoDeviceError(f"No device can take '{entry.spec.id}' now.", retry_after_s=RETRY_AFTER_S)
            if entry.evict is None:
                raise NoRoomError(self._explain(entry, need, free_bytes), retry_after_s=RETRY_AFTER_S)
            await self._give_way(entry, entry.evict, need, free_bytes, asked_at)

    async def _give_way(
        self, entry: "Entry", eviction: Eviction, need: Requirement, free_bytes: Mapping[str, int], asked_at: float
    ) -> None:
        """Take one step: let the victims go, or wait until something changes."""
        settles_in_s = {other.spec.id: self._settles_in_s(other, asked_at) for other in self._loaded()}
        residents = [_resident(other) for other in self._loaded()]
        quiet = {other.spec.id for other in self._loaded() if other.uses and not other.running}
        quiet |= {model for model, wait_s in settles_in_s.items() if wait_s <= 0}

        def choose(among: list[Resident]) -> Room | None:
            return find_room(need, free_bytes, among, eviction.strategy, entry.stay.priority)

        room = choose([resident for resident in residents if resident.model in quiet])
        if room is None:
            if choose(residents) is None:
                raise self._refusal(entry, need, free_bytes)
            wait_s = min(wait_s for wait_s in settles_in_s.values() if wait_s > 0)
        else:
            wait_s = max(settles_in_s[model] for model in room.victims)
        if room is not None and wait_s <= 0:
            for model in room.victims:
                _log.info("evict model=%s for=%s generation=%d", model, entry.spec.id, self._table.generation)
                await self._table.unload(model, math.inf)
            return
        changed = asyncio.ensure_future(self._table.changed())
        try:
            await asyncio.wait({changed}, timeout=wait_s)
        finally:
            changed.cancel()

    def _loaded(self) -> "list[Entry]":
        return [entry for entry in self._table.entries() if entry.state is ModelState.READY and entry.model is not None]

    def _settles_in_s(self, entry: "Entry", asked_at: float) -> float:
        """Return how long a model still keeps its place; 0 when it may be asked to go."""
        now = time.monotonic()
        if not entry.uses:
            return max(0.0, entry.ready_at + self._patience.hold_s - now)
        left_s = asked_at + self._patience.patience_s - now
        if entry.running:
            return max(0.0, left_s)
        linger_s = min(self._patience.linger_s, entry.load_s)
        return max(0.0, min(left_s, entry.idle_at + linger_s - now))

    def _refusal(self, entry: "Entry", need: Requirement, free_bytes: Mapping[str, int]) -> ApiError:
        message = self._explain(entry, need, free_bytes)
        everything = [replace(_resident(other), pinned=False) for other in self._loaded()]
        if find_room(need, free_bytes, everything) is None:
            return DoesNotFitError(message, need.total_bytes)
        return NoRoomError(f"{message}; what is loaded there is pinned or matters more", retry_after_s=RETRY_AFTER_S)

    def _explain(self, entry: "Entry", need: Requirement, free_bytes: Mapping[str, int]) -> str:
        where = ", ".join(
            f"{device}: needs {need.bytes_on[device] / GIB:.2f} GiB, free {free / GIB:.2f} GiB"
            for device, free in free_bytes.items()
        )
        devices = f" on {need.num_devices} devices" if need.num_devices > 1 else ""
        return f"model does not fit: '{entry.spec.id}'{devices}; {where}"

    def _is_taken(self, device: str) -> bool:
        """Return whether a load is under way in this device's memory; that of CPU devices is the host's, and one."""
        if device.startswith("cpu"):
            return any(taken.startswith("cpu") for taken in self._taking)
        return device in self._taking

    def _is_due(self, device: str) -> bool:
        cycles = self._table.defrag_after_cycles
        return self._recycle is not None and 0 < cycles <= self.unloads.get(device, 0)

    async def _replace(self, device: str) -> None:
        assert self._recycle is not None
        _log.info("recycle device=%s after unloads=%d", device, self.unloads.pop(device, 0))
        await self._recycle(device)


def _resident(entry: "Entry") -> Resident:
    assert entry.model is not None
    loaded, devices = entry.model.loaded, entry.model.devices
    share_bytes = (loaded.weights_bytes + loaded.kv_cache_bytes) // max(1, len(devices))
    return Resident(
        entry.spec.id,
        dict.fromkeys(devices, share_bytes),
        entry.last_used_at,
        entry.stay.priority,
        entry.stay.pinned,
    )
