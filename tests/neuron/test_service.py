"""The life of a daemon, served for real, with a device that takes its time and a model that plays scripts."""

import asyncio
from typing import Any

import httpx
import pytest
import uvloop
from daemons import free_port
from scripted_model import ScriptedHarness

from cortex.wire.node import Device as Described
from cortex.wire.node import DeviceKind, WorkerHealth, WorkerState
from neuron.api import Api
from neuron.config import Config, DaemonSettings, ModelSettings
from neuron.device.probe import Host
from neuron.service import Service

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Device:
    """A device worker that starts on a signal of the test."""

    device_id = "cpu:0"
    ready: Any = None

    def __init__(self) -> None:
        self.may_start = asyncio.Event()

    async def start(self) -> None:
        await self.may_start.wait()
        self.ready = object()

    async def stop(self, timeout_s: float) -> None:
        pass

    @property
    def state(self) -> WorkerState:
        return WorkerState.STARTING if self.ready is None else WorkerState.READY

    def health(self) -> WorkerHealth:
        return WorkerHealth(self.device_id, self.state, 0)


def test_it_answers_before_anything_is_warm_and_reports_what_it_waits_for() -> None:
    async def story() -> None:
        port, device, harness = free_port(), Device(), ScriptedHarness()
        harness.waits = asyncio.Event()
        config = Config(
            daemon=DaemonSettings(name="n", listen=f"127.0.0.1:{port}", devices="cpu"),
            models=(ModelSettings(id="m", source="/"),),
        )
        service = Service(config, {"torch": harness}, {"cpu:0": device})  # type: ignore[dict-item]
        running = asyncio.create_task(service.run(Api(service)))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:

            async def reports(path: str, expected: dict[str, Any]) -> None:
                async with asyncio.timeout(10):
                    while True:
                        try:
                            answer = (await client.get(path)).json()
                        except httpx.ConnectError:
                            answer = {}
                        if expected.items() <= answer.items():
                            return
                        await asyncio.sleep(0.01)

            await reports("/health", {"state": "starting", "activating": ["m"]})
            device.may_start.set()
            await reports("/health", {"state": "ready", "activating": ["m"]})
            assert [model["state"] for model in (await client.get("/models")).json()["models"]] == ["loading"]
            early = await client.post("/v1/chat/completions", json=CHAT)
            assert (early.status_code, early.json()["error"]["code"]) == (503, "model_not_ready")
            assert int(early.headers["retry-after"]) >= 1
            harness.waits.set()
            await reports("/health", {"state": "ready", "activating": []})
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        service.stop()
        await running

    uvloop.run(story())


CPU = Described("cpu:0", DeviceKind.CPU, "cpu", 1, 1)


def test_workers_of_gpus_listen_to_this_host_alone_and_end_a_hung_sum_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")  # an operator's own word
    host = Host((Described("cuda:0", DeviceKind.CUDA, "gpu", 1, 1), CPU))
    service = Service(Config(daemon=DaemonSettings(devices="all")), {}, look=lambda: host)
    gpu, cpu = (worker._environment for worker in service._workers.values())
    assert gpu["NCCL_SOCKET_IFNAME"] == "lo"
    assert int(gpu["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) <= 1000
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT" not in gpu
    assert not any("NCCL" in name for name in cpu)


def test_an_unusable_gpu_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    host = Host((CPU,), no_gpu="Driver/library version mismatch")
    service = Service(Config(daemon=DaemonSettings(devices="auto")), {}, look=lambda: host)
    assert list(service._workers) == ["cpu:0"]
    assert "no GPU can be used: Driver/library version mismatch" in caplog.text
