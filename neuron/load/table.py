"""The models of this node and their states: the one owner of what is loaded here.

Loads are single-flight for each model and joinable; an unload drains first. Times are Unix seconds. The table decides
nothing about devices: that is the harness's, and the worker's.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from cortex.wire.errors import ApiError, ModelNotFoundError, UnavailableError
from cortex.wire.node import ModelSpec, ModelState, ModelStatus
from neuron.errors import ModelConflictError, ModelFailedError
from neuron.harness import Harness, Model

_log = logging.getLogger("neuron.models")

Load = Callable[["Entry"], Awaitable[Model]]
"""Brings an entry's model up: fetches, checks and loads it (:mod:`neuron.load.loader`)."""

LOADING_RETRY_AFTER_S = 2.0
FAILED_RETRY_AFTER_S = 30.0


@dataclass
class Entry:
    """One model on this node."""

    spec: ModelSpec
    harness: Harness
    state: ModelState = ModelState.AVAILABLE
    model: Model | None = None
    progress: float = 0.0
    loaded_at: float = 0.0
    last_used_at: float = 0.0
    running: int = 0
    error: str | None = None
    loading: "asyncio.Task[None] | None" = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def status(self) -> ModelStatus:
        """Return this entry as ``GET /models`` shows it."""
        common = ModelStatus(
            id=self.spec.id,
            state=self.state,
            source=self.spec.source,
            progress=self.progress if self.state in {ModelState.LOADING, ModelState.RECOVERING} else 0.0,
            running=self.running,
            loaded_at=self.loaded_at,
            last_used_at=self.last_used_at,
            error=self.error,
        )
        if self.model is None:
            return common
        loaded = self.model.loaded
        return msgspec.structs.replace(
            common,
            devices=self.model.devices,
            capabilities=self.model.capabilities,
            architecture=loaded.architecture,
            dtype=loaded.dtype,
            context_tokens=loaded.context_tokens,
            max_sequences=loaded.max_sequences,
            weights_bytes=loaded.weights_bytes,
            kv_cache_bytes=loaded.kv_cache_bytes,
        )


class ModelTable:
    """All entries by id. Call from one event loop."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._entries: dict[str, Entry] = {}

    def add(self, spec: ModelSpec, harness: Harness) -> None:
        """Make a model known without loading it."""
        self._entries.setdefault(spec.id, Entry(spec, harness))

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
            raise UnavailableError(
                f"The model '{name}' is {entry.state} on this node.", retry_after_s=LOADING_RETRY_AFTER_S
            )
        entry.running += 1
        entry.idle.clear()
        entry.last_used_at = time.time()
        try:
            yield entry.model
        finally:
            entry.running -= 1
            entry.last_used_at = time.time()
            if entry.running == 0:
                entry.idle.set()

    async def load(self, spec: ModelSpec, harness: Harness) -> ModelStatus:
        """Load a model and return its status once it is ready; join a load that is under way.

        The load goes on when a caller is cancelled: others may wait for it, and the next request will.

        Raises:
            ApiError: why it could not be loaded.
            ModelConflictError: it is here already from another source or with other limits.
        """
        entry = self._entries.get(spec.id)
        if entry is None or entry.state in {ModelState.AVAILABLE, ModelState.FAILED}:
            entry = self._entries[spec.id] = Entry(spec, harness)
            self._begin(entry, ModelState.LOADING)
        elif entry.spec != spec:
            raise ModelConflictError(
                f"The model '{spec.id}' is {entry.state} here from '{entry.spec.source}'; unload it first.", param="id"
            )
        elif entry.state is ModelState.DRAINING:
            raise UnavailableError(f"The model '{spec.id}' is being unloaded.", retry_after_s=LOADING_RETRY_AFTER_S)
        if entry.loading is not None:
            await asyncio.shield(entry.loading)
        return entry.status()

    async def unload(self, name: str, drain_timeout_s: float) -> ModelStatus:
        """Let running requests finish for up to ``drain_timeout_s``, then free the model; returns its last status."""
        entry = self.find(name)
        if entry.loading is not None:
            entry.loading.cancel()
            await asyncio.wait({entry.loading})
        if entry.model is not None and entry.state is not ModelState.DRAINING:
            entry.state = ModelState.DRAINING
            if entry.running:
                try:
                    await asyncio.wait_for(entry.idle.wait(), drain_timeout_s)
                except TimeoutError:
                    _log.warning("unload model=%s cut %d running requests", name, entry.running)
            model, entry.model = entry.model, None
            await entry.harness.unload(model)
        entry.state, entry.error, entry.progress = ModelState.AVAILABLE, None, 0.0
        return entry.status()

    def lose(self, device: str) -> None:
        """Mark the models of a device whose worker died ``recovering``: they answer 503 until :meth:`recover`."""
        for entry in self._on(device):
            entry.state = ModelState.RECOVERING

    async def recover(self, device: str) -> None:
        """Load the models of a device again on its new worker; returns when each is ready or has failed."""
        recovering = [entry for entry in self._on(device) if entry.state is ModelState.RECOVERING]
        for entry in recovering:
            self._begin(entry, ModelState.RECOVERING)
        await asyncio.gather(*(e.loading for e in recovering if e.loading is not None), return_exceptions=True)

    def _on(self, device: str) -> list[Entry]:
        return [e for e in self._entries.values() if e.model is not None and device in e.model.devices]

    def _begin(self, entry: Entry, state: ModelState) -> None:
        entry.state, entry.error, entry.progress = state, None, 0.0
        entry.loading = asyncio.create_task(self._bring_up(entry))
        # Whoever waits sees the error; where no one does, the entry's status holds it.
        entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _bring_up(self, entry: Entry) -> None:
        start = time.monotonic()
        try:
            entry.model = await self._load(entry)
        except BaseException as error:
            entry.model = None
            entry.state = ModelState.FAILED
            entry.error = error.message if isinstance(error, ApiError) else f"{type(error).__name__}: {error}"
            if isinstance(error, asyncio.CancelledError):
                entry.error = "the load was cancelled"
            _log.error("load failed model=%s error=%s", entry.spec.id, entry.error)
            raise
        finally:
            entry.loading = None
        entry.state, entry.progress, entry.loaded_at = ModelState.READY, 1.0, time.time()
        _log.info("loaded model=%s seconds=%.2f", entry.spec.id, time.monotonic() - start)
