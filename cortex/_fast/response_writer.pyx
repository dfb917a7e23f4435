"""Writers of a started stream, and the one over a server that queues without limit."""

cimport cython
from posix.time cimport CLOCK_MONOTONIC, nanosleep, timespec

from cortex._fast.clock cimport seconds_of

COALESCE_S = 0.00075
"""Shortest time between two iterations of an event loop that write SSE events.

Waking two threads for one SSE event costs more than the event does; where events arrive faster than this, each
iteration finds several. A token may be late by as much.
"""

BYPASS_S = 0.005
"""Time after a request's arrival without coalescing: more requests may be waiting behind it."""

cdef double _COALESCE_S = COALESCE_S
cdef double _BYPASS_S = BYPASS_S
cdef double WORTH_S = 20e-6  # a sleep that is shorter ends late

cdef enum:
    CHUNK_BYTES = 12  # the most that a chunk's own framing takes
    TLS_RECORD_BYTES = 30  # the most that a record takes beside its content, which is at most TLS_CONTENT_BYTES
    TLS_CONTENT_BYTES = 16 * 1024


@cython.final
cdef class WriteCoalescer:
    """Spacing between the loop iterations that write SSE events."""

    def __init__(self, loop):
        self.loop = loop

    cdef int mark(self) except -1:
        """Mark this iteration as one that writes."""
        if not self.is_scheduled:
            self.is_scheduled = True
            self.loop.call_soon(self.end)
        return 0

    cpdef object bypass(self):
        """Suspend coalescing for ``BYPASS_S``."""
        self.bypassed_at = seconds_of(CLOCK_MONOTONIC)

    def end(self):
        """Sleep until the next iteration may begin; only the loop's thread sleeps."""
        cdef timespec time
        cdef double at = seconds_of(CLOCK_MONOTONIC)
        cdef double left_s = self.begun_at + _COALESCE_S - at
        self.is_scheduled = False
        if left_s > WORTH_S and at - self.bypassed_at > _BYPASS_S:
            with nogil:
                time.tv_sec = 0
                time.tv_nsec = <long>(left_s * 1e9)
                nanosleep(&time, NULL)
        self.begun_at = seconds_of(CLOCK_MONOTONIC)


cdef class Writer:
    """Writer of a started stream. ``written_at`` is the time of its last write, by the loop's clock."""

    cpdef object write(self, bytes data):
        """Send some bytes; return the coroutine to await before sending more, if any."""
        raise NotImplementedError


@cython.final
cdef class ResponseWriter(Writer):
    """Writer that counts the bytes it gives to ``send``, with framing: exact in the clear, never too low over TLS.

    Without ``counts_framing`` framing is left out, so that the count is never too high. Bytes beyond ``limit_bytes``
    are still sent; ``wait`` is then called with the writer and returns the coroutine to await before more is sent.
    Each write marks the ``coalescer``.
    """

    def __init__(self, send, wait, Py_ssize_t limit_bytes, WriteCoalescer coalescer not None, *, bint is_tls,
                 bint counts_framing=True):
        self.send = send
        self.wait = wait
        self.limit_bytes = limit_bytes
        self.is_tls = is_tls
        self.counts_framing = counts_framing
        self.coalescer = coalescer

    cpdef object write(self, bytes data):
        """Send some bytes; return the coroutine to await before sending more, if any.

        That coroutine raises if the client has disconnected. Raises ``TypeError`` once the writer is closed.
        """
        cdef Py_ssize_t size_bytes = len(data)
        self.send(data)
        self.coalescer.mark()
        self.written_at = seconds_of(CLOCK_MONOTONIC)
        self.sent_bytes += size_bytes
        if self.counts_framing:
            self.sent_bytes += CHUNK_BYTES
            if self.is_tls:
                self.sent_bytes += TLS_RECORD_BYTES * (1 + size_bytes // TLS_CONTENT_BYTES)
        return self.wait(self) if self.sent_bytes > self.limit_bytes else None

    def close(self):
        """Release the server's transport: the server ends a stream when no reference to it is left."""
        self.send = None
