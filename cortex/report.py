"""Output of ``cortex status`` and ``cortex models``: tables for an 80-column terminal.

Takes the JSON of a gateway of this version or another; missing fields are left blank. Names and faults come from nodes:
no markup in them is interpreted, and control characters are replaced.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cortex.console import console as standard_console

GIB = 1024**3
COLOURS = {
    "ready": "green",
    "up": "green",
    "available": "dim",
    "loading": "yellow",
    "starting": "yellow",
    "draining": "yellow",
    "recovering": "yellow",
    "failed": "red",
    "poisoned": "red",
    "down": "red",
}


def print_fleet(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print nodes, their devices and their models."""
    console = console or standard_console()
    nodes: Sequence[Mapping[str, Any]] = report.get("nodes", ())
    table = _table("Node", "State", "Endpoint", ">In flight", "Version")
    for node in nodes:
        state = (node.get("state") or "up") if node.get("up") else "down"
        in_flight = str(node.get("in_flight", ""))
        _add(table, node["name"], _state(state), node.get("endpoint", ""), in_flight, node.get("version", ""))
    console.print(table)
    for node in nodes:
        if node.get("fault"):
            console.print(_text(f"{node['name']}: {node['fault']}", "red"))
    devices = _table("Node", "Device", "Name", "Worker", ">Free GiB", ">of")
    for node in nodes:
        for device in node.get("devices", ()):
            _add(
                devices,
                node["name"],
                device.get("id", ""),
                device.get("name", ""),
                _state(device.get("worker") or "unused"),
                _gib(device.get("memory_free_bytes")),
                _gib(device.get("memory_total_bytes")),
            )
    if devices.row_count:
        console.print(devices)
    models = _table("Model", "Node", "State", ">Context", ">Mem GiB", ">Run", ">Wait")
    for node in nodes:
        for model in node.get("models", ()) if node.get("up") else ():
            state = model.get("state", "")
            progress = f" {model['progress']:.0%}" if state == "loading" and model.get("progress") else ""
            _add(
                models,
                model.get("id", "") + (" *" if model.get("pinned") else ""),
                node["name"],
                _state(state, progress),
                str(model.get("context_tokens", "")),
                _gib(model.get("weights_bytes", 0) + model.get("kv_cache_bytes", 0)),
                str(model.get("running", 0)),
                str(model.get("waiting", 0)),
            )
    if models.row_count:
        console.print(models)
    for node in nodes:
        for model in node.get("models", ()):
            if model.get("error"):
                console.print(_text(f"{model.get('id', '')} on {node['name']}: {model['error']}", "red"))
    if any(model.get("pinned") for node in nodes for model in node.get("models", ())):
        console.print(_text("* pinned", "dim"))
    if report.get("degraded"):
        console.print(_text(f"the gateway does not do all that it should: {', '.join(report['degraded'])}", "red"))
    if report.get("config_error"):
        console.print(_text(f"the configuration was changed and is not in force: {report['config_error']}", "red"))


