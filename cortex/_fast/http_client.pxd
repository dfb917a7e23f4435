cimport cython


cdef class Listener:
    cdef int notify(self, Response response) except -1


@cython.final
cdef class Response:
    cdef readonly int status
    cdef readonly list headers
    cdef object head
    cdef Connection connection
    cdef list chunks
    cdef readonly Py_ssize_t unread_bytes
    cdef object waiter
    cdef object error
    cdef object loop
    cdef Listener listener

    cpdef object header(self, bytes name)
    cpdef object end_within(self, double limit_s)
    cdef int untake(self, bytes body) except -1
    cdef object something(self)
    cdef bytes take(self)
    cdef int deliver(self) except -1
    cdef int ended(self, error) except -1


@cython.final
cdef class Connection:
    cdef object pool
    cdef object loop
    cdef object parser
    cdef object transport
    cdef Response response
    cdef object watchdog
    cdef double active_at
    cdef double limit_s
    cdef double stall_s
    cdef double whole_s
    cdef double whole_until
    cdef double head_until
    cdef Py_ssize_t head_bytes
    cdef Py_ssize_t wire_bytes
    cdef Py_ssize_t body_bytes
    cdef Py_ssize_t quiet_bytes
    cdef int num_interim
    cdef bint in_head
    cdef bint is_beyond
    cdef bint in_body
    cdef bint ends_with_connection
    cdef bint keeps_alive
    cdef bint is_paused
    cdef readonly Py_ssize_t num_responses

    cdef Response send(
        self, bytes head, bytes lines, bytes body, double first_byte_s, double stall_s, double whole_s
    )
    cdef int resume(self) except -1
    cdef int finish(self, error) except -1
    cdef unanswered(self)
    cdef int watch(self, double limit_s) except -1
    cdef int bound(self, double limit_s) except -1
    cdef double due(self)
    cdef int arm(self) except -1
