"""``cortex.toml`` and ``models.toml``: the operator's configuration, checked before anything starts.

Layers and errors are of :mod:`cortex.settings`, with ``CORTEX_`` as the environment's prefix
(``CORTEX_GATEWAY__LISTEN``). This module checks values and pairs of them; :mod:`cortex.fleet.catalogue` interprets the
catalogue.
"""

import os
import pathlib
import ssl
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from cortex import guard, settings, tracing
from cortex.dialects import registry
from cortex.fleet.policies.registry import POLICIES
from cortex.logs import LogFormat
from cortex.request_body import BODY_TIMEOUT_S
from cortex.settings import ConfigError
from cortex.wire.node import Duration, EvictionStrategy, ModelSpec, Priority, spec_of

ENVIRONMENT_PREFIX = "CORTEX_"
CONFIG_VARIABLE = "CORTEX_CONFIG"
"""Variable with the path of ``cortex.toml``, for ``granian cortex.asgi:app``."""

SEARCH_PATH = ("cortex.toml", "/etc/cortex/cortex.toml")
NO_FILE = "no cortex.toml"
"""Source of settings where there is no file: the environment, the flags and the defaults."""
LOCAL_NEURON = "local", "http://127.0.0.1:13131"
"""Name and endpoint of the default node: a neuron of this host, at its default address."""

ADDED_MODELS = "added-models.json"
"""Name of the file of models that commands and the dashboard add."""
ADDED_KEYS = "added-keys.json"
"""Name of the file of keys that commands and the dashboard add."""

Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
"""A finite positive duration."""
Dollars = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""A finite price."""
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Alias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}\*?$")]
"""Another name of a model; with a ``*`` at its end, a prefix of all names that match nothing else."""


class Timeouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Timeouts of a node's silence. None of them bounds a healthy stream, however long it takes."""

    connect_s: Seconds = 5.0
    first_byte_s: Seconds = 60.0
    """Timeout of a stream's first byte; a node sends its headers within a second, before its first token."""
    answer_s: Seconds = 1800.0
    """Timeout of a whole answer that is not streamed, or is made in the background."""
    stall_s: Seconds = 60.0
    """Timeout of silence within an answer. Nodes send a heartbeat every few seconds."""
    load_stall_s: Seconds = 600.0
    """Timeout of a cold load that makes no progress."""


class Polling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Polling of nodes. ``failure_threshold`` failed polls in a row make a node down."""

    interval_s: Seconds = 2.0
    timeout_s: Seconds = 3.0
    max_backoff_s: Seconds = 30.0
    failure_threshold: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3


class NodeTimeouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Timeouts of one node, in place of the gateway's; ``None`` takes the gateway's."""

    connect_s: Seconds | None = None
    first_byte_s: Seconds | None = None
    answer_s: Seconds | None = None
    stall_s: Seconds | None = None
    load_stall_s: Seconds | None = None

    def over(self, timeouts: Timeouts) -> Timeouts:
        """Return ``timeouts`` with these in place of its own."""
        given = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(timeouts, **given)


class BreakerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Circuit breaker of a failing replica: it opens after ``failures`` in a row, for ``open_s`` and then longer.

    After failures that the requests may have caused, the replica is used last, for ``open_s``.
    """

    failures: Annotated[int, msgspec.Meta(ge=1)] = 5
    open_s: Seconds = 5.0
    max_open_s: Seconds = 60.0


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[gateway]``. Addresses are ``host:port``; ``models`` is relative to the file that names it."""

    listen: str = "127.0.0.1:31313"
    metrics_listen: str = "127.0.0.1:31314"
    """Address of the metrics; empty: none are served."""
    models: str = "models.toml"
    added_models: str = ""
    """Path of the file of models that commands and the dashboard add, relative to ``models``. Empty:
    ``added-models.json`` in the service's state directory, or beside ``models``; without a ``cortex.toml`` in the
    user's state directory."""
    discover: bool = True
    """Whether models that only nodes list, and ``models.toml`` does not name, are offered."""
    log_format: LogFormat = LogFormat.TEXT
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 32 * 1024 * 1024
    body_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] = BODY_TIMEOUT_S
    """Timeout of reading a request's body, beside a second for each 64 KiB of it."""
    max_connections_per_node: Annotated[int, msgspec.Meta(ge=1)] = 1024
    workers: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    drain_timeout_s: Annotated[int, msgspec.Meta(ge=1)] = 30
    timeouts: Timeouts = Timeouts()
    polling: Polling = Polling()
    breaker: BreakerSettings = BreakerSettings()
    routing_policy: Annotated[str, msgspec.Meta(pattern=rf"^({'|'.join(POLICIES)})\Z")] = "prefix_affine"
    """Policy that chooses among the ready replicas of a model, unless the model names its own."""
    affinity_slack: Annotated[int, msgspec.Meta(ge=0)] = 8
    """Requests by which a node that has a conversation's prefix may be busier than the least busy one, under
    ``prefix_affine``."""
    secret_file: str = ""
    """Path of a file whose first line is sent to every neuron as a secret; see ``daemon.secret_file`` there."""
    tls_certificate: str = ""
    """Path of a PEM file; with it and ``tls_key``, ``cortex serve`` serves TLS."""
    tls_key: str = ""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may use ``/v1``, as browsers write them; ``*``, with keys: any origin."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that clients without a key may use, beyond addresses, the host's name and private names."""
    trace_endpoint: str = ""
    """URL of an OpenTelemetry collector (OTLP over HTTP, ``http://host:4318``), which gets a span of each request.
    Empty: no tracing."""
    reload_check_s: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Interval of the check of the files for changes; 0: only SIGHUP reloads them."""


class EvictionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[eviction]``. ``defrag_after_cycles`` of 0 never recycles a device worker."""

    strategy: EvictionStrategy = EvictionStrategy.LRU
    defrag_after_cycles: Annotated[int, msgspec.Meta(ge=0)] = 0


class StoreKind(StrEnum):
    """Storage of responses."""

    NONE = "none"
    SQLITE = "sqlite"
    VALKEY = "valkey"


class StoreSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[store]``: responses that clients refer to by ``previous_response_id``."""

    kind: StoreKind = StoreKind.SQLITE
    path: str = ""
    """Path of the SQLite file. Empty: ``responses.db`` in the service's state directory, or in the user's."""
    url: str = "redis://127.0.0.1:6379/0"
    """URL of the Valkey or Redis server."""
    ttl_s: Seconds = 30 * 24 * 3600.0
    """Lifetime of a response after its last use in a conversation."""
    max_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 1024 * 1024 * 1024
    """Size of all responses in the SQLite file; the oldest are deleted first, of the key that has most."""
    max_bytes_per_key: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Size of the responses and conversations of one key there; 0: a quarter of ``max_bytes``."""
    usage_days: Annotated[int, msgspec.Meta(ge=1, le=36500)] = 400
    """Days of use per key and model that are kept, of those with any."""
    socket_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 256 * 1024 * 1024
    """Size of all conversations that WebSocket connections of one worker hold, stored or not."""
    socket_bytes_per_key: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Size of the conversations of one key there; 0: a quarter of ``socket_bytes``."""


class CountersKind(StrEnum):
    """Storage of the counters of keys' use."""

    MEMORY = "memory"
    VALKEY = "valkey"


class AccessSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[access]``: keys and limits. ``keys`` is relative to the file that names it."""

    keys: str = ""
    """Path of ``keys.toml``; empty: there are no keys but added ones."""
    added_keys: str = ""
    """Path of the file of keys that commands and the dashboard add; where it exists, clients need a key. Empty:
    ``added-keys.json`` beside the file of added models."""
    anonymous: bool = False
    """Whether requests without a key are accepted where there are keys. They are served from spare capacity."""
    anonymous_models: tuple[str, ...] = ("*",)
    anonymous_requests_per_minute: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Requests per minute of all anonymous clients together; 0: no limit."""
    anonymous_max_concurrent: Annotated[int, msgspec.Meta(ge=0)] = 0
    counters: CountersKind = CountersKind.MEMORY
    url: str = "redis://127.0.0.1:6379/0"
    """URL of the Valkey or Redis server."""
    reserve_tokens: Annotated[int, msgspec.Meta(ge=0)] = 1024
    """Output tokens reserved for a request that sets no limit, until its use is known."""
    spare_capacity_wait_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    """Time that a request which is served from spare capacity waits for it."""
    strict: bool = False
    """Whether a request with an unknown member is refused, unless its key decides; otherwise a header names it."""


class NodeType(StrEnum):
    """Kind of server at a node's endpoint."""

    NEURON = "neuron"
    OPENAI = "openai"
    """Any server that speaks OpenAI's dialects; it serves inference and loads nothing."""


class NodeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of ``[[neurons]]``."""

    name: Name
    endpoint: str
    type: NodeType = NodeType.NEURON
    secret_file: str = ""
    """Path of its secret, in place of the gateway's; for ``openai`` of an API key."""
    ca_file: str = ""
    """Path of the CA certificates of an ``https`` endpoint, in place of the system's."""
    models: dict[str, str] = {}
    """For ``openai``: the names that are offered, with the name of each there. Empty: all that it lists."""
    dialects: tuple[str, ...] = ("openai-chat", "openai-completions")
    """For ``openai``: its dialects."""
    timeouts: NodeTimeouts = NodeTimeouts()

    def secret_path(self, gateway: GatewaySettings) -> str:
        """Return the path of the secret that is sent to it as ``Authorization: Bearer``; empty: none."""
        return self.secret_file or (gateway.secret_file if self.type is NodeType.NEURON else "")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole ``cortex.toml``."""

    gateway: GatewaySettings = GatewaySettings()
    eviction: EvictionSettings = EvictionSettings()
    store: StoreSettings = StoreSettings()
    access: AccessSettings = AccessSettings()
    neurons: tuple[NodeSettings, ...] = ()

    @property
    def counts_limits(self) -> bool:
        """Whether the limits of keys can be counted: by one worker, or by several together."""
        return self.gateway.workers == 1 or self.access.counters is not CountersKind.MEMORY


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Prices of a million tokens in US dollars, as ``/v1/models`` and the dashboard tell them."""

    input: Dollars = 0.0
    output: Dollars = 0.0
    cached_input: Dollars | None = None
    """Price of the prompt's tokens that the prefix cache has; ``None``: that of the others."""


