"""Worker process, from spawn to reap, on the daemon's event loop.

Its end shows twice, as the end of its channel and as its exit; the first starts a timer for the other, so that its last
messages are read, its status is collected, and a process that does only one of the two is killed. Nothing here blocks
the loop or depends on jobs, sequences or restarts: bytes in, bytes out, and a reason at the end.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from neuron.device.channel import Channel, ChannelClosed, ChannelError, socket_pair
from neuron.device.jobs import EXIT_CRASHED, EXIT_POISONED, EXIT_WEDGED

EXIT_GRACE_S = 1.0
"""Time that a process may outlive its channel before it is killed."""
KILL_GRACE_S = 5.0
"""Time that a killed process may take to end; a process that hangs in its driver does not, and is abandoned."""

_REASONS = {
    0: "exited by itself",
    EXIT_POISONED: "device fault",
    EXIT_WEDGED: "a step outlasted its limit",
    EXIT_CRASHED: "its engine crashed; the log has the traceback",
}

logger = logging.getLogger(__name__)


class WorkerProcess:
    """Process of ``command`` with ``--device`` and ``--channel-fd`` added, in a process group of its own.

    ``on_message`` gets each message; ``on_end`` gets the reason, once, after the last message. The worker has the
    kernel end it with the *thread* that spawned it (:func:`neuron.device.loop.die_with_parent`), so construct
    this on the thread that runs the daemon's loop. Raises OSError if it cannot be spawned.
    """

    def __init__(
        self,
        device_id: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        on_message: Callable[[bytes], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._device_id = device_id
        self._on_message = on_message
        self._on_end = on_end
        self._verdict: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        ours, theirs = socket_pair()
        self._channel = Channel(ours)
        try:
            self._popen = subprocess.Popen(
                [*command, "--device", device_id, "--channel-fd", str(theirs)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # output of libraries belongs into the log
                pass_fds=(theirs,),
                process_group=0,
                env={**os.environ, **environment},
            )
        except BaseException:
            self._channel.close()
            raise
        finally:
            os.close(theirs)
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        self._loop.add_reader(self._channel.fileno(), self._readable)

    @property
    def pid(self) -> int:
        """Process id, and id of its group."""
        return self._popen.pid

    @property
    def status(self) -> int | None:
        """Exit status, or the negative number of the signal that ended it; ``None`` before."""
        return self._popen.returncode

    @property
    def pending_bytes(self) -> int:
        """Number of queued bytes that have not left this process."""
        return self._channel.pending_bytes

    def send(self, message: bytes) -> None:
        """Send a message, or queue it; dropped if the process is ending, as ``on_end`` follows.

        Raises MessageTooLong.
        """
        if self.ended.is_set():
            return
        try:
            self._channel.send(message)
        except ChannelClosed:
            return
        if self._channel.wants_write:
            self._loop.add_writer(self._channel.fileno(), self._writable)

    def kill(self, reason: str) -> None:
        """Kill the process, with ``reason`` as the reason for its end unless it has one."""
        if self._verdict is None:
            self._verdict = reason
        self.signal(signal.SIGKILL)
        self._give_up_after(KILL_GRACE_S)

    def expect_end(self, reason: str) -> None:
        """Record ``reason`` for the end that the process announced, and kill it after a grace period."""
        if self._verdict is None:
            self._verdict = reason
        self._kill_after(EXIT_GRACE_S)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole process group, if it still exists."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def destroy(self) -> None:
        """Kill and reap without the event loop, for a cancelled caller. Blocks for milliseconds."""
        if self.ended.is_set():
            return
        self.signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(KILL_GRACE_S)
        self._end("stopped")

    # ------------------------------------------------------------------ callbacks of the event loop

    def _readable(self) -> None:
        try:
            messages = self._channel.receive_ready()
        except ChannelError as error:
            self._forget_channel()
            logger.debug("%s: pid %d: %s", self._device_id, self.pid, error)
            self._kill_after(EXIT_GRACE_S)
            return
        for message in messages:
            if self._verdict is None:
                self._on_message(message)

    def _writable(self) -> None:
        try:
            done = self._channel.flush()
        except ChannelError:
            done = True  # the reader finds the end
        if done:
            self._loop.remove_writer(self._channel.fileno())

    def _exited(self) -> None:
        """Read its last messages, kill its group, reap it."""
        while not self.ended.is_set():
            try:
                messages = self._channel.receive_ready()
            except ChannelError:
                break
            if not messages:
                break
            for message in messages:
                if self._verdict is None:
                    self._on_message(message)
        self.signal(signal.SIGKILL)  # its children; its own entry is there until the wait
        status = self._popen.wait()
        self._end(self._verdict or reason_of(status))

    def _kill_after(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, self.kill, "closed its channel and did not exit")

    def _give_up_after(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        logger.error("%s: pid %d was killed and does not die; it may still hold the device", self._device_id, self.pid)
        self._end(f"{self._verdict}; it was killed and does not die")

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget_channel(self) -> None:
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())

    def _end(self, reason: str) -> None:
        if self.ended.is_set():
            return
        self._cancel_timer()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._forget_channel()
        self._channel.close()
        self.ended.set()
        self._on_end(reason)


def reason_of(status: int) -> str:
    """Return the reason for an exit status: a worker's own, a signal (negative), or another."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
        return f"killed by signal {-status}"
    return _REASONS.get(status, f"exited with status {status}")
