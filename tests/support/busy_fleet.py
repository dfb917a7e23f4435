"""Many nodes in one process, each of them busy: ``busy_fleet.py NUMBER``. Prints their ports, then serves until killed.

What they say of themselves is different at every poll, as it is in a fleet under load.
"""

import asyncio
import contextlib
import json
import random
import sys
import time

import msgspec
import uvloop
from fake_node import GIB, FakeNode

from cortex.wire.node import Device, DeviceKind, Discovery, Health, WorkerHealth, WorkerState

NUM_DEVICES = 8
NUM_MODELS = 5
dice = random.Random(4)
began = time.monotonic()


class BusyNode(FakeNode):
    """One node with eight GPUs and five models."""

    def discovery(self) -> Discovery:
        devices = tuple(
            Device(
                f"cuda:{i}", DeviceKind.CUDA, "NVIDIA H100 80GB HBM3", 80 * GIB, dice.randrange(8 * GIB, 30 * GIB),
                "9.0", worker=WorkerState.READY,
            )
            for i in range(NUM_DEVICES)
        )  # fmt: skip
        return msgspec.structs.replace(super().discovery(), devices=devices)

    def health(self) -> Health:
        uptime_s = time.monotonic() - began
        for name, status in self.models.items():
            self.models[name] = msgspec.structs.replace(
                status, running=dice.randrange(40), last_used_at=time.time(), devices=("cuda:0",)
            )
        workers = tuple(
            WorkerHealth(f"cuda:{i}", WorkerState.READY, 0, 9, dice.randrange(3), generated=int(800 * uptime_s))
            for i in range(NUM_DEVICES)
        )
        return Health(self.state, uptime_s, workers)


async def _run(number: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        nodes = [BusyNode(f"gpu-{i:03}").ready(*(f"model-{m}" for m in range(NUM_MODELS))) for i in range(number)]
        for node in nodes:
            await stack.enter_async_context(node.serving())
        print(json.dumps({node.name: node.url for node in nodes}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_run(int(sys.argv[1])))
