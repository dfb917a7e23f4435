"""From a model's name to an answer that has begun: route, load, ask, and ask another where that can help.

A request is sent again only while nothing of an answer has arrived: after a connection that could not be made or broke
before its first byte, and after a node's 503, 529 or 429. Silence is not retried, for the node may be working. A node
that does not have the model after all is believed, and the request is routed anew. Of dialects it knows which nodes
speak one; an error body is passed on as it is.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

from cortex.config import Timeouts
from cortex.dialects.passthrough import CHAT
from cortex.dialects.translate import told_error
from cortex.errors import ConnectError, ConnectionLostError, NoNodeError, PoolFullError, ReplyError
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.control import read_error
from cortex.fleet.loader import Loader
from cortex.fleet.poller import Poller
from cortex.fleet.router import Busy, Decision, Load, Serve, Unknown, offered_profile, route
from cortex.fleet.state import Fleet, Seat
from cortex.upstream import Header, Pool, Response
from cortex.wire.errors import ApiError, ModelNotFoundError, RemoteError

log = logging.getLogger("cortex.fleet")

MAX_ATTEMPTS = 8
MAX_ERROR_BYTES = 1024 * 1024
BACK_PRESSURE = frozenset({429, 503, 529})


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a node. ``target`` is the path, ``model`` an id, never an alias.

    ``dialect`` must be spoken, unless ``as_chat`` gives the question as a chat, for a node that speaks that.
    """

    model: str
    dialect: str
    target: bytes
    headers: Sequence[Header]
    body: bytes
    is_stream: bool
    as_chat: Callable[[], bytes] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A node's 200, with its body to come. Close it in every case."""

    node: str
    response: Response
    seat: Seat
    is_chat: bool = False
    """Whether the question was asked as a chat, so that this is one."""

    def close(self) -> None:
        """Give the seat back, and the connection up unless the body is complete."""
        self.response.close()
        self.seat.release()


class Dispatcher:
    """Finds a node for each request."""

    def __init__(
        self,
        fleet: Fleet,
        catalogue: Catalogue,
        pools: dict[str, Pool],
        loader: Loader,
        poller: Poller,
        timeouts: Timeouts,
        first_look_s: float,
        on_retry: Callable[[str, str], None] = lambda node, reason: None,
    ) -> None:
        self._fleet = fleet
        self._catalogue = catalogue
        self._pools = pools
        self._loader = loader
        self._poller = poller
        self._timeouts = timeouts
        self._first_look_s = first_look_s
        self._on_retry = on_retry
        self._pins = frozenset(profile.id for profile in catalogue.profiles.values() if profile.pinned)

    def knows(self, model: str) -> bool:
        """Return whether a model is in the catalogue, or on a node even if that is down now."""
        return model in self._catalogue.profiles or model in self._fleet.state.known

    async def first_look(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Return when every node has been polled once or has had the time to be, or as soon as ``enough`` is true."""
        try:
            async with asyncio.timeout(self._first_look_s):
                while not self._fleet.state.complete and not enough():
                    await self._fleet.changed()
        except TimeoutError:
            pass

    async def ask(self, question: Question, on_node: Callable[[str], None]) -> Answer:
        """Return the answer of a node to ``question``; ``on_node`` is told of each node that is tried.

        Raises:
            ModelNotFoundError: nobody offers the model.
            NoNodeError: it cannot be served now.
            ReplyError: a node answered with an error, the last one that was tried.
            ApiError: the load failed, or the last node that was tried could not be reached.
        """
        excluded = frozenset(
            node.name
            for node in self._fleet.state.nodes.values()
            if node.discovery is not None and not _understands(question, node.discovery.dialects)
        )
        last: ApiError | None = None
        for _ in range(MAX_ATTEMPTS):
            node = await self._find(question.model, excluded, last)
            on_node(node)
            # Counted from here on, before the node knows: a burst must not pile onto one replica.
            seat = self._fleet.in_flight.take(node, question.model)
            try:
                is_chat = self._is_asked_as_chat(node, question)
                response = await self._post(node, question, is_chat)
            except (ConnectError, ConnectionLostError, PoolFullError) as error:
                seat.release()
                last = error
                self._on_retry(node, error.code)
                if not isinstance(error, PoolFullError):
                    self._poller.poll_soon(node)
                excluded |= {node}
                continue
            except BaseException:
                seat.release()
                raise
            if response.status == 200:
                return Answer(node, response, seat, is_chat)
            try:
                refusal = await _read_refusal(response, is_chat)
            finally:
                response.close()
                seat.release()
            if refusal.status == ModelNotFoundError.status and refusal.code == ModelNotFoundError.code:
                self._fleet.forget_model(node, question.model)
                last = NoNodeError(f"{node} does not have {question.model} loaded any more.", retry_after_s=1)
            elif refusal.status in BACK_PRESSURE:
                last = refusal
                excluded |= {node}
            else:
                raise refusal
            self._on_retry(node, refusal.code)
        assert last is not None
        raise last

    async def _find(self, model: str, excluded: frozenset[str], last: ApiError | None) -> str:
        """Return a node that has the model ready, loading it if need be."""
        profile = self._catalogue.profiles.get(model)

        def decide() -> Decision:
            in_flight = self._fleet.in_flight.by_node
            return route(self._fleet.state, model, profile, in_flight, excluded, self._pins)

        decision = decide()
        if not isinstance(decision, Serve) and not self._fleet.state.complete:
            # Just started: a node that has not been heard of yet may have the model ready.
            await self.first_look(lambda: isinstance(decide(), Serve))
            decision = decide()
        match decision:
            case Serve(node):
                return node
            case Load(candidates):
                profile = profile or offered_profile(self._fleet.state, model)
                assert profile is not None
                return await self._loader.load(profile.spec(), candidates)
            case Busy(retry_after_s, reason):
                raise last or NoNodeError(f"{reason[0].upper()}{reason[1:]}.", retry_after_s=retry_after_s)
            case Unknown():
                raise last or ModelNotFoundError(f"The model {model!r} does not exist.", param="model")
            case _:
                assert_never(decision)

    def _is_asked_as_chat(self, node: str, question: Question) -> bool:
        """Return whether a node has to be asked in chat, which it speaks, for want of the question's own dialect."""
        discovery = self._fleet.state.nodes[node].discovery
        return question.as_chat is not None and discovery is not None and question.dialect not in discovery.dialects

    async def _post(self, node: str, question: Question, as_chat: bool) -> Response:
        timeouts = self._timeouts
        return await self._pools[node].request(
            b"POST",
            CHAT.path.encode() if as_chat else question.target,
            question.headers,
            question.as_chat() if as_chat and question.as_chat is not None else question.body,
            first_byte_s=timeouts.first_byte_s if question.is_stream else timeouts.answer_s,
        )


def _understands(question: Question, dialects: Sequence[str]) -> bool:
    return question.dialect in dialects or (question.as_chat is not None and CHAT.name in dialects)


async def _read_refusal(response: Response, is_chat: bool) -> ReplyError | RemoteError:
    """Return a node's error, with its body unless that is in another dialect than the caller's."""
    body = await response.read_all(MAX_ERROR_BYTES)
    retry_after = response.header(b"retry-after")
    status = response.status if response.status >= 400 else 502
    error = read_error(status, body, retry_after)
    if is_chat:
        return RemoteError(told_error(error))
    return ReplyError(
        status,
        body,
        content_type=response.header(b"content-type") or b"application/json",
        code=error.code,
        message=error.message,
        param=error.param,
        retry_after=retry_after,
    )
