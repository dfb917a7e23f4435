"""The C side of event-stream framing, for the usage scanner."""

from libc.stdint cimport uint8_t

cdef extern from "sse_event.h":
    size_t sse_event_length(const uint8_t* p, size_t length, size_t* resume, bint eager) nogil
    const uint8_t* sse_next_line(const uint8_t* line_end, const uint8_t* end) nogil
    const uint8_t* sse_field(
        const uint8_t* line, const uint8_t* line_end, const char* name, size_t length) nogil
    const uint8_t* scan_line_end(const uint8_t* p, const uint8_t* end) nogil
