"""The check of a request's origin, which every listener of both daemons makes first.

A browser sends requests for any page that is open in it, also to addresses that only its own host can reach. So a
request without a key (or a neuron's secret) must not come from a page of another site: its ``Origin`` and
``Sec-Fetch-Site`` are this server's own or allowed, and its ``Host`` is no name that a stranger can resolve to here
(DNS rebinding). A key proves this by itself, since a page has no key that it was not given. A body needs a JSON content
type in every case: a browser sends a preflight before it sends that to another site.

Only headers are checked here, no keys, paths or servers. :meth:`Guard.cors` and :meth:`Guard.preflight` return the
headers for browsers.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Collection, Sequence

from cortex.settings import ConfigError
from cortex.wire.errors import ApiError, ForbiddenError
from cortex.wire.headers import IGNORED, REQUEST_ID

Header = tuple[bytes, bytes]
Headers = Callable[[bytes], bytes | None]
"""Returns a request's header by its lower-case name."""

ANY = "*"
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._~-]+)(?::[0-9]{1,5})?")
HOST = re.compile(r"[a-z0-9._-]+|\[?[0-9a-f:.]+(?:%[a-z0-9._-]+)?\]?")

OWN_SITE = frozenset({b"same-origin", b"none"})
PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")
"""Suffixes of names that no public name server resolves, so that no stranger can have one."""

BODIES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
MAX_KNOWN_HOSTS = 1024

ALLOWED_HEADERS = re.compile(
    r"authorization|content-type|accept|traceparent|tracestate|idempotency-key|x-api-key|x-request-id|x-client-request-id"
    r"|x-cortex-[a-z0-9-]+|x-stainless-[a-z0-9-]+|anthropic-[a-z0-9-]+|openai-[a-z0-9-]+"
)
"""Headers that a page of an allowed origin may send: the SDKs' and this project's."""
EXPOSED_HEADERS = REQUEST_ID + b", request-id, retry-after, " + IGNORED + b", *"
"""Headers that a page may read; no response depends on cookies, so the star means all."""
PREFLIGHT_AGE_S = 600


class OriginNotAllowedError(ForbiddenError):
    """The request comes from a page of another site, in a browser."""

    code = "origin_not_allowed"


class HostNotAllowedError(ForbiddenError):
    """The request was sent to a host name that is not known as this server's."""

    code = "host_not_allowed"


class UnsupportedMediaTypeError(ApiError):
    """The content type of the body is not JSON."""

    status = 415
    code = "unsupported_media_type"


