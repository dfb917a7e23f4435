"""The command ``cortex``: ``serve``, and the commands of other modules, each with its own arguments.

Exit status 2 with one line for a wrong configuration, 1 for a gateway that cannot be reached, 0 otherwise.
"""

import argparse
import multiprocessing
import os
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cortex import (
    __version__,
    capture_commands,
    catalogue_commands,
    demo,
    gateway_client,
    key_commands,
    launch,
    logs,
    operate,
    run,
    systemd,
)
from cortex.build_identity import COMMIT
from cortex.settings import ConfigError, split_address

if TYPE_CHECKING:
    from cortex.config import Config

EXIT_UNREACHABLE = 1
EXIT_CONFIG = 2
MAX_PENDING_CONNECTIONS = 4096
"""Concurrent connections of a worker; a stream occupies one."""

BACKLOG = 1024
"""Length of the listening socket's queue of connections."""

KILL_MARGIN_S = 10
"""Time, after the drain timeout, for a worker to end its requests and itself before it is killed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = command_line()
    own, words = launch.split_words(sys.argv[1:] if arguments is None else arguments)
    options, more = parser.parse_known_args(own, argparse.Namespace(words=words))
    flags = more[: more.index("--")] if "--" in more else more
    rest: list[str] | None = getattr(options, "rest", None) and getattr(options, options.rest)
    if more and (rest is None or any(word.startswith("-") for word in flags)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if rest is not None:  # argparse gives none of the words behind an option to a list that may be empty
        rest += (word for word in more if word != "--")
    try:
        match options.command:
            case "serve":
                return _serve(options)
            case None:
                parser.print_help()
                return EXIT_CONFIG
            case _:
                run: Callable[[argparse.Namespace], int] = options.run
                return run(options)
    except ConfigError as error:
        return _fail(str(error), EXIT_CONFIG)
    except (gateway_client.GatewayError, launch.LaunchError) as error:
        return _fail(str(error), EXIT_UNREACHABLE)
    except KeyboardInterrupt:
        return 0


def command_line() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(prog="cortex", description="A gateway in front of your own GPU hosts.")
    parser.add_argument(
        "--version", action="version", version=f"cortex {__version__}{f' ({COMMIT[:12]})' if COMMIT else ''}"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the gateway")
    serve.add_argument(
        "--config", metavar="FILE", help="cortex.toml (default: $CORTEX_CONFIG, ./ or /etc/cortex/, or none)"
    )
    serve.add_argument("--listen", metavar="HOST:PORT", help="where clients connect")
    serve.add_argument("--metrics-listen", metavar="HOST:PORT", help='where Prometheus scrapes; "" serves no metrics')
    serve.add_argument("--workers", type=int, metavar="N", help="processes that accept connections")
    serve.add_argument("--check", action="store_true", help="check the configuration and exit")

    run.add_command(commands)
    catalogue_commands.add_commands(commands)
    operate.add_commands(commands)
    key_commands.add_commands(commands)
    capture_commands.add_commands(commands)
    launch.add_command(commands)
    demo.add_command(commands)
    return parser


# ------------------------------------------------------------------ serve


def _serve(options: argparse.Namespace) -> int:
    """Check the configuration in this process, so that errors reach the terminal; the workers read it again."""
    from cortex import config, preflight, reload

    flags: dict[str, object] = {
        "gateway.listen": options.listen,
        "gateway.metrics_listen": options.metrics_listen,
        "gateway.workers": options.workers,
    }
    path = _config_path(options.config)
    loaded = reload.load(path, os.environ, flags)
    found = loaded.config
    preflight.check(found, str(path or config.NO_FILE), os.environ)
    if options.check:
        counts = f"{len(found.neurons)} nodes, {len(loaded.catalogue.profiles)} models"
        if not loaded.keys.is_open:
            counts += f", {len(loaded.keys.principals)} keys"
        sys.stdout.write(f"{path or config.NO_FILE}: ok, {counts}\n")
        return 0
    if path is not None:
        os.environ[config.CONFIG_VARIABLE] = str(path)
    for key, value in flags.items():
        if value is not None:
            table, _, name = key.partition(".")
            os.environ[f"{config.ENVIRONMENT_PREFIX}{table}__{name}".upper()] = str(value)
    if found.gateway.workers == 1:
        return _run(found)
    # Before prometheus_client is imported: it chooses between shared files and plain memory at import.
    shared = tempfile.mkdtemp(prefix="cortex-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared
    try:
        return _run(found)
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def _run(config: "Config") -> int:
    """Run Granian until it is ended by a signal."""
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops
    from granian.errors import ConfigurationError
    from granian.http import HTTP1Settings

    from cortex.request_body import HEAD_TIMEOUT_S

    gateway = config.gateway
    host, port = split_address(gateway.listen)
    handed_over = systemd.listen_fds()
    if len(handed_over) > 1:
        return _fail(f"{len(handed_over)} sockets were handed over; the gateway listens on one", EXIT_CONFIG)
    if handed_over and (elsewhere := _differs(handed_over[0], host, port)):
        reason = f"the socket that was handed over listens at {elsewhere}, and gateway.listen is {gateway.listen}"
        return _fail(f"{reason}; make them the same (systemctl edit cortex.socket)", EXIT_CONFIG)
    if not handed_over:
        try:
            _try_to_bind(host, port)
        except OSError as error:
            reason = f"cannot listen at {gateway.listen}: {error.strerror or error}"
            return _fail(f"{reason}; see who does (ss -ltnp), or give --listen another address", EXIT_CONFIG)
    server = Granian(
        "cortex.asgi:app",
        address=host,
        port=port,
        interface=Interfaces.RSGI,
        http=HTTPModes.http1,
        loop=Loops.uvloop,
        workers=gateway.workers,
        backlog=BACKLOG,
        backpressure=MAX_PENDING_CONNECTIONS,
        http1_settings=HTTP1Settings(header_read_timeout=HEAD_TIMEOUT_S * 1000),
        websockets=True,
        workers_kill_timeout=gateway.drain_timeout_s + KILL_MARGIN_S,
        respawn_failed_workers=True,
        log_access=False,
        log_dictconfig=dict(logs.server_settings(gateway.log_format)),
        ssl_cert=pathlib.Path(gateway.tls_certificate) if gateway.tls_certificate else None,
        ssl_key=pathlib.Path(gateway.tls_key) if gateway.tls_key else None,
    )
    # On SIGHUP, Granian would replace its workers, which fail if a file is wrong: the workers reload by themselves.
    server.signal_handler_reload = _hang_up_workers  # type: ignore[method-assign]
    stop = server.signal_handler_interrupt

    def end(*signal_and_frame: object) -> None:
        systemd.notify(systemd.STOPPING)
        stop()  # type: ignore[no-untyped-call]

    server.signal_handler_interrupt = end  # type: ignore[method-assign]
    if handed_over:
        _listen_on(server, handed_over[0])
    try:
        server.serve()
    except ConfigurationError as error:
        return _fail(f"granian: {error}", EXIT_CONFIG)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


def _listen_on(server: Any, fd: int) -> None:
    """Have the server accept from a socket that was handed over.

    When this process ends, the socket's other owners (systemd, another gateway) keep the connections in its queue.
    """
    from granian._granian import SocketHolder

    os.set_blocking(fd, False)

    def take() -> None:
        server._ssp, server._shd, server._sfd, server._sso = None, SocketHolder(fd, False, BACKLOG), fd, None  # type: ignore[call-arg]

    server._init_shared_socket = take


def _differs(fd: int, host: str, port: int) -> str:
    """Return the address of a socket if it differs from the configured one; otherwise an empty string."""
    with socket.socket(fileno=os.dup(fd)) as given:
        there, there_port = given.getsockname()[:2]
    wanted = {address[4][0] for address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    everywhere = {"0.0.0.0", "::"}
    is_same = there in wanted or (there in everywhere and bool(wanted & everywhere))
    return "" if is_same and there_port == port else f"{there}:{there_port}"


def _hang_up_workers(*signal_and_frame: object) -> None:
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, signal.SIGHUP)


def _try_to_bind(host: str, port: int) -> None:
    """Raise ``OSError`` if the address cannot be bound: the server itself would panic with a backtrace.

    Without ``SO_REUSEPORT``, so that another gateway is found there even if its workers share the port.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(address)


def _config_path(path: str | None) -> pathlib.Path | None:
    from cortex import config

    return pathlib.Path(path) if path is not None else config.find(os.environ)


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"cortex: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
