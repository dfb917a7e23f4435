"""State machine of an inference request: READ, ROUTE, SEND, HEAD, BODY or STREAM, END.

Where a cached route holds and a connection is idle, everything up to the node's answer happens in one loop iteration.
What has to wait for more than that (a load, a free slot, another attempt) or is not forwarded unchanged is a step in
:mod:`cortex.inference`, which comes back here to stream. SSE events go to the client in the loop iteration in which
they arrive; the request's coroutine wakes only where the client has to be waited for, and at the end.

Headers of a stream are held back for a moment so that an early failure keeps its HTTP status; then they are sent, and
heartbeats fill every silence. A stream has one timer at a time, which compares clock readings; an event sets none.
"""

cimport cython
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME

from cortex._fast.clock cimport seconds_of
from cortex._fast.http_client cimport Connection, Listener, Response
from cortex._fast.in_flight cimport InFlightRequest, InFlightRequests
from cortex._fast.peek cimport Peek
from cortex._fast.record cimport Record
from cortex._fast.response_writer cimport Writer
from cortex.pipeline.node_stream cimport NodeStream

import asyncio
from asyncio import CancelledError, current_task

from cortex import event_stream, tracing
from cortex._fast.peek import splice
from cortex.access.authenticator import UNCOUNTED
from cortex.dialects.parameters import add_header
from cortex.errors import NotAnAnswerError
from cortex.fleet.node_request import NodeResponse
from cortex.fleet.refusals import wrong_head
from cortex.http_io import ClientDisconnectedError
from cortex.request_body import slow_body
from cortex.wire.errors import ApiError, UpstreamTimeoutError
from cortex.wire.headers import CLIENT_CLOSED_REQUEST as _CLIENT_CLOSED_REQUEST
from cortex.wire.headers import FORWARDED as _FORWARDED

cdef enum:
    MAX_ACCESSES = 4096
    MAX_ROUTES = 1024

cdef enum State:
    IDLE        # nothing is sent
    SENT        # to a node, whose head is awaited
    STREAMING   # the node's answer has begun


def tokens_used(Record record not None, reservation, *, bint has_left):
    """Return the tokens that a request costs: the node's counts, or an estimate if the client disconnected before them.

    An unfinished answer that is not streamed costs the tokens reserved for it, which is also the most an estimate
    costs.
    """
    used = record.tokens_used(reservation.need.prompt_tokens)
    if used or not has_left or not record.node:
        return used
    reserved = reservation.reserved_tokens
    return min(reservation.need.prompt_tokens, reserved) if record.is_stream else reserved


@cython.final
cdef class NodeRoute:
    """A node that serves a model: its connections, and a request's head up to the request id."""

    def __init__(self, str name not None, pool not None, bytes head not None):
        self.name = name
        self.pool = pool
        self.head = head
        self.first_byte_s = pool.timeouts.first_byte_s
        self.answer_s = pool.timeouts.answer_s
        self.stall_s = pool.timeouts.stall_s


@cython.final
cdef class CachedRoute:
    """Route of a model, valid while the fleet's state is ``state``: the nodes that serve it, by name.

    ``is_alias``: the name in the body is not the model's id, which replaces it.
    """

    def __init__(self, state, str model not None, bint is_alias, dict nodes not None):
        self.state = state
        self.model = model
        self.is_alias = is_alias
        self.nodes = nodes
        self.only = next(iter(nodes.values())) if len(nodes) == 1 else None


@cython.final
cdef class Access:
    """Access of one principal to one path, valid while the gateway has these settings and keys.

    ``find`` returns the :class:`CachedRoute` of a model by its name, or
    ``None`` where a step has to be awaited first. ``hosts`` are the accepted values of ``Host``, ``None`` for any.
    """

    def __init__(self, settings, keys, dialect not None, principal not None, find, hosts):
        self.settings = settings
        self.keys = keys
        self.dialect = dialect
        self.dialect_name = dialect.name
        self.can_stream = dialect.streams
        self.principal = principal
        self.key = principal.name
        self.expires_s = principal.expires_s
        self.is_limited = not principal.limits.are_none
        self.parameters = dialect.parameters
        self.find = find
        self.hosts = hosts
        self.max_body_bytes = settings.gateway.max_body_bytes
        self.routes = {}


