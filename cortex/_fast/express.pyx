"""The express way of the plainest request: from the server to a node and back, with nothing to wait for but the node.

Which requests may go this way :mod:`cortex.express` says; they are counted, timed and written down as all are. A trip
that cannot go on (there is no idle connection, the node refuses, its answer breaks off or is large) has not failed: how
far it has come is kept, and the common way goes on from there.
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
from cortex.dialects.parameters import told as _told
from cortex.http_io import ClientDisconnectedError as _ClientDisconnectedError
from cortex.request_body import WHOLE_BYTES as _WHOLE
from cortex.request_body import slow_body as _slow_body
from cortex.wire.errors import ApiError as _ApiError
from cortex.wire.headers import CLIENT_CLOSED_REQUEST as _CLIENT_CLOSED_REQUEST
from cortex.wire.headers import FORWARDED as _FORWARDED
from cortex.wire.headers import REQUEST_ID as _REQUEST_ID_BYTES

cdef enum:
    MAX_LANES = 4096
    MAX_TARGETS = 1024

cdef object monotonic = time.monotonic
cdef str _REQUEST_ID = _REQUEST_ID_BYTES.decode()
cdef Py_ssize_t _WHOLE_BYTES = _WHOLE


@cython.final
cdef class Target:
    """The node that is asked for a model, for as long as ``state`` is what is known of the fleet.

    ``head`` is all of a request's head up to its id.
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
cdef class Lane:
    """Those who ask at one path with one key, for as long as the gateway has these settings and these keys.

    ``find`` returns the :class:`Target` of a model by its name, or ``None``; ``key`` is the key's name; ``known`` has
    what may be in a body. ``read_answer`` returns an answer's usage and finish, or ``None`` for what is no answer in
    the ``dialect``. ``hosts`` are the values of ``Host`` that may be asked at, ``None`` where any may.
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
    cdef dict targets

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
        self.targets = {}


@cython.final
cdef class Way:
    """What all trips of a process share."""

    cdef object find_lane
    cdef object gateway
    cdef object authenticator
    cdef object fleet
    cdef object breakers
    cdef object deaths
    cdef object book
    cdef object ending
    cdef Watches watches
    cdef InFlightRequests in_flight
    cdef object loop
    cdef object new_request_id
    cdef bint flushes
    cdef dict lanes

    def __init__(self, *, find_lane, gateway, breakers, deaths, ending, watches, new_request_id, bint flushes):
        """``find_lane`` returns the :class:`Lane` for a path, a header's name and its value, or ``None``.

        With ``flushes`` an answer goes out only when the protocol's ``flush`` has been awaited.
        """
        self.find_lane = find_lane
        self.gateway = gateway
        self.authenticator = gateway.authenticator
        self.fleet = gateway.fleet
        self.in_flight = gateway.fleet.in_flight
        self.breakers = breakers
        self.deaths = deaths
        self.book = gateway.book
        self.ending = ending
        self.watches = watches
        self.loop = watches.loop
        self.new_request_id = new_request_id
        self.flushes = flushes
        self.lanes = {}

    def begin(self, scope, protocol):
        """Return a request's trip, or ``None`` if it has to go the common way from its beginning.

        ``scope`` and ``protocol`` are RSGI's, or look like them as far as is asked here.
        """
        cdef Lane lane
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
        lane = self.lanes.get(place)
        if lane is None or lane.settings is not self.gateway.settings or lane.keys is not self.authenticator.keys:
            lane = self.find_lane(path, name, given)
            if lane is None:
                return None
            if len(self.lanes) >= MAX_LANES:
                self.lanes.clear()
            self.lanes[place] = lane
        if self.ending.has_begun or headers.get("traceparent") is not None:
            return None
        # What a browser sends, or says otherwise than every client does, the guard of the common way looks at.
        if headers.get("origin") is not None or headers.get("sec-fetch-site") is not None:
            return None
        given = headers.get("content-type")
        if given is not None and given != "application/json":
            return None
        if lane.hosts is not None:
            given = headers.get("host")
            if given is None:
                given = getattr(scope, "authority", None)  # as HTTP/2 has it
            if given not in lane.hosts:
                return None
        if headers.get("content-encoding") is not None:
            return None
        given = headers.get("content-length")
        if given is None or not given.isdigit() or len(given) > 12 or int(given) > lane.max_body_bytes:
            return None
        given = headers.get(_REQUEST_ID)
        trip = Trip.__new__(Trip)
        (<Trip>trip).way = self
        (<Trip>trip).lane = lane
        (<Trip>trip).protocol = protocol
        (<Trip>trip).record = Record(self.new_request_id(None if given is None else given.encode()), lane.dialect)
        (<Trip>trip).record.key = lane.key
        return trip


@cython.final
cdef class Trip(Listener):
    """One request on the express way.

    Of one that had to leave that way, ``record`` goes on, and the ``body`` is there if it was read, or the ``error``
    that came of reading it.
    """

    cdef readonly Record record
    cdef readonly bytes body
    cdef readonly object error
    cdef InFlightRequest in_flight_request
    cdef Response response
    cdef Way way
    cdef Lane lane
    cdef Target target
    cdef object protocol
    cdef object over
    cdef object task
    cdef bint is_late
    cdef bint is_answered
    cdef bint has_left

    async def answer(self):
        """Answer the request and return true, or return false: it has to go on the common way."""
        cdef Way way = self.way
        cdef Watch watch
        way.ending.num_running += 1
        try:
            self.task = current_task(way.loop)
            # Over ASGI the protocol looks at the clock itself.
            timer = None if way.flushes else way.loop.call_later(self.lane.body_timeout_s, self.cut_off)
            try:
                self.body = await self.protocol()
            except (ProtocolClosed, _ClientDisconnectedError):
                self.end_as_left()
                return True
            except _ApiError as error:
                self.error = error
                return False
            except CancelledError:
                if not self.is_late or self.task.uncancel():
                    raise
                self.error = _slow_body(None, self.lane.body_timeout_s)
                return False
            finally:
                if timer is not None:
                    timer.cancel()
                self.task = None
            if not self.ask():
                return False
            self.over = way.loop.create_future()
            watch = way.watches.begin(self.protocol, self.leave)
            try:
                await self.over
            except BaseException:  # it is being cancelled, or something is wrong here
                if self.response is not None:
                    self.give_up()
                    way.book.note(self.record)
                raise
            finally:
                watch.end()
            if self.is_answered and way.flushes:
                await self.protocol.flush()
            return self.is_answered or self.has_left
        finally:
            way.ending.num_running -= 1
            way.ending.last_at = monotonic()

    def cut_off(self):
        """Wait for the body no longer."""
        if self.task is not None:
            self.is_late = True
            self.task.cancel()

    cdef bint ask(self) except -1:
        """Ask the node, if there is nothing to wait for."""
        cdef Way way = self.way
        cdef Target target
        cdef Connection connection
        cdef Record record = self.record
        cdef dict targets = self.lane.targets
        cdef bytes body = self.body
        cdef str model
        try:
            found = peek(body, self.lane.known)
        except PeekError:
            return False  # which is the common way's to say
        model = found.model
        if not model or found.stream or found.unknown or way.breakers or way.deaths:
            return False
        target = targets.get(model)
        if target is None or target.state is not way.fleet.state:
            if len(targets) >= MAX_TARGETS:
                targets.clear()
            target = self.lane.find(model)
            if target is None:
                return False
            targets[model] = target
        connection = target.pool.idle_connection()
        if connection is None:
            return False
        if target.is_alias:
            body = splice(body, found, target.model)
        record.model = target.model
        record.node = target.node
        self.target = target
        self.in_flight_request = way.in_flight.add(target.node, target.model)
        self.response = connection.send(
            target.head,
            record.request_id.encode() + b"\r\n",
            body,
            target.first_byte_s,
            target.stall_s,
            target.first_byte_s,  # of an answer in one piece they are the same
        )
        self.response.listener = self
        return True

    cdef int told(self, Response response) except -1:
        """Answer if the whole answer is there; have the common way go on if it will not be, or not in one piece."""
        if self.over is None or self.over.done():
            return 0
        if response.connection is None:
            try:
                self.is_answered = self.reply(response)
            except Exception as error:
                self.over.set_exception(error)
                return 0
        elif not response.status or response.status == 200 and not response.connection.is_paused:
            return 0
        response.listener = None
        self.over.set_result(None)
        return 0

    cdef bint reply(self, Response response) except -1:
        cdef Way way = self.way
        cdef Record record = self.record
        cdef bytes body
        if response.error is not None or response.status != 200:
            return False
        if response.header(b"content-encoding") is not None or not response.chunks:
            return False
        body = response.take()
        read = self.lane.read_answer(body)
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
                    headers.append((name.decode(), _told(name, value)))
            self.protocol.response_bytes(200, headers, body)
        finally:
            if way.breakers:
                way.breakers.succeed(self.target.node, self.target.model)
            self.in_flight_request.release()
            self.response = self.in_flight_request = None
            way.book.note(record)
        return True

    def leave(self):
        """End, since the client has gone."""
        if not self.over.done():
            self.has_left = True
            self.give_up()
            self.end_as_left()
            self.over.set_result(None)

    def take(self):
        """Return the node that was asked, its in-flight request and its response, for somebody else to go on; ``None``
        if none was.
        """
        if self.response is None:
            return None
        taken = self.target.node, self.in_flight_request, self.response
        self.response = self.in_flight_request = None
        return taken

    def give_up(self):
        """Let go of the answer, unless there is none or somebody else has it."""
        if self.response is not None:
            self.response.listener = None
            self.response.close()
            if self.way.breakers:
                self.way.breakers.let_go(self.target.node, self.target.model)
            self.in_flight_request.release()
            self.response = self.in_flight_request = None

    cdef int end_as_left(self) except -1:
        """Write down that the client left."""
        self.record.status, self.record.finish = _CLIENT_CLOSED_REQUEST, "disconnected"
        self.way.book.note(self.record)
        return 0
