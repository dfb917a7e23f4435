"""Fast path of the plainest requests: from the server to a node and back, waiting for nothing but the node.

:mod:`cortex.fast_path` decides which requests may take it; they are counted, timed and logged as all are. A request
that cannot go on here (no idle connection, a refusal, an answer that breaks off or is large) has not failed: the slow
path continues with its state.
"""

cimport cython

import time
from asyncio import CancelledError, current_task

from cortex._fast.http_client cimport Connection, Listener, Response
from cortex._fast.in_flight cimport InFlightRequests, InFlightRequest
from cortex._fast.record cimport Record
from cortex._fast.watches cimport Watch, Watches

from granian.rsgi import ProtocolClosed

from cortex._fast.peek import PeekError, peek, splice
from cortex.dialects.parameters import forwarded_header as _forwarded_header
from cortex.http_io import ClientDisconnectedError as _ClientDisconnectedError
from cortex.request_body import WHOLE_BYTES as _WHOLE
from cortex.request_body import slow_body as _slow_body
from cortex.wire.errors import ApiError as _ApiError
from cortex.wire.headers import CLIENT_CLOSED_REQUEST as _CLIENT_CLOSED_REQUEST
from cortex.wire.headers import FORWARDED as _FORWARDED
from cortex.wire.headers import REQUEST_ID as _REQUEST_ID_BYTES

cdef enum:
    MAX_ACCESSES = 4096
    MAX_ROUTES = 1024

cdef object monotonic = time.monotonic
cdef str _REQUEST_ID = _REQUEST_ID_BYTES.decode()
cdef Py_ssize_t _WHOLE_BYTES = _WHOLE


@cython.final
cdef class CachedRoute:
    """Route to the node that serves a model, valid while the fleet's state is ``state``.

    ``head`` is the request's head up to the request id.
    """

    cdef object state
    cdef str model
    cdef str node
    cdef object pool
    cdef bytes head
    cdef bint is_alias
    cdef double first_byte_s
    cdef double stall_s

    def __init__(self, state, str model not None, str node not None, pool not None, bytes head not None, bint is_alias,
                 double first_byte_s, double stall_s):
        self.state = state
        self.model = model
        self.node = node
        self.pool = pool
        self.head = head
        self.is_alias = is_alias
        self.first_byte_s = first_byte_s
        self.stall_s = stall_s


@cython.final
cdef class CachedAccess:
    """Cached result of authentication for one path and key, valid while the gateway has these settings and keys.

    ``find`` returns the :class:`CachedRoute` of a model by its name, or ``None``; ``key`` is the key's name; ``known``
    holds the known members of a body. ``read_answer`` returns an answer's usage and finish, or ``None`` for a body that
    is no answer of the ``dialect``. ``hosts`` are the accepted values of ``Host``, ``None`` for any.
    """

    cdef object settings
    cdef object keys
    cdef str dialect
    cdef object read_answer
    cdef str key
    cdef object find
    cdef Py_ssize_t max_body_bytes
    cdef double body_timeout_s
    cdef object known
    cdef set hosts
    cdef dict routes

    def __init__(self, settings, keys, str dialect not None, read_answer, str key not None, find,
                 Py_ssize_t max_body_bytes, double body_timeout_s, known, set hosts):
        self.hosts = hosts
        self.settings = settings
        self.keys = keys
        self.dialect = dialect
        self.read_answer = read_answer
        self.key = key
        self.find = find
        self.max_body_bytes = min(max_body_bytes, _WHOLE_BYTES)
        self.body_timeout_s = body_timeout_s
        self.known = known
        self.routes = {}


