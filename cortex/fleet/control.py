"""The typed client of a neuron's control plane: discovery, health, models, loads.

Each call is one HTTP exchange, on a pool of connections apart from inference, so that a poll never waits behind it.
Errors are :class:`~cortex.wire.errors.ApiError`, with status and code of the neuron where it sent them.
"""

import asyncio
import logging
from typing import TypeVar

import msgspec

from cortex.config import GatewaySettings, NodeSettings
from cortex.errors import NotAnAnswerError
from cortex.fleet.refusals import MAX_TEXT, read_error
from cortex.settings import read_secret
from cortex.upstream import Pool
from cortex.wire.errors import RemoteError, UpstreamError, UpstreamTimeoutError
from cortex.wire.node import (
    Discovery,
    DrainRequest,
    Fit,
    ForgetRequest,
    Health,
    LoadRequest,
    ModelName,
    ModelSpec,
    ModelState,
    ModelStatus,
    NodeState,
    PinRequest,
    UnloadRequest,
)

T = TypeVar("T")
R = TypeVar("R", ModelStatus, "_Listed")

log = logging.getLogger("cortex.fleet")

MAX_ANSWER_BYTES = 8 * 1024 * 1024
MAX_MODELS = 4096
"""Number of models taken from a node's list, which is kept, compared and shown every few seconds."""
UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError, MemoryError)
"""Exceptions of reading a node's JSON, which may be deep, huge, or no text at all."""
NUM_CONNECTIONS = 64
UNLOAD_TIMEOUT_S = 30.0
"""Timeout of an unload beyond its drain."""
FIT_TIMEOUT_S = 180.0
"""Timeout of a fit, which tries a hub that does not answer five times."""
JSON_HEADERS = ((b"content-type", b"application/json"),)


