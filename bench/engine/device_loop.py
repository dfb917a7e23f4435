"""Cost of a device loop to the host: per replayed launch, and per small job over the channel.

The driver is the tests' counting table, so a launch is one indirect call: the rest is the loop's own cost. The
peer for a replay is the same count of launches made one by one from Python; the peer for a job is the standard
library's ``multiprocessing`` pipe, with a thread that answers on its other end as the loop does.
"""

import multiprocessing
import threading
import time
from collections.abc import Callable
from typing import Any

import report

from neuron.device import _fake_driver as fake  # type: ignore[attr-defined]
from neuron.device.channel import Channel, socket_pair
from neuron.device.loop import DeviceLoop

LAUNCHES = 1_000_000
GRAPH = 0x77


class Answering:
    """Handler that answers each message with itself, or with the time of a replay."""

    busy = False

    def __init__(self, loop: DeviceLoop) -> None:
        self.loop = loop

    def handle(self, message: bytes) -> None:
        """Answer one message."""
        if message[:1] == b"r":
            self.loop.send(b"%d" % replay_ns(self.loop, message))
        else:
            self.loop.send(message)

    def step(self) -> None:
        """Do nothing: ``busy`` is always false."""


def replay_ns(loop: DeviceLoop, message: bytes) -> int:
    """Return the nanoseconds of ``LAUNCHES`` launches, made as the message asks."""
    start = time.perf_counter_ns()
    if message == b"r one by one":
        for _ in range(LAUNCHES // 10):
            loop.replay(GRAPH, 1)
        return 10 * (time.perf_counter_ns() - start)
    if message == b"r queued":
        for _ in range(LAUNCHES // 10):
            loop.launch(GRAPH)
        return 10 * (time.perf_counter_ns() - start)
    loop.replay(GRAPH, LAUNCHES, stop_on_message=message == b"r stoppable")
    return time.perf_counter_ns() - start


class Worker:
    """Loop on a thread of its own, and the daemon's end of its channel."""

    def __enter__(self) -> Channel:
        theirs, ours = socket_pair()
        fake.reset()
        self.channel = Channel(ours)
        self.thread = threading.Thread(target=self._main, args=(theirs,))
        self.thread.start()
        return self.channel

    def _main(self, fd: int) -> None:
        with DeviceLoop(fake.capsule(), 0, fd, name="cuda-dev-0", step_limit_s=60.0) as loop:
            loop.run(Answering(loop))

    def __exit__(self, *exc_info: object) -> None:
        self.channel.close()
        self.thread.join()


def over_channel(channel: Channel, message: bytes) -> Callable[[], bytes]:
    """Return a call that sends ``message`` and waits for the answer."""

    def round_trip() -> bytes:
        channel.send(message)
        if channel.wants_write:
            channel.flush(10.0)
        return channel.recv(10.0)

    return round_trip


def over_pipe(messages: list[bytes]) -> list[float]:
    """Return the nanoseconds of a round trip of each message over a multiprocessing pipe."""
    ours, theirs = multiprocessing.Pipe()

    def answer() -> None:
        while message := theirs.recv_bytes():
            theirs.send_bytes(message)

    thread = threading.Thread(target=answer)
    thread.start()

    def round_trip_of(message: bytes) -> Callable[[], bytes]:
        def round_trip() -> bytes:
            ours.send_bytes(message)
            return ours.recv_bytes()

        return round_trip

    times = [report.best_ns(round_trip_of(message)) for message in messages]
    ours.send_bytes(b"")
    thread.join()
    return times


def main() -> None:
    """Measure and print."""
    options = report.arguments(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    with Worker() as channel:
        launches = {}
        for word in ("one by one", "queued", "multi-step", "stoppable"):
            round_trip = over_channel(channel, b"r " + word.encode())
            launches[word] = min(int(round_trip()) / LAUNCHES for _ in range(5))
            rows.append({"what": f"launch, {word}", "ns": launches[word]})
        sizes = [100, 1_000, 10_000, 60_000]
        messages = [b"m" * size for size in sizes]
        ours = [report.best_ns(over_channel(channel, message)) for message in messages]
    for size, mine, pipe in zip(sizes, ours, over_pipe(messages), strict=True):
        rows.append({"what": f"round trip of {size:,} bytes", "ns": mine, "pipe_ns": pipe})
    report.write(
        "device_loop",
        rows,
        question="host time of a replayed launch (counting driver) and of a small job over the channel",
        packages=["Cython"],
        ratios={
            "one by one / multi-step": launches["one by one"] / launches["multi-step"],
            "pipe / channel, 100 bytes": rows[4]["pipe_ns"] / rows[4]["ns"],
        },
        keep=options.keep,
    )


if __name__ == "__main__":
    main()
