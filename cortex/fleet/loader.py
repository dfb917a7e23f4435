"""Makes a placement true: a cold load behind the requests that need it.

One load per model at a time, which every request for that model joins; a request that gives up leaves the others and
the load alone. Nothing limits how long a load takes, only how long it makes no progress. The node decides whether it
will: a refusal moves on to the next candidate, and what comes out in the end is a typed error that says what each node
said, and never a 404.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from cortex.errors import LoadFailedError, LoadRefusedError
from cortex.fleet.control import NeuronClient
from cortex.fleet.state import Fleet
from cortex.wire.errors import ApiError, UpstreamError
from cortex.wire.node import ModelSpec, ModelState, ModelStatus

log = logging.getLogger("cortex.fleet")

RETRY_AFTER_S = 5.0
"""Told to clients whose cold load failed for a reason that may pass."""

MAX_ASKS = 3
UNLIMITED_S = 1e8
"""More than three years: what is watched instead is progress."""

REFUSALS = frozenset({400, 413, 422})
"""Statuses with which a node says that asking again will not help."""


class Loader:
    """Loads models on nodes."""

    def __init__(
        self,
        fleet: Fleet,
        neurons: Mapping[str, NeuronClient],
        stall_s: float,
        poll_soon: Callable[[str], None] = lambda node: None,
        on_load: Callable[[str, bool], None] = lambda model, succeeded: None,
    ) -> None:
        self._fleet = fleet
        self._neurons = neurons
        self._stall_s = stall_s
        self._poll_soon = poll_soon
        self._on_load = on_load
        self._loads: dict[str, asyncio.Task[str]] = {}

    async def load(self, spec: ModelSpec, candidates: tuple[str, ...]) -> str:
        """Return the node that has the model ready, after loading it on the first candidate that takes it.

        Joins a load of this model that is under way, whatever candidates that one has.

        Raises:
            LoadRefusedError: every candidate refused for good.
            LoadFailedError: no candidate loaded it, and a later try may succeed.
        """
        task = self._loads.get(spec.id)
        if task is None:
            task = asyncio.create_task(self._load(spec, candidates), name=f"load {spec.id}")
            self._loads[spec.id] = task
            task.add_done_callback(lambda done: self._ended(spec.id, done))
        return await asyncio.shield(task)

    async def stop(self) -> None:
        """Stop waiting for loads. The nodes go on with theirs."""
        tasks = tuple(self._loads.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, model: str, task: asyncio.Task[str]) -> None:
        del self._loads[model]
        if not task.cancelled():
            task.exception()  # seen, even if every waiter has gone

    async def _load(self, spec: ModelSpec, candidates: tuple[str, ...]) -> str:
        errors: list[tuple[str, ApiError]] = []
        for name in candidates:
            log.info("model=%s node=%s load", spec.id, name)
            try:
                status = await self._load_on(name, spec)
            except ApiError as error:
                log.warning("model=%s node=%s load failed status=%d code=%s", spec.id, name, error.status, error.code)
                errors.append((name, error))
                self._poll_soon(name)
                continue
            self._fleet.set_model(name, status)
            self._on_load(spec.id, True)
            log.info("model=%s node=%s ready", spec.id, name)
            return name
        self._on_load(spec.id, False)
        reasons = "; ".join(f"{name}: {error.message}" for name, error in errors)
        message = f"{spec.id} could not be loaded. {reasons}"
        if all(error.status in REFUSALS for _, error in errors):
            raise LoadRefusedError(message, param="model")
        waits = [error.retry_after_s for _, error in errors if error.retry_after_s is not None]
        raise LoadFailedError(message, retry_after_s=min(waits, default=RETRY_AFTER_S))

    async def _load_on(self, name: str, spec: ModelSpec) -> ModelStatus:
        """Load on one node. A connection that breaks is no answer: the node is asked what became of the load."""
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
        """Return what a node says of a model after ``error``, or raise that if it says nothing."""
        try:
            statuses = await self._neurons[name].models()
        except ApiError:
            raise error from None
        for status in statuses:
            if status.id == model and status.state in (ModelState.READY, ModelState.LOADING):
                return status
        raise error

    async def _ask(self, name: str, spec: ModelSpec) -> ModelStatus:
        """Ask one node, and give up on it only when it makes no progress or is down."""
        asked = asyncio.create_task(self._neurons[name].load(spec, timeout_s=UNLIMITED_S))
        try:
            await self._progress_or_end(name, spec.id, asked)
            if asked.done():
                return asked.result()
        finally:
            if not asked.done():
                asked.cancel()
                await asyncio.wait({asked})
        if not self._fleet.state.nodes[name].up:
            raise LoadFailedError(f"{name} went down while it loaded {spec.id}")
        raise LoadFailedError(f"loading {spec.id} made no progress for {self._stall_s:g} s")

    async def _progress_or_end(self, name: str, model: str, asked: "asyncio.Task[ModelStatus]") -> None:
        """Return when ``asked`` is done, or nothing has moved in the node's own account for the stall limit."""
        clock = asyncio.get_running_loop().time
        moved_at = clock()
        seen = self._account(name, model)
        while not asked.done():
            left_s = moved_at + self._stall_s - clock()
            if left_s <= 0 or not self._fleet.state.nodes[name].up:
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
        """Return what a node says of a load: its state, how far it is, what it holds. ``None`` when it is down."""
        status = self._fleet.state.status(name, model)
        return None if status is None else (status.state, status.progress, status.weights_bytes)
