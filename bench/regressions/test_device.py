"""The device loop's costs as pytest-benchmark runs: ``pytest --benchmark``."""

import ctypes
import threading
from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from neuron.device import _fake_driver as fake  # type: ignore[attr-defined]
from neuron.device.channel import Channel, socket_pair
from neuron.device.loop import DeviceLoop

GRAPH = 0x77
PENDING = -2
ROWS = 64


class Answering:
    """Handler that replays as often as the message asks, or takes as many single steps, and answers."""

    busy = False

    def __init__(self, loop: DeviceLoop) -> None:
        self.loop = loop
        self.tokens = (ctypes.c_int * (2 * ROWS))(*[PENDING] * (2 * ROWS))

    def handle(self, message: bytes) -> None:
        """Answer one message."""
        if message.isdigit():
            self.loop.replay(GRAPH, int(message))
        elif message.startswith(b"steps "):
            self._step_singly(int(message[6:]))
        self.loop.send(message)

    def _step_singly(self, count: int) -> None:
        fake.publish_to(ctypes.addressof(self.tokens), 2, ROWS)
        for step in range(count):
            first = step % 2 * ROWS
            self.tokens[first] = PENDING
            self.loop.launch(GRAPH)
            self.loop.wait_for_words(ctypes.addressof(self.tokens) + first * 4, ROWS, PENDING)

    def step(self) -> None:
        """Never called: nothing is ever busy."""


@pytest.fixture(name="daemon")
def daemon_fixture() -> Iterator[Channel]:
    """Give the daemon's end of a loop that runs on a thread of its own."""
    theirs, ours = socket_pair()
    fake.reset()

    def serve() -> None:
        with DeviceLoop(fake.capsule(), 0, theirs, name="cuda-dev-0", step_limit_s=60.0) as loop:
            loop.run(Answering(loop))

    thread = threading.Thread(target=serve)
    thread.start()
    channel = Channel(ours)
    yield channel
    channel.close()
    thread.join()


@pytest.mark.parametrize("message", [b"x" * 100, b"x" * 10_000], ids=["100 bytes", "10 kB"])
def test_round_trip(benchmark: BenchmarkFixture, daemon: Channel, message: bytes) -> None:
    """Send a small job to the loop and wait for its answer."""

    def round_trip() -> bytes:
        daemon.send(message)
        return daemon.recv(10.0)

    assert benchmark(round_trip) == message


def test_replay_of_100_000_launches(benchmark: BenchmarkFixture, daemon: Channel) -> None:
    """Replay without the GIL through a driver that only counts."""

    def replay() -> bytes:
        daemon.send(b"100000")
        return daemon.recv(10.0)

    assert benchmark(replay) == b"100000"


def test_1000_single_steps(benchmark: BenchmarkFixture, daemon: Channel) -> None:
    """Launch a step and read its 64 tokens, one after the other: the host's share of a step of a captured graph."""

    def steps() -> bytes:
        daemon.send(b"steps 1000")
        return daemon.recv(10.0)

    assert benchmark(steps) == b"steps 1000"


def test_messages_through_a_socket(benchmark: BenchmarkFixture) -> None:
    """Send 64 rows and read them at once, on one thread."""
    left, right = (Channel(fd) for fd in socket_pair())

    def send_rows() -> int:
        for _ in range(64):
            left.send(b"a row of tokens, about as long as they are: sixty-four bytes of..")
        return len(right.receive_ready())

    assert benchmark(send_rows) == 64
    left.close()
    right.close()
