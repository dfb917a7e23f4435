"""The worker process of one device: ``python -m neuron.engine --channel-fd N --device cpu:0``.

Started by the daemon with its end of a channel. The device loop owns the device and the thread; this file joins it to
the engine. The daemon decides when it ends: SIGINT, which a terminal sends to the whole group, is ignored.
"""

import argparse
import functools
import logging
import os
import signal
import sys

import msgspec
import torch

from cortex import logs
from neuron.device.channel import Channel
from neuron.device.driver import DriverError, DriverNotFoundError, cuda_driver
from neuron.device.jobs import EXIT_POISONED, Poisoned, Ready
from neuron.device.loop import DeviceLoop, die_with_parent
from neuron.device.probe import usable_cores
from neuron.engine.device_graphs import DeviceGraphs
from neuron.engine.engine import Engine
from neuron.engine.process_memory import keep_activations_mapped
from neuron.engine_settings import WorkerSettings

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Serve the device until the daemon is done with it; return the exit status."""
    parser = argparse.ArgumentParser(prog="neuron.engine", description=__doc__)
    parser.add_argument("--channel-fd", type=int, required=True, help="the inherited end of the daemon's channel")
    parser.add_argument("--device", required=True, help="cpu:0, cuda:0, cuda:1, ...")
    parser.add_argument("--settings", default="{}", help="WorkerSettings as JSON")
    options = parser.parse_args(arguments)
    settings = msgspec.json.decode(options.settings, type=WorkerSettings)
    kind, _, ordinal = options.device.partition(":")
    if kind not in {"cpu", "cuda"} or not ordinal.isdigit():
        parser.error(f"--device is {options.device!r}, not cpu:N or cuda:N")
    name = f"{kind}-dev-{ordinal}"
    logs.configure(settings.log_format, "INFO", logger="", worker=name)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    if kind == "cpu":
        keep_activations_mapped()
        torch.set_num_threads(usable_cores())
    # A loop that cannot start closes its descriptor; this one is for the reason.
    spare_fd = os.dup(options.channel_fd)
    try:
        loop = DeviceLoop(
            cuda_driver() if kind == "cuda" else None,
            int(ordinal),
            options.channel_fd,
            name=name,
            step_limit_s=settings.step_limit_s,
        )
    except (DriverNotFoundError, DriverError) as error:
        return _refuse(f"{options.device} cannot be taken: {error}", spare_fd)
    with loop:
        # Ends the loop after the message or step in hand, like the daemon's own Shutdown.
        signal.signal(signal.SIGTERM, lambda *_: loop.stop())
        if kind == "cuda":
            try:
                torch.cuda.init()  # type: ignore[no-untyped-call]
            except (RuntimeError, AssertionError) as error:
                return _refuse(f"{options.device} cannot be taken by torch: {str(error).splitlines()[0]}", spare_fd)
            torch.cuda.set_device(int(ordinal))
            # torch's work and the loop's graphs are queued on one stream, in the order they are given.
            torch.cuda.set_stream(torch.cuda.ExternalStream(loop.stream))  # type: ignore[no-untyped-call]
        os.close(spare_fd)
        engine = Engine(
            options.device,
            loop.send,
            loop.memory,
            loop.stop,
            max_waiting=settings.max_waiting,
            channel_fd=loop.channel.fileno(),
            graphs=functools.partial(DeviceGraphs, loop) if kind == "cuda" else None,
            settings=settings.engine,
        )
        free_bytes, total_bytes = loop.memory()
        loop.send(msgspec.msgpack.encode(Ready(options.device, os.getpid(), total_bytes, free_bytes)))
        status = loop.run(engine)
        if kind == "cuda":
            # The process frees everything. At a normal exit torch would free its memory on a stream that is gone by
            # then, with a driver that may no longer answer, and crash.
            logging.shutdown()
            os._exit(status)
        return status


def _refuse(reason: str, channel_fd: int) -> int:
    """Send the daemon the reason why there is no device; return the exit status."""
    logger.error("%s", reason)
    channel = Channel(channel_fd)
    channel.send(msgspec.msgpack.encode(Poisoned(reason)))
    channel.close()
    return EXIT_POISONED


if __name__ == "__main__":
    sys.exit(main())
