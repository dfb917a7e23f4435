"""Responses that are made while nobody need wait: begun, looked at, followed, cancelled, by whoever has their id.

A run lives in the gateway that began it and is kept in the store from the start, so that every gateway can tell of it.
What is kept of a running one is a promise with a date: its gateway renews it, and one that has run out is told as
failed, for then that gateway is gone. A wish to cancel that reaches another gateway is written into the store, where
the run finds it. SSE events are numbered from 0, one by one, which is what lets a reader go on where it stopped.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

import msgspec
import orjson

from cortex._fast.peek import peek
from cortex._fast.sse import SseDecoder, SseEventTooLarge, encode
from cortex.dialects.passthrough import responses_failure
from cortex.errors import GatewayStoppedError, NotAnAnswerError, TooLongAnswerError
from cortex.store.conversation import Conversations, PendingResponse
from cortex.store.interface import StoredResponse
from cortex.store.items import check_output
from cortex.supervise import Supervisor
from cortex.wire.errors import ApiError, InvalidRequestError, UnsupportedParameterError
from cortex.wire.responses_events import LAST

log = logging.getLogger("cortex.background")

LEASE_S = 30.0
RENEW_S = 2.0
"""How long a promise holds, and how often it is renewed; a cancellation elsewhere takes effect within the second."""

LOOK_S = 0.5
"""How often the store is asked for a run of another gateway that somebody follows."""

MAX_BYTES = 64 * 1024 * 1024
"""Of the events of one response, as of an answer that is not streamed."""


class _Told(msgspec.Struct):
    response: dict[str, msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET

    @property
    def status(self) -> str:
        if self.response is msgspec.UNSET:
            return ""
        return msgspec.json.decode(self.response.get("status", msgspec.Raw(b'""')), type=str)

    def __post_init__(self) -> None:
        if self.response is not msgspec.UNSET and not self.status:
            raise ValueError("a response without a status")


_ENDS = frozenset({"completed", "incomplete", "failed", "cancelled"})
_EVENT = msgspec.json.Decoder(_Told)


class Run:
    """One response being made."""

    def __init__(self, id: str, response: bytes, owned: Conversations) -> None:
        self.id = id
        self.owned = owned
        """The stored responses that it is one of."""
        self.response = response
        """The response object as it is now."""
        self.sse_events: list[bytes] = []
        self.ended = False
        self.making: asyncio.Task[None] | None = None
        """What makes it; none of one that another gateway makes."""
        self._num_published = 0
        self._size_bytes = 0
        self._is_kept = False
        self._decoder = SseDecoder(MAX_BYTES)
        self._changed = asyncio.Event()

    def add(self, data: bytes) -> None:
        """Take some whole SSE events. Those that end it are told once it has been kept: it may be continued then."""
        for sse_event in self._decoder.feed(data):
            if self.ended:
                break  # nothing follows the last one
            self._size_bytes += len(sse_event.data)
            if self._size_bytes > MAX_BYTES:
                raise TooLongAnswerError(f"The response is longer than the {MAX_BYTES} bytes that are kept of one.")
            peek(sse_event.data)  # all of it is JSON, which is read again and again
            event = _EVENT.decode(sse_event.data)
            ended = (sse_event.event or b"").decode("latin-1") in LAST
            if ended and event.status not in _ENDS:
                raise NotAnAnswerError("The node ended a response without saying how it ended.")
            if event.response is not msgspec.UNSET:
                response = msgspec.json.encode(event.response)
                if ended:
                    check_output(response)  # which whoever continues it reads
                self.response = response
            self.sse_events.append(encode(sse_event.data, sse_event.event))
            self.ended = ended
        if not self.ended:
            self._publish()

    def add_all(self, data: bytes) -> None:
        """Take SSE events as :meth:`add` does.

        Raises:
            TooLongAnswerError: they are more than is kept.
            NotAnAnswerError: they are no events of a response.
        """
        try:
            self.add(data)
        except SseEventTooLarge:
            raise TooLongAnswerError(f"The node sent an event of more than {MAX_BYTES} bytes.") from None
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise NotAnAnswerError("The node sent an event that is none of a response.") from None

    def add_stored(self, data: bytes) -> None:
        """Take SSE events that were made here, however long they are: those that ended it, or those that were kept."""
        self._decoder, self._size_bytes = SseDecoder(len(data) + 1), -len(data)
        self.add(data)

    @property
    def is_answer(self) -> bool:
        """Whether it has ended as something that a conversation goes on from."""
        return orjson.loads(self.response)["status"] in ("completed", "incomplete")

    def close(self, **changes: Any) -> None:
        """End without an SSE event that says so, with some fields of the response changed."""
        self.response = orjson.dumps(orjson.loads(self.response) | changes)
        self.ended = True

    def cancel(self) -> None:
        """End its making."""
        assert self.making is not None
        self.making.cancel()

    async def wait(self) -> None:
        """Return when it is made and kept."""
        assert self.making is not None
        await asyncio.wait({self.making})

    def notify_kept(self) -> None:
        """Tell the end, which the store knows now."""
        self._is_kept = True
        self._publish()

    def _publish(self) -> None:
        self._num_published = len(self.sse_events)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """Yield the SSE events behind number ``after``, those to come too."""
        at = after + 1
        while True:
            changed, end = self._changed, self._num_published
            if at < end:
                yield b"".join(self.sse_events[at:end])
                at = end  # and not where they end by now
            elif self._is_kept:
                return
            else:
                await changed.wait()


class Background:
    """The runs of this gateway, and a view of those of others."""

    def __init__(self, clock: Callable[[], float] = time.time, supervisor: Supervisor | None = None) -> None:
        self._clock = clock
        self._supervisor = supervisor or Supervisor()
        self._runs: dict[str, Run] = {}
        self._stopping = False

    async def start(
        self, owned: Conversations, pending: PendingResponse, queued: bytes, sse_events: AsyncGenerator[bytes, None]
    ) -> Run:
        """Begin to make a response. ``queued`` is the object that tells of it before the node does.

        Raises:
            StoreUnavailableError: it cannot be promised.
        """
        run = Run(pending.context.id, queued, owned)
        await owned.put(run.id, self._promise(pending, run), pending.chain)
        run.making = asyncio.create_task(self._make(run, pending, sse_events), name=f"response {run.id}")
        await asyncio.sleep(0)  # nobody can end it before it has begun, so what it holds is always given back
        return run

    async def stop(self) -> None:
        """End every run; those who ask later are told why."""
        self._stopping = True
        await asyncio.gather(*map(self._end, tuple(self._runs.values())))

    async def response(self, owned: Conversations, id: str) -> bytes:
        """Return a response as it is now. Raises :class:`ResponseNotFoundError`, :class:`StoreUnavailableError`."""
        run = self._run(owned, id)
        if run is None:
            return self._body(await owned.get(id))
        if run.ended:
            await run.wait()  # until it is kept
        return run.response

    async def follow(self, owned: Conversations, id: str, after: int) -> AsyncGenerator[bytes, None]:
        """Return the SSE events of a response behind number ``after``, those to come too.

        Raises:
            UnsupportedParameterError: it was not made in the background: nothing is kept of its SSE events.
        """
        run = self._run(owned, id)
        if run is not None:
            return run.follow(after)
        stored = await owned.get(id)
        if not stored.until and not stored.sse_events:
            raise UnsupportedParameterError(
                "Unsupported parameter: 'stream': only a response made in the background is told again as a stream.",
                param="stream",
            )
        return self._follow_elsewhere(owned, id, stored, after)

    async def cancel(self, owned: Conversations, id: str) -> bytes:
        """End a response, wherever it is made, and return what it is then; one that has ended stays as it is.

        Raises:
            InvalidRequestError: it was not made in the background.
        """
        run = self._run(owned, id)
        if run is not None:
            await self._end(run)
            return run.response
        stored = await owned.get(id)
        response = orjson.loads(bytes(stored.body))
        if not response.get("background"):
            raise InvalidRequestError("Cannot cancel a synchronous response.", param="response_id")
        if not stored.until:
            return bytes(stored.body)
        cancelled = msgspec.Raw(orjson.dumps(response | {"status": "cancelled"}))
        await owned.put(id, msgspec.structs.replace(stored, body=cancelled, until=0))
        return bytes(cancelled)

    async def end(self, owned: Conversations, id: str) -> None:
        """End a run of this gateway, and return when it has ended; others are left alone."""
        run = self._run(owned, id)
        if run is not None:
            await self._end(run)

    def _run(self, owned: Conversations, id: str) -> Run | None:
        run = self._runs.get(id)
        return run if run is not None and run.owned.owner == owned.owner else None

    async def _end(self, run: Run) -> None:
        if not run.ended:  # one that has is being kept
            run.cancel()
        await run.wait()

    async def _make(self, run: Run, pending: PendingResponse, sse_events: AsyncGenerator[bytes, None]) -> None:
        self._runs[run.id] = run
        renewing = self._supervisor.start("renew responses", lambda: self._renew(run, pending))
        try:
            async with aclosing(sse_events):
                async for some in sse_events:
                    run.add_all(some)
            if not run.ended:
                raise NotAnAnswerError("The node ended its answer without saying how the response ended.")
        except ApiError as error:
            self._fail(run, error)
        except asyncio.CancelledError:
            if self._stopping:
                self._fail(run, GatewayStoppedError("The gateway was stopped while it made the response."))
            else:
                run.close(status="cancelled")
        except Exception:
            log.exception("response %s failed", run.id)
            self._fail(run, ApiError("The gateway failed to answer; its log says why."))
        finally:
            renewing.cancel()
            with suppress(asyncio.CancelledError):
                await renewing
            try:
                await self._keep(run, pending)
            finally:
                run.notify_kept()  # in every case: whoever follows it would wait for ever
                del self._runs[run.id]

    def _fail(self, run: Run, error: ApiError) -> None:
        """End a run with an error, in SSE events that say so unless its own are such that none can go on from them."""
        try:
            run.add_stored(self._failure(run, error))
        except Exception:
            log.exception("response %s has no SSE events that say how it failed", run.id)
        if not run.ended:
            run.close(status="failed", error={"code": error.code, "message": error.message})

    async def _keep(self, run: Run, pending: PendingResponse) -> None:
        try:
            ended = msgspec.structs.replace(
                run.owned.stored(pending, run.response), sse_events=b"".join(run.sse_events)
            )
            if run.is_answer:
                await run.owned.settle(pending, run.id, ended)
            else:
                await run.owned.put(run.id, ended)
        except ApiError:
            pass  # it is in the log
        except Exception:
            log.exception("response %s was not kept", run.id)

    async def _renew(self, run: Run, pending: PendingResponse) -> None:
        """Renew the promise until cancelled, or end the run if somebody wrote that they want it ended."""
        renewed_at = self._clock()
        while True:
            await asyncio.sleep(RENEW_S / 2)
            with suppress(ApiError):
                stored = await run.owned.find(run.id)
                if stored is not None and not stored.until:
                    run.cancel()
                    return
                if self._clock() - renewed_at >= RENEW_S:
                    renewed_at = self._clock()
                    await run.owned.put(run.id, self._promise(pending, run))

    def _promise(self, pending: PendingResponse, run: Run) -> StoredResponse:
        kept = run.owned.stored(pending, run.response)
        return msgspec.structs.replace(kept, until=self._clock() + LEASE_S)

    def _failure(self, run: Run, error: ApiError) -> bytes:
        first = run.sse_events[0] if run.sse_events else b'data: {"response":%b}\n\n' % run.response
        return responses_failure(error.info(), first, run.sse_events[-1] if run.sse_events else b"")

    def _body(self, stored: StoredResponse) -> bytes:
        if not stored.until or self._clock() < stored.until:
            return bytes(stored.body)
        error = {"code": "server_error", "message": "The gateway that made the response is gone."}
        return orjson.dumps(orjson.loads(bytes(stored.body)) | {"status": "failed", "error": error})

    async def _follow_elsewhere(
        self, owned: Conversations, id: str, stored: StoredResponse, after: int
    ) -> AsyncGenerator[bytes, None]:
        """Yield the SSE events of another gateway's response, once it has ended."""
        while stored.until:
            if self._clock() >= stored.until:
                run = Run(id, self._body(stored), owned)
                error = orjson.loads(run.response)["error"]
                yield self._failure(run, GatewayStoppedError(error["message"]))
                return
            await asyncio.sleep(LOOK_S)
            stored = await owned.get(id)
        run = Run(id, bytes(stored.body), owned)
        run.add_stored(stored.sse_events)
        run.notify_kept()
        async for sse_events in run.follow(after):
            yield sse_events
