cimport cython


@cython.final
cdef class Turns:
    cdef object loop
    cdef double begun_at
    cdef double asked_at
    cdef bint is_noted

    cdef int note(self) except -1
    cpdef object hurry(self)


@cython.final
cdef class Outlet:
    cdef readonly double written_at
    cdef readonly Py_ssize_t sent_bytes
    cdef public Py_ssize_t limit_bytes
    cdef object send
    cdef object wait
    cdef bint is_tls
    cdef bint counts_framing
    cdef Turns turns

    cpdef object write(self, bytes data)
