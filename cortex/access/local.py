"""Whether a request comes from somebody on this host, and not from elsewhere by way of something on this host.

Where no key is an administrator's, this alone opens ``/admin``. A loopback address is not enough: a reverse proxy here
passes strangers on, and a page of theirs in a browser here can ask for addresses of this host, or have its own name
resolve to one.
"""

import ipaddress
import socket
from collections.abc import Callable

FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")
SAME_SITE = frozenset({b"same-origin", b"none"})


def comes_from_here(client: str, header: Callable[[bytes], bytes | None]) -> bool:
    """Return whether a request's client and headers say that an operator on this host asks."""
    if not _is_loopback(client) or any(header(name) is not None for name in FORWARDED):
        return False
    host = header(b"host")
    if host is not None and not _names_here(_without_port(host.decode("latin-1"))):
        return False
    origin, site = header(b"origin"), header(b"sec-fetch-site")
    if site is not None and site not in SAME_SITE:
        return False
    return origin is None or (host is not None and origin.partition(b"://")[2] == host)


def _names_here(host: str) -> bool:
    return host.lower() in {"localhost", socket.gethostname().lower()} or _is_loopback(host.strip("[]"))


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
