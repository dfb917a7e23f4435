"""The growable byte buffer, for the modules that build SSE events in it.

The short functions are inline: an SSE event is a dozen of them, and a call through the class's table costs more than
the copy it makes.
"""

cimport cython
from libc.stdint cimport uint8_t
from libc.string cimport memcpy, strlen


@cython.final
cdef class Buffer:
    cdef char* data
    cdef Py_ssize_t size
    cdef Py_ssize_t capacity

    cdef int grow(self, Py_ssize_t extra) except -1
    cdef int put_text(self, str text) except -1
    cdef int put_wide_text(self, const uint8_t* text, int width, Py_ssize_t length) except -1
    cdef int put_integer(self, long long value) except -1
    cdef int put_number(self, double value) except -1
    cdef int drop(self, Py_ssize_t length) except -1
    cdef bytes slice(self, Py_ssize_t start, Py_ssize_t end)
    cdef bytes cut(self)


cdef inline int reserve(Buffer buffer, Py_ssize_t extra) except -1:
    """Make room for ``extra`` bytes more."""
    if buffer.capacity - buffer.size < extra:
        buffer.grow(extra)
    return 0


cdef inline int put(Buffer buffer, const char* text, Py_ssize_t length) except -1:
    """Append ``length`` bytes, which may not lie in the buffer itself."""
    if buffer.capacity - buffer.size < length:
        buffer.grow(length)
    memcpy(buffer.data + buffer.size, text, length)
    buffer.size += length
    return 0


cdef inline int put_bytes(Buffer buffer, bytes text) except -1:
    """Append a bytes object."""
    return put(buffer, <const char*>text, len(text))


cdef inline int put_literal(Buffer buffer, const char* text) except -1:
    """Append a literal: its length is known when this is compiled."""
    return put(buffer, text, strlen(text))
