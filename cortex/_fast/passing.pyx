"""Frames on their way from a node to a client, in compiled code where a client can be written to at once."""

from cortex._fast.http_client cimport Sink
from cortex._fast.outlet cimport Outlet
from cortex._fast.record cimport Record

from collections import deque

from cortex._fast.tap import StreamTap


cdef class FrameRelay(Sink):
    """Lets whole frames through, and remembers the first and the last few of them.

    ``out`` is written to by :meth:`push`: it begins a stream at its first ``write_now``, and then has an ``outlet``.
    """

    cdef readonly bytes first
    cdef readonly object tail
    cdef readonly Record record
    cdef readonly object tap
    cdef public object out
    cdef Outlet outlet

    def __init__(self, Record record not None, Py_ssize_t tail_chunks):
        self.first = b""
        self.tail = deque(maxlen=tail_chunks)
        self.record = record
        self.tap = StreamTap()

    cpdef bytes take(self, bytes data):
        """Return the whole frames that ``data`` completes.

        Raises:
            FrameTooLarge: one is longer than is read.
        """
        cdef bytes frames = self.tap.feed(data)
        if frames:
            if not self.first:
                self.first = frames
            self.tail.append(frames)
            if self.tap.first_token:
                self.record.note_first_token()
        return frames

    cdef object push(self, bytes data):
        """Write the whole frames that ``data`` completes; return what is to be awaited before there is more."""
        cdef object pause
        cdef bytes frames = self.take(data)
        if not frames:
            return None
        if self.outlet is not None:
            return self.outlet.write(frames)
        pause = self.out.write_now(frames)
        self.outlet = self.out.outlet
        return pause
