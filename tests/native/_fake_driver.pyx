"""Fake CUDA driver made of counters, for tests of the shipped loop.

Every call goes through `enter`, which logs it, and delays it and fails it as set up. Handles are numbers that grow and never
repeat; using one that is not alive is logged as misuse and returns an error, as the real driver would.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memset, strncpy
from posix.unistd cimport usleep

from neuron.device.driver cimport (
    CALL_CONTEXT_RELEASE,
    CALL_CONTEXT_RETAIN,
    CALL_CONTEXT_SET_CURRENT,
    CALL_DEVICE_GET,
    CALL_DEVICE_GET_NAME,
    CALL_EVENT_CREATE,
    CALL_EVENT_DESTROY,
    CALL_EVENT_RECORD,
    CALL_EVENT_SYNCHRONIZE,
    CALL_GET_VERSION,
    CALL_GRAPH_EXEC_DESTROY,
    CALL_GRAPH_INSTANTIATE,
    CALL_GRAPH_LAUNCH,
    CALL_INIT,
    CALL_MEMORY_INFO,
    CALL_STREAM_CREATE,
    CALL_STREAM_DESTROY,
    CALL_STREAM_QUERY,
    CALL_STREAM_SYNCHRONIZE,
    NUM_CALLS,
    Call,
    Driver,
)

from neuron.device.driver import SYMBOLS

cdef extern from *:
    """
    static __thread void *fake_current_context;
    static void *fake_get_current(void) { return fake_current_context; }
    static void fake_set_current(void *context) { fake_current_context = context; }
    #define fake_count(counter) __atomic_add_fetch((counter), 1, __ATOMIC_RELAXED)
    #define fake_store(word, value) __atomic_store_n((word), (value), __ATOMIC_RELEASE)
    #define fake_counted(counter) __atomic_load_n((counter), __ATOMIC_RELAXED)
    """
    uint64_t fake_count(uint64_t *counter) nogil
    void fake_store(int *word, int value) nogil
    uint64_t fake_counted(uint64_t *counter) nogil
    void *fake_get_current() nogil
    void fake_set_current(void *context) nogil

cdef enum:
    LOG_CALLS = 4096
    INVALID_HANDLE = 400
    NUM_DEVICES = 2
    INVALID_DEVICE = 101

# Safety: one loop at a time uses the table, from its own thread; the test sets up before that thread starts and reads
# when it rests or has ended. The counts alone are atomic: tests wait for them while the loop runs.
cdef int log[LOG_CALLS]
cdef uint64_t num_calls
cdef uint64_t counts[<int>NUM_CALLS]
cdef uint64_t fail_at[<int>NUM_CALLS]
cdef int fail_with[<int>NUM_CALLS]
cdef unsigned int delays_us[<int>NUM_CALLS]
cdef uintptr_t next_handle = 0x1000
cdef void *context
cdef int retained
cdef int streams
cdef int events
cdef int misuses
cdef uint64_t launched  # by the host
cdef uint64_t finished  # by the device, as far as the host has waited for it
cdef size_t free_bytes
cdef size_t total_bytes
cdef bint sticky
cdef int broken


cdef int enter(Call call) noexcept nogil:
    global num_calls, broken
    if num_calls < LOG_CALLS:
        log[num_calls] = call
    num_calls += 1
    cdef uint64_t nth = fake_count(&counts[<int>call])
    if delays_us[<int>call]:
        usleep(delays_us[<int>call])
    if broken:
        return broken
    if nth == fail_at[<int>call]:
        if sticky:
            broken = fail_with[<int>call]
        return fail_with[<int>call]
    return 0

cdef int need_context() noexcept nogil:
    global misuses
    if retained and fake_get_current() == context:
        return 0
    misuses += 1
    return 201  # CUDA_ERROR_INVALID_CONTEXT

cdef int fake_init(unsigned int flags) noexcept nogil:
    return enter(CALL_INIT)

cdef int fake_version(int *version) noexcept nogil:
    version[0] = 12080
    return enter(CALL_GET_VERSION)

cdef int fake_error_name(int code, const char **name) noexcept nogil:
    if code == 719:
        name[0] = b"CUDA_ERROR_LAUNCH_FAILED"
    elif code == 700:
        name[0] = b"CUDA_ERROR_ILLEGAL_ADDRESS"
    elif code == 2:
        name[0] = b"CUDA_ERROR_OUT_OF_MEMORY"
    elif code == INVALID_DEVICE:
        name[0] = b"CUDA_ERROR_INVALID_DEVICE"
    else:
        return 1
    return 0

cdef int fake_device(int *device, int ordinal) noexcept nogil:
    device[0] = ordinal
    cdef int code = enter(CALL_DEVICE_GET)
    return code if code else INVALID_DEVICE if not 0 <= ordinal < NUM_DEVICES else 0

cdef int fake_device_name(char *name, int size, int device) noexcept nogil:
    strncpy(name, b"Counting Machine", size)
    return enter(CALL_DEVICE_GET_NAME)

cdef int fake_retain(void **out, int device) noexcept nogil:
    global retained, context, next_handle
    cdef int code = enter(CALL_CONTEXT_RETAIN)
    if code:
        return code
    if not retained:
        next_handle += 1
        context = <void *>next_handle
    retained += 1
    out[0] = context
    return 0

cdef int fake_release(int device) noexcept nogil:
    global retained
    retained -= 1
    return enter(CALL_CONTEXT_RELEASE)

cdef int fake_set(void *wanted) noexcept nogil:
    cdef int code = enter(CALL_CONTEXT_SET_CURRENT)
    if code == 0:
        fake_set_current(wanted)
    return code

cdef int fake_memory(size_t *free, size_t *total) noexcept nogil:
    free[0] = free_bytes
    total[0] = total_bytes
    cdef int code = enter(CALL_MEMORY_INFO)
    return code if code else need_context()

cdef int fake_stream_create(void **stream, unsigned int flags) noexcept nogil:
    global streams, next_handle
    cdef int code = enter(CALL_STREAM_CREATE)
    if code == 0:
        code = need_context()
    if code == 0:
        streams += 1
        next_handle += 1
        stream[0] = <void *>next_handle
    return code

cdef int fake_stream_destroy(void *stream) noexcept nogil:
    global streams
    streams -= 1
    return enter(CALL_STREAM_DESTROY)

# What the device does of its own: the step that finishes as number `stop_at` writes to the host's word, and every step
# writes its number to as many words as it has rows, in the next row of a ring.
cdef uint64_t stop_at
cdef int stop_word
cdef int *ring
cdef uint64_t ring_rows
cdef uint64_t ring_columns
cdef object on_launch = None
cdef object on_finish = None

cdef void finish(uint64_t until) noexcept nogil:
    global finished
    cdef uint64_t column
    while finished < until:
        if ring != NULL:
            for column in range(ring_columns):
                fake_store(ring + finished % ring_rows * ring_columns + column, <int>finished + 1)
        finished += 1
        if has_hooks:
            call(on_finish)
    if stop_at and finished >= stop_at:
        fake_store(&stop_word, 1)

cdef bint has_hooks

cdef void call(hook) noexcept with gil:
    hook()

cdef int fake_stream_synchronize(void *stream) noexcept nogil:
    cdef int code = enter(CALL_STREAM_SYNCHRONIZE)
    if code == 0:
        finish(launched)
        code = need_context()
    return code

cdef int fake_stream_query(void *stream) noexcept nogil:
    cdef int code = enter(CALL_STREAM_QUERY)
    if code or finished == launched:
        return code
    finish(finished + 1)  # meanwhile
    return 600

# An event is the number of launches before it, so that waiting for one finishes those and no more.
cdef uint64_t recorded[64]

cdef int fake_event_create(void **event, unsigned int flags) noexcept nogil:
    global events
    cdef int code = enter(CALL_EVENT_CREATE)
    if code == 0:
        events += 1
        event[0] = <void *><uintptr_t>events
    return code

cdef int fake_event_destroy(void *event) noexcept nogil:
    global events
    events -= 1
    return enter(CALL_EVENT_DESTROY)

cdef int fake_event_record(void *event, void *stream) noexcept nogil:
    recorded[<uintptr_t>event & 63] = launched
    return enter(CALL_EVENT_RECORD)

cdef int fake_event_synchronize(void *event) noexcept nogil:
    cdef int code = enter(CALL_EVENT_SYNCHRONIZE)
    if code == 0:
        finish(recorded[<uintptr_t>event & 63])
    return code

cdef uint64_t furthest  # the most launches that were ever under way at once

cdef int fake_launch(void *graph_exec, void *stream) noexcept nogil:
    global launched, furthest
    cdef int code = enter(CALL_GRAPH_LAUNCH)
    if code == 0 and graph_exec == NULL:
        code = INVALID_HANDLE
    if code == 0:
        code = need_context()
    if code == 0:
        launched += 1
        furthest = max(furthest, launched - finished)
        if has_hooks:
            call(on_launch)
    return code

cdef int fake_instantiate(void **graph_exec, void *graph, unsigned long long flags) noexcept nogil:
    global next_handle
    cdef int code = enter(CALL_GRAPH_INSTANTIATE)
    if code == 0:
        code = need_context()
    if code == 0:
        next_handle += 1
        graph_exec[0] = <void *>next_handle
    return code

cdef int fake_graph_destroy(void *graph_exec) noexcept nogil:
    return enter(CALL_GRAPH_EXEC_DESTROY)

cdef Driver table
table.init = fake_init
table.get_version = fake_version
table.get_error_name = fake_error_name
table.device_get = fake_device
table.device_get_name = fake_device_name
table.context_retain = fake_retain
table.context_release = fake_release
table.context_set_current = fake_set
table.memory_info = fake_memory
table.stream_create = fake_stream_create
table.stream_destroy = fake_stream_destroy
table.stream_synchronize = fake_stream_synchronize
table.stream_query = fake_stream_query
table.event_create = fake_event_create
table.event_destroy = fake_event_destroy
table.event_record = fake_event_record
table.event_synchronize = fake_event_synchronize
table.graph_instantiate = fake_instantiate
table.graph_launch = fake_launch
table.graph_exec_destroy = fake_graph_destroy


def capsule():
    return PyCapsule_New(&table, b"neuron.device.driver.Driver", NULL)


def call_number(name):
    return SYMBOLS.index(name)


def reset(*, size_t free=3 << 30, size_t total=4 << 30, bint faults_stick=True):
    """Reset all state. With ``faults_stick`` each call after a failed one fails too, as on a real device."""
    global num_calls, retained, streams, events, misuses, launched, finished, free_bytes, total_bytes, sticky, broken
    global context, furthest, stop_at, ring, has_hooks
    stop_at = 0
    ring = NULL
    has_hooks = False
    fake_store(&stop_word, 0)
    num_calls = launched = finished = furthest = 0
    retained = streams = events = misuses = broken = 0
    context = NULL
    free_bytes, total_bytes, sticky = free, total, faults_stick
    memset(counts, 0, sizeof(counts))
    memset(fail_at, 0, sizeof(fail_at))
    memset(fail_with, 0, sizeof(fail_with))
    memset(delays_us, 0, sizeof(delays_us))


def fail(name, uint64_t at, int code=719):
    """Let the ``at``-th call of ``name`` (from 1) return ``code``."""
    cdef int call = call_number(name)
    fail_at[call] = at
    fail_with[call] = code


def stop_word_after(uint64_t steps):
    """Return the address of a word that the device writes when it has finished so many launches."""
    global stop_at
    stop_at = steps
    return <uintptr_t>&stop_word


def publish_to(uintptr_t address, uint64_t rows, uint64_t columns):
    """Have each launch that finishes write its number to a row of int32, as a ring buffer."""
    global ring, ring_rows, ring_columns
    ring, ring_rows, ring_columns = <int *>address, rows, columns


def hooks(launch, finish):
    """Call ``launch`` when the host launches, and ``finish`` when the device has finished one, with the GIL."""
    global on_launch, on_finish, has_hooks
    on_launch, on_finish, has_hooks = launch, finish, True


def num_finished():
    return finished


def delay(name, unsigned int microseconds):
    delays_us[<int>call_number(name)] = microseconds


def count(name):
    return fake_counted(&counts[<int>call_number(name)])


def calls():
    """The names of the calls so far, in order; the first 4,096 of them."""
    return [SYMBOLS[log[i]] for i in range(min(num_calls, <uint64_t>LOG_CALLS))]


def alive():
    return {"contexts": retained, "streams": streams, "events": events}


def misuse():
    return misuses


def most_under_way():
    return furthest


def current_context():
    """The context that is current on the calling thread; 0 is none."""
    return <uintptr_t>fake_get_current()
