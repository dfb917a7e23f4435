"""Watches for client disconnects, over a server that reports one only when asked.

Asking costs more than most answers do, so a watch asks once its answer has taken a moment: one timer for all watches.
"""

import asyncio

cimport cython

WATCH_AFTER_S = 0.02
"""Age of an answer at which its watch asks for the client's disconnect, and at least half of that."""


@cython.final
@cython.freelist(64)
cdef class Watch:
    """Watch of one client: calls ``callback`` once when it disconnects."""

    def __init__(self, protocol, callback):
        self.protocol = protocol
        self.callback = callback

    def end(self):
        """End the watch."""
        self.callback = None
        if self.future is not None:
            self.future.cancel()

    cdef int ask(self) except -1:
        """Ask the server to report the disconnect."""
        if self.callback is None:
            return 0
        future = self.protocol.client_disconnect()
        if asyncio.isfuture(future):
            self.future = future
            future.add_done_callback(self.on_disconnect)
        else:  # disconnected already
            self.on_disconnect(future)
        return 0

    def on_disconnect(self, future):
        """Call the callback."""
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()


@cython.final
cdef class Watches:
    """Watches of a loop that have not asked yet; each does when its answer is ``after_s`` old."""

    def __init__(self, loop, double after_s=WATCH_AFTER_S):
        self.loop = loop
        self.poll_s = after_s / 2
        self.young = []
        self.older = []

    cpdef Watch begin(self, protocol, callback):
        """Return a watch that asks soon, unless it is ended before."""
        watch = Watch(protocol, callback)
        self.young.append(watch)
        if not self.is_timed:
            self.is_timed = True
            self.loop.call_later(self.poll_s, self.poll)
        return watch

    def poll(self):
        """Ask for each watch that was here at the last poll; poll again while there are any."""
        cdef Watch watch
        for watch in self.older:
            watch.ask()
        self.older, self.young = self.young, []
        self.is_timed = bool(self.older)
        if self.is_timed:
            self.loop.call_later(self.poll_s, self.poll)
