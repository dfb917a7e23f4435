"""Eviction of models for a load: one load at a time, on fresh figures, and never at the cost of a running request.

Loads are admitted in order, and memory is given to one at a time, so neither of two loads takes what the other has been
given; loads on different GPUs run side by side. A model is kept until the requests it was loaded for have used it, or
``hold_s`` has passed. An idle model is evicted ``linger_s`` after its last request, so that alternating requests are
served together and not one swap each. A busy one takes requests for ``patience_s`` more; then it drains, however long
that takes, and is unloaded. So every model that is requested gets loaded, and no request is cut.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from cortex.wire.errors import ApiError
from cortex.wire.node import Eviction, ModelState
from neuron.errors import NoDeviceError, NoRoomError
from neuron.harness import Requirement
from neuron.load.entry import Entry
from neuron.load.eviction_plan import EvictionPlan, Resident, plan_eviction
from neuron.load.table import ModelTable
from neuron.models.errors import DoesNotFitError

_log = logging.getLogger("neuron.models")

RETRY_AFTER_S = 5.0
GIB = 1 << 30

Recycle = Callable[[str], Awaitable[None]]
"""Function that replaces the worker of a device on which no model is loaded."""


@dataclass(frozen=True, slots=True)
class EvictionTimeouts:
    """Times for which a loaded model is kept while another one waits for its memory."""

    hold_s: float = 10.0
    """Time from the end of its load to its first request."""
    linger_s: float = 0.5
    """Time after its last request; at most the time that its load took."""
    patience_s: float = 20.0
    """Time for which a busy model accepts further requests."""


class Evictor:
    """Gives each load its devices, evicting models where it may."""

    def __init__(
        self, table: ModelTable, timeouts: EvictionTimeouts | None = None, recycle: Recycle | None = None
    ) -> None:
        self._table = table
        self._timeouts = timeouts or EvictionTimeouts()
        self._recycle = recycle
        self._lock = asyncio.Lock()
        self._loading_on: set[str] = set()
        """Devices with a load in progress: their free memory is not known."""

    @asynccontextmanager
    async def devices_for(self, entry: Entry, need: Requirement) -> AsyncIterator[tuple[str, ...]]:
        """Wait for the lock, evict where needed, and yield the devices to load on; the body is the load.

        Raises:
            NoRoomError: it does not fit beside the loaded models, and none may be evicted.
            DoesNotFitError: it would not fit on empty devices.
            NoDeviceError: no device that it could use takes loads now.
        """
        entry.need = need
        async with self._lock:
            devices = await self._clear(entry, need) if need.bytes_on else ()
            self._loading_on.update(devices)
        try:
            yield devices
        finally:
            self._loading_on.difference_update(devices)
            self._table.note_change()

    def evictable_bytes(self) -> dict[str, int]:
        """Return what the idle models hold of each device that a load of priority 0 may evict."""
        found: dict[str, int] = {}
        for entry in self._loaded():
            resident = _resident(entry)
            if not entry.running and not resident.pinned and resident.priority <= 0:
                for device, size_bytes in resident.bytes_on.items():
                    found[device] = found.get(device, 0) + size_bytes
        return found

    async def tidy(self, idle_s: float) -> None:
        """Replace the workers that are due for it and whose models have been idle for ``idle_s``."""
        for device in [device for device in self._table.unloads if self._is_due(device)]:
            entries = self._table.on_device(device)
            now = time.monotonic()
            is_used = any(entry.running or now - entry.idle_at < idle_s for entry in entries)
            if is_used or self._lock.locked() or self._is_loading_on(device):
                continue
            async with self._lock:
                self._table.lose(device)
                await self._replace(device)
            await self._table.recover(device)

    async def _clear(self, entry: Entry, need: Requirement) -> tuple[str, ...]:
        asked_at = time.monotonic()
        while True:
            available = [device for device in need.bytes_on if not self._is_loading_on(device)]
            for device in available:
                if self._is_due(device) and not self._table.on_device(device):
                    await self._replace(device)
            free_bytes = await entry.harness.free_bytes(available) if available else {}
            plan = plan_eviction(need, free_bytes)
            if plan is not None:
                return plan.devices
            if len(available) < len(
                need.bytes_on
            ):  # do not evict: a device with a load in progress may have memory left
                if any(map(self._is_loading_on, need.bytes_on)):
                    await self._table.changed()
                continue
            if not free_bytes:
                raise NoDeviceError(f"No device can take '{entry.spec.id}' now.", retry_after_s=RETRY_AFTER_S)
            if entry.evict is None:
                raise NoRoomError(self._explain(entry, need, free_bytes), retry_after_s=RETRY_AFTER_S)
            await self._evict_or_wait(entry, entry.evict, need, free_bytes, asked_at)

    async def _evict_or_wait(
        self, entry: Entry, eviction: Eviction, need: Requirement, free_bytes: Mapping[str, int], asked_at: float
    ) -> None:
        """Evict the models of the best plan, or wait until something changes."""
        kept_for_s = {other.spec.id: self._kept_for_s(other, asked_at) for other in self._loaded()}
        residents = [_resident(other) for other in self._loaded()]
        evictable = {other.spec.id for other in self._loaded() if other.uses and not other.running}
        evictable |= {model for model, wait_s in kept_for_s.items() if wait_s <= 0}

        def choose(among: list[Resident]) -> EvictionPlan | None:
            return plan_eviction(need, free_bytes, among, eviction.strategy, entry.retention.priority)

        plan = choose([resident for resident in residents if resident.model in evictable])
        if plan is None:
            if choose(residents) is None:
                raise self._refusal(entry, need, free_bytes)
            wait_s = min(wait_s for wait_s in kept_for_s.values() if wait_s > 0)
        else:
            wait_s = max(kept_for_s[model] for model in plan.to_evict)
        if plan is not None and wait_s <= 0:
            for model in plan.to_evict:
                _log.info("evict model=%s for=%s generation=%d", model, entry.spec.id, self._table.generation)
                await self._table.unload(model, math.inf)
            return
        changed = asyncio.ensure_future(self._table.changed())
        try:
            await asyncio.wait({changed}, timeout=wait_s)
        finally:
            changed.cancel()

    def _loaded(self) -> list[Entry]:
        return [entry for entry in self._table.entries() if entry.state is ModelState.READY and entry.model is not None]

    def _kept_for_s(self, entry: Entry, asked_at: float) -> float:
        """Return how long a model is still kept; 0 when it may be evicted."""
        now = time.monotonic()
        if not entry.uses:
            return max(0.0, entry.ready_at + self._timeouts.hold_s - now)
        left_s = asked_at + self._timeouts.patience_s - now
        if entry.running:
            return max(0.0, left_s)
        linger_s = min(self._timeouts.linger_s, entry.load_s)
        return max(0.0, min(left_s, entry.idle_at + linger_s - now))

    def _refusal(self, entry: Entry, need: Requirement, free_bytes: Mapping[str, int]) -> ApiError:
        message = self._explain(entry, need, free_bytes)
        everything = [replace(_resident(other), pinned=False) for other in self._loaded()]
        if plan_eviction(need, free_bytes, everything) is None:
            return DoesNotFitError(message, need.total_bytes)
        return NoRoomError(f"{message}; what is loaded there is pinned or matters more", retry_after_s=RETRY_AFTER_S)

    def _explain(self, entry: Entry, need: Requirement, free_bytes: Mapping[str, int]) -> str:
        where = ", ".join(
            f"{device}: needs {need.bytes_on[device] / GIB:.2f} GiB, free {free / GIB:.2f} GiB"
            for device, free in free_bytes.items()
        )
        devices = f" on {need.num_devices} devices" if need.num_devices > 1 else ""
        return f"model does not fit: '{entry.spec.id}'{devices}; {where}"

    def _is_loading_on(self, device: str) -> bool:
        """Return whether a load is in progress in this device's memory; all CPU devices share the host's."""
        if device.startswith("cpu"):
            return any(other.startswith("cpu") for other in self._loading_on)
        return device in self._loading_on

    def _is_due(self, device: str) -> bool:
        cycles = self._table.defrag_after_cycles
        return self._recycle is not None and 0 < cycles <= self._table.unloads.get(device, 0)

    async def _replace(self, device: str) -> None:
        assert self._recycle is not None
        _log.info("recycle device=%s after unloads=%d", device, self._table.unloads.pop(device, 0))
        await self._recycle(device)


def _resident(entry: Entry) -> Resident:
    assert entry.model is not None
    loaded, devices = entry.model.loaded, entry.model.devices
    share_bytes = (loaded.weights_bytes + loaded.kv_cache_bytes) // max(1, len(devices))
    return Resident(
        entry.spec.id,
        dict.fromkeys(devices, share_bytes),
        entry.last_used_at,
        entry.retention.priority,
        entry.retention.pinned,
    )
