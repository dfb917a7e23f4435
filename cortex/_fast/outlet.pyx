"""What a stream that has begun is written to, over a server that queues whatever it is sent."""

cimport cython
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef enum:
    CHUNK_BYTES = 12  # the most that a chunk's own framing takes
    TLS_RECORD_BYTES = 30  # the most that a record takes beside its content, which is at most TLS_CONTENT_BYTES
    TLS_CONTENT_BYTES = 16 * 1024


@cython.final
cdef class Outlet:
    """Counts what it passes on to ``send``, with its framing: exactly in the clear, and never too low over TLS.

    What is beyond ``limit_bytes`` is still sent; ``wait`` then is called with the outlet, and returns what to await
    before there is more. ``written_at`` is when it was last written to, by the event loop's clock.
    """

    def __init__(self, send, wait, Py_ssize_t limit_bytes, *, bint is_tls):
        self.send = send
        self.wait = wait
        self.limit_bytes = limit_bytes
        self.is_tls = is_tls

    cpdef object write(self, bytes data):
        """Send some bytes; return what is to be awaited before there is more, if anything.

        That a client has gone it says to whoever waits. Raises ``TypeError`` once it is closed.
        """
        cdef timespec now
        cdef Py_ssize_t size_bytes = len(data)
        self.send(data)
        clock_gettime(CLOCK_MONOTONIC, &now)
        self.written_at = now.tv_sec + now.tv_nsec * 1e-9
        self.sent_bytes += size_bytes + CHUNK_BYTES
        if self.is_tls:
            self.sent_bytes += TLS_RECORD_BYTES * (1 + size_bytes // TLS_CONTENT_BYTES)
        return self.wait(self) if self.sent_bytes > self.limit_bytes else None

    def close(self):
        """Let go of what is written to: a stream ends when nobody can write to it any more."""
        self.send = None
