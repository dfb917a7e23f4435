"""The fields of a log line as text: ``key=value``, in quotes where a value would not be told apart otherwise."""

from cpython.float cimport PyFloat_CheckExact
from cpython.long cimport PyLong_CheckExact
from libc.stdint cimport uint8_t
from libc.stdio cimport snprintf

from cortex._fast.buffer cimport Buffer, put, put_literal, reserve

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object text)
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    object PyUnicode_DecodeUTF8(const char* text, Py_ssize_t size, const char* errors)

cdef enum:
    NUMBER_BYTES = 32


def log_fields(fields not None):
    """Return the fields of a mapping one after another, each after a space.

    Floats have four digits. A string that is empty, or has a space, a quote or a control character, is written as JSON
    writes it.
    """
    cdef Buffer line = Buffer()
    cdef str key
    cdef object value
    cdef const char* text
    cdef Py_ssize_t size
    for key, value in fields.items():
        text = PyUnicode_AsUTF8AndSize(key, &size)
        put_literal(line, b" ")
        put(line, text, size)
        put_literal(line, b"=")
        if PyLong_CheckExact(value):
            try:
                line.put_integer(value)
            except OverflowError:
                put_value(line, str(value))
        elif PyFloat_CheckExact(value):
            put_float(line, value)
        else:
            put_value(line, value if isinstance(value, str) else str(value))
    return PyUnicode_DecodeUTF8(line.data, line.size, NULL)


cdef int put_float(Buffer line, double value) except -1:
    reserve(line, NUMBER_BYTES)
    line.size += snprintf(line.data + line.size, NUMBER_BYTES, b"%.4g", value)
    return 0


cdef int put_value(Buffer line, str text) except -1:
    cdef Py_ssize_t size
    cdef const char* bytes_of
    if PyUnicode_IS_COMPACT_ASCII(text):
        bytes_of = PyUnicode_AsUTF8AndSize(text, &size)
        if is_plain(<const uint8_t*>bytes_of, size):
            return put(line, bytes_of, size)
    elif text.isprintable() and not (set(text) & {" ", '"'}):
        bytes_of = PyUnicode_AsUTF8AndSize(text, &size)
        return put(line, bytes_of, size)
    line.append_json(text)
    return 0


cdef bint is_plain(const uint8_t* text, Py_ssize_t size) noexcept:
    cdef Py_ssize_t i
    for i in range(size):
        if text[i] <= c" " or text[i] == c'"' or text[i] == 0x7F:
            return False
    return size > 0
