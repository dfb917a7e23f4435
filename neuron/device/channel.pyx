"""Channel between a daemon and a device worker: an end of a SOCK_SEQPACKET socket pair.

The kernel keeps packet boundaries, pushes back when the reader is slow and reports the death of the other end. A
message longer than a packet goes out in fragments: one header byte (1 = more follow, 0 = last), then at most 65,535
bytes. Sending never blocks: bytes that the socket does not take are queued here, in order; `pending_bytes` counts them.

A channel owns its descriptor and belongs to one thread. It does not interpret messages.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EMSGSIZE, ENOBUFS, ENOMEM, EPIPE, EPROTO, errno
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset
from posix.fcntl cimport F_GETFL, F_SETFL, O_NONBLOCK, fcntl
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close

import os
import socket

cdef extern from "<sys/socket.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
        int msg_flags
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    enum: MSG_NOSIGNAL, MSG_DONTWAIT, MSG_TRUNC

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout_ms)
    enum: POLLIN, POLLOUT

cdef extern from *:
    """
    static long live_blocks_count;
    #define count_blocks(n) __atomic_add_fetch(&live_blocks_count, (n), __ATOMIC_RELAXED)
    """
    long count_blocks(long n) nogil

cdef enum:
    PAYLOAD_BYTES = FRAGMENT_BYTES - 1
    INPUT_KEPT_BYTES = 1 << 20  # a longer buffer goes back to the system after its message
    MESSAGES_PER_READ = 64

MAX_MESSAGE_BYTES = 64 << 20
"""Default bound on the length of a message."""


class ChannelError(Exception):
    """The channel cannot be used any further."""


class ChannelClosed(ChannelError):
    """The other end is gone."""


class ChannelCorrupt(ChannelError):
    """A received packet is not one that a channel sends."""


class MessageTooLong(ChannelError):
    """A message is longer than the channel's bound."""


def live_blocks():
    """Return the number of allocated buffers of this module, for tests of leaks."""
    return count_blocks(0)


