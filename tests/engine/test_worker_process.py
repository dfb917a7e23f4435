"""The worker as a process of its own, over a real channel."""

import array
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.device.channel import Channel, socket_pair


class Worker:
    def __init__(self) -> None:
        ours, theirs = socket_pair()
        self.channel = Channel(ours)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "neuron.engine", "--device", "cpu:0", "--channel-fd", str(theirs)],
            pass_fds=[theirs],
        )
        os.close(theirs)

    def send(self, message: jobs.ToWorker) -> None:
        self.channel.send(msgspec.msgpack.encode(message))

    def receive(self) -> Any:
        return msgspec.msgpack.decode(self.channel.recv(60.0), type=jobs.FromWorker)

    def until(self, kind: type) -> Any:
        while not isinstance(message := self.receive(), kind):
            pass
        return message


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker()
    yield found
    found.channel.close()
    assert found.process.wait(30) in {0, -signal.SIGKILL}


def test_a_worker_from_ready_to_shutdown(worker: Worker, tiny_llama: pathlib.Path) -> None:
    ready = worker.receive()
    assert isinstance(ready, jobs.Ready)
    assert (ready.device, ready.pid) == ("cpu:0", worker.process.pid)
    assert 0 < ready.memory_free_bytes <= ready.memory_total_bytes
    names = {path.read_text().strip() for path in pathlib.Path(f"/proc/{ready.pid}/task").glob("*/comm")}
    assert "cpu-dev-0" in names
    worker.send(jobs.Load(1, ModelSpec("m", "x"), str(tiny_llama)))
    assert worker.until(jobs.Done).result.model == "m"
    prompt = array.array("i", range(3, 30)).tobytes()
    worker.send(jobs.Generate(1, "m", prompt, 8, (), jobs.SamplerSettings(temperature=0.0)))
    rows: list[jobs.TokenRow] = []
    while not rows or rows[-1].end is None:
        rows += worker.until(jobs.Tokens).rows
    assert sum(len(row.ids) for row in rows) == 8 * 4
    # A terminal's interrupt goes to the whole group; the daemon decides.
    os.kill(ready.pid, signal.SIGINT)
    worker.send(jobs.QueryMemory(2))
    assert worker.until(jobs.Done).job == 2
    worker.send(jobs.Shutdown())
    assert worker.process.wait(30) == 0


def test_sigterm_and_a_daemon_that_goes_are_orderly_ends(worker: Worker) -> None:
    assert isinstance(worker.receive(), jobs.Ready)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(30) == 0
    other = Worker()
    assert isinstance(other.receive(), jobs.Ready)
    other.channel.close()
    assert other.process.wait(30) == 0
