"""``cortex capture``: capture one key's requests, list them, print one, and send one again.

Each is one request to ``/admin/capture``; ``replay`` sends the captured body to its path with the key of the command.
"""

import argparse
import shlex
import sys
import time
import urllib.parse
from typing import Any

import msgspec
import orjson

from cortex import gateway_client, operate, report
from cortex.gateway_client import GatewayError, ask, read
from cortex.settings import ConfigError

PATH = "/admin/capture"
MIB = 1 << 20
NEEDS_NAME = ("begin", "show", "curl", "replay")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to a parser."""
    command = operate.add_command(commands, "capture", "capture one key's requests, print and replay them", _capture)
    command.add_argument(
        "act",
        nargs="?",
        choices=("list", "begin", "end", "show", "curl", "replay", "rm"),
        default="list",
        help="list the captured requests, if nothing is given; begin, end or remove (rm) a capture; show a request, "
        "print it as a command of curl, or send it again (replay)",
    )
    command.add_argument(
        "name", nargs="?", help='the name of a key (begin), "" where there are none; the id of a request (the others)'
    )
    command.add_argument("--minutes", type=float, default=10.0, metavar="N", help="end after this time (10)")
    command.add_argument("--size", type=float, default=16.0, metavar="MIB", help="end beyond this size, in MiB (16)")
    command.add_argument("--model", help="the model to send it to (replay)")


def _capture(options: argparse.Namespace) -> int:
    if (options.name is not None) != (options.act in NEEDS_NAME):
        needs = "needs the name of a key" if options.act == "begin" else "needs the id of a request"
        raise ConfigError(f"capture {options.act}", "", needs if options.name is None else "takes no name")
    with gateway_client.of_gateway():
        match options.act:
            case "list":
                return operate.show(options, ask(options, "GET", PATH), "requests", _print_list)
            case "begin":
                body = {
                    "key": options.name, "seconds": 60 * options.minutes, "max_bytes": int(MIB * options.size)
                }  # fmt: skip
                return operate.show(options, ask(options, "POST", PATH, body), "requests", _print_list)
            case "end":
                return operate.show(options, ask(options, "POST", f"{PATH}/end", {}), "requests", _print_list)
            case "rm":
                return operate.show(options, ask(options, "DELETE", PATH), "requests", _print_list)
            case "show":
                answer = ask(options, "GET", _path_of(options.name))
                text = answer if options.json else msgspec.json.format(answer, indent=2)
                sys.stdout.write(text.decode() + "\n")
                return 0
            case "curl":
                _print_curl(options, read(ask(options, "GET", _path_of(options.name))))
                return 0
            case _:
                return _replay(options, read(ask(options, "GET", _path_of(options.name))))


def _path_of(id: str) -> str:
    return f"{PATH}/{urllib.parse.quote(id, safe='')}"


def _print_list(answer: dict[str, Any]) -> None:
    capture = answer["capture"]
    if capture is None:
        report.print_line("nothing is captured; `cortex capture begin KEY` begins")
        return
    whose = capture["key"] or "everybody"
    until = time.strftime("%H:%M:%S", time.localtime(capture["until"]))
    state = f"captured until {until}, ended: {capture['ended']}" if capture["ended"] else f"captured until {until}"
    report.print_line(f"{whose}: {state}; {answer['size_bytes']} of {capture['max_bytes']} bytes")
    for one in answer["requests"]:
        at = time.strftime("%H:%M:%S", time.localtime(one["at"]))
        cut = " (cut)" if one["is_cut"] else ""
        line = f"{one['id']}  {at}  {one['status']}  {one['method']} {one['path']}  {one['model']}"
        report.print_line(f"{line}  {one['ended_s']:.2f} s{cut}")


def _print_curl(options: argparse.Namespace, captured: dict[str, Any]) -> None:
    url = gateway_client.url_of_gateway(options).rstrip("/") + captured["path"]
    sys.stdout.write(
        f"curl -N {shlex.quote(url)} \\\n  -H 'content-type: application/json' \\\n"
        f'  -H "authorization: Bearer ${{{gateway_client.KEY_VARIABLE}:-none}}" \\\n'
        f"  -d {shlex.quote(captured['body'])}\n"
    )


def _replay(options: argparse.Namespace, captured: dict[str, Any]) -> int:
    """Send a captured request again, and write the answer as it comes."""
    if captured["is_cut"] or captured["method"] != "POST":
        raise GatewayError(f"{captured['id']} cannot be sent again: it was cut, or is no POST")
    body = orjson.loads(captured["body"])
    if options.model is not None:
        body["model"] = options.model
    with gateway_client.opened(options, "POST", captured["path"], body) as answer:
        while piece := answer.read1():
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    sys.stdout.write("\n")
    return 0
