"""Settings of either daemon: a TOML file, then the environment, then flags, checked against a struct.

The last one wins. A wrong key, type or address is a :class:`ConfigError` that names where it was said, the key and the
reason. What the keys mean is each daemon's own (``cortex.config``, ``neuron.config``).
"""

import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)


class ConfigError(Exception):
    """A setting is wrong. ``source`` is a file, a variable or a flag; ``key`` is dotted and may be empty."""

    def __init__(self, source: str, key: str, reason: str) -> None:
        super().__init__(f"{source}: {key}: {reason}" if key else f"{source}: {reason}")
        self.source = source
        self.key = key
        self.reason = reason


def load(
    kind: type[S],
    document: dict[str, Any],
    source: str,
    *,
    prefix: str,
    environment: Mapping[str, str],
    flags: Mapping[str, object] | None = None,
) -> S:
    """Return ``document`` with the environment and the flags laid over it, as a ``kind``.

    ``PREFIX_TABLE__KEY`` sets ``table.key``; lists and tables are given as JSON. ``flags`` maps dotted keys to values,
    ``None`` where a flag was not given. Changes ``document``.

    Raises:
        ConfigError: any of the three is wrong.
    """
    for variable, text in sorted(environment.items()):
        keys = variable.removeprefix(prefix).lower().split("__")
        # Every setting lies in a table: a variable without "__" is another program's, unless it names a table.
        if variable.startswith(prefix) and (len(keys) > 1 or keys[0] in kind.__struct_fields__):
            _put(document, keys, _typed(kind, variable, keys, text), variable)
    for flag, value in (flags or {}).items():
        if value is not None:
            _put(document, flag.split("."), value, f"--{flag.rpartition('.')[2].replace('_', '-')}")
    return convert(document, kind, source)


def read_toml(path: pathlib.Path) -> dict[str, Any]:
    """Return a TOML file as a dictionary.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "", f"is not TOML: {error}") from None


def convert(document: Mapping[str, object], kind: type[S], source: str) -> S:
    """Return ``document`` as a struct.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type.
    """
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `")
        key = where.rstrip("`").removeprefix("key` in `").removeprefix("$").removeprefix(".")
        if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", reason):
            key, reason = f"{key}.{unknown[1]}".lstrip("."), "unknown key"
        elif missing := re.fullmatch(r"Object missing required field `(.*)`", reason):
            key, reason = f"{key}.{missing[1]}".lstrip("."), "is missing"
        raise ConfigError(source, key, reason) from None


def read_secret(path: str, source: str, key: str) -> bytes:
    """Return the first line of a file that holds a secret; nothing for no path.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    if not path:
        return b""
    try:
        secret = pathlib.Path(path).read_bytes().partition(b"\n")[0].strip()
    except OSError as error:
        raise ConfigError(source, key, f"{path} cannot be read: {error.strerror}") from None
    if not secret:
        raise ConfigError(source, key, f"{path} is empty")
    return secret


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` or ``[v6]:port``.

    Raises:
        ValueError: it is not such an address.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]/]+)):(\d{1,5})", address)
    if match is None:
        raise ValueError(f"{address!r} is not host:port")
    port = int(match[3])
    if not 0 < port < 65536:
        raise ValueError(f"{address!r}: the port is not in 1..65535")
    return match[1] or match[2], port


def _typed(kind: Any, variable: str, keys: list[str], text: str) -> object:
    """Return ``text`` as the type the key has: itself, or JSON for lists and tables."""
    for key in keys:
        fields = {f.name: f.type for f in msgspec.structs.fields(kind)} if _is_struct(kind) else {}
        if key not in fields:
            raise ConfigError(variable, ".".join(keys), "unknown key")
        kind = fields[key]
    is_json = text[:1] in {"[", "{"}
    try:
        found = msgspec.json.decode(text, type=kind) if is_json else msgspec.convert(text, kind, strict=False)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(variable, ".".join(keys), str(error)) from None
    return msgspec.to_builtins(found)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _put(document: dict[str, Any], keys: list[str], value: object, source: str) -> None:
    table = document
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(source, ".".join(keys), f"{key} is not a table in the file")
    table[keys[-1]] = value