class Guard:
    """The check of one listener. ``origins`` and ``hosts`` are allowed beyond its own."""

    def __init__(self, origins: Collection[str] = (), hosts: Collection[str] = ()) -> None:
        self._origins = frozenset(normal_origin(origin) for origin in origins)
        self._hosts = frozenset({socket.gethostname().lower(), *(host.lower().rstrip(".") for host in hosts)})
        self.known_hosts: set[str | None] = {None}
        """Values of ``Host`` that have passed, for the pipeline; ``None`` is no such header."""

    def check_media_type(self, method: str, header: Headers) -> None:
        """Raise :class:`UnsupportedMediaTypeError` for a body of another type, or of no type with an ``Origin``."""
        if method not in BODIES:
            return
        given = header(b"content-type")
        if given is None:
            has_body = header(b"content-length") not in (None, b"0") or header(b"transfer-encoding") is not None
            if header(b"origin") is None or not has_body:
                return
        elif given.partition(b";")[0].strip().lower() == b"application/json":
            return
        kind = "no type" if given is None else repr(given[:80].decode("latin-1"))
        raise UnsupportedMediaTypeError(f"The body has {kind}: send it with 'content-type: application/json'.")

    def check_site(self, header: Headers, *, setting: str) -> None:
        """Refuse a request that may come from another site's page. ``setting`` is the table that could allow it.

        Raises:
            OriginNotAllowedError: it comes from a page of another site.
            HostNotAllowedError: its host name is not known as this server's.
        """
        host, origin, site = header(b"host"), header(b"origin"), header(b"sec-fetch-site")
        self._check_host(host, origin, setting)
        self.check_origin(origin, host, setting=setting)
        if site is not None and site not in OWN_SITE and not self.is_allowed(origin):
            raise OriginNotAllowedError("A page of another site may not ask here without a key.")

    def check_origin(
        self, origin: bytes | None, host: bytes | None, *, setting: str, any_is_allowed: bool = False
    ) -> None:
        """Raise :class:`OriginNotAllowedError` for a page that is neither this server's own nor allowed.

        ``any_is_allowed`` makes the star among the origins effective, as for requests with a key.
        """
        if any_is_allowed and ANY in self._origins:
            return
        if origin is None or self.is_allowed(origin) or _is_own(origin, host):
            return
        shown = origin[:200].decode("latin-1")
        raise OriginNotAllowedError(
            f"Pages of {shown} may not ask here; {setting}.allowed_origins lists the allowed ones."
        )

    def is_allowed(self, origin: bytes | None) -> bool:
        """Return whether an origin is one that the operator named."""
        return origin is not None and bool(self._origins) and normal_origin(origin.decode("latin-1")) in self._origins

    def cors(self, origin: bytes | None) -> Sequence[Header]:
        """Return the headers by which a browser lets a page read an answer; none for a page that may not."""
        if not self._origins:
            return ()
        if origin is None or not (ANY in self._origins or self.is_allowed(origin)):
            return ((b"vary", b"Origin"),)
        return (
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", EXPOSED_HEADERS),
            (b"vary", b"Origin"),
        )

    def preflight(self, header: Headers, methods: str, *, setting: str) -> Sequence[Header]:
        """Return the headers of the answer to a CORS preflight; none for another request.

        Raises:
            OriginNotAllowedError: the origin is not allowed.
        """
        origin, wanted = header(b"origin"), header(b"access-control-request-method")
        if origin is None or wanted is None:
            return ()
        self.check_origin(origin, header(b"host"), setting=setting, any_is_allowed=True)
        asked = (header(b"access-control-request-headers") or b"").decode("latin-1").lower().split(",")
        allowed = [name for name in map(str.strip, asked) if ALLOWED_HEADERS.fullmatch(name)]
        found = [
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-methods", methods.encode()),
            (b"access-control-max-age", str(PREFLIGHT_AGE_S).encode()),
            (b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers"),
        ]
        if allowed:
            found.append((b"access-control-allow-headers", ", ".join(allowed).encode()))
        if header(b"access-control-request-private-network") is not None:
            found.append((b"access-control-allow-private-network", b"true"))
        return found

    def _check_host(self, host: bytes | None, origin: bytes | None, setting: str) -> None:
        if host is None and origin is None:
            return
        text = (host or b"").decode("latin-1")
        if not self._is_own_host(text):
            raise HostNotAllowedError(
                f"This server is not known as {text[:200]!r}: {setting}.allowed_hosts names what else it is called."
            )
        if len(self.known_hosts) < MAX_KNOWN_HOSTS:
            self.known_hosts.add(text)

    def _is_own_host(self, host: str) -> bool:
        """Return whether a host name cannot have been made to resolve to here by a stranger."""
        name = _without_port(host.lower()).rstrip(".")
        if not HOST.fullmatch(name):
            return False
        # A name without a dot is of the local network; an address needs no lookup.
        return "." not in name or name in self._hosts or name.endswith(PRIVATE_SUFFIXES) or _is_address(name)


def check_hosts(hosts: Collection[str], source: str, key: str) -> None:
    """Raise :class:`~cortex.settings.ConfigError` for a host that is no name or address."""
    for index, host in enumerate(hosts):
        if not HOST.fullmatch(host.lower()):
            raise ConfigError(source, f"{key}[{index}]", f"{host!r} is not a host's name, such as gpu.example.com")


def normal_origin(origin: str) -> str:
    """Return an origin as browsers write it."""
    origin = origin.lower()
    for scheme, port in (("http://", ":80"), ("https://", ":443")):
        if origin.startswith(scheme):
            origin = origin.removesuffix(port)
    return origin


def _is_own(origin: bytes, host: bytes | None) -> bool:
    """Return whether an origin is the host of the request. The scheme is not compared: a proxy may end TLS."""
    scheme, _, place = normal_origin(origin.decode("latin-1")).partition("://")
    if scheme not in {"http", "https"} or host is None or not place:
        return False
    return place == normal_origin(f"{scheme}://{host.decode('latin-1')}").partition("://")[2]


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and (":" not in name or name.endswith("]")) else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]").partition("%")[0])
    except ValueError:
        return False
    return True
