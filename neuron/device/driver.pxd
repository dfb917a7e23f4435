"""Functions of the CUDA driver API that a device worker calls, as a table of pointers."""

cdef struct Driver:
    # One field per name in SYMBOLS of driver.pyx, in its order: the table is filled by position.
    int (*init)(unsigned int flags) noexcept nogil
    int (*get_version)(int *version) noexcept nogil
    int (*get_error_name)(int code, const char **name) noexcept nogil
    int (*device_get)(int *device, int ordinal) noexcept nogil
    int (*device_get_name)(char *name, int size, int device) noexcept nogil
    int (*context_retain)(void **context, int device) noexcept nogil
    int (*context_release)(int device) noexcept nogil
    int (*context_set_current)(void *context) noexcept nogil
    int (*memory_info)(size_t *free, size_t *total) noexcept nogil
    int (*stream_create)(void **stream, unsigned int flags) noexcept nogil
    int (*stream_destroy)(void *stream) noexcept nogil
    int (*stream_synchronize)(void *stream) noexcept nogil
    int (*stream_query)(void *stream) noexcept nogil
    int (*event_create)(void **event, unsigned int flags) noexcept nogil
    int (*event_destroy)(void *event) noexcept nogil
    int (*event_record)(void *event, void *stream) noexcept nogil
    int (*event_synchronize)(void *event) noexcept nogil
    int (*graph_instantiate)(void **graph_exec, void *graph, unsigned long long flags) noexcept nogil
    int (*graph_launch)(void *graph_exec, void *stream) noexcept nogil
    int (*graph_exec_destroy)(void *graph_exec) noexcept nogil

cdef enum Call:
    CALL_INIT
    CALL_GET_VERSION
    CALL_GET_ERROR_NAME
    CALL_DEVICE_GET
    CALL_DEVICE_GET_NAME
    CALL_CONTEXT_RETAIN
    CALL_CONTEXT_RELEASE
    CALL_CONTEXT_SET_CURRENT
    CALL_MEMORY_INFO
    CALL_STREAM_CREATE
    CALL_STREAM_DESTROY
    CALL_STREAM_SYNCHRONIZE
    CALL_STREAM_QUERY
    CALL_EVENT_CREATE
    CALL_EVENT_DESTROY
    CALL_EVENT_RECORD
    CALL_EVENT_SYNCHRONIZE
    CALL_GRAPH_INSTANTIATE
    CALL_GRAPH_LAUNCH
    CALL_GRAPH_EXEC_DESTROY
    NUM_CALLS

cdef enum:
    SUCCESS = 0
    OUT_OF_MEMORY = 2
    NOT_READY = 600


cdef class DriverHandle:
    cdef Driver *table
    cdef object _capsule
    cdef set _graph_execs
    cdef readonly bint is_host
    cdef readonly int num_contexts
    cdef readonly int num_streams
    cdef readonly int num_events

    cdef str error_name(self, int code)
    cdef int check(self, int code, Call call) except -1
    cdef void *retain_context(self, int device) except? NULL
    cdef int release_context(self, int device) noexcept
    cdef void *create_stream(self) except? NULL
    cdef int destroy_stream(self, void *stream) noexcept
    cdef void *create_event(self) except? NULL
    cdef int destroy_event(self, void *event) noexcept
