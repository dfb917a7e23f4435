"""A growable byte buffer, and JSON text written straight into it.

The one place that turns a ``str`` into JSON: projectors escape a delta into the SSE event they are building, with no
string in between.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.math cimport isfinite
from libc.stdint cimport uint8_t
from libc.string cimport memcpy, memmove

cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(object text)
    int PyUnicode_KIND(object text)
    void* PyUnicode_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    char* PyOS_double_to_string(double value, char format_code, int precision, int flags, int* type) except NULL
    int Py_DTSF_ADD_DOT_0

cdef extern from "scan.h":
    const uint8_t* scan_plain(const uint8_t* p, const uint8_t* end) nogil

cdef extern from "json_text.h":
    int JSON_ESCAPE_BYTES
    uint8_t* json_put_escape(uint8_t* out, uint8_t character) nogil
    uint8_t* json_put_wide(uint8_t* out, const void* text, int width, size_t length) nogil

cdef enum:
    FIRST_CAPACITY = 512
    # Wide text is escaped by blocks: reserving the worst case of a whole answer would take six times its length.
    WIDE_BLOCK = 256
    INTEGER_BYTES = 24


@cython.final
cdef class Buffer:
    """Bytes that grow at the end. The only owner of its memory."""

    def __cinit__(self):
        # Never NULL, so that no copy of zero bytes needs a test.
        self.data = <char*>PyMem_Malloc(FIRST_CAPACITY)
        if self.data == NULL:
            raise MemoryError
        self.size = 0
        self.capacity = FIRST_CAPACITY

    def __dealloc__(self):
        PyMem_Free(self.data)

    def __len__(self):
        return self.size

    def append(self, bytes text not None):
        """Append ``text``."""
        if self.capacity - self.size < len(text):
            self.grow(len(text))
        memcpy(self.data + self.size, <const char*>text, len(text))
        self.size += len(text)

    def append_json(self, str text not None, *, bint quotes=True):
        """Append ``text`` as a JSON string in UTF-8, with or without its quotes; a lone surrogate becomes U+FFFD."""
        if quotes:
            self.append(b'"')
        self.put_text(text)
        if quotes:
            self.append(b'"')

    def take(self):
        """Return what was appended and start anew."""
        return self.cut()

    cdef int grow(self, Py_ssize_t extra) except -1:
        """Make room for ``extra`` bytes, at least doubling."""
        cdef Py_ssize_t wanted = self.size + extra
        cdef Py_ssize_t capacity = max(self.capacity * 2, wanted)
        cdef char* data = <char*>PyMem_Realloc(self.data, capacity)
        if data == NULL:
            raise MemoryError
        self.data = data
        self.capacity = capacity
        return 0

    cdef int put_text(self, str text) except -1:
        """Append ``text`` as the inside of a JSON string."""
        if text is None:
            raise TypeError("expected str, got None")
        cdef Py_ssize_t length = PyUnicode_GET_LENGTH(text)
        cdef const uint8_t* p = <const uint8_t*>PyUnicode_DATA(text)
        if not PyUnicode_IS_ASCII(text):
            return self.put_wide_text(p, PyUnicode_KIND(text), length)
        cdef const uint8_t* end = p + length
        cdef const uint8_t* stop
        while True:
            stop = scan_plain(p, end)
            # One reservation covers the run and the escape that ends it.
            if self.capacity - self.size < (stop - p) + JSON_ESCAPE_BYTES:
                self.grow((stop - p) + JSON_ESCAPE_BYTES)
            memcpy(self.data + self.size, p, stop - p)
            self.size += stop - p
            if stop == end:
                return 0
            self.size = <char*>json_put_escape(<uint8_t*>self.data + self.size, stop[0]) - self.data
            p = stop + 1

    cdef int put_wide_text(self, const uint8_t* text, int width, Py_ssize_t length) except -1:
        cdef Py_ssize_t block
        while length > 0:
            block = min(length, <Py_ssize_t>WIDE_BLOCK)
            if self.capacity - self.size < block * JSON_ESCAPE_BYTES:
                self.grow(block * JSON_ESCAPE_BYTES)
            self.size = <char*>json_put_wide(<uint8_t*>self.data + self.size, text, width, block) - self.data
            text += block * width
            length -= block
        return 0

    cdef int put_integer(self, long long value) except -1:
        """Append a decimal integer."""
        cdef char digits[INTEGER_BYTES]
        cdef int at = INTEGER_BYTES
        cdef unsigned long long rest = <unsigned long long>value
        if value < 0:
            rest = 0 - rest
        while True:
            at -= 1
            digits[at] = <char>(c'0' + rest % 10)
            rest //= 10
            if rest == 0:
                break
        if value < 0:
            at -= 1
            digits[at] = c'-'
        if self.capacity - self.size < INTEGER_BYTES:
            self.grow(INTEGER_BYTES)
        memcpy(self.data + self.size, digits + at, INTEGER_BYTES - at)
        self.size += INTEGER_BYTES - at
        return 0

    cdef int put_number(self, double value) except -1:
        """Append the shortest decimal that reads back as ``value``, which must be finite."""
        cdef char* digits
        if not isfinite(value):
            raise ValueError(f"JSON has no {value}")
        digits = PyOS_double_to_string(value, c'r', 0, Py_DTSF_ADD_DOT_0, NULL)
        try:
            self.append(<bytes>digits)
        finally:
            PyMem_Free(digits)
        return 0

    cdef int drop(self, Py_ssize_t length) except -1:
        """Remove the first ``length`` bytes."""
        self.size -= length
        memmove(self.data, self.data + length, self.size)
        return 0

    cdef bytes slice(self, Py_ssize_t start, Py_ssize_t end):
        """Return the bytes from ``start`` up to ``end``."""
        return PyBytes_FromStringAndSize(self.data + start, end - start)

    cdef bytes cut(self):
        """Return everything and start anew, keeping the memory."""
        cdef bytes text = PyBytes_FromStringAndSize(self.data, self.size)
        self.size = 0
        return text
