"""The check that every listener of both daemons makes before anything else: may this request come from where it does?

A browser sends requests for whatever page is open in it, also to addresses that only its own host can reach. So whoever
gets in without a key (or a neuron's secret) has to show that no stranger's page asks: its ``Origin`` and
``Sec-Fetch-Site`` are this server's own, or are allowed; its ``Host`` is no name that a stranger can have made resolve
to here (DNS rebinding). A key is such proof by itself: no page sends a key that it was not given. A body has to say
that it is JSON, in every case: a browser asks before it sends that to another site.

It knows headers, not keys, paths or servers. :meth:`Guard.cors` and :meth:`Guard.preflight` tell browsers the same.
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
"""Ends of names that no public name server answers for, so that no stranger can have one."""

BODIES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
MAX_KNOWN_HOSTS = 1024

ASKED_HEADERS = re.compile(
    r"authorization|content-type|accept|traceparent|tracestate|idempotency-key|x-api-key|x-request-id|x-client-request-id"
    r"|x-cortex-[a-z0-9-]+|x-stainless-[a-z0-9-]+|anthropic-[a-z0-9-]+|openai-[a-z0-9-]+"
)
"""Headers that a page of an allowed origin may send: those of the SDKs and of this project."""
TOLD_HEADERS = REQUEST_ID + b", request-id, retry-after, " + IGNORED + b", *"
"""Headers that a page may read; no answer depends on cookies, so the star means all."""
PREFLIGHT_AGE_S = 600


class OriginNotAllowedError(ForbiddenError):
    """A page of another site asks, by somebody's browser."""

    code = "origin_not_allowed"


class HostNotAllowedError(ForbiddenError):
    """The request was sent to a name that is not known to be this server's."""

    code = "host_not_allowed"


class UnsupportedMediaTypeError(ApiError):
    """The body is not said to be JSON."""

    status = 415
    code = "unsupported_media_type"


class Guard:
    """The rule of one listener. ``origins`` and ``hosts`` are what its operator allows beyond its own."""

    def __init__(self, origins: Collection[str] = (), hosts: Collection[str] = ()) -> None:
        self._origins = frozenset(normal_origin(origin) for origin in origins)
        self._hosts = frozenset({socket.gethostname().lower(), *(host.lower().rstrip(".") for host in hosts)})
        self.known_hosts: set[str | None] = {None}
        """Values of ``Host`` that have passed, for a fast path to look at; ``None`` is no such header."""

    def check_media_type(self, method: str, header: Headers) -> None:
        """Raise :class:`UnsupportedMediaTypeError` for a body of another type; one of no type comes from no page."""
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
        """Let nobody in who may be another site's page. ``setting`` is the table that could allow it.

        Raises:
            OriginNotAllowedError: a page of another site asks.
            HostNotAllowedError: it asks for a name that may be anybody's.
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

        ``any_is_allowed`` has the star among the origins hold, as it does for whoever sends a key.
        """
        if any_is_allowed and ANY in self._origins:
            return
        if origin is None or self.is_allowed(origin) or _is_own(origin, host):
            return
        told = origin[:200].decode("latin-1")
        raise OriginNotAllowedError(f"Pages of {told} may not ask here; {setting}.allowed_origins says which may.")

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
            (b"access-control-expose-headers", TOLD_HEADERS),
            (b"vary", b"Origin"),
        )

    def preflight(self, header: Headers, methods: str, *, setting: str) -> Sequence[Header]:
        """Return the headers that answer a browser's question whether it may ask. None where this is no such question.

        Raises:
            OriginNotAllowedError: it may not.
        """
        origin, wanted = header(b"origin"), header(b"access-control-request-method")
        if origin is None or wanted is None:
            return ()
        self.check_origin(origin, header(b"host"), setting=setting, any_is_allowed=True)
        asked = (header(b"access-control-request-headers") or b"").decode("latin-1").lower().split(",")
        allowed = [name for name in map(str.strip, asked) if ASKED_HEADERS.fullmatch(name)]
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
        """Return whether no stranger can have made a name resolve to here."""
        name = _without_port(host.lower()).rstrip(".")
        if not HOST.fullmatch(name):
            return False
        # A name without a dot is one of the network's own; an address was not looked up at all.
        return "." not in name or name in self._hosts or name.endswith(PRIVATE_SUFFIXES) or _is_address(name)


def check_hosts(hosts: Collection[str], source: str, key: str) -> None:
    """Raise :class:`~cortex.settings.ConfigError` for a host that is more than a name or an address."""
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
    """Return whether a page came from where it asks. The scheme is a proxy's to know."""
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
