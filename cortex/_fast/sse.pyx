"""Codec of SSE events: encodes payloads, decodes events from any split of the bytes.

Follows the HTML standard, section 9.2.6 (server-sent events): lines end with LF, CRLF or CR, ``data`` lines of an event
are joined with LF, comments are skipped. ``id`` and ``retry`` serve reconnection, which no dialect here has: ignored.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t
from libc.string cimport memcmp, memcpy

from cortex._fast.buffer cimport Buffer, put

MAX_EVENT_BYTES = 8 * 1024 * 1024


class SseEventTooLarge(ValueError):
    """An SSE event is longer than the reader accepts. The stream cannot be read further."""

    def __init__(self, max_event_bytes):
        super().__init__(f"an SSE event is longer than {max_event_bytes} bytes")
        self.max_event_bytes = max_event_bytes


def encode(bytes data not None, bytes event=None):
    """Return an SSE event that carries ``data``, under an ``event`` name if one is given.

    A line end within ``data`` starts another ``data`` line and arrives as LF. Raises ``ValueError`` for a line end in
    ``event``.
    """
    cdef const uint8_t* text = <const uint8_t*>PyBytes_AS_STRING(data)
    cdef Py_ssize_t length = len(data)
    cdef Py_ssize_t name_bytes = 0
    cdef bytes sse_event
    cdef char* out
    if event is not None:
        _check_one_line(event)
        name_bytes = len(event) + 8
    if scan_line_end(text, text + length) != text + length:
        return _encode_lines(b"data: ", data, event)
    sse_event = PyBytes_FromStringAndSize(NULL, name_bytes + length + 8)
    out = PyBytes_AS_STRING(sse_event)
    if event is not None:
        memcpy(out, b"event: ", 7)
        memcpy(out + 7, PyBytes_AS_STRING(event), name_bytes - 8)
        out[name_bytes - 1] = c"\n"
        out += name_bytes
    memcpy(out, b"data: ", 6)
    memcpy(out + 6, text, length)
    memcpy(out + 6 + length, b"\n\n", 2)
    return sse_event


def comment(bytes text not None):
    """Return an SSE comment, which clients skip: it keeps an idle connection of the OpenAI dialects open."""
    return _encode_lines(b": ", text, None)


cdef int _check_one_line(bytes name) except -1:
    cdef const uint8_t* text = <const uint8_t*>PyBytes_AS_STRING(name)
    if scan_line_end(text, text + len(name)) != text + len(name):
        raise ValueError(f"an event name is one line, not {name!r}")
    return 0


cdef bytes _encode_lines(bytes field, bytes text, bytes event):
    cdef Buffer sse_event = Buffer()
    cdef const uint8_t* line = <const uint8_t*>PyBytes_AS_STRING(text)
    cdef const uint8_t* end = line + len(text)
    cdef const uint8_t* line_end
    if event is not None:
        sse_event.append(b"event: " + event + b"\n")
    while True:
        line_end = scan_line_end(line, end)
        sse_event.append(field)
        put(sse_event, <const char*>line, line_end - line)
        sse_event.append(b"\n")
        if line_end == end:
            sse_event.append(b"\n")
            return sse_event.cut()
        line = sse_next_line(line_end, end)


@cython.final
@cython.freelist(64)
cdef class SseEvent:
    """SSE event: its name (``None`` if it has none) and its data."""

    cdef readonly bytes event
    cdef readonly bytes data

    def __init__(self, bytes event, bytes data not None):
        self.event = event
        self.data = data

    def __eq__(self, other):
        if not isinstance(other, SseEvent):
            return NotImplemented
        return self.event == (<SseEvent>other).event and self.data == (<SseEvent>other).data

    def __hash__(self):
        return hash((self.event, self.data))

    def __repr__(self):
        return f"SseEvent(event={self.event!r}, data={self.data!r})"


@cython.final
cdef class SseDecoder:
    """Incremental decoder of an event stream, for any split of its bytes."""

    cdef Buffer held
    cdef Buffer joined
    cdef size_t max_event_bytes
    cdef size_t resume
    cdef bint started
    cdef bint drop_line_feed

    def __init__(self, size_t max_event_bytes=MAX_EVENT_BYTES):
        self.held = Buffer()
        self.joined = Buffer()
        self.max_event_bytes = max_event_bytes

    def feed(self, bytes data not None):
        """Return the SSE events that ``data`` completes.

        Raises :exc:`SseEventTooLarge` as soon as an SSE event, its blank line included, is longer than the limit; SSE
        events that the same bytes completed before it are lost with the stream.
        """
        cdef list sse_events = []
        cdef const uint8_t* p
        cdef Py_ssize_t length, used
        if self.drop_line_feed and len(data):
            self.drop_line_feed = False
            if PyBytes_AS_STRING(data)[0] == c"\n":
                data = data[1:]
        if self.held.size == 0:
            # The common case: the bytes are read where they lie.
            p = <const uint8_t*>PyBytes_AS_STRING(data)
            length = len(data)
            used = self.read(p, length, sse_events)
            if used < length:
                put(self.held, <const char*>p + used, length - used)
        else:
            self.held.append(data)
            used = self.read(<const uint8_t*>self.held.data, self.held.size, sse_events)
            if used:
                self.held.drop(used)
        return sse_events

    def close(self):
        """Return the bytes of an SSE event that the end of the stream cut off, and start anew; empty after a clean end.
        """
        self.resume = 0
        self.started = False
        self.drop_line_feed = False
        return self.held.cut()

    cdef Py_ssize_t read(self, const uint8_t* p, Py_ssize_t length, list sse_events) except -1:
        """Append the whole SSE events at ``p`` to ``sse_events``; return how many bytes they were."""
        cdef Py_ssize_t used = 0
        cdef size_t event_bytes
        cdef SseEvent sse_event
        while used < length:
            event_bytes = sse_event_length(p + used, length - used, &self.resume, True)
            if (event_bytes or <size_t>(length - used)) > self.max_event_bytes:
                raise SseEventTooLarge(self.max_event_bytes)
            if event_bytes == 0:
                return used
            self.resume = 0
            sse_event = self.parse(p + used, p + used + event_bytes)
            if sse_event is not None:
                sse_events.append(sse_event)
            used += event_bytes
            if used == length and p[used - 1] == c"\r":
                self.drop_line_feed = True
        return used

    cdef SseEvent parse(self, const uint8_t* line, const uint8_t* end):
        cdef const uint8_t* line_end
        cdef const uint8_t* value
        cdef const uint8_t* data = NULL
        cdef const uint8_t* data_end = NULL
        cdef const uint8_t* name = NULL
        cdef const uint8_t* name_end = NULL
        cdef bint several = False
        cdef SseEvent sse_event
        if not self.started:
            self.started = True
            if end - line >= 3 and memcmp(line, b"\xef\xbb\xbf", 3) == 0:
                line += 3
        while line < end:
            line_end = scan_line_end(line, end)
            value = sse_field(line, line_end, b"data", 4)
            if value != NULL:
                if several:
                    put(self.joined, b"\n", 1)
                    put(self.joined, <const char*>value, line_end - value)
                elif data != NULL:
                    several = True
                    self.joined.size = 0
                    put(self.joined, <const char*>data, data_end - data)
                    put(self.joined, b"\n", 1)
                    put(self.joined, <const char*>value, line_end - value)
                else:
                    data = value
                    data_end = line_end
            else:
                value = sse_field(line, line_end, b"event", 5)
                if value != NULL:
                    name = value
                    name_end = line_end
            line = sse_next_line(line_end, end)
        if data == NULL:
            return None
        sse_event = SseEvent.__new__(SseEvent)
        sse_event.event = None
        if name != name_end:
            sse_event.event = PyBytes_FromStringAndSize(<const char*>name, name_end - name)
        if several:
            sse_event.data = self.joined.cut()
        else:
            sse_event.data = PyBytes_FromStringAndSize(<const char*>data, data_end - data)
        return sse_event
