"""The way of a model to being ready: choose where it fits, add it to the catalogue, load it. For ``run`` and ``pull``.

What was chosen, where, how large it is and what was passed over goes to standard error.
"""

import argparse
import pathlib
import sys
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cortex import report
from cortex.gateway_client import GatewayError, ask, of_gateway, read
from cortex.load_watch import watched

MAX_PASSED_OVER = 8
"""Lines of a plan about what was passed over."""
GIB = 1 << 30
DENIED = frozenset({401, 403})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how a model is chosen."""
    parser.add_argument(
        "model", help="an id or alias, a known name (cortex search), hf:OWNER/NAME[:TAG], pypi:..., a path"
    )
    parser.add_argument("--context", type=_tokens, default=0, metavar="TOKENS", help="context that it must have")
    parser.add_argument("--node", default="", help="on this node only")
    parser.add_argument("--id", default="", metavar="NAME", help="name of a new model for clients")


def _tokens(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens")
    return int(text)


def prepare(options: argparse.Namespace, model: str, *, loads: bool = True) -> str:
    """Return the id of a model that is ready, or only in the catalogue and downloaded without ``loads``.

    Raises:
        GatewayError: it cannot be.
    """
    try:
        with of_gateway():
            return _prepare(options, model, loads)
    except GatewayError as error:
        if error.status in DENIED and loads and _is_offered(options, model):
            return model  # who may not add models may use those that are there
        raise


def fitted(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Return what ``/admin/models/fit`` answers for a model. A path of this host is made absolute."""
    name = str(pathlib.Path(model).expanduser().absolute()) if model.startswith((".", "~")) else model
    body: dict[str, Any] = {"model": name, "node": options.node, "context_tokens": options.context}
    return read(ask(options, "POST", "/admin/models/fit", body | ({"id": options.id} if options.id else {})))


def plan_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that tell what a fit has chosen, where, how large it is, and what it passed over and why."""
    profile, weights = plan["profile"], plan.get("weights")
    yield f"{profile['id']}: {profile['source']}"
    if weights is None:
        yield f"  on {plan['node']}; measured once it is downloaded"
    else:
        evicts = ", after evicting idle models" if weights.get("evicts") else ""
        yield (
            f"  on {plan['node']} ({'+'.join(weights['devices'])}): {_gb(weights['size_bytes'])}, "
            f"{weights['required_bytes'] / GIB:.1f} GiB of memory on each device, "
            f"{weights['context_tokens']} tokens of context{evicts}"
        )
    yield from _passed_over(plan)


def _passed_over(plan: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each that is larger or elsewhere, as far as they are few, and one for the rest."""
    size_bytes = (plan.get("weights") or {}).get("size_bytes", 0)
    rows: Sequence[Mapping[str, Any]] = plan.get("passed_over", ())
    told = [row for row in rows if row["node"] != plan["node"] or row["size_bytes"] > size_bytes]
    # Of another node, the largest says enough.
    told = [row for row in told if row["node"] == plan["node"] or row["size_bytes"] == _largest(told, row["node"])]
    for row in told[:MAX_PASSED_OVER]:
        what = f"{row['choice']} ({_gb(row['size_bytes'])}) on {row['node']}" if row["choice"] else row["node"]
        yield f"  passed over: {what}: {row['reason']}"
    if rest := len(rows) - len(told[:MAX_PASSED_OVER]):
        yield f"  passed over: {rest} more, which hold less or fit as little"


def _largest(rows: Sequence[Mapping[str, Any]], node: str) -> int:
    return max(int(row["size_bytes"]) for row in rows if row["node"] == node)


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def say(line: str) -> None:
    """Print a line on standard error."""
    sys.stderr.write(report.plain(line) + "\n")
    sys.stderr.flush()


def _prepare(options: argparse.Namespace, model: str, loads: bool) -> str:
    plan = fitted(options, model)
    profile = plan["profile"]
    name, is_new = str(profile["id"]), not plan["offered"]
    if not is_new and (options.context or options.id):
        reason = f"{model!r} is in the catalogue already, as {name!r}, where its context and its name are set"
        raise GatewayError(f"{reason}: leave out --context and --id, or remove it first (cortex rm)", 409)
    if is_new:
        for line in plan_lines(plan):
            say(line)
        ask(options, "POST", "/admin/models", profile)
    elif loads and _is_ready(options, name):
        return name
    body = {"model": name, "node": plan["node"]}
    if loads and is_new:
        body["evict_for_tokens"] = plan["evict_for_tokens"]
    try:
        with watched(options, name):
            ask(options, "POST", f"/admin/models/{'load' if loads else 'pull'}", body)
    except GatewayError as error:
        if is_new and 400 <= error.status < 500:  # no later load would do better
            ask(options, "DELETE", f"/admin/models/{urllib.parse.quote(name)}")
        raise
    return name


def _is_ready(options: argparse.Namespace, name: str) -> bool:
    rows = read(ask(options, "GET", "/admin/models"))["data"]
    return any(row["id"] == name and row["state"] == "ready" for row in rows)


def _is_offered(options: argparse.Namespace, name: str) -> bool:
    try:
        rows = read(ask(options, "GET", "/v1/models")).get("data", ())
    except GatewayError:
        return False
    return any(row["id"] == name for row in rows)
