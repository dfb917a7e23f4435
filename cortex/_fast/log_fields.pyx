"""Log lines as text. Fields are ``key=value``, with a quoted value where it would be ambiguous."""

from cpython.float cimport PyFloat_CheckExact
from cpython.long cimport PyLong_CheckExact
from libc.stdint cimport uint8_t
from libc.stdio cimport snprintf
from libc.time cimport gmtime, time_t, tm

from cortex._fast.buffer cimport Buffer, put, put_literal, reserve

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object text)
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    object PyUnicode_DecodeUTF8(const char* text, Py_ssize_t size, const char* errors)

cdef enum:
    NUMBER_BYTES = 32
    TIME_BYTES = 32


def log_lines(str head not None, lines not None):
    """Return a line for each pair of a Unix time and fields: the time in UTC, ``head``, and the fields.

    Floats have four digits. A string that is empty, or has a space, a quote or a control character, is written as JSON
    writes it. Each line ends with a line feed. Raises ``ValueError`` for a time that is no time.
    """
    cdef Buffer text = Buffer()
    cdef double at
    cdef object fields
    cdef Py_ssize_t size
    cdef const char* head_text = PyUnicode_AsUTF8AndSize(head, &size)
    for at, fields in lines:
        put_time(text, at)
        put_literal(text, b" ")
        put(text, head_text, size)
        put_fields(text, fields)
        put_literal(text, b"\n")
    return PyUnicode_DecodeUTF8(text.data, text.size, NULL)


cdef int put_time(Buffer line, double at) except -1:
    cdef time_t second = <time_t>at
    cdef tm* parts = gmtime(&second)
    if parts == NULL or at < 0:
        raise ValueError(f"{at} is no time")
    reserve(line, TIME_BYTES)
    line.size += snprintf(
        line.data + line.size, TIME_BYTES, b"%04d-%02d-%02dT%02d:%02d:%02d.%03dZ",
        parts.tm_year + 1900, parts.tm_mon + 1, parts.tm_mday, parts.tm_hour, parts.tm_min, parts.tm_sec,
        <int>((at - second) * 1000),
    )
    return 0


cdef int put_fields(Buffer line, fields) except -1:
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
    return 0


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
