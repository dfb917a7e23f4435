"""Background responses: started, retrieved, followed and cancelled by id, with no client connected.

A run belongs to the gateway that started it and is in the store from the start, so that every gateway can return it.
The stored entry of a run is a lease: its gateway renews it, and an expired one is returned as failed, since its gateway
is gone. A cancellation at another gateway is written into the store, where the run finds it. SSE events are numbered
from 0, so that a reader can resume.
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
from cortex.dialects.responses.spec import responses_failure
from cortex.errors import GatewayStoppedError, NotAnAnswerError, TooLongAnswerError
from cortex.responses.stored import PendingResponse, StoredResponses, not_stored, output_of
from cortex.store.interface import StoredResponse
from cortex.supervise import Supervisor
from cortex.wire.errors import ApiError, InvalidRequestError, UnsupportedParameterError
from cortex.wire.responses_events import LAST

log = logging.getLogger("cortex.responses")

LEASE_S = 30.0
RENEW_S = 1.0
"""Duration of a lease, and time between renewals, when a cancellation elsewhere takes effect."""

LOOK_S = 0.5
"""Time between reads of the store for a followed run of another gateway."""

MAX_BYTES = 64 * 1024 * 1024
"""Limit of the events of a response, as of one that is not streamed."""


class _Event(msgspec.Struct):
    response: msgspec.Raw = msgspec.Raw(b"")


class _Response(msgspec.Struct):
    status: str


_ENDS = frozenset({"completed", "incomplete", "failed", "cancelled"})
_EVENT = msgspec.json.Decoder(_Event)
_RESPONSE = msgspec.json.Decoder(_Response)


class Run:
    """A response that is being generated."""

    def __init__(self, id: str, response: bytes, owned: StoredResponses) -> None:
        self.id = id
        self.owned = owned
        """The principal's stored responses."""
        self.response = response
        """The response object as it is now."""
        self.output = b"[]"
        """Its output, when it has ended."""
        self.sse_events: list[bytes] = []
        self.ended = False
        self.making: asyncio.Task[None] | None = None
        """Task of the run; ``None`` for a run of another gateway."""
        self._num_published = 0
        self._size_bytes = 0
        self._is_kept = False
        self._decoder = SseDecoder(MAX_BYTES)
        self._changed = asyncio.Event()

    def add(self, data: bytes) -> None:
        """Add whole SSE events. The last ones are published after the response is stored, when it can be continued."""
        for sse_event in self._decoder.feed(data):
            if self.ended:
                break  # nothing follows the last one
            self._size_bytes += len(sse_event.data)
            if self._size_bytes > MAX_BYTES:
                raise TooLongAnswerError(f"The response is longer than the {MAX_BYTES} bytes that are kept of one.")
            peek(sse_event.data)  # all of it must be JSON
            response = bytes(_EVENT.decode(sse_event.data).response)
            status = _RESPONSE.decode(response).status if response else ""
            ended = (sse_event.event or b"").decode("latin-1") in LAST
            if ended and status not in _ENDS:
                raise NotAnAnswerError("The node ended a response without saying how it ended.")
            if response:
                if ended:
                    self.output = output_of(response)  # read by a request that continues it
                self.response = response
            self.sse_events.append(encode(sse_event.data, sse_event.event))
            self.ended = ended
        if not self.ended:
            self._publish()

    def add_all(self, data: bytes) -> None:
        """Add SSE events as :meth:`add` does.

        Raises:
            TooLongAnswerError: the response is too long.
            NotAnAnswerError: they are not events of a response.
        """
        try:
            self.add(data)
        except SseEventTooLarge:
            raise TooLongAnswerError(f"The node sent an event of more than {MAX_BYTES} bytes.") from None
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise NotAnAnswerError("The node sent an event that is none of a response.") from None

    def add_stored(self, data: bytes) -> None:
        """Add SSE events of this gateway or of the store, of any length."""
        self._decoder, self._size_bytes = SseDecoder(len(data) + 1), -len(data)
        self.add(data)

    @property
    def is_answer(self) -> bool:
        """Whether it has ended so that it can be continued."""
        return orjson.loads(self.response)["status"] in ("completed", "incomplete")

    def close(self, **changes: Any) -> None:
        """End without an SSE event, with some fields of the response changed."""
        self.response = self.changed(**changes)
        self.ended = True

    def changed(self, **changes: Any) -> bytes:
        """Return the response with some fields changed."""
        return orjson.dumps(orjson.loads(self.response) | changes)

    def mark_not_stored(self) -> None:
        """Give the response ``store: false``, in its last SSE event too."""
        response = not_stored(self.response)
        if self.sse_events:
            self.sse_events[-1] = self.sse_events[-1].replace(self.response, response, 1)
        self.response = response

    def cancel(self) -> None:
        """Cancel the run."""
        assert self.making is not None
        self.making.cancel()

    async def wait(self) -> None:
        """Wait until the run has ended and is stored."""
        assert self.making is not None
        await asyncio.wait({self.making})

    def publish_end(self) -> None:
        """Publish the end, after the response is stored."""
        self._is_kept = True
        self._publish()

    def _publish(self) -> None:
        self._num_published = len(self.sse_events)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """Yield the SSE events after number ``after``, future ones too."""
        at = after + 1
        while True:
            changed, end = self._changed, self._num_published
            if at < end:
                yield b"".join(self.sse_events[at:end])
                at = end  # not the present end
            elif self._is_kept:
                return
            else:
                await changed.wait()


