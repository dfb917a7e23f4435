cimport cython


@cython.final
cdef class InFlight:
    cdef public object on_release
    cdef readonly dict by_node
    cdef readonly dict by_model

    cpdef Seat take(self, str node, str model)


@cython.final
cdef class Seat:
    cdef InFlight counts
    cdef readonly str node
    cdef readonly str model

    cpdef object release(self)
