"""``cortex keys`` and ``cortex usage``: list the clients' keys, make one, revoke one; show the use of each.

Each is one request to ``/admin``; ``cortex keys add --print`` asks no gateway. The new key goes to standard
output, once, and is kept nowhere.
"""

import argparse
import datetime
import json
import re
import sys
import urllib.parse

from cortex import operate, report
from cortex.access import keys
from cortex.gateway_client import ask
from cortex.settings import ConfigError

PATH = "/admin/keys"
LIMITS = {
    "requests_per_minute": "requests within any 60 s",
    "max_concurrent": "concurrent answers",
    "tokens_per_window": "tokens within a day, or within --window",
    "balance_tokens": "tokens in all",
}
OF_NEW_KEYS = ("models", "admin", "priority", *LIMITS, "window", "expires", "prints")
"""Options that only a new key has."""
_UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"([1-9]\d{0,5})([hdw])")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to a parser."""
    command = operate.add_command(
        commands, "keys", "list the keys of clients, make one (add), or revoke one (rm)", _keys
    )
    command.add_argument(
        "act", nargs="?", choices=("list", "add", "rm"), default="list", help="list, if nothing is given"
    )
    command.add_argument("name", nargs="*", help="the key's name in logs and lists")
    command.set_defaults(rest="name")
    usage = operate.add_command(commands, "usage", "show requests, tokens and cost by key, model or day", _usage)
    usage.add_argument("--by", choices=("key", "model", "day"), default="key", help="what each line is of (key)")
    for name, meaning in (("from", "first day in UTC (29 days before the last)"), ("to", "last day (today)")):
        usage.add_argument(f"--{name}", metavar="DAY", help=meaning)
    usage.add_argument("--key", metavar="NAME", help='of this key only; "" is the use without a key')
    usage.add_argument("--model", metavar="ID", help="of this model only")
    new = command.add_argument_group("a new key")
    new.add_argument("--models", metavar="ID,...", help="models it may use, by id; qwen* is a prefix (all)")
    new.add_argument("--admin", action="store_true", help="it may use /admin")
    new.add_argument("--priority", type=int, metavar="N", help="higher is served first; below 0: from spare capacity")
    for name, meaning in LIMITS.items():
        new.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=meaning)
    new.add_argument("--window", type=_span, metavar="SPAN", help="length of the window of tokens, e.g. 12h or 7d")
    new.add_argument("--expires", type=_expiry, metavar="WHEN", help="refuse it after e.g. 90d, or from 2027-01-31 on")
    new.add_argument("--print", action="store_true", dest="prints", help="print a table for keys.toml and add nothing")


def _span(text: str) -> float:
    """Return the seconds of a span such as ``12h``."""
    if (found := _SPAN.fullmatch(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of h, d or w, such as 90d")
    return float(int(found[1]) * _UNITS_S[found[2]])


def _expiry(text: str) -> datetime.datetime:
    """Return the time at the end of a span from now, or at the beginning of a day in UTC."""
    if _SPAN.fullmatch(text):
        try:
            return datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(seconds=_span(text))
        except OverflowError:
            raise argparse.ArgumentTypeError(f"{text!r} is too long") from None
    try:
        return datetime.datetime.combine(datetime.date.fromisoformat(text), datetime.time(), datetime.UTC)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a span, such as 90d, nor a day, such as 2027-01-31"
        ) from None


def _keys(options: argparse.Namespace) -> int:
    if options.act != "list" and len(options.name) != 1:
        raise ConfigError(f"keys {options.act}", "", "needs the name of a key")
    if options.act == "list" and options.name:
        raise ConfigError("keys list", "", "takes no name")
    if options.act != "add":
        given = [getattr(options, option) for option in OF_NEW_KEYS]
        if any(value is not None and value is not False for value in given):
            raise ConfigError(f"keys {options.act}", "", "takes no option of a new key")
    match options.act:
        case "add":
            return _add(options, options.name[0])
        case "rm":
            answer = ask(options, "DELETE", f"{PATH}/{urllib.parse.quote(options.name[0], safe='')}")
            return operate.show(options, answer, "name", lambda gone: report.print_line(f"{gone['name']}: revoked"))
        case _:
            return operate.show(options, ask(options, "GET", PATH), "keys", report.print_keys)


def _add(options: argparse.Namespace, name: str) -> int:
    try:
        keys.check_name(name)
    except ValueError as error:
        raise ConfigError("keys add", "", str(error)) from None
    given = "*" if options.models is None else options.models
    fields = {
        "models": [model.strip() for model in given.split(",") if model.strip()],
        "admin": options.admin or None,
        "priority": options.priority,
        **{limit: getattr(options, limit) for limit in LIMITS},
        "window_s": options.window,
        "expires_at": options.expires and options.expires.isoformat(),
    }
    body = {"name": name, **{field: value for field, value in fields.items() if value is not None}}
    if not options.prints:
        answer = ask(options, "POST", PATH, body)
        return operate.show(options, answer, "key", lambda made: _say(f"The key, shown this once: {made['key']}"))
    key, sha256 = keys.new_key()
    row = {**body, "sha256": sha256}
    if options.json:
        return _say(json.dumps({"key": key, **row}))
    _say(f"The key, shown this once: {key}\n\nFor keys.toml:\n\n[[keys]]")
    for field, value in row.items():
        _say(f"{field} = {value if field == 'expires_at' else json.dumps(value)}")
    return 0


def _usage(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ("by", "from", "to", "key", "model")}
    query = urllib.parse.urlencode({name: value for name, value in given.items() if value is not None})
    answer = ask(options, "GET", f"/admin/usage?{query}")
    return operate.show(options, answer, "rows", lambda found: report.print_usage(found, options.by))


def _say(text: str) -> int:
    sys.stdout.write(f"{text}\n")
    return 0
