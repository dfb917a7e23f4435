"""The control plane of a neuron, typed: what it is, how it is, what it has, and what it should load.

One call, one HTTP exchange, on connections of its own: a poll never waits behind inference. Errors are
:class:`~cortex.wire.errors.ApiError`, those of the neuron with its own status and code.
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
    ForgetRequest,
    Health,
    LoadRequest,
    ModelName,
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
"""Of one node: a list is kept, compared and shown every few seconds."""
UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError, MemoryError)
"""What reading a node's JSON may raise: it may be deep, huge, or no text at all."""
NUM_CONNECTIONS = 64
UNLOAD_TIMEOUT_S = 30.0
"""Beyond the drain itself."""
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
        """Return what the host is."""
        return await self._look(b"/discovery", Discovery)

    async def health(self) -> Health:
        """Return how the daemon is."""
        health = await self._look(b"/health", Health)
        workers = tuple(
            msgspec.structs.replace(worker, fault=worker.fault[:MAX_TEXT]) if worker.fault else worker
            for worker in health.workers
        )
        return msgspec.structs.replace(health, workers=workers)

    async def models(self) -> tuple[ModelStatus, ...]:
        """Return the models it knows: of a long list the first, and none that is not one."""
        statuses = self._listed((await self._look(b"/models", _ModelList)).models, ModelStatus)
        return tuple(
            msgspec.structs.replace(status, error=status.error[:MAX_TEXT]) if status.error else status
            for status in statuses
        )

    async def load(self, asked: LoadRequest, *, timeout_s: float) -> ModelStatus:
        """Ask for a model and return when it is ready. The load goes on in the node if the caller stops waiting.

        ``timeout_s`` bounds the silence of a node that makes progress elsewhere visible; the caller watches that.
        """
        body = msgspec.json.encode(asked)
        # On a connection of its own: what closes that is the node, or the node's end.
        return await self._call(b"POST", b"/models/load", ModelStatus, body, timeout_s=timeout_s, is_fresh=True)

    async def unload(self, asked: UnloadRequest) -> ModelStatus:
        """Unload a model and return when it is gone: after its running requests, or the drain timeout."""
        timeout_s = asked.drain_timeout_s + UNLOAD_TIMEOUT_S
        return await self._call(
            b"POST", b"/models/unload", ModelStatus, msgspec.json.encode(asked), timeout_s=timeout_s
        )

    async def forget(self, asked: ForgetRequest) -> ModelStatus:
        """Take a model that is not loaded off the node's list; return what it was."""
        body = msgspec.json.encode(asked)
        return await self._call(b"POST", b"/models/forget", ModelStatus, body, timeout_s=self._timeout_s)

    async def pin(self, asked: PinRequest) -> ModelStatus:
        """Change how long a model may stay."""
        body = msgspec.json.encode(asked)
        return await self._call(b"POST", b"/models/pin", ModelStatus, body, timeout_s=self._timeout_s)

    async def drain(self, asked: DrainRequest) -> Health:
        """Have the node take no more requests and loads, or take them again."""
        return await self._call(b"POST", b"/drain", Health, msgspec.json.encode(asked), timeout_s=self._timeout_s)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def _listed(self, rows: tuple[msgspec.Raw, ...], kind: type[R]) -> tuple[R, ...]:
        """Return the rows of a list that can be read. What cannot be is logged when it changes, and left out.

        A node is not down for one row: whoever can have it load a model chooses the name.
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
        """Read something that a daemon always has at hand: here the whole exchange is timed."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._call(b"GET", target, kind, timeout_s=self._timeout_s)
        except TimeoutError:
            message = f"{self.name} did not answer {target.decode()} within {self._timeout_s:g} s."
            raise UpstreamTimeoutError(message) from None

    async def _call(
        self,
        method: bytes,
        target: bytes,
        kind: type[T],
        body: bytes = b"",
        *,
        timeout_s: float,
        is_fresh: bool = False,
    ) -> T:
        response = await self._pool.request(
            method,
            target,
            JSON_HEADERS if body else (),
            body,
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
    """Another server that speaks OpenAI's dialects, seen as a node: what it lists is ready, and it loads nothing."""

    def __init__(self, node: NodeSettings, settings: GatewaySettings) -> None:
        super().__init__(node, settings)
        self._node = node

    async def discovery(self) -> Discovery:
        """Return what the configuration says of it: no devices, no harness, so that nothing is ever placed there."""
        return Discovery(self.name, "", self._node.endpoint, "", None, None, (), (), self._node.dialects)

    async def health(self) -> Health:
        """Return that it is ready; whether it is there, :meth:`models` finds out."""
        return Health(NodeState.READY, 0.0, ())

    async def models(self) -> tuple[ModelStatus, ...]:
        """Return what it lists, under the names that are offered here."""
        listing = await self._look(b"/v1/models", _Listing)
        there = dict.fromkeys(model.id for model in self._listed(listing.data, _Listed))
        names = self._node.models or dict.fromkeys(there, "")
        return tuple(
            ModelStatus(name, ModelState.READY) for name, other in names.items() if not other or other in there
        )


def make_pool(node: NodeSettings, settings: GatewaySettings, max_connections: int) -> Pool:
    """Return a pool of connections to a node, with its secret and its timeouts."""
    return Pool(
        node.name,
        node.endpoint,
        node.timeouts.over(settings.timeouts),
        max_connections,
        secret=read_secret(node.secret_path(settings), "cortex.toml", f"neurons.{node.name}.secret_file"),
        ca_file=node.ca_file,
    )