def print_act(answer: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of a load, unload or pin on each node."""
    console = console or standard_console()
    if not answer.get("nodes"):
        console.print("the model is on no node: there is nothing to do")
    for node, model in answer.get("nodes", {}).items():
        pinned = ", pinned" if model.get("pinned") else ""
        console.print(_text(f"{model['id']} on {node}: ").append_text(_state(model["state"], pinned)))


def print_forgotten(model: str, answer: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the nodes that have forgotten a model."""
    console = console or standard_console()
    console.print(_text(f"{model}: forgotten by {', '.join(answer.get('nodes', {}))}"))


def print_line(line: str, console: Console | None = None) -> None:
    """Print a line that contains text of other processes."""
    (console or standard_console()).print(_text(line), soft_wrap=True)


def print_keys(answer: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the limits and the usage of keys, as ``used/limit``."""
    if not answer.get("required", True):
        print_line("there is no key, and none is needed; `cortex keys add NAME` makes the first one", console)
        return
    console = console or standard_console()
    now = time.time()
    table = _table("Key", "Models", ">Prio", ">Per min", ">Now", ">Tokens", ">Ever", ">Used")
    for key in answer.get("keys", ()):
        used = key.get("used", {})
        state = " (expired)" if 0 < key.get("expires_s", 0) <= now else ""
        _add(
            table,
            _text(key["name"] + state, "bold" if key.get("admin") else ""),
            " ".join(key.get("models", ())) or "-",
            str(key.get("priority", 0)),
            _of(used.get("requests"), key.get("requests_per_minute")),
            _of(used.get("running"), key.get("max_concurrent")),
            _of(used.get("tokens"), key.get("tokens_per_window")),
            _of(used.get("spent_tokens"), key.get("balance_tokens")),
            f"{_age(now - key['last_used_s'])} ago" if key.get("last_used_s") else "-",
        )
    console.print(table)


def print_usage(answer: Mapping[str, Any], by: str, console: Console | None = None) -> None:
    """Print use that is added up by ``key``, ``model`` or ``day``."""
    console = console or standard_console()
    rows = sorted(answer.get("rows", ()), key=lambda row: row["day"] if by == "day" else -row["requests"])
    table = _table(by.capitalize(), ">Requests", ">Tokens in", ">Cached", ">Tokens out", ">Cost")
    for row in rows:
        counts = (_short(row.get(name, 0)) for name in ("requests", "tokens_in", "tokens_cached", "tokens_out"))
        _add(table, row[by] or "(no key)", *counts, f"${row['cost']:,.2f}" if row.get("cost") else "-")
    console.print(table if table.row_count else "no use")
    kept = "" if answer.get("persists", True) else "; only since the start of the gateway, which keeps it in memory"
    console.print(_text(f"{answer.get('first', '')} to {answer.get('last', '')} (UTC){kept}", "dim"))


def _of(used: int | None, limit: int | None) -> str:
    """Return ``used/limit`` with large numbers short; a dash where there is no limit."""
    return f"{_short(used or 0)}/{_short(limit)}" if limit else "-"


def _short(number: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{number / (1000 if letter == 'k' else size):.4g}{letter}"
    return str(number)


def print_models(listing: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the models that clients may use."""
    console = console or standard_console()
    table = _table("Model", "State", "Nodes", ">Context", "Can")
    for model in listing.get("data", ()):
        name = _text(model["id"])
        if model.get("alias_of"):
            name.append(plain(f" -> {model['alias_of']}"), "dim")
        nodes = ", ".join(node["name"] for node in model.get("nodes", ()) if node.get("state") == "ready")
        _add(
            table,
            name,
            _state(model.get("state", "")),
            nodes,
            str(model.get("context_length") or ""),
            ", ".join(model.get("capabilities", ())),
        )
    console.print(table)


def print_model(profile: Mapping[str, Any], offer: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a model of the catalogue: its source, where it is, what it can do, and how it is sampled."""
    console = console or standard_console()
    sampling = offer.get("sampling") or {}
    where = ", ".join(f"{node['name']}: {node.get('state', '')}" for node in offer.get("nodes", ()))
    rows = {
        "Source": profile["source"],
        "Nodes": where or "none has it",
        "Context": str(offer.get("context_length") or "known once it is loaded"),
        "Can": ", ".join(offer.get("capabilities", ())),
        "Aliases": ", ".join(offer.get("aliases", ())),
        "Sampling": ", ".join(f"{name} {value}" for name, value in sampling.items()),
    }
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            _add(table, name, value)
    console.print(_text(offer["id"], "bold").append_text(_text("  ")).append_text(_state(offer.get("state", ""))))
    console.print(table)


def print_loaded(fleet: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the models that hold memory or are about to."""
    console = console or standard_console()
    table = _table("Model", "Node", "State", "Device", ">Context", ">GiB", ">Run", ">Idle")
    now = time.time()
    for node in fleet["nodes"]:
        for model in node.get("models", ()) if node.get("up") else ():
            if model["state"] in {"available", "failed"}:
                continue
            used_at = model.get("last_used_at") or model.get("loaded_at") or now
            _add(
                table,
                model["id"] + (" *" if model.get("pinned") else ""),
                node["name"],
                _state(model["state"], f" {progress_of(model)}" if model["state"] == "loading" else ""),
                "+".join(model.get("devices", ())),
                str(model.get("context_tokens") or ""),
                _gib(model.get("weights_bytes", 0) + model.get("kv_cache_bytes", 0)),
                str(model.get("running", 0)),
                "" if model.get("running") else _age(now - used_at),
            )
    console.print(table if table.row_count else "no model is loaded")


def print_known(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print known models."""
    console = console or standard_console()
    table = _table("Name", ">Size", ">GB", ">Context", "Can", "Licence")
    for row in rows:
        can, gb = " ".join(row["capabilities"]), f"{row['bytes'] / 1e9:.1f}"
        _add(table, row["name"], row["size"], gb, str(row["context_tokens"]), can, row["license"])
    console.print(table)


def _age(seconds: float) -> str:
    for size_s, letter in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size_s:
            return f"{seconds / size_s:.0f}{letter}"
    return f"{max(0.0, seconds):.0f}s"


def _table(*columns: str) -> Table:
    """Return a table; ``>`` marks a number. Names give way where a line is too long, numbers and states never."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        is_number = column.startswith(">")
        name = column.removeprefix(">")
        table.add_column(
            name,
            justify="right" if is_number else "left",
            no_wrap=is_number or name in {"State", "Worker", "Device", "Version"},
            overflow="fold",
        )
    return table


def _state(state: str, suffix: str = "") -> Text:
    return _text(state + suffix, COLOURS.get(state, ""))


def _add(table: Table, *cells: str | Text) -> None:
    table.add_row(*(cell if isinstance(cell, Text) else _text(cell) for cell in cells))


def plain(text: str) -> str:
    """Return text of another process as a line without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def progress_of(model: Mapping[str, Any]) -> str:
    """Return the progress of a load that ``/admin/fleet`` describes, with the bytes of its download."""
    progress, done_bytes, all_bytes = (model.get(key, 0) for key in ("progress", "downloaded_bytes", "download_bytes"))
    if not all_bytes:
        return f"{progress:.0%}"
    # A download alone has no progress of a load.
    return f"{progress or done_bytes / all_bytes:.0%} (downloaded {done_bytes / 1e9:.2f} of {all_bytes / 1e9:.2f} GB)"


def _text(text: str, style: str = "") -> Text:
    return Text(plain(text), style)


def _gib(size_bytes: int | None) -> str:
    return f"{size_bytes / GIB:.1f}" if size_bytes else ""
