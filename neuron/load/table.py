"""The models of this node and their states: the one owner of the loaded models.

Each model has one load at a time, which later callers join; an unload drains first, and a load requested meanwhile
waits for its end. ``generation`` grows with every change of a state, so that a decision made on an older view is
recognised. Times that are shown are Unix seconds, times that are compared are monotonic. Devices and evictions of a
load are decided by :mod:`neuron.load.eviction`.

The table is bounded: models that the configuration does not name are forgotten, failed ones after a time, and the
oldest model at rest when the table is full.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from cortex.wire.errors import ApiError, ModelNotFoundError, UnavailableError
from cortex.wire.node import Eviction, ModelSpec, ModelState, ModelStatus
from neuron.errors import (
    GenerationConflictError,
    ModelConflictError,
    ModelFailedError,
    ModelNotReadyError,
    TooManyModelsError,
)
from neuron.harness import Harness, Model, Requirement
from neuron.load.entry import Entry, Retention

_log = logging.getLogger("neuron.models")

Load = Callable[[Entry], Awaitable[Model]]
"""Function that fetches, checks and loads an entry's model (:meth:`neuron.load.loader.Loader.load`)."""
Fetch = Callable[[Entry], Awaitable[None]]
"""Function that downloads an entry's files (:meth:`neuron.load.loader.Loader.fetch`)."""

LOADING_RETRY_AFTER_S = 2.0
FAILED_RETRY_AFTER_S = 30.0
FULL_RETRY_AFTER_S = 5.0


