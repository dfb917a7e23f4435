"""The commands about which models there are: pull, rm, show, search, ps.

Each prints tables of at most 80 columns, or JSON. ``search`` needs no gateway.
"""

import argparse
import functools
import sys
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import orjson

from cortex import gateway_client, preparation, report
from cortex.gateway_client import GatewayError, ask, read
from cortex.known_models import KnownModel, known_models, search


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to a parser."""

    def add(name: str, help_text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=help_text)
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=functools.partial(_run, run))
        return parser

    pull = add("pull", "choose where a model fits, and download it there", _pull)
    show = add("show", "show a model, or what would be chosen of it and where", _show)
    removal = add("rm", "remove an added model from the catalogue, and unload it", _remove)
    for parser in (pull, show, removal, add("ps", "show the models that are loaded", _ps)):
        gateway_client.add_options(parser)
    for parser in (pull, show):
        preparation.add_arguments(parser)
    removal.add_argument("model")
    add("search", "list the known models that have all words", _search).add_argument("words", nargs="*")


def _run(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    with gateway_client.reasons_alone(), gateway_client.of_gateway():
        return command(options)


def _pull(options: argparse.Namespace) -> int:
    name = preparation.prepare(options, options.model, loads=False)
    return _print(options, {"id": name}, lambda: report.print_line(f"{name}: downloaded; `cortex run {name}` loads it"))


def _remove(options: argparse.Namespace) -> int:
    removed = read(ask(options, "DELETE", f"/admin/models/{urllib.parse.quote(options.model)}"))
    where = f", and unloaded on {', '.join(removed['nodes'])}" if removed["nodes"] else ""
    line = f"{removed['id']}: removed from the catalogue{where}; downloaded files stay in the caches of the nodes"
    return _print(options, removed, lambda: report.print_line(line))


def _show(options: argparse.Namespace) -> int:
    plan = preparation.fitted(options, options.model)
    name = plan["profile"]["id"]
    rows = read(ask(options, "GET", "/admin/models"))["data"] if plan["offered"] else ()
    offer = next((row for row in rows if row["id"] == name), None)
    known = known_models().get(name)
    found = {**plan, "offer": offer, "known": msgspec.to_builtins(known)}

    def show() -> None:
        if offer is None:
            for line in preparation.plan_lines(plan):
                report.print_line(line)
        else:
            report.print_model(plan["profile"], offer)
        if known is not None:
            report.print_line(_facts(known))

    return _print(options, found, show)


def _facts(model: KnownModel) -> str:
    memory = ", ".join(
        f"{model.memory_bytes(context_tokens=tokens) / preparation.GIB:.1f} GiB with {tokens} tokens"
        for tokens in (8192, 32768, model.context_tokens)
        if tokens <= model.context_tokens
    )
    can = ", ".join(model.capabilities)
    facts = f"{_billions(model.parameters)} parameters, licence {model.license}, {can}"
    return f"{model.title}: {facts}; about {memory} as {model.usual_quant}"


def _ps(options: argparse.Namespace) -> int:
    fleet = read(ask(options, "GET", "/admin/fleet"))
    return _print(options, fleet, lambda: report.print_loaded(fleet))


def _search(options: argparse.Namespace) -> int:
    words = " ".join(options.words)
    found = search(words, known_models())
    if not found and not options.json:
        raise GatewayError(f"no known model has {words!r}; any repository can be named: cortex run hf:OWNER/NAME")
    rows = [
        {
            **msgspec.to_builtins(model),
            "size": _billions(model.parameters),
            "bytes": model.weights_bytes(),
        }
        for model in found
    ]
    return _print(options, rows, lambda: report.print_known(rows))


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 999.5e6 else f"{parameters / 1e6:.0f} M"


def _print(options: argparse.Namespace, value: Mapping[str, Any] | list[Any], show: Callable[[], None]) -> int:
    if options.json:
        sys.stdout.write(orjson.dumps(value).decode() + "\n")
    else:
        show()
    return 0
