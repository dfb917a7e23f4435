cimport cython


@cython.final
cdef class Peek:
    cdef readonly str model
    cdef readonly Py_ssize_t model_start
    cdef readonly Py_ssize_t model_end
    cdef readonly bint stream
    cdef readonly str previous_response_id
    cdef readonly str prompt_cache_key
    cdef readonly bint stores
    cdef readonly bytes bounds
    cdef readonly tuple unknown
    cdef readonly tuple refused