class Background:
    """The runs of this gateway, and access to those of others."""

    def __init__(self, clock: Callable[[], float] = time.time, supervisor: Supervisor | None = None) -> None:
        self._clock = clock
        self._supervisor = supervisor or Supervisor()
        self._runs: dict[str, Run] = {}
        self._stopping = False

    async def start(
        self, owned: StoredResponses, pending: PendingResponse, queued: bytes, sse_events: AsyncGenerator[bytes, None]
    ) -> Run:
        """Start a run. ``queued`` is the response object before the node has begun.

        Raises:
            StoreUnavailableError: the lease cannot be stored.
        """
        run = Run(pending.context.id, queued, owned)
        await owned.put(run.id, self._lease(pending, run))
        run.making = asyncio.create_task(self._make(run, pending, sse_events), name=f"response {run.id}")
        await asyncio.sleep(0)  # it has begun before it can be cancelled, so that it always releases what it holds
        return run

    async def stop(self) -> None:
        """End every run as failed."""
        self._stopping = True
        await asyncio.gather(*map(self._end, tuple(self._runs.values())))

    async def response(self, owned: StoredResponses, id: str) -> bytes:
        """Return a response as it is now. Raises :class:`ResponseNotFoundError`, :class:`StoreUnavailableError`."""
        run = self._run(owned, id)
        if run is None:
            return self._body(await owned.get(id))
        if run.ended:
            await run.wait()  # until it is stored
        return run.response

    async def follow(self, owned: StoredResponses, id: str, after: int) -> AsyncGenerator[bytes, None]:
        """Return the SSE events of a response after number ``after``, future ones too.

        Raises:
            UnsupportedParameterError: it is not a background response, so that its SSE events are not stored.
        """
        run = self._run(owned, id)
        if run is not None:
            return run.follow(after)
        stored = await owned.get(id)
        if not stored.lease_until and not stored.sse_events:
            raise UnsupportedParameterError(
                "Unsupported parameter: 'stream': only a response made in the background can be streamed again.",
                param="stream",
            )
        return self._follow_elsewhere(owned, id, stored, after)

    async def cancel(self, owned: StoredResponses, id: str) -> bytes:
        """Cancel a response of any gateway, and return it; an ended one stays as it is.

        Raises:
            InvalidRequestError: it is not a background response.
        """
        run = self._run(owned, id)
        if run is not None:
            await self._end(run)
            return run.response
        stored = await owned.get(id)
        response = orjson.loads(stored.body)
        if not response.get("background"):
            raise InvalidRequestError("Cannot cancel a synchronous response.", param="response_id")
        if not stored.lease_until:
            return stored.body
        cancelled = orjson.dumps(response | {"status": "cancelled"})
        await owned.put(id, msgspec.structs.replace(stored, body=cancelled, lease_until=0))
        return cancelled

    async def end(self, owned: StoredResponses, id: str) -> None:
        """Cancel a run of this gateway, and wait for its end; ignore others."""
        run = self._run(owned, id)
        if run is not None:
            await self._end(run)

    def _run(self, owned: StoredResponses, id: str) -> Run | None:
        run = self._runs.get(id)
        return run if run is not None and run.owned.owner == owned.owner else None

    async def _end(self, run: Run) -> None:
        if not run.ended:  # an ended one is being stored
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
                run.publish_end()  # in every case: followers would wait for ever
                del self._runs[run.id]

    def _fail(self, run: Run, error: ApiError) -> None:
        """End a run with an error, with SSE events for it if they can follow the ones before."""
        try:
            run.add_stored(self._failure(run, error))
        except Exception:
            log.exception("response %s has no SSE events that say how it failed", run.id)
        if not run.ended:
            run.close(status="failed", error={"code": error.code, "message": error.message})

    async def _keep(self, run: Run, pending: PendingResponse) -> None:
        """Store the end of a run; where there is no room for it, that it failed."""
        try:
            ended = pending.record(run.response, run.output)
            ended = msgspec.structs.replace(ended, sse_events=b"".join(run.sse_events))
            if run.is_answer:
                await run.owned.settle(pending, run.id, ended)
            else:
                await run.owned.put(run.id, ended)
        except ApiError as error:  # logged already
            run.mark_not_stored()
            failed = Run(run.id, run.changed(output=[]), run.owned)
            failed.add_stored(b"".join(run.sse_events[:-1][:1]))
            self._fail(failed, error)
            stored = pending.record(failed.response, b"[]")
            with suppress(ApiError):
                sse_events = b"".join(failed.sse_events)
                await run.owned.put(run.id, msgspec.structs.replace(stored, sse_events=sse_events))
        except Exception:
            log.exception("response %s was not kept", run.id)

    async def _renew(self, run: Run, pending: PendingResponse) -> None:
        """Renew the lease until cancelled; cancel the run if it has none: it was cancelled or deleted elsewhere."""
        stored = run.response
        while True:
            await asyncio.sleep(RENEW_S)
            with suppress(ApiError):
                if not await run.owned.renew(run.id, self._clock() + LEASE_S):
                    run.cancel()
                    return
                if run.response is not stored and not run.ended:  # it is in progress
                    stored = run.response
                    await run.owned.put(run.id, self._lease(pending, run))

    def _lease(self, pending: PendingResponse, run: Run) -> StoredResponse:
        stored = pending.record(run.response, run.output)
        return msgspec.structs.replace(stored, lease_until=self._clock() + LEASE_S)

    def _failure(self, run: Run, error: ApiError) -> bytes:
        first = run.sse_events[0] if run.sse_events else b'data: {"response":%b}\n\n' % run.response
        return responses_failure(error.info(), first, run.sse_events[-1] if run.sse_events else b"")

    def _body(self, stored: StoredResponse) -> bytes:
        if not stored.lease_until or self._clock() < stored.lease_until:
            return stored.body
        error = {
            "code": "server_error",
            "message": "The gateway that made the response is gone, or could not store its end.",
        }
        return orjson.dumps(orjson.loads(stored.body) | {"status": "failed", "error": error})

    async def _follow_elsewhere(
        self, owned: StoredResponses, id: str, stored: StoredResponse, after: int
    ) -> AsyncGenerator[bytes, None]:
        """Yield the SSE events of another gateway's response, once it has ended."""
        while stored.lease_until:
            if self._clock() >= stored.lease_until:
                run = Run(id, self._body(stored), owned)
                error = orjson.loads(run.response)["error"]
                yield self._failure(run, GatewayStoppedError(error["message"]))
                return
            await asyncio.sleep(LOOK_S)
            stored = await owned.get(id)
        run = Run(id, stored.body, owned)
        run.add_stored(stored.sse_events)
        run.publish_end()
        async for sse_events in run.follow(after):
            yield sse_events
