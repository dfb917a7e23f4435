"""``neuron``: the daemon's command line. Parses arguments, sets up logging and signals, and runs the service."""

import argparse
import asyncio
import contextlib
import pathlib
import signal
import sys

import uvloop

from cortex import logs, tracing
from cortex._fast.scheduling import set_slice
from cortex.build_identity import COMMIT
from cortex.settings import ConfigError, check_address
from cortex.wire.errors import ApiError
from neuron import __version__
from neuron.api import Api
from neuron.config import Config, load
from neuron.service import Service

EXIT_CONFIG = 2
SLICE_NS = 100_000
"""Time slice of the event loop's thread, so that it soon runs beside workers that compute on every core."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(
        "neuron", description="Load open-weight models on this host's devices and serve inference over HTTP."
    )
    found.add_argument("--devices", help="devices to use: 'auto', 'cpu', or GPU indices such as '0,1'")
    found.add_argument("--config", type=pathlib.Path, help="neuron.toml (default: $NEURON_CONFIG, /etc/neuron)")
    found.add_argument("--listen", help="address to serve on, host:port (default 127.0.0.1:13131)")
    found.add_argument("--name", help="this node's name (default: the host's)")
    found.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    found.add_argument("--check", action="store_true", help="check the configuration and exit")
    found.add_argument(
        "--version", action="version", version=f"neuron {__version__}{f' ({COMMIT[:12]})' if COMMIT else ''}"
    )
    return found


def main() -> int:
    """Run the daemon until SIGTERM or SIGINT. Returns 0 after an orderly end, 2 for a wrong configuration."""
    arguments = parser().parse_args()
    flags = {
        "daemon.devices": arguments.devices,
        "daemon.listen": arguments.listen,
        "daemon.name": arguments.name,
    }
    try:
        config = load(arguments.config, flags)
        check_address(config.daemon.listen, str(arguments.config or "neuron.toml"), "daemon.listen")
        if arguments.check:
            print(f"neuron: the configuration is right, models: {len(config.models)}")  # noqa: T201
            return 0
        logs.configure(config.daemon.log_format, arguments.log_level.upper(), logger="")
        tracing.configure(config.daemon.trace_endpoint, "neuron", config.daemon.name)
        return uvloop.run(_run(config))
    except (ConfigError, ApiError) as error:
        print(f"neuron: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_CONFIG
    finally:
        tracing.shut_down()


async def _run(config: Config) -> int:
    with contextlib.suppress(OSError):  # forbidden in a sandbox
        set_slice(0, SLICE_NS, inherited=False)
    service = Service(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    await service.run(Api(service))
    return 0


if __name__ == "__main__":
    sys.exit(main())
