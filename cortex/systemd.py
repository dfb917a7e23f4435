"""The interface to systemd: readiness, the watchdog, and socket activation.

The protocols of ``sd_notify(3)`` and ``sd_listen_fds(3)``, which are a datagram and two variables; without systemd all
of it does nothing. Any process of a service may notify (``NotifyAccess=all``), so ``WATCHDOG_PID`` is ignored.
"""

import asyncio
import os
import socket
from collections.abc import Mapping

LISTEN_FDS_START = 3
READY = "READY=1"
STOPPING = "STOPPING=1"
ALIVE = "WATCHDOG=1"


def notify(message: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send a message to the service manager; return whether it was sent."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            # A manager that does not read must not hold up an event loop.
            line.setblocking(False)
            line.connect(address)
            line.sendall(message.encode())
    except OSError:
        return False
    return True


def watchdog_s(environment: Mapping[str, str] = os.environ) -> float:
    """Return the timeout of the watchdog; 0 if there is none."""
    given = environment.get("WATCHDOG_USEC", "")
    return int(given) / 1e6 if given.isdecimal() else 0.0


async def stay_alive(environment: Mapping[str, str] = os.environ) -> None:
    """Notify the watchdog in time while this event loop runs; return at once without a watchdog."""
    limit_s = watchdog_s(environment)
    if not limit_s or not environment.get("NOTIFY_SOCKET"):
        return
    while True:
        notify(ALIVE, environment)
        await asyncio.sleep(limit_s / 3)


def listen_fds(environment: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """Return the descriptors of the sockets that were handed over to this process."""
    count = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return ()
    return tuple(range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)))
