"""CUDA driver of a device worker: a table of function pointers, and counts of the objects created through it.

The table is filled from ``libcuda.so.1`` at run time, so building needs no CUDA toolkit and running needs no GPU; a
test passes a table of its own; a CPU device has one whose context and stream are null. Independent of channels,
jobs and torch.
"""

cimport cython
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy
from posix.dlfcn cimport RTLD_LOCAL, RTLD_NOW, dlclose, dlopen, dlsym

import threading

cdef const char *CAPSULE_NAME = b"neuron.device.driver.Driver"

# The versioned names are the ones that current headers map the plain names to; the plain ones are older ABIs.
SYMBOLS = (
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamQuery",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
)
"""The driver's functions in the order of the table's fields."""

cdef enum:
    STREAM_NON_BLOCKING = 1  # never waits for the legacy default stream
    EVENT_DISABLE_TIMING = 2  # ordering only; a timed event costs a write of a time stamp


class DriverNotFoundError(Exception):
    """There is no usable NVIDIA driver: the library is missing or too old, or finds no device."""


class DriverError(Exception):
    """A driver call returned an error."""

    def __init__(self, call: str, code: int, name: str):
        super().__init__(f"{call} returned {code} ({name})")
        self.call = call
        self.code = code
        self.name = name


class DeviceFault(DriverError):
    """The device is unusable until its process is replaced: every later call on it fails too."""


cdef Driver _cuda_table
cdef object _cuda_lock = threading.Lock()
cdef bint _cuda_open = False


def cuda_driver(str library="libcuda.so.1"):
    """Return the table of the CUDA driver as a capsule, opening ``library`` the first time.

    The library stays loaded for the life of the process. Raises DriverNotFoundError if it cannot be opened or lacks
    a symbol.
    """
    global _cuda_open, _cuda_table
    cdef Driver table
    with _cuda_lock:
        if not _cuda_open:
            _fill(&table, library)
            _cuda_table = table
            _cuda_open = True
    return PyCapsule_New(&_cuda_table, CAPSULE_NAME, NULL)


cdef int _fill(Driver *table, str library) except -1:
    cdef bytes path = library.encode()
    cdef void *opened = dlopen(path, RTLD_NOW | RTLD_LOCAL)
    cdef void *symbol
    cdef size_t position = 0
    if opened == NULL:
        raise DriverNotFoundError(
            f"no NVIDIA driver: {library} cannot be opened; install the driver or serve with --devices cpu"
        )
    for name in SYMBOLS:
        symbol = dlsym(opened, <bytes>name.encode())
        if symbol == NULL:
            dlclose(opened)
            raise DriverNotFoundError(
                f"{library} has no {name}: the NVIDIA driver is too old; CUDA 11.4 or later is needed"
            )
        memcpy(<char *>table + position, &symbol, sizeof(void *))
        position += sizeof(void *)
    return 0


# A CPU has no context and no stream: creating and destroying them succeeds and does nothing. Graphs and device memory
# are absent, and using them is an error of the caller.

cdef int _host_init(unsigned int flags) noexcept nogil:
    return SUCCESS

cdef int _host_device(int *device, int ordinal) noexcept nogil:
    device[0] = ordinal
    return SUCCESS

cdef int _host_retain(void **context, int device) noexcept nogil:
    context[0] = NULL
    return SUCCESS

cdef int _host_release(int device) noexcept nogil:
    return SUCCESS

cdef int _host_pointer(void *thing) noexcept nogil:
    return SUCCESS

cdef int _host_create(void **thing, unsigned int flags) noexcept nogil:
    thing[0] = NULL
    return SUCCESS

cdef Driver _host_table
_host_table.init = _host_init
_host_table.device_get = _host_device
_host_table.context_retain = _host_retain
_host_table.context_release = _host_release
_host_table.context_set_current = _host_pointer
_host_table.stream_create = _host_create
_host_table.stream_destroy = _host_pointer
_host_table.stream_synchronize = _host_pointer
_host_table.stream_query = _host_pointer
_host_table.event_create = _host_create
_host_table.event_destroy = _host_pointer