@cython.final
cdef class Channel:
    """End of a channel. Takes over ``fd``, a connected SOCK_SEQPACKET socket, and makes it non-blocking.

    Raises OSError if the descriptor cannot be used.
    """

    def __cinit__(self, int fd, *, size_t max_message_bytes=MAX_MESSAGE_BYTES):
        self._fd = -1
        self.max_message_bytes = max_message_bytes
        cdef int flags = fcntl(fd, F_GETFL)
        if flags < 0 or fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0:
            raise OSError(errno, os.strerror(errno), f"channel descriptor {fd}")
        self._fd = fd

    def __dealloc__(self):
        self._drop_outgoing()
        self._drop_input()
        if self._fd >= 0:
            close(self._fd)

    def fileno(self):
        """Return the descriptor, for a selector. Raises ChannelClosed after :meth:`close`."""
        self._check_open()
        return self._fd

    def close(self):
        """Close this end and drop queued messages. Closing twice is fine."""
        self._drop_outgoing()
        self._drop_input()
        self._broken = self._end_of_input = True
        if self._fd >= 0:
            close(self._fd)
            self._fd = -1

    @property
    def closed(self):
        """Whether this end was closed or the other end was found closed."""
        return self._end_of_input

    @property
    def wants_write(self):
        """Whether messages are queued: :meth:`flush` when the descriptor is writable."""
        return self._first != NULL

    def receive_ready(self):
        """Return the messages that have arrived, at most 64 of them, without waiting.

        Raises ChannelClosed once the other end is gone and everything it sent was returned, MessageTooLong and
        ChannelCorrupt when the peer breaks the rules.
        """
        cdef Outcome outcome
        cdef list messages = []
        self._check_open()
        while len(messages) < MESSAGES_PER_READ:
            # Safety: the buffers belong to this channel, the channel to the calling thread.
            with nogil:
                outcome = self.receive()
                while outcome == PARTIAL:
                    outcome = self.receive()
            if outcome == MESSAGE:
                messages.append(self.take())
            elif outcome == WOULD_BLOCK or messages:
                break
            elif outcome == CLOSED:
                self._raise_closed()
            else:
                self.fail()
        return messages

    def recv(self, timeout_s=None):
        """Wait for one message and return it. Raises TimeoutError, and as :meth:`receive_ready`."""
        cdef Outcome outcome
        cdef double deadline = -1.0 if timeout_s is None else _now() + <double>timeout_s
        self._check_open()
        while True:
            # Safety: as in receive_ready.
            with nogil:
                outcome = self.receive()
                while outcome == PARTIAL:
                    outcome = self.receive()
            if outcome == MESSAGE:
                return self.take()
            if outcome == CLOSED:
                self._raise_closed()
            if outcome == FAILED:
                self.fail()
            if not self._wait_until(POLLIN, deadline):
                raise TimeoutError(f"no message within {timeout_s} s")

    def send(self, bytes message not None):
        """Send ``message``, or queue the bytes that the socket does not take; order is kept.

        Raises ChannelClosed if the other end is gone, MessageTooLong without sending anything.
        """
        cdef Outcome outcome
        cdef const char *data = PyBytes_AS_STRING(message)
        cdef size_t size = PyBytes_GET_SIZE(message)
        self._check_open()
        # Safety: the caller holds `message`, which is immutable; the queue belongs to the calling thread.
        with nogil:
            outcome = self.put(data, size)
        if outcome == CLOSED:
            self._raise_closed()
        if outcome == FAILED:
            self.fail()

    def flush(self, double timeout_s=0.0):
        """Send queued messages, waiting at most ``timeout_s``; return whether all were sent.

        Raises ChannelClosed if the other end is gone.
        """
        cdef Outcome outcome
        cdef double deadline = _now() + timeout_s
        self._check_open()
        while True:
            # Safety: as in send.
            with nogil:
                outcome = self.drain()
            if outcome == DONE:
                return True
            if outcome == CLOSED:
                self._raise_closed()
            if outcome == FAILED:
                self.fail()
            if timeout_s <= 0.0 or not self._wait_until(POLLOUT, deadline):
                return False

    # ------------------------------------------------------------------ without the GIL

    cdef Outcome receive(self) noexcept nogil:
        """Read one packet. Messages are assembled here alone."""
        cdef char header
        cdef iovec parts[2]
        cdef msghdr packet
        cdef ssize_t size
        cdef size_t capacity
        cdef char *grown
        if self._input_fault:
            self.error_number = self._input_fault
            return FAILED
        if self._end_of_input:
            return CLOSED
        if self._input_capacity < self._input_bytes + PAYLOAD_BYTES:
            capacity = max(2 * self._input_capacity, self._input_bytes + PAYLOAD_BYTES)
            grown = <char *>realloc(self._input, capacity)
            if grown == NULL:
                self.error_number = ENOMEM
                return FAILED
            if self._input == NULL:
                count_blocks(1)
            self._input = grown
            self._input_capacity = capacity
        parts[0].iov_base = &header
        parts[0].iov_len = 1
        parts[1].iov_base = self._input + self._input_bytes
        parts[1].iov_len = PAYLOAD_BYTES
        while True:
            memset(&packet, 0, sizeof(packet))
            packet.msg_iov = parts
            packet.msg_iovlen = 2
            size = recvmsg(self._fd, &packet, MSG_DONTWAIT)
            if size >= 0:
                break
            # Linux reports ECONNRESET once when the peer closed with unread input; the data that the peer had sent
            # follows the error.
            if errno == EINTR or errno == ECONNRESET:
                continue
            if errno == EAGAIN:
                return WOULD_BLOCK
            self.error_number = errno
            return FAILED
        if size == 0:  # no packet is empty: each has its header
            self._end_of_input = True
            return CLOSED
        if packet.msg_flags & MSG_TRUNC or header < 0 or header > 1:
            self._input_fault = self.error_number = EPROTO
            return FAILED
        self._input_bytes += size - 1
        if self._input_bytes > self.max_message_bytes:
            self._input_fault = self.error_number = EMSGSIZE
            return FAILED
        return PARTIAL if header else MESSAGE

    cdef Outcome put(self, const char *data, size_t size) noexcept nogil:
        """Send a message, or the bytes of it that the socket takes, and queue a copy of the rest."""
        cdef Outgoing *node
        cdef size_t sent = 0
        cdef Outcome outcome = WOULD_BLOCK
        if size > self.max_message_bytes:
            self.error_number = EMSGSIZE
            return FAILED
        if self._broken:
            return CLOSED
        if self._first == NULL:
            outcome = self._transmit(data, size, &sent)
            if outcome != WOULD_BLOCK:
                return outcome
        node = <Outgoing *>malloc(sizeof(Outgoing) + size - sent)
        if node == NULL:
            # Not recoverable: half of the message may be sent.
            self._broken = True
            self.error_number = ENOMEM
            return FAILED
        count_blocks(1)
        node.next = NULL
        node.size_bytes = size - sent
        node.sent_bytes = 0
        memcpy(node + 1, data + sent, size - sent)
        if self._first == NULL:
            self._first = node
        else:
            self._last.next = node
        self._last = node
        self.pending_bytes += node.size_bytes
        return WOULD_BLOCK

    cdef Outcome drain(self) noexcept nogil:
        """Send from the queue until it is empty or the socket takes no more."""
        cdef Outgoing *node
        cdef Outcome outcome
        cdef size_t before
        if self._broken:
            return CLOSED
        while self._first != NULL:
            node = self._first
            before = node.sent_bytes
            outcome = self._transmit(<const char *>(node + 1), node.size_bytes, &node.sent_bytes)
            self.pending_bytes -= node.sent_bytes - before
            if outcome != DONE:
                if outcome != WOULD_BLOCK:
                    self._drop_outgoing()
                return outcome
            self._first = node.next
            free(node)
            count_blocks(-1)
        return DONE

    cdef Outcome _transmit(self, const char *data, size_t size, size_t *sent) noexcept nogil:
        """Send ``data`` from ``sent[0]`` on, fragment by fragment; ``sent[0]`` ends where the socket stopped."""
        cdef char header
        cdef iovec parts[2]
        cdef msghdr packet
        cdef size_t length
        memset(&packet, 0, sizeof(packet))
        packet.msg_iov = parts
        packet.msg_iovlen = 2
        parts[0].iov_base = &header
        parts[0].iov_len = 1
        while True:
            length = min(size - sent[0], <size_t>PAYLOAD_BYTES)
            header = sent[0] + length < size
            parts[1].iov_base = <void *>(data + sent[0])
            parts[1].iov_len = length
            if sendmsg(self._fd, &packet, MSG_NOSIGNAL | MSG_DONTWAIT) < 0:
                if errno == EINTR:
                    continue
                # A packet is sent whole or not at all.
                if errno == EAGAIN or errno == ENOBUFS:
                    return WOULD_BLOCK
                self._broken = True
                if errno == EPIPE or errno == ECONNRESET:
                    return CLOSED
                self.error_number = errno
                return FAILED
            sent[0] += length
            if not header:
                return DONE

    cdef int wait(self, short events, int timeout_ms) noexcept nogil:
        """Wait for ``events``; return those that hold, 0 after the timeout, -errno if it fails."""
        cdef pollfd entry
        entry.fd = self._fd
        entry.events = events
        entry.revents = 0
        cdef int ready = poll(&entry, 1, timeout_ms)
        return entry.revents if ready > 0 else -errno if ready < 0 else 0

    cdef void _drop_outgoing(self) noexcept nogil:
        cdef Outgoing *node
        while self._first != NULL:
            node = self._first
            self._first = node.next
            free(node)
            count_blocks(-1)
        self._last = NULL
        self.pending_bytes = 0

    cdef void _drop_input(self) noexcept nogil:
        if self._input != NULL:
            free(self._input)
            count_blocks(-1)
        self._input = NULL
        self._input_capacity = self._input_bytes = 0

    # ------------------------------------------------------------------ with it

    cdef bytes take(self):
        """Return the assembled message and make room for the next."""
        cdef bytes message = PyBytes_FromStringAndSize(self._input, <Py_ssize_t>self._input_bytes)
        self._input_bytes = 0
        if self._input_capacity > INPUT_KEPT_BYTES:
            self._drop_input()
        return message

    cdef int fail(self) except -1:
        """Raise the exception for ``error_number``."""
        if self.error_number == EMSGSIZE:
            raise MessageTooLong(f"a message is longer than the channel's bound of {self.max_message_bytes} bytes")
        if self.error_number == EPROTO:
            raise ChannelCorrupt("a packet has no valid header")
        raise OSError(self.error_number, os.strerror(self.error_number))

    cdef int _check_open(self) except -1:
        if self._fd < 0:
            raise ChannelClosed("this end is closed")
        return 0

    cdef int _raise_closed(self) except -1:
        if self._input_bytes:
            raise ChannelClosed(f"the other end is gone after {self._input_bytes} bytes of an unfinished message")
        raise ChannelClosed("the other end is gone")

    cdef int _wait_until(self, short events, double deadline) except -1:
        """Wait for ``events`` until ``deadline`` (below 0: for ever); return whether they occurred."""
        cdef int ready
        cdef double left
        cdef int timeout_ms = -1
        while True:
            if deadline >= 0.0:
                left = deadline - _now()
                if left <= 0.0:
                    return 0
                timeout_ms = <int>(left * 1000.0) + 1 if left < 1e6 else 1000000000
            # Safety: reads the descriptor only, which this thread alone closes.
            with nogil:
                ready = self.wait(events, timeout_ms)
            if ready > 0:
                return 1
            if ready < 0:
                if ready != -EINTR:
                    raise OSError(-ready, os.strerror(-ready))
                PyErr_CheckSignals()  # a Python signal handler may run here, and raise


cdef double _now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec + 1e-9 * time.tv_nsec


def socket_pair():
    """Return two connected descriptors for two channels; closed on exec unless passed on."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return left.detach(), right.detach()
