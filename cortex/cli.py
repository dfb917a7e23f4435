"""``cortex``: serve, look at a running gateway, and nothing that needs the gateway's own modules to say ``--version``.

Exit status 2 with one line for a wrong configuration, 1 for a gateway that cannot be reached, 0 otherwise.
"""

import argparse
import http.client
import importlib
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from cortex import __version__
from cortex.errors import ConfigError

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
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "demo":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        match options.command:
            case "serve":
                return _serve(options)
            case "status":
                return _status(options)
            case "models":
                return _models(options)
            case "demo":
                return _demo(rest)
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

    commands.add_parser("demo", help="a model, a neuron and a gateway on this machine", add_help=False)
    return parser


# ------------------------------------------------------------------ serve


def _serve(options: argparse.Namespace) -> int:
    """Check the configuration here, where an error has a terminal to go to; then let the workers read it again."""
    from cortex import config as settings
    from cortex.fleet import catalogue

    flags = {
        "gateway.listen": options.listen,
        "gateway.metrics_listen": options.metrics_listen,
        "gateway.workers": options.workers,
    }
    config = settings.load(_config_path(options.config), flags=flags)
    catalogue.load(config.models_path, {node.name for node in config.neurons})
    if options.check:
        sys.stdout.write(f"{config.path}: {len(config.neurons)} nodes, models in {config.models_path}: ok\n")
        return 0
    os.environ[settings.CONFIG_VARIABLE] = config.path
    for key, value in flags.items():
        if value is not None:
            table, _, name = key.partition(".")
            os.environ[f"{settings.ENVIRONMENT_PREFIX}{table}__{name}".upper()] = str(value)
    if config.gateway.workers == 1:
        return _run(config)
    # Before prometheus_client is imported anywhere: it chooses shared files or plain memory once.
    shared = tempfile.mkdtemp(prefix="cortex-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared
    try:
        return _run(config)
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def _run(config: "Config") -> int:
    """Run Granian until a signal ends it."""
    from granian import Granian
    from granian.constants import Interfaces, Loops
    from granian.errors import ConfigurationError

    from cortex.config import split_address

    gateway = config.gateway
    host, port = split_address(gateway.listen)
    server = Granian(
        "cortex.asgi:app",
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        loop=Loops.uvloop,
        workers=gateway.workers,
        backpressure=MAX_PENDING_CONNECTIONS,
        websockets=False,
        workers_kill_timeout=gateway.drain_timeout_s,
        respawn_failed_workers=True,
        log_access=False,
    )
    try:
        server.serve()
    except ConfigurationError as error:
        return _fail(f"granian: {error}", EXIT_CONFIG)
    except OSError as error:
        return _fail(f"cannot listen at {gateway.listen}: {error.strerror or error}", EXIT_CONFIG)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


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
    from cortex import config as settings

    try:
        listen = settings.load(_config_path(path)).gateway.listen
    except ConfigError:
        if path is not None:
            raise
        listen = settings.GatewaySettings().listen
    host, port = settings.split_address(listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _config_path(path: str | None) -> pathlib.Path:
    from cortex import config as settings

    return pathlib.Path(path) if path is not None else settings.find(os.environ)


# ------------------------------------------------------------------


def _demo(arguments: Sequence[str]) -> int:
    try:
        demo = importlib.import_module("cortex.demo")
    except ModuleNotFoundError as error:
        if error.name != "cortex.demo":
            raise
        return _fail("this installation has no demo", EXIT_UNREACHABLE)
    status: Any = demo.main(list(arguments))
    return int(status or 0)


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"cortex: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