class ModelTable:
    """All entries by id. Call from one event loop."""

    def __init__(
        self,
        load: Load,
        on_leave: Callable[[str], None] = lambda model: None,
        *,
        fetch: Fetch | None = None,
        max_models: int = 256,
        failed_kept_s: float = 600.0,
    ) -> None:
        """``on_leave`` is called with the name of each model that has been unloaded or forgotten."""
        self._max_models = max_models
        self._failed_kept_s = failed_kept_s
        self._load = load
        self._fetch = fetch
        self._on_leave = on_leave
        self._entries: dict[str, Entry] = {}
        self._changed = asyncio.Event()
        self.generation = time.time_ns() // 1_000_000  # above that of any earlier life of the daemon
        self.defrag_after_cycles = 0
        self.unloads: dict[str, int] = {}
        """Number of models unloaded from each device since its worker was started."""

    def add(self, spec: ModelSpec, harness: Harness, retention: Retention | None = None) -> None:
        """Add a model without loading it."""
        self._entries.setdefault(spec.id, Entry(spec, harness, retention or Retention(), is_configured=True))

    def statuses(self) -> tuple[ModelStatus, ...]:
        """Return every model's status, by name."""
        return tuple(self._entries[name].status() for name in sorted(self._entries))

    def entries(self) -> Iterator[Entry]:
        """Iterate over all entries."""
        return iter(tuple(self._entries.values()))

    def find(self, name: str) -> Entry:
        """Return the entry of a model, or raise :class:`ModelNotFoundError`."""
        entry = self._entries.get(name)
        if entry is None:
            raise ModelNotFoundError(f"The model '{name}' does not exist on this node.", param="model")
        return entry

    @contextmanager
    def use(self, name: str) -> Iterator[Model]:
        """Hold a ready model while a request runs on it, so that an unload waits for it.

        Raises:
            ModelNotFoundError: it is not loaded here.
            ModelFailedError: its last load failed.
            UnavailableError: it is loading, draining or recovering.
        """
        entry = self.find(name)
        if entry.state is ModelState.AVAILABLE:
            raise ModelNotFoundError(f"The model '{name}' is not loaded on this node.", param="model")
        if entry.state is ModelState.FAILED:
            raise ModelFailedError(
                f"The model '{name}' could not be loaded on this node: {entry.error}",
                retry_after_s=FAILED_RETRY_AFTER_S,
            )
        if entry.state is not ModelState.READY or entry.model is None:
            raise ModelNotReadyError(
                f"The model '{name}' is {entry.state} on this node.", retry_after_s=LOADING_RETRY_AFTER_S
            )
        entry.running += 1
        entry.uses += 1
        entry.idle.clear()
        entry.last_used_at = time.time()
        try:
            yield entry.model
        finally:
            entry.running -= 1
            entry.last_used_at, entry.idle_at = time.time(), time.monotonic()
            if entry.running == 0:
                entry.idle.set()
                self.note_change()

    async def load(
        self, spec: ModelSpec, harness: Harness, retention: Retention | None = None, evict: Eviction | None = None
    ) -> ModelStatus:
        """Load a model and return its status once it is ready; join a load that is under way.

        The load continues when a caller is cancelled: others may wait for it. A model that is already loaded is pinned
        if ``retention`` is, never unpinned.

        Raises:
            ApiError: the reason why it could not be loaded.
            ModelConflictError: it is already loaded from another source or with other limits.
            TooManyModelsError: the table is full of models that are loaded, loading or configured.
        """
        retention = retention or Retention()
        entry = self._entries.get(spec.id)
        while entry is not None and (before := entry.leaving or entry.fetching) is not None:
            await asyncio.wait({before})
            entry = self._entries.get(spec.id)
        if evict is not None:
            self.defrag_after_cycles = evict.defrag_after_cycles
        if entry is None or entry.state in {ModelState.AVAILABLE, ModelState.FAILED}:
            need = entry.need if entry is not None and entry.spec == spec else Requirement()
            is_configured = entry is not None and entry.is_configured
            if entry is None:
                self._make_space(spec.id)
            entry = self._entries[spec.id] = Entry(spec, harness, retention, is_configured, evict=evict, need=need)
            self._begin(entry, ModelState.LOADING)
        elif entry.spec != spec:
            raise ModelConflictError(
                f"The model '{spec.id}' is {entry.state} here from '{entry.spec.source}'; unload it first.", param="id"
            )
        elif retention.pinned:
            entry.retention = retention
        if (loading := entry.loading) is not None:
            await asyncio.wait({loading})
            if loading.cancelled():
                raise UnavailableError(f"The load of '{spec.id}' was ended by an unload.", retry_after_s=1.0)
            loading.result()
        return entry.status()

    async def pull(self, spec: ModelSpec, harness: Harness) -> ModelStatus:
        """Download the files of a model, listed from then on, and return its status; join a download or load of it.

        The download continues when a caller is cancelled. Raises as :meth:`load`.
        """
        entry = self._entries.get(spec.id)
        is_new = entry is None
        if entry is None or (entry.is_at_rest() and entry.spec != spec):
            if is_new:
                self._make_space(spec.id)
            is_configured = entry is not None and entry.is_configured
            entry = self._entries[spec.id] = Entry(spec, harness, is_configured=is_configured)
        elif entry.spec != spec:
            raise ModelConflictError(
                f"The model '{spec.id}' is {entry.state} here from '{entry.spec.source}'; unload it first.", param="id"
            )
        if entry.is_at_rest():
            entry.fetching = asyncio.create_task(self._pull(entry, is_new))
            entry.fetching.add_done_callback(lambda task: task.cancelled() or task.exception())
        if (running := entry.fetching or entry.loading) is not None:
            await asyncio.wait({running})
            if running.cancelled():
                raise UnavailableError(f"The download of '{spec.id}' was ended by an unload.", retry_after_s=1.0)
            running.result()
        return entry.status()

    async def _pull(self, entry: Entry, is_new: bool) -> None:
        assert self._fetch is not None
        try:
            await self._fetch(entry)
        except BaseException:
            if is_new and self._entries.get(entry.spec.id) is entry:
                del self._entries[entry.spec.id]
            raise
        finally:
            entry.fetching = None
            self.generation += 1
            self.note_change()

    async def unload(self, name: str, drain_timeout_s: float, generation: int = 0) -> ModelStatus:
        """Let running requests finish for up to ``drain_timeout_s``, then free the model; return its last status.

        The unload continues when its caller is cancelled. A ``generation`` other than 0 must be that of the last load.

        Raises:
            ModelNotFoundError: the table has no such model.
            GenerationConflictError: the model has been loaded again since.
        """
        entry = self.find(name)
        if generation not in {0, entry.generation}:
            raise GenerationConflictError(
                f"'{name}' was loaded again since: generation {entry.generation}, not {generation}.", param="generation"
            )
        for running in (entry.loading, entry.fetching):
            if running is not None:
                running.cancel()
                await asyncio.wait({running})
        if entry.leaving is None and entry.model is not None:
            self._enter(entry, ModelState.DRAINING)
            entry.leaving = asyncio.create_task(self._leave(entry, drain_timeout_s))
        if entry.leaving is not None:
            await asyncio.shield(entry.leaving)
        elif entry.model is None:
            entry.error, entry.progress = None, 0.0
            self._enter(entry, ModelState.AVAILABLE)
        return entry.status()

    async def unload_idle(self) -> list[str]:
        """Unload the models that have been idle for their ``idle_ttl_s``, and return their names."""
        now = time.monotonic()
        due = [
            entry.spec.id
            for entry in self._entries.values()
            if entry.state is ModelState.READY
            and entry.retention.idle_ttl_s > 0
            and not entry.retention.pinned
            and not entry.running
            and now - max(entry.idle_at, entry.ready_at) >= entry.retention.idle_ttl_s
        ]
        for name in due:
            _log.info("idle model=%s", name)
            await self.unload(name, math.inf)
        return due

    def forget(self, name: str) -> None:
        """Remove a model that is not loaded from the table.

        Raises:
            ModelNotFoundError: the table has no such model.
            ModelNotReadyError: it is loaded, loading or draining.
        """
        entry = self.find(name)
        if not entry.is_at_rest():
            raise ModelNotReadyError(f"The model '{name}' is {entry.state} on this node; unload it first.", param="id")
        del self._entries[name]
        self.generation += 1
        self.note_change()
        self._on_leave(name)

    def forget_failed(self) -> list[str]:
        """Forget the models whose load failed and has not been retried since, and return their names."""
        before = time.monotonic() - self._failed_kept_s
        due = [
            entry.spec.id
            for entry in self._entries.values()
            if entry.state is ModelState.FAILED
            and not entry.is_configured
            and entry.is_at_rest()
            and entry.entered_at < before
        ]
        for name in due:
            self.forget(name)
        return due

    def _make_space(self, name: str) -> None:
        """Forget the model that has been at rest for longest if the table is full."""
        if len(self._entries) < self._max_models:
            return
        at_rest = [entry for entry in self._entries.values() if entry.is_at_rest() and not entry.is_configured]
        if not at_rest:
            raise TooManyModelsError(
                f"This node has {len(self._entries)} models, all of them loaded, loading or configured, and keeps at "
                f"most {self._max_models} (max_models): unload one before '{name}'.",
                retry_after_s=FULL_RETRY_AFTER_S,
            )
        self.forget(min(at_rest, key=lambda entry: entry.entered_at).spec.id)

    def pin(
        self, name: str, pinned: bool | None = None, priority: int | None = None, idle_ttl_s: float | None = None
    ) -> ModelStatus:
        """Change the retention of a model; ``None`` leaves a value as it is."""
        entry = self.find(name)
        asked = {"pinned": pinned, "priority": priority, "idle_ttl_s": idle_ttl_s}
        entry.retention = replace(entry.retention, **{key: value for key, value in asked.items() if value is not None})  # type: ignore[arg-type]
        self.note_change()
        return entry.status()

    def lose(self, device: str) -> frozenset[str]:
        """Mark the models of a device whose worker died ``recovering``: they answer 503 until :meth:`recover`.

        Returns the other devices of such models: their workers are useless to the model and may hang, so all are to be
        replaced.
        """
        self.unloads.pop(device, None)
        others: set[str] = set()
        for entry in self.on_device(device):
            if entry.leaving is not None:
                continue
            self._enter(entry, ModelState.RECOVERING)
            if not entry.lost_on and entry.model is not None:
                entry.lost_on.update(entry.model.devices)
                others |= entry.lost_on
            entry.lost_on.add(device)
        return frozenset(others - {device})

    async def recover(self, device: str) -> None:
        """Load the models of a device again on its new worker; return when each is ready or has failed.

        A model on several devices is loaded when the last of them is back.
        """
        recovering = []
        for entry in self.on_device(device):
            entry.lost_on.discard(device)
            if entry.state is ModelState.RECOVERING and not entry.lost_on:
                recovering.append(entry)
                self._begin(entry, ModelState.RECOVERING)
        await asyncio.gather(*(e.loading for e in recovering if e.loading is not None), return_exceptions=True)

    def on_device(self, device: str) -> list[Entry]:
        """Return the entries of the models loaded on a device."""
        return [e for e in self._entries.values() if e.model is not None and device in e.model.devices]

    async def changed(self) -> None:
        """Return when a model has changed its state or become idle."""
        await self._changed.wait()

    def _enter(self, entry: Entry, state: ModelState) -> None:
        entry.state, entry.entered_at = state, time.monotonic()
        self.generation += 1
        self.note_change()

    def note_change(self) -> None:
        """Wake the tasks that wait in :meth:`changed`."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _leave(self, entry: Entry, drain_timeout_s: float) -> None:
        name = entry.spec.id
        try:
            if entry.running:
                try:
                    await asyncio.wait_for(entry.idle.wait(), None if drain_timeout_s == math.inf else drain_timeout_s)
                except TimeoutError:
                    _log.warning("unload model=%s cut %d running requests", name, entry.running)
            model, entry.model = entry.model, None
            assert model is not None
            for device in model.devices:
                self.unloads[device] = self.unloads.get(device, 0) + 1
            await entry.harness.unload(model)
        except ApiError as error:  # the worker that had it is gone, and the model with it
            _log.warning("unload model=%s error=%s", name, error.message)
        finally:
            entry.leaving, entry.error, entry.progress = None, None, 0.0
            self._enter(entry, ModelState.AVAILABLE)
            self._on_leave(name)

    def _begin(self, entry: Entry, state: ModelState) -> None:
        entry.error, entry.progress, entry.uses = None, 0.0, 0
        self._enter(entry, state)
        entry.generation = self.generation
        entry.loading = asyncio.create_task(self._bring_up(entry))
        # The callers that wait get the error; without any, the entry's status holds it.
        entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _bring_up(self, entry: Entry) -> None:
        start = time.monotonic()
        try:
            entry.model = await self._load(entry)
        except BaseException as error:
            entry.model = None
            self._enter(entry, ModelState.FAILED)
            entry.error = error.message if isinstance(error, ApiError) else f"{type(error).__name__}: {error}"
            if isinstance(error, asyncio.CancelledError):
                entry.error = "the load was cancelled"
            _log.error("load failed model=%s error=%s", entry.spec.id, entry.error)
            raise
        finally:
            entry.loading = None
        entry.progress, entry.loaded_at = 1.0, time.time()
        entry.ready_at = entry.idle_at = time.monotonic()
        self._enter(entry, ModelState.READY)
        _log.info("loaded model=%s seconds=%.2f generation=%d", entry.spec.id, entry.ready_at - start, entry.generation)
