cimport cython


@cython.final
cdef class Record:
    cdef readonly str request_id
    cdef readonly str dialect
    cdef public str model
    cdef public str node
    cdef public str key
    cdef public str finish
    cdef public int status
    cdef public bint is_stream
    cdef public Py_ssize_t num_token_events
    cdef public object usage
    cdef public object trace
    cdef readonly double ended_at
    cdef readonly double begun_s
    cdef double first_token_at_s
    cdef double ended_s
    cdef tuple final_counts

    cpdef tuple counts(self)
