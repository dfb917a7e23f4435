"""The loader: cold loads, and the requests that wait for them.

There is one load per model at a time, which every request for that model joins; a request that is cancelled leaves the
load alone. A load may take any time while it makes progress. The node accepts or refuses it: after a refusal the next
candidate is tried, and the final error has each node's reason, and is never a 404. Where there are several candidates,
each is first asked to load without eviction, and only if none can is one asked to evict, since a node's measurements
beat the estimates here. A node that the catalogue prefers may evict at once. A load of which two nodes died is tried on
no third, nor again for a while.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping

import msgspec

from cortex.config import EvictionSettings, ModelProfile
from cortex.errors import ConnectionLostError, CutAnswerError, LoadFailedError, LoadRefusedError
from cortex.fleet.control import NeuronClient
from cortex.fleet.deaths import REMEMBER_S, Deaths
from cortex.fleet.refusals import DEATHS
from cortex.fleet.state import Fleet
from cortex.wire.errors import ApiError, UpstreamError
from cortex.wire.node import Eviction, LoadRequest, ModelState, ModelStatus

log = logging.getLogger("cortex.fleet")

RETRY_AFTER_S = 5.0
"""``Retry-After`` of a cold load that failed for a reason that may pass."""

MAX_ASKS = 3
UNLIMITED_S = 1e8
"""More than three years: progress is watched instead."""

NO_ROOM = "no_room"
"""Error code of a node that would have to evict a model."""

REFUSALS = frozenset({400, 413, 422})
"""Statuses of a node that refuses for good."""


class WentDownError(LoadFailedError):
    """A node was lost while it loaded a model."""


class Loader:
    """Loads models on nodes."""

    def __init__(
        self,
        fleet: Fleet,
        neurons: Mapping[str, NeuronClient],
        eviction: EvictionSettings,
        poll_soon: Callable[[str], None] = lambda node: None,
        on_load: Callable[[str, bool], None] = lambda model, succeeded: None,
    ) -> None:
        self._fleet = fleet
        self._neurons = neurons
        self.eviction = eviction
        self._poll_soon = poll_soon
        self._on_load = on_load
        self._loads: dict[str, asyncio.Task[str]] = {}
        self._stopped_by: ApiError | None = None
        self._deaths = Deaths()

    async def load(self, profile: ModelProfile, candidates: tuple[str, ...], *, may_evict: bool = True) -> str:
        """Return the node that has the model ready, after loading it on the first candidate that takes it.

        Joins a load of this model that is under way, whether or not that may evict.

        Raises:
            LoadRefusedError: every candidate refused for good.
            LoadFailedError: no candidate loaded it, and a later try may succeed.
        """
        task = self._loads.get(profile.id)
        if task is None:
            task = asyncio.create_task(self._load(profile, candidates, may_evict), name=f"load {profile.id}")
            self._loads[profile.id] = task
            task.add_done_callback(lambda done: self._ended(profile.id, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._stopped_by is not None and task.cancelled():
                raise self._stopped_by from None
            raise

    async def load_on(
        self, name: str, profile: ModelProfile, *, may_evict: bool = True, evict_for_tokens: int = 0
    ) -> ModelStatus:
        """Load a model on one node, and return when it is ready there.

        ``evict_for_tokens`` is the context for which it evicts others, where the profile demands none.

        Raises:
            LoadFailedError: nodes died of this load, so that it is not tried for a while.
            ApiError: the node refuses or fails, with its own message.
        """
        if self._is_deadly(profile):
            raise LoadFailedError(
                f"Nodes died while they loaded {profile.id}, so that it is not tried again for a while; their logs "
                "say what they died of.",
                retry_after_s=REMEMBER_S,
            )
        log.info("model=%s node=%s load evict=%d", profile.id, name, may_evict)
        asked = self._request(name, profile, may_evict, evict_for_tokens)
        sent_at = time.monotonic()
        try:
            status = await self._load_on(name, asked)
        except ApiError as error:
            log.warning("model=%s node=%s load failed status=%d code=%s", profile.id, name, error.status, error.code)
            if is_death(error):
                self._deaths.record(_identity(profile), sent_at, time.monotonic())
            self._poll_soon(name)
            raise
        self._deaths.forget(_identity(profile))
        self._fleet.set_model(name, status)
        log.info("model=%s node=%s ready generation=%d", profile.id, name, status.generation)
        return status

    def progress(self, model: str) -> float | None:
        """Return the progress of a load that requests of this process wait for; ``None`` if there is none."""
        if model not in self._loads:
            return None
        statuses = (node.models[model] for node in self._fleet.state.listing.get(model, ()))
        return max((s.progress for s in statuses if s.state is ModelState.LOADING), default=0.0)

    def end(self, error: ApiError) -> None:
        """End every wait for a load with ``error``. The loads go on in their nodes."""
        self._stopped_by = error
        for task in self._loads.values():
            task.cancel()

    async def stop(self) -> None:
        """Stop waiting for loads, which go on in their nodes."""
        tasks = tuple(self._loads.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, model: str, task: asyncio.Task[str]) -> None:
        del self._loads[model]
        if not task.cancelled():
            task.exception()  # retrieved, even if no request waits any more

    def _request(self, name: str, profile: ModelProfile, may_evict: bool, evict_for_tokens: int) -> LoadRequest:
        eviction = Eviction(self.eviction.strategy, self.eviction.defrag_after_cycles, evict_for_tokens)
        return LoadRequest(
            **{field: getattr(profile, field) for field in profile.spec().__struct_fields__},
            pinned=name in profile.pinned,
            priority=profile.priority,
            idle_ttl_s=profile.idle_ttl_s,
            evict=eviction if may_evict else None,
        )

    async def _load(self, profile: ModelProfile, candidates: tuple[str, ...], may_evict: bool) -> str:
        errors: dict[str, ApiError] = {}
        wanted = {*profile.pinned, *profile.preferred_nodes}
        attempts = deque((name, may_evict and (len(candidates) == 1 or name in wanted)) for name in candidates)
        while attempts:
            name, evicts = attempts.popleft()
            try:
                await self.load_on(name, profile, may_evict=evicts)
            except ApiError as error:
                errors[name] = error
                if self._is_deadly(profile):
                    break
                if error.code == NO_ROOM and may_evict and not evicts:
                    attempts.append((name, True))
            else:
                self._on_load(profile.id, True)
                return name
        self._on_load(profile.id, False)
        reasons = "; ".join(f"{name}: {error.message}" for name, error in errors.items())
        message = f"{profile.id} could not be loaded. {reasons}"
        if all(error.status in REFUSALS for error in errors.values()):
            raise LoadRefusedError(message, param="model")
        waits = [error.retry_after_s for error in errors.values() if error.retry_after_s is not None]
        raise LoadFailedError(message, retry_after_s=min(waits, default=RETRY_AFTER_S))

    def _is_deadly(self, profile: ModelProfile) -> bool:
        return self._deaths.is_deadly(_identity(profile), time.monotonic())

    async def _load_on(self, name: str, spec: LoadRequest) -> ModelStatus:
        """Load a model on one node. After a connection that breaks, the node is asked for the state of the load."""
        for _ in range(MAX_ASKS):
            try:
                status = await self._ask(name, spec)
            except UpstreamError as error:
                status = await self._status(name, spec.id, error)
                if status.state is ModelState.LOADING:
                    continue
            if status.state is ModelState.READY:
                return status
            raise LoadFailedError(f"{spec.id} is {status.state} after its load: {status.error}")
        raise LoadFailedError(f"the connection broke {MAX_ASKS} times while {spec.id} was loading")

    async def _status(self, name: str, model: str, error: UpstreamError) -> ModelStatus:
        """Return the status of a model after ``error``, or raise that if the node reports none."""
        try:
            statuses = await self._neurons[name].models()
        except ApiError:
            raise error from None
        for status in statuses:
            if status.id == model and status.state in (ModelState.READY, ModelState.LOADING):
                return status
        raise error

    async def _ask(self, name: str, spec: LoadRequest) -> ModelStatus:
        """Send one load to a node, and give up only when it makes no progress or the node is down."""
        neuron = self._neurons.get(name)
        if neuron is None:
            raise LoadFailedError(f"{name} is not a node of this gateway any more")
        asked = asyncio.create_task(neuron.load(spec, timeout_s=UNLIMITED_S))
        try:
            await self._progress_or_end(name, spec.id, asked, neuron.load_stall_s)
            if asked.done():
                return asked.result()
        finally:
            if not asked.done():
                asked.cancel()
                await asyncio.wait({asked})
        if not self._is_up(name):
            raise WentDownError(f"{name} went down while it loaded {spec.id}")
        raise LoadFailedError(f"loading {spec.id} made no progress for {neuron.load_stall_s:g} s")

    def _is_up(self, name: str) -> bool:
        node = self._fleet.state.nodes.get(name)
        return node is not None and node.up

    async def _progress_or_end(self, name: str, model: str, asked: "asyncio.Task[ModelStatus]", stall_s: float) -> None:
        """Return when ``asked`` is done, or the node has reported no progress for the stall limit."""
        clock = asyncio.get_running_loop().time
        moved_at = clock()
        seen = self._account(name, model)
        while not asked.done():
            left_s = moved_at + stall_s - clock()
            if left_s <= 0 or not self._is_up(name):
                return
            changed = asyncio.ensure_future(self._fleet.changed())
            try:
                await asyncio.wait({asked, changed}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            now = self._account(name, model)
            if now != seen:
                seen, moved_at = now, clock()

    def _account(self, name: str, model: str) -> object:
        """Return state, progress and bytes of a load as its node reports them; ``None`` when the node is down."""
        status = self._fleet.state.status(name, model)
        return None if status is None else (status.state, status.progress, status.weights_bytes)


def is_death(error: ApiError) -> bool:
    """Return whether a node, or the process behind it, was lost while it had a load."""
    return isinstance(error, (ConnectionLostError, CutAnswerError, WentDownError)) or error.code in DEATHS


def _identity(profile: ModelProfile) -> bytes:
    """Return the identity of a load, as the bytes of its specification."""
    return msgspec.json.encode(profile.spec())
