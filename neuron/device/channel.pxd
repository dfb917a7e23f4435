"""Channel between a daemon and a device worker, for callers without the GIL."""

cdef enum:
    FRAGMENT_BYTES = 65536  # of one packet, header included

cdef enum Outcome:
    MESSAGE  # a whole message is assembled: take() it before receiving again
    PARTIAL  # a fragment was read, more follow
    DONE  # everything queued is sent
    WOULD_BLOCK
    CLOSED  # the other end is gone
    FAILED  # see error_number

cdef struct Outgoing:
    Outgoing *next
    size_t size_bytes
    size_t sent_bytes
    # the message follows


cdef class Channel:
    cdef int _fd
    cdef int error_number  # of the last FAILED
    cdef int _input_fault  # errno of the peer's violation: nothing is read after it
    cdef bint _end_of_input
    cdef bint _broken  # nothing can be sent any more
    cdef char *_input
    cdef size_t _input_bytes
    cdef size_t _input_capacity
    cdef Outgoing *_first
    cdef Outgoing *_last
    cdef readonly size_t pending_bytes
    cdef readonly size_t max_message_bytes

    # The nogil half. A channel belongs to one thread; none of these may run beside another on the same channel.
    cdef Outcome receive(self) noexcept nogil
    cdef Outcome put(self, const char *data, size_t size) noexcept nogil
    cdef Outcome drain(self) noexcept nogil
    cdef int wait(self, short events, int timeout_ms) noexcept nogil
    cdef Outcome _transmit(self, const char *data, size_t size, size_t *sent) noexcept nogil
    cdef void _drop_outgoing(self) noexcept nogil
    cdef void _drop_input(self) noexcept nogil
    cdef bytes take(self)
    cdef int fail(self) except -1
    cdef int _check_open(self) except -1
    cdef int _raise_closed(self) except -1
    cdef int _wait_until(self, short events, double deadline) except -1
