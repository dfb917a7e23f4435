"""A real neuron over scripted models: ``scripted_node.py '{"port": 8000, "name": "a", "devices": {"cuda:0": GIB}}'``.

Without ``devices`` it has a CPU and the model ``m``, which plays the scenarios. ``dialects`` are the only ones that it
serves. Its server, its API and its table of models are the daemon's own.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import uvloop
from scenarios import count_up, play
from scripted_model import GIB, ScriptedHarness, ScriptedWorker

from cortex.dialects import registry
from cortex.wire.node import LoadRequest
from neuron.api import Api
from neuron.config import Config, DaemonSettings
from neuron.service import Service

QUICK = {
    "hold_s": 2.0, "linger_s": 0.05, "patience_s": 0.5, "drain_timeout_s": 2.0, "defrag_idle_s": 0.5,
}  # fmt: skip


def serve_only(dialects: Sequence[str]) -> None:
    """Take all other dialects off the list."""
    registry.DIALECTS = tuple(dialect for dialect in registry.DIALECTS if dialect.name in dialects)


async def run(port: int, name: str, devices: dict[str, float], dialects: Sequence[str] = ()) -> None:
    body_timeout_s = float(os.environ.get("SCRIPTED_BODY_TIMEOUT_S", "60"))
    more: dict[str, Any] = QUICK if devices else {"devices": "cpu", "body_timeout_s": body_timeout_s}
    config = Config(daemon=DaemonSettings(name=name, listen=f"127.0.0.1:{port}", **more))
    total_bytes = {device: int(gib * GIB) for device, gib in devices.items()}
    harness = ScriptedHarness(count_up if devices else play, not devices, total_bytes)
    if devices:
        workers: Any = {device: ScriptedWorker(device, harness) for device in devices}
        service = Service(config, {"torch": harness}, workers, harness.host)
    else:
        service = Service(config, {"torch": harness})
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, service.stop)
    loading = None if devices else asyncio.ensure_future(service.load(LoadRequest(id="m", source="/")))
    if dialects:
        serve_only(dialects)
    await service.run(Api(service))
    if loading is not None:
        await loading


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(created).3f %(levelname)s %(name)s %(message)s")
    uvloop.run(run(**json.loads(sys.argv[1])))
