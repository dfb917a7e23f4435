"""What a stream that has begun is written to, over a server that queues whatever it is sent."""

cimport cython
from posix.time cimport CLOCK_MONOTONIC, nanosleep, timespec

from cortex._fast.clock cimport seconds_of

COALESCE_S = 0.00075
"""The least between two turns of an event loop that pass SSE events on.

To wake two threads for one SSE event costs more than the SSE event does; so where SSE events come faster than this,
each turn finds some. It is what a token may be late.
"""

BYPASS_S = 0.005
"""How long no turn is held off after a request has come: others may be waiting behind it."""

cdef double _COALESCE_S = COALESCE_S
cdef double _BYPASS_S = BYPASS_S
cdef double WORTH_S = 20e-6  # a sleep that is shorter ends late

cdef enum:
    CHUNK_BYTES = 12  # the most that a chunk's own framing takes
    TLS_RECORD_BYTES = 30  # the most that a record takes beside its content, which is at most TLS_CONTENT_BYTES
    TLS_CONTENT_BYTES = 16 * 1024


@cython.final
cdef class WriteCoalescer:
    """Holds the turns of a loop apart that pass SSE events on."""

    def __init__(self, loop):
        self.loop = loop

    cdef int mark(self) except -1:
        """Note that this turn is one."""
        if not self.is_scheduled:
            self.is_scheduled = True
            self.loop.call_soon(self.end)
        return 0

    cpdef object bypass(self):
        """Hold nothing off for a while."""
        self.bypassed_at = seconds_of(CLOCK_MONOTONIC)

    def end(self):
        """Wait until the next one may begin: the loop sleeps, and nothing else of the process does."""
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


@cython.final
cdef class ResponseWriter:
    """Counts what it passes on to ``send``, with its framing: exactly in the clear, and never too low over TLS.

    Without ``counts_framing`` the framing is left out, so that the count is never too high.
    What is beyond ``limit_bytes`` is still sent; ``wait`` then is called with the writer, and returns what to await
    before there is more. ``written_at`` is when it was last written to, by the loop's clock; to ``coalescer`` it is
    told.
    """

    def __init__(self, send, wait, Py_ssize_t limit_bytes, WriteCoalescer coalescer not None, *, bint is_tls, bint counts_framing=True):
        self.send = send
        self.wait = wait
        self.limit_bytes = limit_bytes
        self.is_tls = is_tls
        self.counts_framing = counts_framing
        self.coalescer = coalescer

    cpdef object write(self, bytes data):
        """Send some bytes; return what is to be awaited before there is more, if anything.

        That a client has gone it says to whoever waits. Raises ``TypeError`` once it is closed.
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
        """Let go of what is written to: a stream ends when nobody can write to it any more."""
        self.send = None