@cython.final
cdef class Pipeline:
    """State that the requests of a process share."""

    def __init__(self, *, find_access, steps, choose, heartbeat, gateway, breakers, deaths):
        """``find_access`` returns the :class:`Access` for a path, a header's name and its value, or ``None``.

        ``steps`` answers a request that cannot be answered at once. ``choose`` returns the node for a request to a
        model with several replicas, with the choice, and ``None`` where that is no matter of a moment. ``heartbeat``
        returns the heartbeat of a dialect's stream.
        """
        self.find_access = find_access
        self.steps = steps
        self.choose = choose
        self.heartbeat = heartbeat
        self.gateway = gateway
        self.authenticator = gateway.authenticator
        self.fleet = gateway.fleet
        self.in_flight = gateway.fleet.in_flight
        self.breakers = breakers
        self.deaths = deaths
        self.request_log = gateway.request_log
        self.accesses = {}

    def begin(self, exchange):
        """Return the request of an exchange, ``None`` for one that the gateway has to examine first.

        Those are the requests of browsers, and all that have no business here.
        """
        cdef Access access
        cdef str given, name
        cdef tuple place
        if exchange.method != "POST":
            return None
        header = exchange.text_header
        name = "authorization"
        given = header(name)
        if given is None:
            name = "x-api-key"
            given = header(name)
        place = (exchange.path, given)
        access = self.accesses.get(place)
        if access is None or access.settings is not self.gateway.settings or access.keys is not self.authenticator.keys:
            access = self.find_access(exchange.path, name, given)
            if access is None:
                return None
            if len(self.accesses) >= MAX_ACCESSES:
                self.accesses.clear()
            self.accesses[place] = access
        if access.expires_s and seconds_of(CLOCK_REALTIME) >= access.expires_s:
            return None
        if header("origin") is not None or header("sec-fetch-site") is not None:
            return None
        given = header("content-type")
        if given is not None and given != "application/json":
            return None
        if access.hosts is not None:
            host = exchange.header(b"host")
            if (None if host is None else host.decode("latin-1")) not in access.hosts:
                return None
        return self.request(exchange, access)

    cpdef Request request(self, exchange, Access access):
        """Return the request of an exchange with this access."""
        cdef Request request = Request.__new__(Request)
        request.pipeline = self
        request.exchange = exchange
        request.access = access
        request.record = Record(exchange.request_id, access.dialect_name)
        request.record.key = access.key
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
        if tracing.is_exporting() or exchange.text_header("traceparent") is not None:
            request.record.trace = tracing.begin(access.dialect_name, exchange.header)
        return request


