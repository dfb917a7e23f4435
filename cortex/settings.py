"""Settings of either daemon: a TOML file, then the environment, then flags, checked against a struct.

The last one wins. A wrong key, type or address is a :class:`ConfigError` with source, key and reason. The keys are each
daemon's own (``cortex.config``, ``neuron.config``).
"""

import codecs
import logging
import os
import pathlib
import re
import socket
import ssl
import stat
import tomllib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

log = logging.getLogger("cortex.config")

S = TypeVar("S", bound=msgspec.Struct)

MAX_FILE_BYTES = 16 * 1024 * 1024
"""Size limit of a settings file, twice that of a catalogue of 50,000 models."""
RENAMED_KEYS = {"strikes": "failure_threshold", "leftover_wait_s": "spare_capacity_wait_s"}
"""Keys of earlier versions, and their names now."""


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
    data = read_file(path)
    try:
        return tomllib.loads(data.removeprefix(codecs.BOM_UTF8).decode())
    except RecursionError:
        raise ConfigError(str(path), "", "is not TOML that can be read: it is nested too deeply") from None
    except (ValueError, MemoryError) as error:  # of TOML, of UTF-8, of a number with thousands of digits
        raise ConfigError(str(path), "", f"is not TOML: {error or type(error).__name__}") from None


def state_folder(environment: Mapping[str, str]) -> pathlib.Path | None:
    """Return the folder for state: systemd's, the user's, or one in the user's home; ``None`` if nothing names one."""
    if service := environment.get("STATE_DIRECTORY"):
        return pathlib.Path(service.split(":")[0])
    if base := environment.get("XDG_STATE_HOME"):
        return pathlib.Path(base, "cortex")
    if home := environment.get("HOME"):
        return pathlib.Path(home, ".local", "state", "cortex")
    return None


def read_file(path: pathlib.Path) -> bytes:
    """Return the content of a settings file or a secret. Only a regular file is read: a pipe might never end.

    Raises:
        ConfigError: it cannot be read, is no regular file, or is larger than ``MAX_FILE_BYTES``.
    """
    try:
        # Without the flag, opening a pipe would wait for its writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):  # /dev/null is as good as an empty file
                raise ConfigError(str(path), "", "cannot be read: it is not a regular file")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read: {error.strerror or error}") from None
    except (ValueError, MemoryError) as error:  # a path with a NUL
        raise ConfigError(str(path), "", f"cannot be read: {error or type(error).__name__}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(str(path), "", f"cannot be read: it has more than {MAX_FILE_BYTES} bytes")
    return data


def warn_if_readable_by_all(path: pathlib.Path, what: str) -> None:
    """Log a warning for a file that every user can read or write."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        log.warning("%s, %s, can be read or written by every user of this host (chmod o-rw)", path, what)


def convert(document: Mapping[str, object], kind: type[S], source: str) -> S:
    """Return ``document`` as a struct.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type.
    """
    try:
        return msgspec.convert(document, kind)
    except (RecursionError, OverflowError) as error:
        raise ConfigError(source, "", f"has a value that cannot be used: {error}") from None
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `")
        key = where.rstrip("`").removeprefix("key` in `").removeprefix("$").removeprefix(".")
        if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", reason):
            key, reason = f"{key}.{unknown[1]}".lstrip("."), _unknown(unknown[1])
        elif missing := re.fullmatch(r"Object missing required field `(.*)`", reason):
            key, reason = f"{key}.{missing[1]}".lstrip("."), "is missing"
        raise ConfigError(source, key, reason) from None


def _unknown(key: str) -> str:
    return f"is called {RENAMED_KEYS[key]} now" if key in RENAMED_KEYS else "unknown key"


def read_secret(path: str, source: str, key: str) -> bytes:
    """Return the first line of a file that holds a secret; nothing for no path.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    if not path:
        return b""
    try:
        data = read_file(pathlib.Path(path))
    except ConfigError as error:
        raise ConfigError(source, key, f"{path} {error.reason}") from None
    secret = data.removeprefix(codecs.BOM_UTF8).partition(b"\n")[0].strip()
    if not secret:
        raise ConfigError(source, key, f"{path} is empty")
    if not secret.isascii() or not secret.decode("latin-1").isprintable():
        raise ConfigError(source, key, f"{path} does not begin with a line of text that a header can carry")
    warn_if_readable_by_all(pathlib.Path(path), f"the secret of {key}" if key else "a secret")
    return secret


def check_certificate(certificate: str, key: str, source: str, table: str) -> None:
    """Check the two PEM files of a daemon that serves TLS.

    Raises:
        ConfigError: one is named without the other, cannot be read, or does not match the other.
    """
    if bool(certificate) != bool(key):
        raise ConfigError(source, f"{table}.tls_key", "tls_certificate and tls_key go together")
    if not certificate:
        return
    for name, path in (("tls_certificate", certificate), ("tls_key", key)):
        try:
            read_file(pathlib.Path(path))
        except ConfigError as error:
            raise ConfigError(source, f"{table}.{name}", f"{path} {error.reason}") from None
    try:
        # Without it, OpenSSL asks for a key's pass phrase at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        reason = f"{certificate} and {key} are not a certificate and its key in PEM: {error}"
        raise ConfigError(source, f"{table}.tls_certificate", reason) from None
    warn_if_readable_by_all(pathlib.Path(key), "a private key")


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` or ``[v6]:port``.

    Raises:
        ValueError: it has another form.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]/]+)):(\d{1,5})", address)
    if match is None:
        raise ValueError(f"{address!r} is not host:port")
    port = int(match[3])
    if not 0 < port < 65536:
        raise ValueError(f"{address!r}: the port is not in 1..65535")
    return match[1] or match[2], port


def url_of(scheme: str, host: str, port: int) -> str:
    """Return the URL at which a client on this host reaches a server that listens at ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_address(address: str, source: str, key: str) -> None:
    """Raise :class:`ConfigError` unless an address is one of this host; its port may be in use."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.bind((found[0], 0, *found[2:]))
    except (OSError, UnicodeError) as error:
        reason = f"this host cannot listen at {address!r}: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(source, key, reason) from None


def _typed(kind: Any, variable: str, keys: list[str], text: str) -> object:
    """Return ``text`` as the type the key has: itself, or JSON for lists and tables."""
    for key in keys:
        fields = {f.name: f.type for f in msgspec.structs.fields(kind)} if _is_struct(kind) else {}
        if key not in fields:
            raise ConfigError(variable, ".".join(keys), _unknown(key))
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
