"""The commands for a running gateway: status, models, load, unload, forget, pin, drain, dashboard, reload.

Each is one request to ``/admin``, printed as tables of at most 80 columns, or as the JSON of the response. Exit status
0, 1 for a gateway that cannot be reached or refuses, 2 for a wrong command or configuration.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from cortex import gateway_client, report
from cortex.gateway_client import GatewayError, ask
from cortex.load_watch import watched

MIN_INTERVAL_S = 0.1
MAX_SECONDS = 7 * 24 * 3600.0
CLEAR_SCREEN = "\x1b[H\x1b[2J"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to a parser."""
    add = functools.partial(add_command, commands)
    status = add("status", "show nodes, devices and models", _status)
    status.add_argument(
        "--watch", nargs="?", type=_interval, const=2.0, metavar="SECONDS", help="refresh it at this interval"
    )
    add("models", "show the models that clients may use", _models)
    for name, help_text in (("load", "load a model"), ("unload", "unload a model, after its running requests")):
        command = add(name, help_text, _load if name == "load" else _unload)
        command.add_argument("model")
        command.add_argument("--node", default="", help="on this node only")
    command.add_argument(
        "--drain-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for running requests to end (30)",
    )
    forget = add("forget", "remove a failed or unloaded model from the lists of nodes", _forget)
    forget.add_argument("model")
    forget.add_argument("--node", default="", help="on this node only")
    pin = add("pin", "keep a model loaded where it is, until its node is restarted (models.toml pins for good)", _pin)
    pin.add_argument("model")
    pin.add_argument("--node", default="", help="on this node only")
    pin.add_argument("--off", action="store_true", help="allow its eviction again")
    drain = add("drain", "have a node accept no new requests and loads", _drain)
    drain.add_argument("node")
    drain.add_argument("--off", action="store_true", help="accept them again")
    add("dashboard", "print a link that opens the dashboard of this host's gateway, signed in", _dashboard)
    add("reload", "read the configuration again", _reload)


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    help_text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """Add a command with the options of all commands for a running gateway, and ``run`` as its function."""
    command = commands.add_parser(name, help=help_text)
    gateway_client.add_options(command)
    command.add_argument("--json", action="store_true", help="print the gateway's response")
    command.set_defaults(run=run)
    return command


def _seconds(text: str) -> float:
    """Return the duration in an argument."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {MAX_SECONDS:.0f}")
    return seconds


def _interval(text: str) -> float:
    if (seconds := _seconds(text)) < MIN_INTERVAL_S:
        raise argparse.ArgumentTypeError(f"{text!r} is too often: look again after {MIN_INTERVAL_S} s at the earliest")
    return seconds


def _status(options: argparse.Namespace) -> int:
    while True:
        answer = ask(options, "GET", "/admin/fleet")
        if options.watch is not None:
            sys.stdout.write(CLEAR_SCREEN)
        show(options, answer, "nodes", report.print_fleet)
        if options.watch is None:
            return 0
        sys.stdout.flush()
        time.sleep(options.watch)


def _models(options: argparse.Namespace) -> int:
    return show(options, ask(options, "GET", "/admin/models"), "data", report.print_models)


def _load(options: argparse.Namespace) -> int:
    body = {"model": options.model, "node": options.node}
    with watched(options, options.model):
        answer = ask(options, "POST", "/admin/models/load", body)
    return show(options, answer, "nodes", report.print_act)


def _unload(options: argparse.Namespace) -> int:
    body = {"model": options.model, "node": options.node, "drain_timeout_s": options.drain_timeout}
    return show(options, ask(options, "POST", "/admin/models/unload", body), "nodes", report.print_act)


def _forget(options: argparse.Namespace) -> int:
    body = {"model": options.model, "node": options.node}
    answer = ask(options, "POST", "/admin/models/forget", body)
    return show(options, answer, "nodes", lambda acted: report.print_forgotten(options.model, acted))


def _pin(options: argparse.Namespace) -> int:
    body = {"model": options.model, "node": options.node, "pinned": not options.off}
    return show(options, ask(options, "POST", "/admin/models/pin", body), "nodes", report.print_act)


def _drain(options: argparse.Namespace) -> int:
    body = {"node": options.node, "draining": not options.off}
    answer = ask(options, "POST", "/admin/nodes/drain", body)
    return show(options, answer, "state", lambda health: report.print_line(f"{options.node}: {health['state']}"))


def _reload(options: argparse.Namespace) -> int:
    return show(options, ask(options, "POST", "/admin/reload", {}), "nodes", report.print_fleet)


def show(options: argparse.Namespace, answer: bytes, member: str, show: Callable[[Any], object]) -> int:
    """Print a response, which must have ``member``. Raises :class:`GatewayError` for another server's."""
    with gateway_client.of_gateway():
        value = gateway_client.read(answer)
        if member not in value:
            raise KeyError(member)
        if options.json:
            sys.stdout.write(answer.decode() + "\n")
        else:
            show(value)
    return 0


def _dashboard(options: argparse.Namespace) -> int:
    token = gateway_client.local_token(options)
    url = gateway_client.url_of_gateway(options).rstrip("/")
    if not token:
        reason = "no token of a running gateway is here to read (run this as its user, or as root)"
        raise GatewayError(f"{reason}: open {url}/ and sign in with an administrator's key")
    sys.stdout.write(f"{url}/#key={token}\n")
    return 0
