"""``cortex.toml`` and ``models.toml``: what an operator says, checked before anything starts.

A value comes from the file, then from the environment (``CORTEX_GATEWAY__LISTEN``), then from a flag; the last one
wins. Unknown keys, wrong types and impossible pairs are a :class:`ConfigError` that names file, key and reason. This
module reads and checks values; what the catalogue means is :mod:`cortex.fleet.catalogue`'s.
"""

import os
import pathlib
import re
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from cortex.errors import ConfigError
from cortex.wire.node import ModelSpec

ENVIRONMENT_PREFIX = "CORTEX_"
CONFIG_VARIABLE = "CORTEX_CONFIG"
"""Names ``cortex.toml`` for ``granian cortex.asgi:app``."""

SEARCH_PATH = ("cortex.toml", "/etc/cortex/cortex.toml")

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
ModelId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$")]
S = TypeVar("S", bound=msgspec.Struct)


class LogFormat(StrEnum):
    """How a log line is written."""

    TEXT = "text"
    JSON = "json"


class EvictionStrategy(StrEnum):
    """Which idle model goes first when memory is needed."""

    LRU = "lru"
    PRIORITY = "priority"


class Timeouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long a node may stay silent. None of them bounds a healthy answer, however long it takes."""

    connect_s: Seconds = 5.0
    first_byte_s: Seconds = 60.0
    """A streamed answer's first byte; a node sends its headers within a second, before it has a token."""
    answer_s: Seconds = 1800.0
    """An answer that is not streamed: its first byte comes when all of it is made."""
    stall_s: Seconds = 60.0
    """Silence within an answer. Nodes send a heartbeat every few seconds."""
    load_stall_s: Seconds = 600.0
    """A cold load that makes no progress."""


class Polling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How nodes are watched. ``strikes`` missed polls in a row make a node down."""

    interval_s: Seconds = 2.0
    timeout_s: Seconds = 3.0
    max_backoff_s: Seconds = 30.0
    strikes: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[gateway]``. Addresses are ``host:port``; ``models`` is relative to the file that names it."""

    listen: str = "127.0.0.1:31313"
    metrics_listen: str = "127.0.0.1:31314"
    """Empty: no metrics are served."""
    models: str = "models.toml"
    log_format: LogFormat = LogFormat.TEXT
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 32 * 1024 * 1024
    max_connections_per_node: Annotated[int, msgspec.Meta(ge=1)] = 1024
    workers: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    drain_timeout_s: Annotated[int, msgspec.Meta(ge=1)] = 30
    timeouts: Timeouts = Timeouts()
    polling: Polling = Polling()


class EvictionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[eviction]``. ``defrag_after_cycles`` of 0 never recycles a device worker."""

    strategy: EvictionStrategy = EvictionStrategy.LRU
    defrag_after_cycles: Annotated[int, msgspec.Meta(ge=0)] = 0


class NodeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of ``[[neurons]]``."""

    name: Name
    endpoint: str


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole ``cortex.toml``."""

    gateway: GatewaySettings = GatewaySettings()
    eviction: EvictionSettings = EvictionSettings()
    neurons: tuple[NodeSettings, ...] = ()
    path: str = ""
    """The file this was read from; not a key of it."""

    @property
    def models_path(self) -> pathlib.Path:
        """Where ``models.toml`` is."""
        return pathlib.Path(self.path).parent / self.gateway.models


class ModelProfile(ModelSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of ``[[models]]``: what to load, and where it may live."""

    id: ModelId
    aliases: tuple[ModelId, ...] = ()
    pinned: tuple[str, ...] = ()
    """Nodes on which the model is kept and never evicted."""
    preferred_nodes: tuple[str, ...] = ()
    priority: int = 0
    """Under ``priority`` eviction a lower one goes first."""
    memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """What it needs, for placement before any node has loaded it; 0: not known."""

    def spec(self) -> ModelSpec:
        """Return the part that a neuron is asked to load."""
        return ModelSpec(**{field: getattr(self, field) for field in ModelSpec.__struct_fields__})


class ModelsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole ``models.toml``."""

    models: tuple[ModelProfile, ...] = ()
    aliases: dict[ModelId, str] = {}


def find(environment: Mapping[str, str]) -> pathlib.Path:
    """Return the configuration file that applies.

    Raises:
        ConfigError: there is none.
    """
    named = environment.get(CONFIG_VARIABLE)
    if named:
        return pathlib.Path(named)
    for candidate in SEARCH_PATH:
        if pathlib.Path(candidate).exists():
            return pathlib.Path(candidate)
    raise ConfigError(CONFIG_VARIABLE, "", f"no configuration: none of {', '.join(SEARCH_PATH)} exists")


def load(
    path: pathlib.Path, environment: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> Config:
    """Return the checked configuration. ``flags`` maps dotted keys to values; ``None`` values are not given.

    Raises:
        ConfigError: the file, the environment or a flag is wrong.
    """
    document = read_toml(path)
    if "path" in document:
        raise ConfigError(str(path), "path", "unknown key")
    environment = os.environ if environment is None else environment
    for variable, keys, value in _environment_values(environment):
        _put(document, keys, value, variable)
    for flag, value in (flags or {}).items():
        if value is not None:
            _put(document, flag.split("."), value, f"--{flag.rpartition('.')[2]}")
    document["path"] = str(path)
    config = convert(document, Config, str(path))
    _check(config)
    return config


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
        key = where.rstrip("`").removeprefix("$").removeprefix(".")
        unknown = re.fullmatch(r"Object contains unknown field `(.*)`", reason)
        if unknown:
            key, reason = f"{key}.{unknown[1]}".lstrip("."), "unknown key"
        missing = re.fullmatch(r"Object missing required field `(.*)`", reason)
        if missing:
            key, reason = f"{key}.{missing[1]}".lstrip("."), "is missing"
        raise ConfigError(source, key, reason) from None


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


def split_endpoint(endpoint: str) -> tuple[str, int, str]:
    """Return host, port and path prefix of ``http://host:port[/prefix]``.

    Raises:
        ValueError: it is not such an address.
    """
    parts = urlsplit(endpoint)
    if parts.scheme != "http":
        raise ValueError(f"{endpoint!r} is not http://host:port")
    if not parts.hostname or parts.query or parts.fragment or parts.username is not None or " " in endpoint:
        raise ValueError(f"{endpoint!r} is not http://host:port[/prefix]")
    return parts.hostname, parts.port or 80, parts.path.rstrip("/")


def _environment_values(environment: Mapping[str, str]) -> list[tuple[str, list[str], object]]:
    values: list[tuple[str, list[str], object]] = []
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        keys = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if len(keys) == 1 and keys[0] not in {"gateway", "eviction", "neurons"}:
            continue  # another program's: every setting of ours lies in a table
        values.append((variable, keys, _typed(variable, keys, text)))
    return values


def _typed(variable: str, keys: list[str], text: str) -> object:
    """Return ``text`` as the type the key has: itself, or JSON for lists and tables."""
    kind: Any = Config
    for key in keys:
        fields = {field.name: field.type for field in msgspec.structs.fields(kind)} if _is_struct(kind) else {}
        if key not in fields or key == "path":
            raise ConfigError(variable, ".".join(keys), "unknown key")
        kind = fields[key]
    try:
        if _is_struct(kind) or kind == tuple[NodeSettings, ...]:
            return msgspec.to_builtins(msgspec.json.decode(text, type=kind))
        return msgspec.to_builtins(msgspec.convert(text, kind, strict=False))
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(variable, ".".join(keys), str(error)) from None


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _put(document: dict[str, Any], keys: list[str], value: object, source: str) -> None:
    table = document
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(source, ".".join(keys), f"{key} is not a table in the file")
    table[keys[-1]] = value


def _check(config: Config) -> None:
    """Check what types cannot say."""
    gateway = config.gateway
    for key, address in (("gateway.listen", gateway.listen), ("gateway.metrics_listen", gateway.metrics_listen)):
        if address or key == "gateway.listen":
            try:
                split_address(address)
            except ValueError as error:
                raise ConfigError(config.path, key, str(error)) from None
    if gateway.listen == gateway.metrics_listen:
        raise ConfigError(config.path, "gateway.metrics_listen", f"is {gateway.listen!r}, as gateway.listen is")
    if not gateway.models:
        raise ConfigError(config.path, "gateway.models", "is empty; it names the catalogue, models.toml")
    if not config.neurons:
        raise ConfigError(config.path, "neurons", "names no node; a gateway needs at least one [[neurons]]")
    names: set[str] = set()
    endpoints: dict[str, str] = {}
    for index, node in enumerate(config.neurons):
        if node.name in names:
            raise ConfigError(config.path, f"neurons[{index}].name", f"{node.name!r} is used twice")
        names.add(node.name)
        try:
            split_endpoint(node.endpoint)
        except ValueError as error:
            raise ConfigError(config.path, f"neurons[{index}].endpoint", str(error)) from None
        other = endpoints.setdefault(node.endpoint.rstrip("/"), node.name)
        if other != node.name:
            raise ConfigError(config.path, f"neurons[{index}].endpoint", f"{node.endpoint!r} is also {other!r}'s")
