cimport cython


@cython.final
cdef class Watch:
    cdef object future
    cdef object protocol
    cdef object callback

    cdef int ask(self) except -1


@cython.final
cdef class Watches:
    cdef readonly object loop
    cdef list young
    cdef list older
    cdef bint is_timed
    cdef double poll_s

    cpdef Watch begin(self, protocol, callback)
