cimport cython

from cortex._fast.http_client cimport Response
from cortex._fast.record cimport Record
from cortex._fast.usage_scanner cimport UsageScanner


@cython.final
cdef class NodeStream:
    cdef readonly bytes first
    cdef public Response response
    cdef readonly UsageScanner scanner
    cdef Record record
    cdef list tail
    cdef Py_ssize_t num_chunks
    cdef Py_ssize_t trailing_bytes

    cpdef bytes take(self, bytes data)
    cpdef object check(self)
