"""A neuron that computes nothing and honours memory: ``fleet_node.py PORT NAME '{"cuda:0": GIB}'``.

All of the daemon is the real one: its server, its table, its evictions. See ``fleet_harness.py`` for its models.
"""

import asyncio
import json
import logging
import signal
import sys

import uvloop
from fleet_harness import GIB, FleetHarness, FleetWorker

from neuron.api import Api
from neuron.config import Config, DaemonSettings
from neuron.service import Service


async def _run(port: int, name: str, devices: dict[str, float]) -> None:
    daemon = DaemonSettings(
        name=name,
        listen=f"127.0.0.1:{port}",
        hold_s=2.0,
        linger_s=0.05,
        patience_s=0.5,
        drain_timeout_s=2.0,
        defrag_idle_s=0.5,
    )
    harness = FleetHarness({device: int(gib * GIB) for device, gib in devices.items()})
    workers = {device: FleetWorker(device, harness) for device in devices}
    service = Service(Config(daemon=daemon), {"torch": harness}, workers, harness.host)  # type: ignore[arg-type]
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, service.stop)
    await service.run(Api(service))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(created).3f %(levelname)s %(name)s %(message)s")
    uvloop.run(_run(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])))
