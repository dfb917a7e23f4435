"""A request to a node, and the response that has begun."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from cortex._fast.http_client import Response
from cortex._fast.in_flight import InFlightRequest
from cortex.errors import CutAnswerError, TooLongAnswerError
from cortex.fleet.breaker import Breakers
from cortex.fleet.choice import Choice
from cortex.fleet.deaths import Deaths
from cortex.upstream import Header
from cortex.wire.errors import UpstreamError


class NodeRequest(msgspec.Struct, frozen=True):
    """A request to a node. ``target`` is the path, ``model`` an id, never an alias.

    The node must have ``dialect``, or chat where ``as_chat`` returns the request as a chat.
    """

    model: str
    dialect: str
    target: bytes
    headers: Sequence[Header]
    body: bytes
    is_stream: bool
    is_awaited: bool = True
    """Whether the client reads the stream as it comes; otherwise the whole answer is bounded in time."""
    arrived_at: float = 0.0
    """Time of arrival, by ``time.monotonic``."""
    cache_key: str | None = None
    """The client's ``prompt_cache_key``."""
    principal: str = ""
    """Name of the principal. Prefixes are not shared between principals."""
    as_chat: Callable[[], bytes] | None = None
    priority: int = 0
    """Priority of the request. Below 0: nothing is evicted for it, and it waits for spare capacity."""
    name: str = ""
    """Name of the model in the client's request; empty: its id."""
    on_node: Callable[[str], None] = lambda node: None
    """Callback for each node to which the request is sent."""
    take_begun: Callable[[], tuple[str, InFlightRequest, Response, Choice | None] | None] = lambda: None
    """Function that takes over a request already sent: the node, the request in flight, its response, the choice."""


@dataclass(slots=True)
class NodeResponse:
    """A node's response with status 200, whose body is to come. Close it in every case."""

    node: str
    response: Response
    in_flight_request: InFlightRequest
    breakers: Breakers
    deaths: Deaths
    body: bytes
    """Body of the request."""
    sent_at: float
    is_chat: bool = False
    """Whether the request was sent as a chat, so that the response is one."""
    renamed: str = ""
    """Name of the model to write into the response, where the node has another name for it; empty: none."""
    is_broken: bool = False

    async def read(self, limit_bytes: int) -> bytes:
        """Return the whole body.

        Raises:
            UpstreamError: the body broke off, did not come, or is longer than ``limit_bytes``.
        """
        try:
            return await self.response.read_all(limit_bytes)
        except UpstreamError as error:
            self.record_broken(error)
            raise

    def record_broken(self, error: UpstreamError) -> None:
        """Count a failure of the node, unless the response is only too long, which a request can cause.

        If the node is lost, count a death of the request too.
        """
        self.is_broken = True
        if isinstance(error, TooLongAnswerError):
            self.breakers.let_go(self.node, self.in_flight_request.model)
        else:
            self.breakers.fail(self.node, self.in_flight_request.model, time.monotonic())
        if isinstance(error, CutAnswerError):
            self.record_death()

    def record_death(self) -> None:
        """Count a death of the request."""
        self.is_broken = True
        self.deaths.record(self.body, self.sent_at, time.monotonic())

    def close(self) -> None:
        """Release the request in flight, and close the connection unless the body is complete."""
        if not self.is_broken and self.response.is_complete:
            self.breakers.succeed(self.node, self.in_flight_request.model)
            self.deaths.forget(self.body)
        self.response.close()
        self.in_flight_request.release()
