cimport cython


@cython.final
cdef class WriteCoalescer:
    cdef object loop
    cdef double begun_at
    cdef double bypassed_at
    cdef bint is_scheduled

    cdef int mark(self) except -1
    cpdef object bypass(self)


cdef class Writer:
    cdef public double written_at

    cpdef object write(self, bytes data)


@cython.final
cdef class ResponseWriter(Writer):
    cdef readonly Py_ssize_t sent_bytes
    cdef public Py_ssize_t limit_bytes
    cdef object send
    cdef object wait
    cdef bint is_tls
    cdef bint counts_framing
    cdef WriteCoalescer coalescer