@cython.final
cdef class FastPath:
    """State that the fast requests of a process share."""

    cdef object find_access
    cdef object gateway
    cdef object authenticator
    cdef object fleet
    cdef object breakers
    cdef object deaths
    cdef object request_log
    cdef object ending
    cdef Watches watches
    cdef InFlightRequests in_flight
    cdef object loop
    cdef object new_request_id
    cdef bint flushes
    cdef dict accesses

    def __init__(self, *, find_access, gateway, breakers, deaths, ending, watches, new_request_id, bint flushes):
        """``find_access`` returns the :class:`CachedAccess` for a path, a header's name and its value, or ``None``.

        With ``flushes`` an answer is sent only by awaiting the protocol's ``flush``.
        """
        self.find_access = find_access
        self.gateway = gateway
        self.authenticator = gateway.authenticator
        self.fleet = gateway.fleet
        self.in_flight = gateway.fleet.in_flight
        self.breakers = breakers
        self.deaths = deaths
        self.request_log = gateway.request_log
        self.ending = ending
        self.watches = watches
        self.loop = watches.loop
        self.new_request_id = new_request_id
        self.flushes = flushes
        self.accesses = {}

    def begin(self, scope, protocol):
        """Return a fast request, or ``None`` for a request that takes the slow path from its beginning.

        ``scope`` and ``protocol`` are RSGI's, or objects with the members that are used here.
        """
        cdef CachedAccess access
        cdef FastRequest request
        cdef str path, given, name
        cdef tuple place
        if scope.method != "POST":
            return None
        path = scope.path
        headers = scope.headers
        name = "authorization"
        given = headers.get(name)
        if given is None:
            name = "x-api-key"
            given = headers.get(name)
        place = (path, given)
        access = self.accesses.get(place)
        if access is None or access.settings is not self.gateway.settings or access.keys is not self.authenticator.keys:
            access = self.find_access(path, name, given)
            if access is None:
                return None
            if len(self.accesses) >= MAX_ACCESSES:
                self.accesses.clear()
            self.accesses[place] = access
        if self.ending.has_begun or headers.get("traceparent") is not None:
            return None
        # Requests of browsers, and unusual ones, are for the slow path's guard.
        if headers.get("origin") is not None or headers.get("sec-fetch-site") is not None:
            return None
        given = headers.get("content-type")
        if given is not None and given != "application/json":
            return None
        if access.hosts is not None:
            given = headers.get("host")
            if given is None:
                given = getattr(scope, "authority", None)  # as HTTP/2 has it
            if given not in access.hosts:
                return None
        if headers.get("content-encoding") is not None:
            return None
        given = headers.get("content-length")
        if given is None or not given.isdigit() or len(given) > 12 or int(given) > access.max_body_bytes:
            return None
        given = headers.get(_REQUEST_ID)
        request = FastRequest.__new__(FastRequest)
        request.fast_path = self
        request.access = access
        request.protocol = protocol
        request.record = Record(self.new_request_id(None if given is None else given.encode()), access.dialect)
        request.record.key = access.key
        return request


