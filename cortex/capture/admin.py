"""The operators' endpoints of the capture: begin, end, list, read, remove. Each act is logged with its author."""

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated

import msgspec

from cortex.access.authenticator import LOCAL, principal_of
from cortex.access.keys import KeyRing
from cortex.capture.capture import Capture, CaptureState
from cortex.dialects import fields
from cortex.http_io import Exchange
from cortex.wire.errors import InvalidRequestError, NotFoundError

log = logging.getLogger("cortex.capture")

PATH = "/admin/capture/"
MAX_BODY_BYTES = 1 << 16
MIB = 1 << 20


class NewCapture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/capture``. ``key`` is a key's name; empty: the requests of a gateway without keys."""

    key: str
    seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 600.0
    max_bytes: Annotated[int, msgspec.Meta(ge=1, le=256 * MIB)] = 16 * MIB


class CapturedLine(msgspec.Struct, frozen=True):
    """A captured request in the list."""

    id: str
    at: float
    method: str
    path: str
    status: int
    ended_s: float
    model: str
    is_cut: bool


class CaptureReport(msgspec.Struct, frozen=True):
    """``GET /admin/capture``: the latest capture, if any, and its requests, the oldest first."""

    capture: CaptureState | None
    size_bytes: int
    requests: tuple[CapturedLine, ...]


class CaptureAdmin:
    """The endpoints, after authentication. ``keys`` returns the keys in force."""

    def __init__(self, capture: Capture, keys: Callable[[], KeyRing]) -> None:
        self._capture = capture
        self._keys = keys

    async def show(self, exchange: Exchange) -> None:
        """``GET /admin/capture``."""
        await exchange.reply(200, await asyncio.to_thread(self._report))

    async def begin(self, exchange: Exchange) -> None:
        """``POST /admin/capture``: what was captured before is removed."""
        asked = fields.decode(await exchange.read_body(MAX_BODY_BYTES), NewCapture)
        ring = self._keys()
        names = [LOCAL.name, *(principal.name for principal in ring.by_name())]
        if asked.key not in names and not (asked.key == "" and ring.is_open):
            raise InvalidRequestError(f"There is no key {asked.key!r}; there is: {', '.join(names)}.", param="key")
        self._capture.begin(asked.key, principal_of(exchange.caller).name, asked.seconds, asked.max_bytes)
        await self.show(exchange)

    async def end(self, exchange: Exchange) -> None:
        """``POST /admin/capture/end``: capture nothing more, and keep what was captured for a while."""
        self._capture.end(f"by {principal_of(exchange.caller).name}")
        await self.show(exchange)

    async def remove(self, exchange: Exchange) -> None:
        """``DELETE /admin/capture``: end it, and remove what was captured."""
        self._capture.remove(principal_of(exchange.caller).name)
        await self.show(exchange)

    async def get(self, exchange: Exchange) -> None:
        """``GET /admin/capture/{id}``: one request, whole."""
        id = exchange.path.removeprefix(PATH)
        if id not in self._capture.names():
            raise NotFoundError(f"The request {id!r} is not captured.")
        found = await asyncio.to_thread(self._capture.get, id)
        fields = {"by": principal_of(exchange.caller).name, "id": id}
        log.info("captured request is read", extra={"fields": fields})
        await exchange.reply(200, msgspec.json.encode(found))

    def _report(self) -> bytes:
        lines = []
        for id in self._capture.names():
            found = self._capture.get(id)
            if found is not None:
                model = found.record.get("model", "")
                lines.append(
                    CapturedLine(
                        id, found.at, found.method, found.path, found.status, found.ended_s, model, found.is_cut
                    )
                )
        return msgspec.json.encode(CaptureReport(self._capture.state, self._capture.size_bytes(), tuple(lines)))