@cython.final
cdef class DriverHandle:
    """Driver table in use. Counts the objects created and destroyed through it, so that a leak is a number.

    ``driver`` is a capsule from :func:`cuda_driver` or a test, or None for a CPU device. Initialises the driver.
    A destroyed object counts as gone even if the driver reports an error: after a fault it goes with its context.
    """

    def __cinit__(self, driver):
        self._capsule = driver
        self._graph_execs = set()
        self.is_host = driver is None
        if driver is None:
            self.table = &_host_table
        else:
            self.table = <Driver *>PyCapsule_GetPointer(driver, CAPSULE_NAME)
        self.check(self.table.init(0), CALL_INIT)

    @property
    def num_graph_execs(self):
        """Number of adopted graphs that are alive."""
        return len(self._graph_execs)

    def version(self):
        """Return the CUDA version that the driver supports as (major, minor); (0, 0) for a CPU device."""
        cdef int version = 0
        if self.table.get_version != NULL:
            self.check(self.table.get_version(&version), CALL_GET_VERSION)
        return version // 1000, version % 1000 // 10

    def device(self, int ordinal):
        """Return the driver's handle of the ``ordinal``-th device. Raises DriverError if there is none."""
        cdef int device = 0
        self.check(self.table.device_get(&device, ordinal), CALL_DEVICE_GET)
        return device

    def device_name(self, int device):
        """Return the product name of a device; empty for a CPU device."""
        cdef char name[256]
        name[0] = 0
        if self.table.device_get_name != NULL:
            self.check(self.table.device_get_name(name, sizeof(name), device), CALL_DEVICE_GET_NAME)
        return (<bytes>name).decode(errors="replace")

    def adopt_graph_exec(self, uintptr_t graph_exec):
        """Take ownership of an instantiated graph: it is destroyed with this handle's owner at the latest."""
        if graph_exec in self._graph_execs:
            raise ValueError(f"graph {graph_exec:#x} is already owned")
        self._graph_execs.add(graph_exec)

    def destroy_graph_exec(self, uintptr_t graph_exec):
        """Destroy an adopted graph. Raises KeyError if it is not owned, DriverError if the driver objects."""
        self._graph_execs.remove(graph_exec)
        self.check(self.table.graph_exec_destroy(<void *>graph_exec), CALL_GRAPH_EXEC_DESTROY)

    def destroy_graph_execs(self):
        """Destroy every adopted graph, ignoring the driver's errors."""
        cdef uintptr_t graph_exec
        while self._graph_execs:
            graph_exec = self._graph_execs.pop()
            self.table.graph_exec_destroy(<void *>graph_exec)

    cdef str error_name(self, int code):
        cdef const char *name = NULL
        if self.table.get_error_name != NULL and self.table.get_error_name(code, &name) == SUCCESS and name != NULL:
            return (<bytes>name).decode(errors="replace")
        return "unknown error"

    cdef int check(self, int code, Call call) except -1:
        if code == SUCCESS:
            return 0
        if call == CALL_INIT:
            # CUDA_ERROR_NO_DEVICE, most often: the library is here and no device works
            name = self.error_name(code)
            raise DriverNotFoundError(f"the NVIDIA driver does not start: cuInit returned {code} ({name})")
        raise DriverError(SYMBOLS[<int>call], code, self.error_name(code))

    cdef void *retain_context(self, int device) except? NULL:
        cdef void *context = NULL
        self.check(self.table.context_retain(&context, device), CALL_CONTEXT_RETAIN)
        self.num_contexts += 1
        return context

    cdef int release_context(self, int device) noexcept:
        self.num_contexts -= 1
        return self.table.context_release(device)

    cdef void *create_stream(self) except? NULL:
        cdef void *stream = NULL
        self.check(self.table.stream_create(&stream, STREAM_NON_BLOCKING), CALL_STREAM_CREATE)
        self.num_streams += 1
        return stream

    cdef int destroy_stream(self, void *stream) noexcept:
        self.num_streams -= 1
        return self.table.stream_destroy(stream)

    cdef void *create_event(self) except? NULL:
        cdef void *event = NULL
        self.check(self.table.event_create(&event, EVENT_DISABLE_TIMING), CALL_EVENT_CREATE)
        self.num_events += 1
        return event

    cdef int destroy_event(self, void *event) noexcept:
        self.num_events -= 1
        return self.table.event_destroy(event)