class ModelProfile(ModelSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An entry of ``[[models]]``: a model's specification and placement."""

    aliases: tuple[Alias, ...] = ()
    pinned: tuple[str, ...] = ()
    """Nodes on which the model is kept and never evicted."""
    preferred_nodes: tuple[str, ...] = ()
    routing_policy: Annotated[str, msgspec.Meta(pattern=rf"^({'|'.join(POLICIES)})?\Z")] = ""
    """Policy that chooses among its ready replicas; empty: the gateway's."""
    priority: Priority = 0
    """Priority under ``priority`` eviction: a lower one is evicted first, and never for one that is lower still."""
    idle_ttl_s: Duration = 0.0
    """Idle time after which it is unloaded; 0: never."""
    min_compute_capability: Annotated[str, msgspec.Meta(pattern=r"^([0-9]+\.[0-9]+)?$")] = ""
    """Least compute capability of the GPUs that load it."""
    memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Memory that it needs, for placement before any node has loaded it; 0: not known."""
    price: Price | None = None

    def spec(self) -> ModelSpec:
        """Return the specification that is sent to a neuron."""
        return spec_of(self)


class ModelsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole ``models.toml``."""

    models: tuple[ModelProfile, ...] = ()
    aliases: dict[Alias, str] = {}


def find(environment: Mapping[str, str]) -> pathlib.Path | None:
    """Return the path of the configuration file; ``None``: there is none, so that defaults apply."""
    named = environment.get(CONFIG_VARIABLE)
    if named:
        return pathlib.Path(named)
    return next((path for path in places() if path.exists()), None)


def places() -> tuple[pathlib.Path, ...]:
    """Return the default paths of the configuration file."""
    return tuple(map(pathlib.Path, SEARCH_PATH))


def load(
    path: pathlib.Path | None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    files: list[pathlib.Path] | None = None,
) -> Config:
    """Return the checked configuration. ``flags`` maps dotted keys to values; ``None`` values are not given.

    Without a file everything has its default, and the only node is this host's neuron. The files that it names and
    that are read with it (secrets, certificates) are added to ``files``.

    Raises:
        ConfigError: the file, the environment or a flag is wrong.
    """
    environment = dict(os.environ if environment is None else environment)
    environment.pop(CONFIG_VARIABLE, None)
    source = NO_FILE if path is None else str(path)
    config = settings.load(
        Config,
        {} if path is None else settings.read_toml(path),
        source,
        prefix=ENVIRONMENT_PREFIX,
        environment=environment,
        flags=flags,
    )
    if path is None and not config.neurons:
        config = msgspec.structs.replace(config, neurons=(NodeSettings(*LOCAL_NEURON),))
    if files is not None:
        for named in named_files(config):
            files.append(named)
    _check(config, source)
    return config


def named_files(config: Config) -> list[pathlib.Path]:
    """Return the secrets and certificates that a configuration names."""
    gateway = config.gateway
    named = [gateway.secret_file, gateway.tls_certificate, gateway.tls_key]
    for node in config.neurons:
        named += [node.secret_file, node.ca_file]
    return [pathlib.Path(path) for path in dict.fromkeys(named) if path]


def models_path(config: Config, path: pathlib.Path | None) -> pathlib.Path | None:
    """Return the path of ``models.toml``, given the path of the ``cortex.toml`` that names it.

    Without a ``cortex.toml``, ``None`` if there is no catalogue.
    """
    if path is not None:
        return path.parent / config.gateway.models
    models = pathlib.Path(config.gateway.models)
    is_wanted = config.gateway.models != GatewaySettings().models or models.exists()
    return models if is_wanted else None


def added_path(config: Config, path: pathlib.Path | None, environment: Mapping[str, str]) -> pathlib.Path | None:
    """Return the path of the added models, given that of ``cortex.toml``; ``None`` if nothing says where to keep it."""
    catalogue = pathlib.Path(config.gateway.models) if path is None else path.parent / config.gateway.models
    if config.gateway.added_models:
        return catalogue.parent / config.gateway.added_models
    if path is not None and not environment.get("STATE_DIRECTORY"):
        return catalogue.parent / ADDED_MODELS
    folder = settings.state_folder(environment)
    return None if folder is None else folder / ADDED_MODELS


def added_keys_path(config: Config, path: pathlib.Path | None, environment: Mapping[str, str]) -> pathlib.Path | None:
    """Return the path of the added keys. Arguments and ``None`` are those of :func:`added_path`."""
    if config.access.added_keys:
        return (pathlib.Path() if path is None else path.parent) / config.access.added_keys
    models = added_path(config, path, environment)
    return None if models is None else models.with_name(ADDED_KEYS)


def keys_path(config: Config, path: pathlib.Path | None) -> pathlib.Path | None:
    """Return the path of ``keys.toml``; ``None`` if there are no keys."""
    folder = pathlib.Path() if path is None else path.parent
    return folder / config.access.keys if config.access.keys else None


def split_endpoint(endpoint: str) -> tuple[str, int, str]:
    """Return host, port and path prefix of ``http[s]://host:port[/prefix]``.

    Raises:
        ValueError: it is not such an address.
    """
    wrong = ValueError(f"{endpoint!r} is not http[s]://host:port[/prefix]")
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        raise wrong from None
    if (
        parts.scheme not in {"http", "https"}
        or not parts.hostname
        or parts.username is not None
        or parts.query
        or parts.fragment
    ):
        raise wrong
    if not endpoint.isascii() or not endpoint.isprintable() or " " in endpoint or port == 0:
        raise wrong
    return parts.hostname, port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/")


def _check(config: Config, source: str) -> None:
    """Check values that the types do not, and pairs of them."""
    gateway = config.gateway
    for key, address in (("gateway.listen", gateway.listen), ("gateway.metrics_listen", gateway.metrics_listen)):
        if address or key == "gateway.listen":
            try:
                settings.split_address(address)
            except ValueError as error:
                raise ConfigError(source, key, str(error)) from None
    if gateway.listen == gateway.metrics_listen:
        raise ConfigError(source, "gateway.metrics_listen", f"is {gateway.listen!r}, as gateway.listen is")
    settings.read_secret(gateway.secret_file, source, "gateway.secret_file")
    settings.check_certificate(gateway.tls_certificate, gateway.tls_key, source, "gateway")
    for index, origin in enumerate(gateway.allowed_origins):
        if origin == guard.ANY and not config.access.keys:
            reason = "any page may ask only where it needs a key: set access.keys, or name the origins"
            raise ConfigError(source, f"gateway.allowed_origins[{index}]", reason)
        if origin != guard.ANY and not guard.ORIGIN.fullmatch(guard.normal_origin(origin)):
            reason = f"{origin!r} is not an origin, such as https://chat.example.com"
            raise ConfigError(source, f"gateway.allowed_origins[{index}]", reason)
    guard.check_hosts(gateway.allowed_hosts, source, "gateway.allowed_hosts")
    tracing.check(gateway.trace_endpoint, source, "gateway.trace_endpoint")
    if not gateway.models:
        raise ConfigError(source, "gateway.models", "is empty; it names the catalogue, models.toml")
    if not config.neurons:
        raise ConfigError(source, "neurons", "names no node; a gateway needs at least one [[neurons]]")
    names: set[str] = set()
    endpoints: dict[str, str] = {}
    for index, node in enumerate(config.neurons):
        if node.name in names:
            raise ConfigError(source, f"neurons[{index}].name", f"{node.name!r} is used twice")
        names.add(node.name)
        try:
            split_endpoint(node.endpoint)
        except ValueError as error:
            raise ConfigError(source, f"neurons[{index}].endpoint", str(error)) from None
        _check_node(config, node, f"{source}", f"neurons[{index}]")
        other = endpoints.setdefault(node.endpoint.rstrip("/"), node.name)
        if other != node.name:
            raise ConfigError(source, f"neurons[{index}].endpoint", f"{node.endpoint!r} is also {other!r}'s")


def _check_node(config: Config, node: NodeSettings, source: str, key: str) -> None:
    settings.read_secret(node.secret_path(config.gateway), source, f"{key}.secret_file")
    if node.ca_file:
        try:
            authorities = settings.read_file(pathlib.Path(node.ca_file)).decode("latin-1")
            ssl.create_default_context(cadata=authorities)
        except ConfigError as error:
            raise ConfigError(source, f"{key}.ca_file", f"{node.ca_file} {error.reason}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(source, f"{key}.ca_file", f"{node.ca_file}: {error}") from None
    if node.type is NodeType.NEURON and node.models:
        raise ConfigError(source, f"{key}.models", 'is for nodes of type = "openai"')
    for dialect in node.dialects:
        if dialect not in registry.names():
            raise ConfigError(source, f"{key}.dialects", f"{dialect!r} is none of {', '.join(registry.names())}")
