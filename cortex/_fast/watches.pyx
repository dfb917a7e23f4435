"""Who wants to hear of a client's leaving, from a server that tells only when it is asked.

To ask costs more than most answers do, so it is asked once an answer has taken a moment: one timer for all.
"""

import asyncio

cimport cython

WATCH_AFTER_S = 0.02
"""How long an answer takes before anybody asks whether its client is still there, and half of that at least."""

cdef double LOOK_S = WATCH_AFTER_S / 2


@cython.final
@cython.freelist(64)
cdef class Watch:
    """One who does: ``tell`` is called once."""

    def __init__(self, protocol, callback):
        self.protocol = protocol
        self.callback = callback

    def end(self):
        """Hear of it no more."""
        self.callback = None
        if self.future is not None:
            self.future.cancel()

    cdef int ask(self) except -1:
        """Have the server tell."""
        if self.callback is None:
            return 0
        future = self.protocol.client_disconnect()
        if asyncio.isfuture(future):
            self.future = future
            future.add_done_callback(self.hear)
        else:  # it has gone already
            self.hear(future)
        return 0

    def hear(self, future):
        """Tell."""
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()


@cython.final
cdef class Watches:
    """Those of a loop whose answers are still young."""

    def __init__(self, loop):
        self.loop = loop
        self.young = []
        self.older = []

    cpdef Watch begin(self, protocol, callback):
        """Watch from soon on, until it is ended."""
        watch = Watch(protocol, callback)
        self.young.append(watch)
        if not self.is_timed:
            self.is_timed = True
            self.loop.call_later(LOOK_S, self.look)
        return watch

    def look(self):
        """Ask for those that have been here before, and come again while there are any."""
        cdef Watch watch
        for watch in self.older:
            watch.ask()
        self.older, self.young = self.young, []
        self.is_timed = bool(self.older)
        if self.is_timed:
            self.loop.call_later(LOOK_S, self.look)