@cython.final
cdef class Request(Listener):
    """Inference request, from the exchange with its client to its record.

    ``body`` is the client's, ``found`` is what routing needs of it. ``reservation`` is what it holds of its key's
    limits. Steps may read and replace them.
    """

    # ------------------------------------------------------------ READ, ROUTE, END

    async def serve(self):
        """Answer the request, and record it.

        Raises:
            ApiError: it failed before anything was sent.
            ClientDisconnectedError: the client disconnected.
        """
        cdef Access access = self.access
        cdef Record record = self.record
        cdef bint has_left = False
        try:
            reading = self.exchange.read_whole(access.max_body_bytes)
            if reading is None:
                self.body = await self.exchange.read_body(access.max_body_bytes)
            else:
                self.task = current_task(self.pipeline.loop)
                timer = self.pipeline.loop.call_later(reading[1], self.cut_off)
                try:
                    self.body = await reading[0]
                except self.exchange.disconnect_error:
                    raise ClientDisconnectedError from None
                except CancelledError:
                    if not self.is_late or self.task.uncancel():
                        raise
                    self.exchange.is_last = self.exchange.is_last or self.exchange.is_alone
                    raise slow_body(None, self.exchange.body_timeout_s) from None
                finally:
                    timer.cancel()
            self.found = access.parameters.read(self.body)
            if not self.find_route():
                await self.pipeline.steps(self)
                return
            if access.is_limited:
                self.reservation = await self.pipeline.authenticator.admit(
                    access.principal, len(self.body), self.found.bounds, generates=access.dialect.generates)
            if not self.send():
                await self.pipeline.steps(self)
            elif record.is_stream:
                await self.stream(self.stream_at_once)
            else:
                await self.until_disconnect(None)
                if self.take_answer():
                    await self.exchange.reply(200, self.answer)
                else:
                    await self.pipeline.steps(self)
        except ClientDisconnectedError:
            has_left = True
            record.status, record.finish = _CLIENT_CLOSED_REQUEST, "disconnected"
            raise
        except ApiError as error:
            # Its node may have been at it for all of `answer_s`.
            has_left = isinstance(error, UpstreamTimeoutError) and not record.is_stream
            record.status, record.finish = error.status, error.code
            raise
        finally:
            self.give_up()
            try:
                if self.reservation is not None and self.reservation is not UNCOUNTED:
                    await self.reservation.settle(tokens_used(record, self.reservation, has_left=has_left))
            finally:
                self.pipeline.request_log.record(record)

    def cut_off(self):
        """Stop waiting for the body."""
        self.is_late = True
        self.task.cancel()

    cdef bint find_route(self) except -1:
        """Return whether the body goes unchanged to a node that is known."""
        cdef Pipeline pipeline = self.pipeline
        cdef Access access = self.access
        cdef CachedRoute route
        cdef str name = self.found.model
        if access.find is None or not name or self.found.unknown or pipeline.breakers or pipeline.deaths:
            return False
        route = access.routes.get(name)
        if route is None or route.state is not pipeline.fleet.state:
            if len(access.routes) >= MAX_ROUTES:
                access.routes.clear()
            route = access.find(name)
            if route is None:
                return False
            access.routes[name] = route
        self.route = route
        self.record.model = route.model
        self.record.is_stream = self.found.stream and access.can_stream
        return True

    # ------------------------------------------------------------ SEND

    cdef bint send(self) except -1:
        """Send the request to its node; return false where that would have to wait."""
        cdef Pipeline pipeline = self.pipeline
        cdef CachedRoute route = self.route
        cdef NodeRoute node = route.only
        cdef Connection connection
        cdef Record record = self.record
        cdef bytes body = self.body
        cdef bytes lines
        if route.is_alias:
            body = splice(body, self.found, route.model)
        if node is None:
            chosen = pipeline.choose(route.model, body, self.found.prompt_cache_key, self.access.key)
            if chosen is None:
                return False
            node = route.nodes.get(chosen[0])
            if node is None:
                return False
            self.choice = chosen[1]
        connection = node.pool.idle_connection()
        if connection is None:
            return False
        self.sent_body = body
        record.node = node.name
        self.in_flight_request = pipeline.in_flight.add(node.name, route.model)
        lines = record.request_id.encode() + b"\r\n"
        if record.trace is not None:
            lines += b"".join([name + b": " + value + b"\r\n" for name, value in record.trace.headers])
        self.state = SENT
        self.sent_at = seconds_of(CLOCK_MONOTONIC)
        self.response = connection.send(
            node.head,
            lines,
            body,
            node.first_byte_s if record.is_stream else node.answer_s,
            node.stall_s,
            0 if record.is_stream else node.answer_s,
        )
        self.response.listener = self
        return True

    def take_begun(self):
        """Return the node, its in-flight request, its response and the choice; ``None`` if nothing was sent.

        Another attempt goes on with them.
        """
        if self.state != SENT:
            return None
        taken = self.record.node, self.in_flight_request, self.response, self.choice
        self.response.listener = None
        self.state = IDLE
        self.response = self.in_flight_request = None
        return taken

    cdef int give_up(self) except -1:
        """Close an answer that nobody has taken over; let go of all that refers to this request."""
        if self.state == SENT:
            self.response.listener = None
            self.response.close()
            if self.pipeline.breakers:
                self.pipeline.breakers.let_go(self.record.node, self.route.model)
            self.in_flight_request.release()
        self.state = IDLE
        self.response = self.in_flight_request = self.writer = self.keep = self.task = None
        return 0

    # ------------------------------------------------------------ HEAD, from the connection

    cdef int notify(self, Response response) except -1:
        """Go on with what has arrived of the node's answer."""
        if self.waiter is None or self.waiter.done():
            return 0
        try:
            if self.state == SENT:
                if not response.status and response.connection is not None:
                    return 0
                if not self.record.is_stream:
                    # Whole, or not to be had in one piece.
                    if response.connection is None or response.status != 200 or response.connection.is_paused:
                        self.wake(None)
                    return 0
                if not self.accept(response):
                    self.wake(None)
                    return 0
            if self.state == STREAMING:
                self.pump()
        except Exception as error:
            self.fail(error)
        return 0

    cdef bint accept(self, Response response) except -1:
        """Begin with a node's stream; return false for what is none."""
        cdef Pipeline pipeline = self.pipeline
        if response.status != 200 or wrong_head(response, is_stream=True) is not None:
            return False
        self.copy_headers(response)
        if self.choice is not None:
            self.choice.record(self.record.node)
        if pipeline.breakers:
            pipeline.breakers.answer(self.record.node, self.route.model)
        self.answer = NodeResponse(
            self.record.node, response, self.in_flight_request, pipeline.breakers, pipeline.deaths, self.sent_body,
            self.sent_at)
        self.node_stream.response = response
        self.in_flight_request = None
        self.state = STREAMING
        return True

    cpdef object copy_headers(self, Response response):
        """Copy a node's informational headers to the client's response."""
        for name in _FORWARDED:
            value = response.header(name)
            if value is not None:
                add_header(self.exchange.extra_headers, name, value)

    # ------------------------------------------------------------ BODY

    cdef bint take_answer(self) except -1:
        """Take the node's whole answer; return false if it is not one, or has not come in one piece."""
        cdef Response response = self.response
        cdef bytes body
        if response.connection is not None or response.error is not None or response.status != 200 or not response.chunks:
            return False
        if response.header(b"content-encoding") is not None:
            return False
        body = response.take()
        read = self.access.dialect.read(body)
        if read is None:
            response.untake(body)
            return False
        self.record.usage, self.record.finish = read
        self.record.status = 200
        self.copy_headers(response)
        if self.choice is not None:
            self.choice.record(self.record.node)
        if self.pipeline.breakers:
            self.pipeline.breakers.succeed(self.record.node, self.route.model)
        self.in_flight_request.release()
        self.state = IDLE
        self.answer = body
        return True

    async def until_disconnect(self, work):
        """Run the coroutine function ``work``, or wait for the whole answer, ended by the client's disconnect.

        Raises:
            ClientDisconnectedError: the client disconnected; ``work`` has ended by then.
        """
        self.task = current_task(self.pipeline.loop)
        stop_watching = self.exchange.on_disconnect(self.disconnect)
        try:
            if work is None:
                self.waiter = self.pipeline.loop.create_future()
                await self.waiter
            else:
                await work()
        except CancelledError:
            if not self.has_disconnected:
                raise
            self.has_disconnected = False
            if self.task.uncancel():
                raise  # cancelled from elsewhere too
            raise ClientDisconnectedError from None
        finally:
            stop_watching()
            if self.has_disconnected:
                self.task.uncancel()

    def disconnect(self):
        """End after the client has disconnected."""
        self.has_disconnected = True
        self.task.cancel()

    # ------------------------------------------------------------ STREAM

    async def stream(self, source):
        """Send the event stream that the coroutine function ``source`` forwards, with heartbeats in its silences.

        Raises:
            ApiError: before the first byte; later it is the end of the stream, in its dialect.
            ClientDisconnectedError: the client disconnected; ``source`` has ended by then.
        """
        if self.node_stream is not None:  # begun at once, and now by steps
            await source()
            return
        loop = self.pipeline.loop
        self.record.status = 200
        self.node_stream = NodeStream(self.record)
        self.begun_s = loop.time()
        self.timer = loop.call_later(event_stream.HOLD_HEADERS_S, self.look)
        self.source = source
        try:
            await self.until_disconnect(self.run_stream)
        finally:
            self.timer.cancel()
            if self.beating is not None:
                self.beating.cancel()
            self.node_stream.record_end(self.access.dialect)
            self.source = None

    async def run_stream(self):
        """Forward the stream, and end it."""
        try:
            await self.source()
        except ApiError as error:
            if self.writer is None:
                raise
            self.record.status, self.record.finish = error.status, error.code
            await self.until_beaten()
            pause = self.write(self.access.dialect.failure(error.info(), self.node_stream.first, self.node_stream.last))
            if pause is not None:
                await pause
        self.timer.cancel()
        await self.until_beaten()
        if self.writer is None:
            self.writer = self.exchange.start_now()
        await self.exchange.finish()

    async def stream_at_once(self):
        """Forward the stream that the node answers with; go on by steps if it answers otherwise."""
        await self.forward_chunks()
        if self.state == SENT:
            await self.pipeline.steps(self)

    async def forward(self, answer, reader=None, keep=None):
        """Forward a node's stream that has begun.

        ``reader`` converts it into the client's dialect; ``keep`` stores its last events and returns them.

        Raises:
            UpstreamError: the stream broke, fell silent or ended before its terminator.
        """
        self.answer = answer
        self.response = self.node_stream.response = answer.response
        self.response.listener = self
        self.reader = reader
        self.keep = keep
        self.state = STREAMING
        await self.forward_chunks()

    async def forward_chunks(self):
        """Forward until the node's stream has ended, or has turned out not to begin."""
        error = None
        try:
            while True:
                self.waiter = self.pipeline.loop.create_future()
                if self.state == STREAMING:
                    self.pump()
                await self.waiter
                pause, self.pause = self.pause, None
                if pause is None:
                    break
                await pause
            if self.state == SENT:
                return
            if self.response.error is not None:
                raise self.response.error
            if self.reader is not None:
                pause = self.push(self.reader.end())
                if pause is not None:
                    await pause
        except BaseException as raised:
            error = raised
        if self.pause is not None:
            self.pause.close()  # it lost the race against a cancellation
            self.pause = None
        self.waiter = None
        if self.answer is not None:
            self.response.listener = None
            self.state = IDLE
            answer, self.answer = self.answer, None
            error = self.node_stream.conclude(answer, error) or self.unkept
        if error is not None:
            raise error

    cdef int pump(self) except -1:
        """Forward what has arrived, as far as the client takes it; wake the coroutine where it has to wait, or end."""
        cdef Response response = self.response
        if self.beating is not None:
            return 0
        while response.chunks:
            data = response.take()
            pause = self.push(data if self.reader is None else self.reader.sse_events(data))
            if pause is not None:
                return self.wake(pause)
        if response.connection is None:
            self.wake(None)
        return 0

    cdef object push(self, bytes data):
        """Write the SSE events that ``data`` completes; return the coroutine to await before more is sent, if any."""
        cdef NodeStream node_stream = self.node_stream
        cdef object pause = None
        cdef bytes sse_events
        sse_events = node_stream.take(data)
        if sse_events:
            if self.keep is not None and node_stream.is_complete:
                pause = self.write_kept(sse_events)
            else:
                pause = self.write(sse_events)
        if node_stream.scanner.malformed or node_stream.trailing_bytes:
            try:
                node_stream.check()
            except NotAnAnswerError:
                if pause is not None:
                    pause.close()
                raise
        return pause

    cdef object write(self, bytes data):
        """Write to the client, after the headers if it is the first; return the coroutine to await, if any."""
        if self.writer is None:
            self.writer = self.exchange.start_now()
        return self.writer.write(data)

    async def write_kept(self, bytes sse_events):
        """Store the response that these events complete, and write them."""
        try:
            sse_events = await self.keep(sse_events)
        except NotAnAnswerError as error:
            self.answer.record_broken(error)
            self.unkept = error
            raise
        pause = self.write(sse_events)
        if pause is not None:
            await pause

    cdef int wake(self, pause) except -1:
        """Wake the coroutine, to await ``pause`` if there is one."""
        self.pause = pause
        if not self.waiter.done():
            self.waiter.set_result(None)
        return 0

    cdef int fail(self, error) except -1:
        """End the coroutine's wait with an error."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_exception(error)
        return 0

    def look(self):
        """Send a heartbeat if it is due, and set the timer of the next one."""
        cdef double written_at = self.begun_s if self.writer is None else self.writer.written_at
        cdef double due_s = event_stream.HEARTBEAT_INTERVAL_S - (self.pipeline.loop.time() - written_at)
        if self.writer is None or due_s <= 0:
            due_s = event_stream.HEARTBEAT_INTERVAL_S
            if self.beating is None and (self.waiter is None or not self.waiter.done()):
                pause = self.write(self.pipeline.heartbeat(self.access.dialect, self.record.model))
                if pause is not None:
                    self.beating = self.pipeline.loop.create_task(pause)
                    self.beating.add_done_callback(self.on_beaten)
        self.timer = self.pipeline.loop.call_later(due_s, self.look)

    def on_beaten(self, task):
        """Go on after a heartbeat that the client had to be waited for."""
        self.beating = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self.fail(error)
        elif self.state == STREAMING and self.waiter is not None and not self.waiter.done():
            try:
                self.pump()
            except Exception as error:
                self.fail(error)

    async def until_beaten(self):
        """Wait for a heartbeat that is being sent."""
        if self.beating is not None:
            await asyncio.wait({self.beating})
