cimport cython
from libc.stdint cimport uint8_t

from cortex._fast.buffer cimport Buffer

cdef enum:
    PROBE_BYTES = 64

# What an event is by its name. The first is for data that has no name, or one that no dialect gives a meaning.
cdef enum Kind:
    UNNAMED
    TOKEN        # generated content
    MESSAGE      # Anthropic's message_start and message_delta: may carry usage
    COMPLETED    # the last event of a Responses stream, with the response in it
    FAILED       # the same, with an error
    STOP         # the last event of a Messages stream
    ERROR
    OTHER        # known, and of no interest

cdef extern from "json_walk.h":
    ctypedef struct json_member:
        const uint8_t* key
        const uint8_t* key_end
        const uint8_t* value
        const uint8_t* value_end


@cython.final
cdef class UsageScanner:
    cdef readonly bint first_token
    cdef readonly Py_ssize_t num_token_events
    cdef readonly bytes usage
    cdef readonly bint terminated
    cdef readonly bint failed
    cdef readonly bint malformed

    cdef Buffer held
    cdef Buffer joined
    cdef size_t max_event_bytes
    cdef bint checks
    cdef size_t resume
    cdef bint started
    cdef uint8_t probe[PROBE_BYTES]
    cdef Py_ssize_t probe_length
    cdef Py_ssize_t probe_offset

    cpdef bytes feed(self, bytes data)
    cdef Py_ssize_t read(self, const uint8_t* p, Py_ssize_t length) except -1
    cdef int scan_event(self, const uint8_t* line, const uint8_t* end) except -1
    cdef int scan_data(self, const uint8_t* data, const uint8_t* end, Kind kind) except -1
    cdef int scan_kind(self, const uint8_t* data, const uint8_t* end, Kind kind) except -1
    cdef int scan_object(self, const uint8_t* data, const uint8_t* end) except -1
    cdef bint find_token(self, const uint8_t* choices, const uint8_t* end, const uint8_t* data) noexcept
    cdef bint find_delta(self, json_member* delta, const uint8_t* data) noexcept
    cdef void remember(self, const uint8_t* start, const uint8_t* end, const uint8_t* data) noexcept
    cdef bint matches_probe(self, const uint8_t* data, const uint8_t* end) noexcept
    cdef int scan_usage(self, const uint8_t* data, const uint8_t* end) except -1
    cdef int keep_usage(self, const uint8_t* start, const uint8_t* end) except -1
