"""The worker as a process of its own, over a real channel."""

import array
import asyncio
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from cortex.wire.node import ModelSpec
from neuron.device import jobs
from neuron.device import worker as device_worker
from neuron.device.channel import Channel, socket_pair
from neuron.errors import DeviceWorkerLostError


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


def fault_of(
    device: str, environment: dict[str, str] | None = None, command: tuple[str, ...] = ("-m", "neuron.engine")
) -> str:
    """Start a worker of an unavailable GPU; return its error as the daemon's handle has it."""

    async def story() -> str:
        found = device_worker.Worker(device, [sys.executable, *command], environment=environment)
        with pytest.raises(DeviceWorkerLostError) as caught:
            await found.start()
        await found.stop()
        return str(caught.value)

    return asyncio.run(story())


def test_a_host_without_a_driver_gets_an_error_with_the_remedy() -> None:
    message = fault_of("cuda:0")
    assert "cuda:0 cannot be taken: no NVIDIA driver: libcuda.so.1 cannot be opened" in message
    assert "--devices cpu" in message


def test_a_device_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    spec = importlib.util.find_spec("neuron.device._fake_libcuda")
    assert spec is not None
    assert spec.origin is not None
    (tmp_path / "libcuda.so.1").symlink_to(spec.origin)
    message = fault_of("cuda:5", {"LD_LIBRARY_PATH": str(tmp_path)})
    assert "cuda:5 cannot be taken: cuDeviceGet returned 100 (CUDA_ERROR_NO_DEVICE)" in message


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_that_cannot_use_the_device_is_an_error() -> None:
    """Built without CUDA, or for a newer driver than the one here: the loop takes the device, and torch does not."""
    code = (
        "import sys; from neuron.device import _fake_driver as fake; from neuron.engine import __main__ as worker; "
        "worker.cuda_driver = fake.capsule; sys.exit(worker.main())"
    )
    message = fault_of("cuda:0", command=("-c", code))
    assert "cuda:0 cannot be taken by torch: Torch not compiled with CUDA enabled" in message


ON_A_GPU = """
import os, sys
import torch
from neuron.device import _fake_driver as fake
from neuron.device.driver import DeviceFault
import neuron.engine.__main__ as worker

class Pinned:
    def __del__(self):
        os.abort()  # as torch does, whose destructor records an event on a stream that is gone

class Engine:
    busy = True
    def __init__(self, *_, **__):
        self.pinned = Pinned()
    def step(self):
        raise DeviceFault("cuGraphLaunch", 719, "CUDA_ERROR_LAUNCH_FAILED")

worker.cuda_driver = fake.capsule
worker.Engine = Engine
torch.cuda.init = lambda: None
torch.cuda.set_device = torch.cuda.set_stream = torch.cuda.ExternalStream = lambda _: None
sys.exit(worker.main(["--device", "cuda:0", "--channel-fd", sys.argv[1]]))
"""


def test_after_a_fault_a_worker_leaves_without_giving_anything_back() -> None:
    ours, theirs = socket_pair()
    daemon = Channel(ours)
    process = subprocess.Popen([sys.executable, "-c", ON_A_GPU, str(theirs)], pass_fds=[theirs])
    os.close(theirs)
    sent = [msgspec.msgpack.decode(daemon.recv(60.0), type=jobs.FromWorker) for _ in range(2)]
    assert [type(message) for message in sent] == [jobs.Ready, jobs.Poisoned]
    assert process.wait(30) == jobs.EXIT_POISONED
    daemon.close()
