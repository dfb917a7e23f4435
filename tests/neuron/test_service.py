"""The life of a daemon, served for real, with a device that takes its time and a model that plays scripts."""

import asyncio
from typing import Any

import httpx
import uvloop
from daemons import free_port
from scripted_harness import ScriptedHarness

from cortex.wire.node import WorkerHealth, WorkerState
from neuron.api import Api
from neuron.config import Config, DaemonSettings, ModelSettings
from neuron.service import Service

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Device:
    """A device worker that is up when it is told to be."""

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


def test_it_answers_before_anything_is_warm_and_says_what_it_waits_for() -> None:
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

            async def told(path: str, expected: dict[str, Any]) -> None:
                async with asyncio.timeout(10):
                    while True:
                        try:
                            answer = (await client.get(path)).json()
                        except httpx.ConnectError:
                            answer = {}
                        if expected.items() <= answer.items():
                            return
                        await asyncio.sleep(0.01)

            await told("/health", {"state": "starting", "activating": ["m"]})
            device.may_start.set()
            await told("/health", {"state": "ready", "activating": ["m"]})
            assert [model["state"] for model in (await client.get("/models")).json()["models"]] == ["loading"]
            early = await client.post("/v1/chat/completions", json=CHAT)
            assert (early.status_code, early.json()["error"]["code"]) == (503, "model_not_ready")
            assert int(early.headers["retry-after"]) >= 1
            harness.waits.set()
            await told("/health", {"state": "ready", "activating": []})
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        service.stop()
        await running

    uvloop.run(story())