class NeuronClient:
    """The control plane of one node."""

    def __init__(self, node: NodeSettings, settings: GatewaySettings) -> None:
        self.name = node.name
        quick = msgspec.structs.replace(
            settings, timeouts=msgspec.structs.replace(settings.timeouts, connect_s=settings.polling.timeout_s)
        )
        self._pool = make_pool(node, quick, NUM_CONNECTIONS)
        self._timeout_s = settings.polling.timeout_s
        self._list_problem = ""
        self.load_stall_s = self._pool.timeouts.load_stall_s

    async def discovery(self) -> Discovery:
        """Return the node's host, devices and dialects."""
        return await self._look(b"/discovery", Discovery)

    async def health(self) -> Health:
        """Return the state of the daemon and its workers."""
        health = await self._look(b"/health", Health)
        workers = tuple(
            msgspec.structs.replace(worker, fault=worker.fault[:MAX_TEXT]) if worker.fault else worker
            for worker in health.workers
        )
        return msgspec.structs.replace(health, workers=workers)

    async def models(self) -> tuple[ModelStatus, ...]:
        """Return the valid entries of the node's list of models, of a long list the first."""
        statuses = self._listed((await self._look(b"/models", _ModelList)).models, ModelStatus)
        return tuple(
            msgspec.structs.replace(status, error=status.error[:MAX_TEXT]) if status.error else status
            for status in statuses
        )

    async def load(self, asked: LoadRequest, *, timeout_s: float) -> ModelStatus:
        """Load a model and return when it is ready. The load goes on in the node if the caller stops waiting.

        ``timeout_s`` bounds the wait for the answer; the caller watches the progress, which the node reports elsewhere.
        """
        # On a fresh connection: it is closed only by the node, or by its end.
        return await self._call(b"/models/load", ModelStatus, asked, timeout_s=timeout_s, is_fresh=True)

    async def fit(self, spec: ModelSpec) -> Fit:
        """Return the weights of a source that fit the node best. It asks a hub, and reads headers of files there."""
        return await self._call(b"/models/fit", Fit, spec, timeout_s=FIT_TIMEOUT_S)

    async def pull(self, spec: ModelSpec, *, timeout_s: float) -> ModelStatus:
        """Download the files of a model, and return when they are there. It goes on if the caller stops waiting."""
        return await self._call(b"/models/pull", ModelStatus, spec, timeout_s=timeout_s, is_fresh=True)

    async def unload(self, asked: UnloadRequest) -> ModelStatus:
        """Unload a model and return when it is gone: after its running requests, or the drain timeout."""
        timeout_s = asked.drain_timeout_s + UNLOAD_TIMEOUT_S
        return await self._call(b"/models/unload", ModelStatus, asked, timeout_s=timeout_s)

    async def forget(self, asked: ForgetRequest) -> ModelStatus:
        """Remove a model that is not loaded from the node's list; return its last status."""
        return await self._call(b"/models/forget", ModelStatus, asked, timeout_s=self._timeout_s)

    async def pin(self, asked: PinRequest) -> ModelStatus:
        """Change the pin and retention of a model."""
        return await self._call(b"/models/pin", ModelStatus, asked, timeout_s=self._timeout_s)

    async def drain(self, asked: DrainRequest) -> Health:
        """Have the node stop accepting requests and loads, or accept them again."""
        return await self._call(b"/drain", Health, asked, timeout_s=self._timeout_s)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def _listed(self, rows: tuple[msgspec.Raw, ...], kind: type[R]) -> tuple[R, ...]:
        """Return the rows of a list that can be decoded; others are left out, and logged when they change.

        An invalid row does not make a node fail a poll, since its clients choose the names of models.
        """
        found: list[R] = []
        problem = f"lists {len(rows)} models; the first {MAX_MODELS} are taken" if len(rows) > MAX_MODELS else ""
        for row in rows[:MAX_MODELS]:
            try:
                found.append(msgspec.json.decode(row, type=kind))
            except UNREADABLE as error:
                problem = f"lists a model that cannot be read: {str(error)[:200]}"
        if problem != self._list_problem:
            self._list_problem = problem
            if problem:
                log.warning("node=%s %s", self.name, ascii(problem)[1:-1])
        return tuple({row.id: row for row in found}.values())

    async def _look(self, target: bytes, kind: type[T]) -> T:
        """Get a resource that a daemon has at hand, within the timeout of a poll."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._call(target, kind, timeout_s=self._timeout_s)
        except TimeoutError:
            message = f"{self.name} did not answer {target.decode()} within {self._timeout_s:g} s."
            raise UpstreamTimeoutError(message) from None

    async def _call(
        self,
        target: bytes,
        kind: type[T],
        asked: msgspec.Struct | None = None,
        *,
        timeout_s: float,
        is_fresh: bool = False,
    ) -> T:
        """Post what is ``asked``, or get a resource, and return the answer."""
        response = await self._pool.request(
            b"GET" if asked is None else b"POST",
            target,
            () if asked is None else JSON_HEADERS,
            b"" if asked is None else msgspec.json.encode(asked),
            first_byte_s=timeout_s,
            stall_s=self._timeout_s,
            is_fresh=is_fresh,
        )
        try:
            response.end_within(self._timeout_s)
            answer = await response.read_all(MAX_ANSWER_BYTES)
        finally:
            response.close()
        if response.status != 200:
            status = response.status if 400 <= response.status < 600 else UpstreamError.status
            raise RemoteError(read_error(status, answer, response.header(b"retry-after"))[0])
        try:
            return msgspec.json.decode(answer, type=kind)
        except UNREADABLE as error:
            path, reason = target.decode(), str(error)[:200]
            raise NotAnAnswerError(
                f"{self.name} answered {path} with something else than was asked: {reason}."
            ) from None


class _ModelList(msgspec.Struct, frozen=True):
    models: tuple[msgspec.Raw, ...]


class _Listed(msgspec.Struct, frozen=True):
    id: ModelName


class _Listing(msgspec.Struct, frozen=True):
    data: tuple[msgspec.Raw, ...]


class OpenAIClient(NeuronClient):
    """Another server that speaks OpenAI's dialects, as a node: the models it lists are ready, and it loads none."""

    def __init__(self, node: NodeSettings, settings: GatewaySettings) -> None:
        super().__init__(node, settings)
        self._node = node

    async def discovery(self) -> Discovery:
        """Return the configured dialects, with no devices and no harness, so that nothing is ever placed there."""
        return Discovery(self.name, "", self._node.endpoint, "", None, None, (), (), self._node.dialects)

    async def health(self) -> Health:
        """Return that it is ready; :meth:`models` fails where it is not."""
        return Health(NodeState.READY, 0.0, ())

    async def models(self) -> tuple[ModelStatus, ...]:
        """Return the models it lists, under the names that are offered here."""
        listing = await self._look(b"/v1/models", _Listing)
        there = dict.fromkeys(model.id for model in self._listed(listing.data, _Listed))
        names = self._node.models or dict.fromkeys(there, "")
        return tuple(
            ModelStatus(name, ModelState.READY) for name, other in names.items() if not other or other in there
        )


def make_pool(node: NodeSettings, settings: GatewaySettings, max_connections: int) -> Pool:
    """Return a connection pool of a node, with its secret and its timeouts."""
    return Pool(
        node.name,
        node.endpoint,
        node.timeouts.over(settings.timeouts),
        max_connections,
        secret=read_secret(node.secret_path(settings), "cortex.toml", f"neurons.{node.name}.secret_file"),
        ca_file=node.ca_file,
    )
