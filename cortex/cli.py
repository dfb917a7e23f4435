"""``cortex``: serve, look at a running gateway, and nothing that needs the gateway's own modules to say ``--version``.

Exit status 2 with one line for a wrong configuration, 1 for a gateway that cannot be reached, 0 otherwise.
"""

import argparse
import http.client
import os
import pathlib
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import orjson

from cortex import __version__
from cortex.settings import ConfigError, split_address

if TYPE_CHECKING:
    from cortex.config import Config

EXIT_UNREACHABLE = 1
EXIT_CONFIG = 2
STATUS_TIMEOUT_S = 10.0
MAX_PENDING_CONNECTIONS = 4096
"""Connections a worker serves at a time; a stream is one for as long as it lasts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        match options.command:
            case "serve":
                return _serve(options)
            case "status":
                return _status(options)
            case "models":
                return _models(options)
            case "demo":
                return _demo(options)
            case _:
                parser.print_help()
                return EXIT_CONFIG
    except ConfigError as error:
        return _fail(str(error), EXIT_CONFIG)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cortex", description="A gateway in front of your own GPU hosts.")
    parser.add_argument("--version", action="version", version=f"cortex {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the gateway")
    serve.add_argument("--config", metavar="FILE", help="cortex.toml (default: $CORTEX_CONFIG, ./ or /etc/cortex/)")
    serve.add_argument("--listen", metavar="HOST:PORT")
    serve.add_argument("--metrics-listen", metavar="HOST:PORT", help='"" serves no metrics')
    serve.add_argument("--workers", type=int, metavar="N", help="processes that accept connections")
    serve.add_argument("--check", action="store_true", help="check the configuration and exit")

    for name, help_text in (("status", "show nodes, devices and models"), ("models", "show what clients may ask for")):
        command = commands.add_parser(name, help=help_text)
        where = command.add_mutually_exclusive_group()
        where.add_argument("--url", help="the gateway's address, e.g. http://127.0.0.1:31313")
        where.add_argument("--config", metavar="FILE", help="take the address from a cortex.toml")
        command.add_argument("--json", action="store_true", help="print what the gateway answered")

    demo = commands.add_parser("demo", help="chat with a small real model, all on this machine")
    demo.add_argument("--once", action="store_true", help="end after one answer")
    return parser


# ------------------------------------------------------------------ serve


def _serve(options: argparse.Namespace) -> int:
    """Check the configuration here, where an error has a terminal to go to; then let the workers read it again."""
    from cortex import config
    from cortex.fleet import catalogue

    flags = {
        "gateway.listen": options.listen,
        "gateway.metrics_listen": options.metrics_listen,
        "gateway.workers": options.workers,
    }
    path = _config_path(options.config)
    found = config.load(path, flags=flags)
    offered = catalogue.load(config.models_path(found, path), {node.name for node in found.neurons})
    if options.check:
        sys.stdout.write(f"{path}: ok, {len(found.neurons)} nodes, {len(offered.profiles)} models\n")
        return 0
    os.environ[config.CONFIG_VARIABLE] = str(path)
    for key, value in flags.items():
        if value is not None:
            table, _, name = key.partition(".")
            os.environ[f"{config.ENVIRONMENT_PREFIX}{table}__{name}".upper()] = str(value)
    if found.gateway.workers == 1:
        return _run(found)
    # Before prometheus_client is imported anywhere: it chooses shared files or plain memory once.
    shared = tempfile.mkdtemp(prefix="cortex-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared
    try:
        return _run(found)
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def _run(config: "Config") -> int:
    """Run Granian until a signal ends it."""
    from granian import Granian
    from granian.constants import Interfaces, Loops
    from granian.errors import ConfigurationError

    gateway = config.gateway
    host, port = split_address(gateway.listen)
    try:
        _try_to_bind(host, port)
    except OSError as error:
        return _fail(f"cannot listen at {gateway.listen}: {error.strerror or error}", EXIT_CONFIG)
    server = Granian(
        "cortex.asgi:app",
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        loop=Loops.uvloop,
        workers=gateway.workers,
        backpressure=MAX_PENDING_CONNECTIONS,
        websockets=True,
        workers_kill_timeout=gateway.drain_timeout_s,
        respawn_failed_workers=True,
        log_access=False,
    )
    try:
        server.serve()
    except ConfigurationError as error:
        return _fail(f"granian: {error}", EXIT_CONFIG)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


def _try_to_bind(host: str, port: int) -> None:
    """Raise ``OSError`` if the address cannot be had: the server's own failure is a panic with a backtrace.

    Without ``SO_REUSEPORT``, so that another gateway there is seen even if it shares its port among workers.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(address)


# ------------------------------------------------------------------ status, models


def _status(options: argparse.Namespace) -> int:
    from cortex import report

    answer = _ask(options, "/admin/fleet")
    if isinstance(answer, int):
        return answer
    if options.json:
        sys.stdout.write(answer.decode() + "\n")
    else:
        report.print_fleet(orjson.loads(answer))
    return 0


def _models(options: argparse.Namespace) -> int:
    from cortex import report

    answer = _ask(options, "/v1/models")
    if isinstance(answer, int):
        return answer
    if options.json:
        sys.stdout.write(answer.decode() + "\n")
    else:
        report.print_models(orjson.loads(answer))
    return 0


def _ask(options: argparse.Namespace, path: str) -> bytes | int:
    """Return a running gateway's answer, or the exit status if there is none."""
    url = options.url or f"http://{_address(options.config)}"
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return _fail(f"{url!r} is not the address of a gateway", EXIT_CONFIG)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(parts.hostname, parts.port, timeout=STATUS_TIMEOUT_S)
        try:
            connection.request("GET", parts.path.rstrip("/") + path)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _fail(f"no gateway answers at {url}: {error}", EXIT_UNREACHABLE)
    if response.status != 200:
        return _fail(f"{url}{path} answered with status {response.status}", EXIT_UNREACHABLE)
    return body


def _address(path: str | None) -> str:
    """Return where the configured gateway listens, as a client on this host reaches it."""
    from cortex import config

    try:
        listen = config.load(_config_path(path)).gateway.listen
    except ConfigError:
        if path is not None:
            raise
        listen = config.GatewaySettings().listen
    host, port = split_address(listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _config_path(path: str | None) -> pathlib.Path:
    from cortex import config

    return pathlib.Path(path) if path is not None else config.find(os.environ)


# ------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    from cortex import demo

    return demo.main(options)


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"cortex: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
