"""Code that the stream encoders share: the kind and fields of an event, token probabilities, the usage comment."""

from cpython.object cimport PyObject

from cortex._fast.buffer cimport Buffer

cdef enum EventKind:
    STARTED
    TEXT
    REASONING
    TOOL_CALL
    FINISHED
    FAILED


cdef struct Delta:
    # Borrowed from the event.
    PyObject* text
    PyObject* logprobs
    Py_ssize_t choice


cdef int read_event(object event, Delta* delta) except -1
cdef int put_logprobs(Buffer out, tuple logprobs) except -1
cdef int put_usage_comment(
    Buffer out, Py_ssize_t prompt_tokens, Py_ssize_t completion_tokens, Py_ssize_t cached_tokens) except -1
