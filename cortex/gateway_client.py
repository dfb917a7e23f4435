"""Requests of the commands to a running gateway.

``--url`` or a ``cortex.toml`` has its address; the key is ``--key-file``'s, ``CORTEX_KEY``'s or, on this host, the
gateway's own token. Nothing is printed here.
"""

import argparse
import contextlib
import http.client
import os
import pathlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

import orjson

from cortex import config, report
from cortex.access import local
from cortex.settings import ConfigError, read_secret, split_address, url_of

LOOK_TIMEOUT_S = 10.0
ACT_TIMEOUT_S = 3600.0
"""Timeout of an action: a load may have to download its weights first."""
KEY_VARIABLE = "CORTEX_KEY"
STRANGER = "what answers there is no gateway, or one of another version: its answer cannot be read"
"""Message for an answer without what a gateway's has."""


class GatewayError(Exception):
    """The gateway cannot be reached (``status`` 0), or refuses with an HTTP status, for its own ``reason``."""

    def __init__(self, message: str, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason or message


@contextlib.contextmanager
def of_gateway() -> Iterator[None]:
    """Raise :class:`GatewayError` for JSON that is read in the block and is not what a gateway answers."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError):
        raise GatewayError(STRANGER) from None


def read(answer: bytes) -> dict[str, Any]:
    """Return a gateway's answer. Raises :class:`GatewayError` if it is no JSON object."""
    with of_gateway():
        found: dict[str, Any] = orjson.loads(answer)
        found.keys()
        return found


@contextlib.contextmanager
def reasons_alone() -> Iterator[None]:
    """Reduce the errors of the block to the gateway's own reasons, for commands that newcomers type."""
    try:
        yield
    except GatewayError as error:
        raise GatewayError(error.reason, error.status) from None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the gateway is."""
    address = parser.add_mutually_exclusive_group()
    address.add_argument("--url", help="the gateway's address, e.g. http://127.0.0.1:31313")
    address.add_argument("--config", metavar="FILE", help="take the address from a cortex.toml")
    parser.add_argument("--key-file", metavar="FILE", help=f"a file with the key (default: ${KEY_VARIABLE})")
    parser.add_argument("--ca-file", metavar="FILE", help="CA certificates for an https gateway")


def ask(
    options: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None, *, key: str | None = None
) -> bytes:
    """Return a running gateway's response. Without ``key``, the key of :func:`key_of` is sent.

    Raises:
        GatewayError: there is none, or it is an error.
        ConfigError: the URL, the key or a file is wrong.
    """
    with opened(options, method, path, body, key=key) as response:
        try:
            return response.read()
        except (OSError, http.client.HTTPException) as error:
            raise GatewayError(f"the gateway's answer broke off: {report.plain(str(error))}") from None


@contextlib.contextmanager
def opened(
    options: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None, *, key: str | None = None
) -> Iterator[http.client.HTTPResponse]:
    """Yield a running gateway's response, whose body is to be read, with a status of 200. Raises as :func:`ask`."""
    url = url_of_gateway(options)
    parts = _split(url)
    host = parts.hostname or ""
    key = (key_of(options) or local_token(options)) if key is None else key
    headers = {"authorization": f"Bearer {key}"} if key else {}
    if body is not None:
        headers["content-type"] = "application/json"
    try:
        data = None if body is None else orjson.dumps(body)
    except TypeError:  # an argument may be no valid text
        raise ConfigError(path, "", "a name on the command line is not valid UTF-8") from None
    timeout_s = LOOK_TIMEOUT_S if method == "GET" else ACT_TIMEOUT_S
    connection: http.client.HTTPConnection
    with contextlib.ExitStack() as stack:
        try:
            if parts.scheme == "https":
                tls = ssl.create_default_context(cafile=options.ca_file)
                connection = http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=tls)
            else:
                connection = http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
            stack.callback(connection.close)
            connection.request(method, parts.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
            answer = b"" if response.status == 200 else response.read()
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = report.plain(str(error))
            raise GatewayError(
                f"no gateway answers at {url}: {reason}; `cortex serve` starts one, --url names another"
            ) from None
        if response.status != 200:
            reason, status = _message(answer) or "no reason given", response.status
            raise GatewayError(f"the gateway refuses: {reason} (status {status} of {url}{path})", status, reason)
        yield response


def url_of_gateway(options: argparse.Namespace) -> str:
    """Return the URL of the gateway that the options name, or else of the one that is configured on this host.

    Raises:
        ConfigError: the configuration is wrong.
    """
    if options.url:
        return str(options.url)
    try:
        path = pathlib.Path(options.config) if options.config is not None else config.find(os.environ)
        gateway = config.load(path).gateway
    except ConfigError:
        if options.config is not None:
            raise
        gateway = config.GatewaySettings()
    return url_of("https" if gateway.tls_certificate else "http", *split_address(gateway.listen))


def key_of(options: argparse.Namespace) -> str:
    """Return the key in the file that the options name, or else the environment's; empty if there is none.

    Raises:
        ConfigError: the file cannot be read, or a header cannot carry its content.
    """
    key = read_secret(options.key_file or "", "--key-file", "").decode() or os.environ.get(KEY_VARIABLE, "")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"${KEY_VARIABLE}", "", "this is no key: a header cannot carry it")
    return key


def local_token(options: argparse.Namespace) -> str:
    """Return the administrator's token of a gateway on this host; empty for a URL of another host."""
    parts = _split(url_of_gateway(options))
    host = (parts.hostname or "").lower()
    is_here = host in {"localhost", "::1", socket.gethostname().lower()} or host.startswith("127.")
    if options.url and not is_here:
        return ""
    return local.find(parts.port or (443 if parts.scheme == "https" else 80), os.environ)


def _split(url: str) -> SplitResult:
    """Return the parts of a gateway's URL. Raises :class:`ConfigError` if it is invalid."""
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one:
        raise ConfigError("--url", "", f"{url!r} is not the address of a gateway")
    return parts


def _message(answer: bytes) -> str:
    try:
        return report.plain(str(orjson.loads(answer)["error"]["message"]))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return report.plain(answer.decode(errors="replace")[:200])
