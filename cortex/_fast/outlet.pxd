cimport cython


@cython.final
cdef class Outlet:
    cdef readonly double written_at
    cdef readonly Py_ssize_t sent_bytes
    cdef public Py_ssize_t limit_bytes
    cdef object send
    cdef object wait
    cdef bint is_tls

    cpdef object write(self, bytes data)
