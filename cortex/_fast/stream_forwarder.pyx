"""Forwarding of SSE events from a node to a client, compiled where the client can be written to without waiting."""

from cortex._fast.http_client cimport Response, Sink
from cortex._fast.response_writer cimport ResponseWriter
from cortex._fast.record cimport Record

from collections import deque

from cortex._fast.usage_scanner import UsageScanner
from cortex.errors import NotAnAnswerError

TRAILING_S = 2.0
TRAILING_BYTES = 64 * 1024
"""Limit of what may follow a stream's terminator: a comment with the usage, the end of the connection."""

cdef double _TRAILING_S = TRAILING_S
cdef Py_ssize_t _TRAILING_BYTES = TRAILING_BYTES


cdef class StreamForwarder(Sink):
    """Sink that forwards whole SSE events and keeps the first and the last few of them.

    :meth:`push` writes to ``out``, which starts a stream at its first ``write_now`` and then has a ``writer``. Bytes
    after the stream's end are bounded, in number and in time, on the ``response`` that they come from.
    """

    cdef readonly bytes first
    cdef readonly object tail
    cdef readonly Record record
    cdef readonly object scanner
    cdef public object out
    cdef public Response response
    cdef ResponseWriter writer
    cdef Py_ssize_t trailing_bytes

    def __init__(self, Record record not None, Py_ssize_t tail_chunks):
        self.first = b""
        self.tail = deque(maxlen=tail_chunks)
        self.record = record
        self.scanner = UsageScanner(checks=True)

    cpdef bytes take(self, bytes data):
        """Return the whole SSE events that ``data`` completes.

        Raises:
            SseEventTooLarge: one is longer than is read.
        """
        cdef bytes sse_events = self.scanner.feed(data)
        if sse_events:
            if not self.first:
                self.first = sse_events
            self.tail.append(sse_events)
            if self.scanner.first_token:
                self.record.record_first_token()
            if self.scanner.terminated or self.scanner.failed:
                if self.trailing_bytes:
                    self.trailing_bytes += len(sse_events)
                else:
                    self.trailing_bytes = 1
                    if self.response is not None:
                        self.response.end_within(_TRAILING_S)
        return sse_events

    cpdef object check(self):
        """Raise :exc:`NotAnAnswerError` after a malformed SSE event, or after too many bytes behind the end."""
        if self.scanner.malformed:
            raise NotAnAnswerError("The node sent an event that is not JSON.")
        if self.trailing_bytes > _TRAILING_BYTES:
            raise NotAnAnswerError("The node went on after the end of its stream.")

    cdef object push(self, bytes data):
        """Write the SSE events that ``data`` completes; return the coroutine to await before more is sent, if any."""
        cdef object pause
        cdef bytes sse_events = self.take(data)
        if not sse_events:
            self.check()
            return None
        if self.writer is not None:
            pause = self.writer.write(sse_events)
        else:
            pause = self.out.write_now(sse_events)
            self.writer = self.out.writer
        if self.scanner.malformed or self.trailing_bytes > _TRAILING_BYTES:
            if pause is not None:
                pause.close()
            self.check()
        return pause