@cython.final
cdef class FastRequest(Listener):
    """Request on the fast path.

    Where it falls back to the slow path, ``record`` is reused, and ``body`` is set if it was read, or ``error`` if
    reading it failed.
    """

    cdef readonly Record record
    cdef readonly bytes body
    cdef readonly object error
    cdef InFlightRequest in_flight_request
    cdef Response response
    cdef FastPath fast_path
    cdef CachedAccess access
    cdef CachedRoute route
    cdef object protocol
    cdef object finished
    cdef object task
    cdef bint is_late
    cdef bint is_answered
    cdef bint has_disconnected

    async def answer(self):
        """Answer the request and return true; return false if the slow path has to answer it."""
        cdef FastPath fast_path = self.fast_path
        cdef Watch watch
        fast_path.ending.num_running += 1
        try:
            self.task = current_task(fast_path.loop)
            # Over ASGI the protocol has its own timeout.
            timer = None if fast_path.flushes else fast_path.loop.call_later(self.access.body_timeout_s, self.cut_off)
            try:
                self.body = await self.protocol()
            except (ProtocolClosed, _ClientDisconnectedError):
                self.end_disconnected()
                return True
            except _ApiError as error:
                self.error = error
                return False
            except CancelledError:
                if not self.is_late or self.task.uncancel():
                    raise
                self.error = _slow_body(None, self.access.body_timeout_s)
                return False
            finally:
                if timer is not None:
                    timer.cancel()
                self.task = None
            if not self.ask():
                return False
            self.finished = fast_path.loop.create_future()
            watch = fast_path.watches.begin(self.protocol, self.disconnect)
            try:
                await self.finished
            except BaseException:  # cancelled, or a bug here
                if self.response is not None:
                    self.give_up()
                    fast_path.request_log.record(self.record)
                raise
            finally:
                watch.end()
            if self.is_answered and fast_path.flushes:
                await self.protocol.flush()
            return self.is_answered or self.has_disconnected
        finally:
            fast_path.ending.num_running -= 1
            fast_path.ending.last_at = monotonic()

    def cut_off(self):
        """Stop waiting for the body."""
        if self.task is not None:
            self.is_late = True
            self.task.cancel()

    cdef bint ask(self) except -1:
        """Send the request to its node; return false where that would have to wait."""
        cdef FastPath fast_path = self.fast_path
        cdef CachedRoute route
        cdef Connection connection
        cdef Record record = self.record
        cdef dict routes = self.access.routes
        cdef bytes body = self.body
        cdef str model
        try:
            found = peek(body, self.access.known)
        except PeekError:
            return False  # the slow path reports it
        model = found.model
        if not model or found.stream or found.unknown or fast_path.breakers or fast_path.deaths:
            return False
        route = routes.get(model)
        if route is None or route.state is not fast_path.fleet.state:
            if len(routes) >= MAX_ROUTES:
                routes.clear()
            route = self.access.find(model)
            if route is None:
                return False
            routes[model] = route
        connection = route.pool.idle_connection()
        if connection is None:
            return False
        if route.is_alias:
            body = splice(body, found, route.model)
        record.model = route.model
        record.node = route.node
        self.route = route
        self.in_flight_request = fast_path.in_flight.add(route.node, route.model)
        self.response = connection.send(
            route.head,
            record.request_id.encode() + b"\r\n",
            body,
            route.first_byte_s,
            route.stall_s,
            route.first_byte_s,  # the same for an answer in one piece
        )
        self.response.listener = self
        return True

    cdef int notify(self, Response response) except -1:
        """Answer once the whole answer has arrived; fall back if it will not, or not in one piece."""
        if self.finished is None or self.finished.done():
            return 0
        if response.connection is None:
            try:
                self.is_answered = self.reply(response)
            except Exception as error:
                self.finished.set_exception(error)
                return 0
        elif not response.status or response.status == 200 and not response.connection.is_paused:
            return 0
        response.listener = None
        self.finished.set_result(None)
        return 0

    cdef bint reply(self, Response response) except -1:
        cdef FastPath fast_path = self.fast_path
        cdef Record record = self.record
        cdef bytes body
        if response.error is not None or response.status != 200:
            return False
        if response.header(b"content-encoding") is not None or not response.chunks:
            return False
        body = response.take()
        read = self.access.read_answer(body)
        if read is None:
            response.untake(body)
            return False
        record.usage, record.finish = read
        record.status = 200
        try:
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                (_REQUEST_ID, record.request_id),
                ("request-id", record.request_id),
            ]
            for name in _FORWARDED:
                value = response.header(name)
                if value is not None:
                    headers.append((name.decode(), _forwarded_header(name, value)))
            self.protocol.response_bytes(200, headers, body)
        finally:
            if fast_path.breakers:
                fast_path.breakers.succeed(self.route.node, self.route.model)
            self.in_flight_request.release()
            self.response = self.in_flight_request = None
            fast_path.request_log.record(record)
        return True

    def disconnect(self):
        """End after the client has disconnected."""
        if not self.finished.done():
            self.has_disconnected = True
            self.give_up()
            self.end_disconnected()
            self.finished.set_result(None)

    def take(self):
        """Return the node, its in-flight request and its response for the slow path; ``None`` if nothing was sent."""
        if self.response is None:
            return None
        taken = self.route.node, self.in_flight_request, self.response
        self.response = self.in_flight_request = None
        return taken

    def give_up(self):
        """Close the answer, unless there is none or the slow path has taken it."""
        if self.response is not None:
            self.response.listener = None
            self.response.close()
            if self.fast_path.breakers:
                self.fast_path.breakers.let_go(self.route.node, self.route.model)
            self.in_flight_request.release()
            self.response = self.in_flight_request = None

    cdef int end_disconnected(self) except -1:
        """Record that the client disconnected."""
        self.record.status, self.record.finish = _CLIENT_CLOSED_REQUEST, "disconnected"
        self.fast_path.request_log.record(self.record)
        return 0
