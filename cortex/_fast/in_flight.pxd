cimport cython


@cython.final
cdef class InFlightRequests:
    cdef public object on_release
    cdef readonly dict by_node
    cdef readonly dict by_model

    cpdef InFlightRequest add(self, str node, str model)


@cython.final
cdef class InFlightRequest:
    cdef InFlightRequests counts
    cdef readonly str node
    cdef readonly str model

    cpdef object release(self)
