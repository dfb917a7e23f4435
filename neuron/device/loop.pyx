"""Loop that owns one device: one OS thread, its primary context, its stream and its channel to the daemon.

It waits without the GIL, takes it to pass a message or a step to the handler (the engine), and releases it to replay
captured graphs. The rules: everything here runs on the thread that made the loop; a driver error is final and is
reported to the daemon; the end of the daemon ends the loop; a daemon that does not read pauses it. Messages and steps
are opaque here. Over 450 lines: one class, whose methods share C fields that Python cannot reach.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR
from libc.stdint cimport uint64_t, uintptr_t

from neuron.device.channel cimport CLOSED, DONE, FAILED, MESSAGE, PARTIAL, WOULD_BLOCK, Channel, Outcome
from neuron.device.driver cimport (
    CALL_CONTEXT_SET_CURRENT,
    CALL_EVENT_RECORD,
    CALL_EVENT_SYNCHRONIZE,
    CALL_GRAPH_INSTANTIATE,
    CALL_GRAPH_LAUNCH,
    CALL_MEMORY_INFO,
    CALL_STREAM_QUERY,
    CALL_STREAM_SYNCHRONIZE,
    NOT_READY,
    OUT_OF_MEMORY,
    SUCCESS,
    Call,
    Driver,
    DriverHandle,
)

import logging
import os
import typing

import msgspec

from neuron.device import jobs
from neuron.device.channel import ChannelError
from neuron.device.driver import SYMBOLS as _SYMBOLS
from neuron.device.driver import DeviceFault, DriverError
from neuron.device.probe import host_memory

cdef extern from "watchdog.h" nogil:
    struct watchdog:
        pass
    void watchdog_arm(watchdog *dog)
    void watchdog_disarm(watchdog *dog)
    void watchdog_extend(watchdog *dog, uint64_t limit_ns)
    int watchdog_start(watchdog *dog, const char *name, uint64_t limit_ns, int exit_status)
    void watchdog_stop(watchdog *dog)

cdef extern from "<pthread.h>" nogil:
    unsigned long pthread_self()
    int pthread_setname_np(unsigned long thread, const char *name)

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long argument)
    enum: PR_SET_PDEATHSIG

cdef extern from "<poll.h>" nogil:
    enum: POLLIN, POLLOUT

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int microseconds)

cdef extern from *:
    """
    /* Written by the device, or by a test's thread. */
    static inline int device_word(uintptr_t address) { return __atomic_load_n((int *)address, __ATOMIC_ACQUIRE); }
    """
    int device_word(uintptr_t address) nogil

cdef enum:
    READS_PER_QUERY = 64  # a query of the driver takes as long as some hundred reads of a word
    SPINNING_QUERIES = 64  # about half a millisecond; a longer step can bear a sleep
    NAP_US = 20
    MESSAGES_PER_STEP = 64  # a flood of messages does not starve the sequences that run
    MAX_NAME_BYTES = 15  # the kernel's bound on a thread's name
    SIGNAL_CHECK_MS = 1000  # a signal that arrives just before a poll does not interrupt it, and is seen after this

cdef double FINAL_FLUSH_S = 2.0  # time that an ending loop waits for the daemon to read queued messages

logger = logging.getLogger(__name__)


class Handler(typing.Protocol):
    """Engine that a loop drives. All methods are called on the loop's thread.

    The handler answers errors of a request. An exception that leaves it ends the process: :class:`DeviceFault` (or a
    DriverError) as poisoned, any other as crashed.
    """

    @property
    def busy(self) -> bool:
        """Whether there is a step to run now."""

    def handle(self, message: bytes) -> None:
        """Handle one message of the daemon."""

    def step(self) -> None:
        """Run one step; called while ``busy``, with the messages that arrived handled before each."""


def die_with_parent():
    """Have the kernel kill this process when the thread that started it ends.

    A worker inside a kernel launch does not notice that its channel has closed. Raises OSError.
    """
    if prctl(PR_SET_PDEATHSIG, 9) != 0:
        raise OSError("prctl(PR_SET_PDEATHSIG) failed")


@cython.final
@cython.no_gc_clear  # __dealloc__ releases the device through `driver`
cdef class DeviceLoop:
    """Owner of a device from construction to :meth:`close`, on the constructing thread, which it names ``name``.

    ``driver`` is a capsule of :func:`neuron.device.driver.cuda_driver`, or None for a CPU. ``channel_fd`` is taken
    over. ``step_limit_s`` is the watchdog's: a message or step that takes longer ends the process with EXIT_WEDGED;
    0 runs no watchdog. More than ``queue_limit_bytes`` unread by the daemon stops the stepping until it reads.

    Raises DriverNotFoundError, DriverError, OSError, and ValueError for a name over 15 bytes.
    """

    cdef readonly DriverHandle driver
    cdef readonly Channel channel
    cdef readonly str name
    cdef readonly object fault
    cdef readonly uint64_t launches
    cdef readonly uint64_t steps
    cdef readonly size_t queue_limit_bytes
    cdef unsigned long _owner
    cdef int _device
    cdef void *_stream
    cdef void *_events[2]
    cdef int _num_events
    cdef bint _has_context
    cdef bint _has_stream
    cdef bint _stopping
    cdef watchdog _watchdog
    cdef double _step_limit_s
    cdef double _limit_s

    def __cinit__(
        self, driver, int ordinal, int channel_fd, *, str name not None, double step_limit_s=0.0,
        size_t queue_limit_bytes=1 << 20,
    ):
        cdef bytes encoded = name.encode()
        cdef int error
        self.channel = Channel(channel_fd)
        if not 0 < len(encoded) <= MAX_NAME_BYTES:
            raise ValueError(f"the name of a thread has 1 to {MAX_NAME_BYTES} bytes: {name!r}")
        if step_limit_s < 0.0:
            raise ValueError(f"step_limit_s is negative: {step_limit_s}")
        self.name = name
        self.queue_limit_bytes = queue_limit_bytes
        self._step_limit_s = self._limit_s = step_limit_s
        self._owner = pthread_self()
        pthread_setname_np(self._owner, encoded)
        self.driver = DriverHandle(driver)
        try:
            self._open(ordinal)
            if step_limit_s > 0.0:
                error = watchdog_start(&self._watchdog, encoded, <uint64_t>(step_limit_s * 1e9), jobs.EXIT_WEDGED)
                if error:
                    raise OSError(error, os.strerror(error), "watchdog thread")
        except BaseException:
            self._release()
            raise

    cdef int _open(self, int ordinal) except -1:
        self._device = self.driver.device(ordinal)
        cdef void *context = self.driver.retain_context(self._device)
        self._has_context = True
        self.driver.check(self.driver.table.context_set_current(context), CALL_CONTEXT_SET_CURRENT)
        self._stream = self.driver.create_stream()
        self._has_stream = True
        while self._num_events < 2:
            self._events[self._num_events] = self.driver.create_event()
            self._num_events += 1
        return 0

    def __dealloc__(self):
        if self.driver is not None:
            self._release()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        """Release the device and close the channel, ignoring the driver's errors. Closing twice is fine."""
        self._release()
        self.channel.close()

    cdef int _release(self) noexcept:
        watchdog_stop(&self._watchdog)
        self.driver.destroy_graph_execs()
        while self._num_events:
            self._num_events -= 1
            self.driver.destroy_event(self._events[self._num_events])
        if self._has_stream:
            self._has_stream = False
            self.driver.destroy_stream(self._stream)
        if self._has_context:
            self._has_context = False
            self.driver.table.context_set_current(NULL)
            self.driver.release_context(self._device)
        return 0

    @property
    def stream(self):
        """Driver's handle of the loop's stream, e.g. for ``torch.cuda.ExternalStream``; 0 for a CPU."""
        return <uintptr_t>self._stream

    @property
    def limit_s(self):
        """Watchdog's limit for the current message or step. A long job sets its own, counted from its start; 0 disables
        the watchdog. The next one has ``step_limit_s`` again."""
        return self._limit_s

    @limit_s.setter
    def limit_s(self, double seconds):
        self._check_owner()
        if seconds < 0.0:
            raise ValueError(f"limit_s is negative: {seconds}")
        self._limit_s = seconds
        watchdog_extend(&self._watchdog, <uint64_t>(seconds * 1e9))

    def memory(self):
        """Return (free, total) bytes of the device: of this host, within its control group, for a CPU.

        Raises DeviceFault.
        """
        cdef size_t free_bytes = 0
        cdef size_t total_bytes = 0
        cdef int code
        self._check_usable()
        if self.driver.table.memory_info == NULL:
            return host_memory()
        code = self.driver.table.memory_info(&free_bytes, &total_bytes)
        if code != SUCCESS:
            self._poison(code, CALL_MEMORY_INFO)
        return free_bytes, total_bytes

    def send(self, bytes message not None):
        """Queue a message to the daemon and send what the socket takes. Does nothing if the daemon is gone: the loop
        ends by itself then. Raises MessageTooLong."""
        cdef Outcome outcome
        cdef const char *data = message
        cdef size_t size = len(message)
        self._check_owner()
        # Safety: `message` is immutable and held by the caller; the channel belongs to this thread.
        with nogil:
            outcome = self.channel.put(data, size)
        if outcome == FAILED:
            self.channel.fail()

    def stop(self):
        """End :meth:`run` with status 0 after the current call, once the daemon has read all queued messages."""
        self._stopping = True

    def instantiate(self, uintptr_t graph):
        """Make the captured ``graph`` (a ``CUgraph``) ready to replay; return the handle, which this loop owns.

        Raises DriverError for want of memory, which leaves the device usable; DeviceFault for any other error of the
        driver; ValueError on a device without graphs.
        """
        cdef void *graph_exec = NULL
        cdef int code
        self._check_usable()
        if self.driver.table.graph_instantiate == NULL:
            raise ValueError(f"{self.name} has no graphs")
        code = self.driver.table.graph_instantiate(&graph_exec, <void *>graph, 0)
        if code == OUT_OF_MEMORY:
            raise DriverError(_SYMBOLS[<int>CALL_GRAPH_INSTANTIATE], code, self.driver.error_name(code))
        if code != SUCCESS:
            self._poison(code, CALL_GRAPH_INSTANTIATE)
        self.driver.adopt_graph_exec(<uintptr_t>graph_exec)
        return <uintptr_t>graph_exec

    def launch(self, uintptr_t graph_exec):
        """Queue an instantiated graph on the loop's stream once, and return at once. Raises as :meth:`replay`."""
        cdef int code
        self._check_usable()
        if self.driver.table.graph_launch == NULL:
            raise ValueError(f"{self.name} has no graphs to replay")
        # Safety: as in replay.
        with nogil:
            code = self.driver.table.graph_launch(<void *>graph_exec, self._stream)
        if code != SUCCESS:
            self._poison(code, CALL_GRAPH_LAUNCH)
        self.launches += 1

    def replay(
        self, uintptr_t graph_exec, uint64_t count=1, *, bint stop_on_message=False, uintptr_t stop_word=0
    ):
        """Launch an instantiated graph ``count`` times on the loop's stream, wait for it, return the number of runs.

        With ``stop_on_message`` it ends early when a message of the daemon arrives, with ``stop_word`` when the device
        has written a value other than 0 to the int32 at that address of pinned memory: the running step and the one
        queued behind it still finish, so that the device never waits for the host. Raises DeviceFault, and
        ValueError on a device without graphs.
        """
        cdef uint64_t done
        cdef int code = SUCCESS
        cdef Call call = CALL_GRAPH_LAUNCH
        self._check_usable()
        if self.driver.table.graph_launch == NULL:
            raise ValueError(f"{self.name} has no graphs to replay")
        # Safety: the graph is the caller's for the length of the call; stream and events are this loop's, which
        # belongs to this thread; the driver's table never changes.
        with nogil:
            done = self._replay(<void *>graph_exec, count, stop_on_message, stop_word, &code, &call)
        if code != SUCCESS:
            self._poison(code, call)
        return done

    cdef uint64_t _replay(
        self, void *graph_exec, uint64_t count, bint stop_on_message, uintptr_t stop_word, int *code, Call *call
    ) noexcept nogil:
        cdef Driver *table = self.driver.table
        cdef uint64_t done = 0
        while done < count:
            call[0] = CALL_GRAPH_LAUNCH
            code[0] = table.graph_launch(graph_exec, self._stream)
            if code[0] != SUCCESS:
                return done
            done += 1
            self.launches += 1
            if not (stop_on_message or stop_word) or done == count:
                continue
            # A launch returns at once, so a check between launches alone would come before the first step has run.
            # Waiting for the step before the last keeps one step queued behind the running one.
            call[0] = CALL_EVENT_RECORD
            code[0] = table.event_record(self._events[done & 1], self._stream)
            if code[0] == SUCCESS and done > 1:
                call[0] = CALL_EVENT_SYNCHRONIZE
                code[0] = table.event_synchronize(self._events[(done - 1) & 1])
            if code[0] != SUCCESS:
                return done
            if stop_word and device_word(stop_word):
                break
            if stop_on_message and self.channel.wait(POLLIN, 0) > 0:
                break
        call[0] = CALL_STREAM_SYNCHRONIZE
        code[0] = table.stream_synchronize(self._stream)
        return done

    def wait_for_words(self, uintptr_t address, size_t count, int pending):
        """Wait until none of the ``count`` int32 at ``address``, in pinned memory, is ``pending``.

        Work queued behind these writes is not waited for. Raises DeviceFault, also where the device is idle and has not
        written; ValueError on a device without graphs.
        """
        cdef int code
        self._check_usable()
        if self.driver.table.graph_launch == NULL:
            raise ValueError(f"{self.name} has no graphs to wait for")
        # Safety: the memory is the caller's for the length of the call; the device writes each word once, whole.
        with nogil:
            code = self._wait_for_words(address, count, pending)
        if code == SUCCESS:
            return
        if code != NOT_READY:
            self._poison(code, CALL_STREAM_QUERY)
        self.fault = DeviceFault("wait_for_words", NOT_READY, "the device is done and has not published its tokens")
        raise self.fault

    cdef int _wait_for_words(self, uintptr_t address, size_t count, int pending) noexcept nogil:
        """Return SUCCESS, NOT_READY if the device is done and some word is pending, or the driver's error."""
        cdef size_t at = 0
        cdef int num_reads = 0
        cdef int queries = 0
        cdef int code
        cdef bint done = False
        while True:
            while at < count and device_word(address + at * sizeof(int)) != pending:
                at += 1
            if at == count:
                return SUCCESS
            if done:  # all its writes are visible, and were checked once more
                return NOT_READY
            num_reads += 1
            if num_reads < READS_PER_QUERY:
                continue
            num_reads = 0
            code = self.driver.table.stream_query(self._stream)
            done = code == SUCCESS
            if code != SUCCESS and code != NOT_READY:
                return code
            queries += 1
            if queries > SPINNING_QUERIES:
                usleep(NAP_US)

    def run(self, handler):
        """Serve until the daemon is gone or :meth:`stop` is called (0), the device faults (EXIT_POISONED, reported to
        the daemon first) or the handler raises (EXIT_CRASHED, with the traceback logged). Return that exit status."""
        cdef int status = 0
        self._check_owner()
        try:
            status = self._serve(handler)
        except DriverError as error:
            # Also a fault that the handler made of torch's error.
            logger.exception("%s: device fault", self.name)
            if self.fault is None:
                self.fault = error if isinstance(error, DeviceFault) else DeviceFault(error.call, error.code, error.name)
        except Exception:
            logger.exception("%s: the handler failed", self.name)
            status = jobs.EXIT_CRASHED
        finally:
            watchdog_disarm(&self._watchdog)
        try:
            if self.fault is not None:
                status = jobs.EXIT_POISONED
                self.channel.send(msgspec.msgpack.encode(jobs.Poisoned(str(self.fault))))
            self.channel.flush(FINAL_FLUSH_S)
        except (ChannelError, OSError):
            pass  # the daemon is gone: it finds the channel closed, and the exit status
        return status

    cdef int _serve(self, handler) except -1:
        cdef Outcome outcome
        cdef int handled = 0
        while not self._stopping and self.fault is None:
            if self.channel.pending_bytes:
                # Safety: here and below, channel and buffers belong to this thread.
                with nogil:
                    outcome = self.channel.drain()
                if outcome == CLOSED:
                    return 0
                if outcome == FAILED:
                    self.channel.fail()
                if self.channel.pending_bytes > self.queue_limit_bytes:
                    # More jobs would queue more answers, so nothing is read either.
                    self._sleep(POLLOUT)
                    continue
            with nogil:
                outcome = self.channel.receive()
                while outcome == PARTIAL:
                    outcome = self.channel.receive()
            if outcome == MESSAGE:
                self._limit_s = self._step_limit_s
                watchdog_arm(&self._watchdog)
                handler.handle(self.channel.take())
                watchdog_disarm(&self._watchdog)
                handled += 1
                if handled < MESSAGES_PER_STEP:
                    continue
            elif outcome == CLOSED:
                return 0
            elif outcome == FAILED:
                self.channel.fail()
            handled = 0
            if handler.busy:
                self._limit_s = self._step_limit_s
                watchdog_arm(&self._watchdog)
                handler.step()
                watchdog_disarm(&self._watchdog)
                self.steps += 1
            elif outcome == WOULD_BLOCK:
                self._sleep(POLLIN | POLLOUT if self.channel.pending_bytes else POLLIN)
        return 0

    cdef int _sleep(self, short events) except -1:
        """Sleep until the channel has one of ``events`` or the daemon is gone, a second at the most."""
        cdef int ready
        # Safety: reads the descriptor only, which this thread alone closes.
        with nogil:
            ready = self.channel.wait(events, SIGNAL_CHECK_MS)
        if ready == 0 or ready == -EINTR:
            PyErr_CheckSignals()
        elif ready < 0:
            raise OSError(-ready, os.strerror(-ready))
        return 0

    cdef int _check_owner(self) except -1:
        if pthread_self() != self._owner:
            raise RuntimeError(f"{self.name} is used from another thread than the one that owns it")
        return 0

    cdef int _check_usable(self) except -1:
        self._check_owner()
        if self.fault is not None:
            raise DeviceFault(self.fault.call, self.fault.code, self.fault.name)
        if not self._has_context:
            raise ValueError(f"{self.name} is closed")
        return 0

    cdef int _poison(self, int code, Call call) except -1:
        self.fault = DeviceFault(_SYMBOLS[<int>call], code, self.driver.error_name(code))
        raise self.fault
