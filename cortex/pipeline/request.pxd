cimport cython

from cortex._fast.http_client cimport Listener, Response
from cortex._fast.in_flight cimport InFlightRequest, InFlightRequests
from cortex._fast.peek cimport Peek
from cortex._fast.record cimport Record
from cortex._fast.response_writer cimport Writer
from cortex.pipeline.node_stream cimport NodeStream


@cython.final
cdef class NodeRoute:
    cdef str name
    cdef object pool
    cdef bytes head
    cdef double first_byte_s
    cdef double answer_s
    cdef double stall_s


@cython.final
cdef class CachedRoute:
    cdef object state
    cdef str model
    cdef bint is_alias
    cdef dict nodes
    cdef NodeRoute only


@cython.final
cdef class Access:
    cdef object settings
    cdef object keys
    cdef readonly object dialect
    cdef str dialect_name
    cdef bint can_stream
    cdef readonly object principal
    cdef str key
    cdef double expires_s
    cdef bint is_limited
    cdef object parameters
    cdef object find
    cdef object hosts
    cdef Py_ssize_t max_body_bytes
    cdef dict routes


@cython.final
cdef class Pipeline:
    cdef object find_access
    cdef object steps
    cdef object choose
    cdef object heartbeat
    cdef object gateway
    cdef object authenticator
    cdef object fleet
    cdef object breakers
    cdef object deaths
    cdef InFlightRequests in_flight
    cdef object request_log
    cdef object loop
    cdef dict accesses

    cpdef Request request(self, exchange, Access access)


@cython.final
cdef class Request(Listener):
    cdef readonly object exchange
    cdef readonly Access access
    cdef readonly Record record
    cdef readonly bytes body
    cdef readonly Peek found
    cdef public object reservation
    cdef Pipeline pipeline
    cdef CachedRoute route
    cdef object choice
    cdef bytes sent_body
    cdef double sent_at
    cdef int state
    cdef InFlightRequest in_flight_request
    cdef Response response
    cdef object answer
    cdef object waiter
    cdef object pause
    cdef object task
    cdef bint has_disconnected
    cdef bint is_late
    # of a stream
    cdef readonly NodeStream node_stream
    cdef Writer writer
    cdef object source
    cdef object reader
    cdef object keep
    cdef object unkept
    cdef object timer
    cdef object beating
    cdef double begun_s

    cdef bint take_answer(self) except -1
    cdef bint find_route(self) except -1
    cdef bint send(self) except -1
    cdef int give_up(self) except -1
    cdef bint accept(self, Response response) except -1
    cpdef object copy_headers(self, Response response)
    cdef int pump(self) except -1
    cdef object push(self, bytes data)
    cdef object write(self, bytes data)
    cdef int wake(self, pause) except -1
    cdef int fail(self, error) except -1
