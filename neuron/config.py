"""``neuron.toml``: what an operator says of one daemon, checked before anything starts.

All of it has defaults, so a daemon runs without a file. Layers as in :mod:`cortex.settings`, with ``NEURON_`` as the
prefix of the environment (``NEURON_DAEMON__LISTEN``).
"""

import os
import pathlib
import socket
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

import msgspec

from cortex import guard, settings, tracing
from cortex.logs import LogFormat
from cortex.request_body import BODY_TIMEOUT_S
from cortex.settings import ConfigError
from cortex.wire.node import LoadRequest
from neuron.engine_settings import EngineSettings

ENVIRONMENT_PREFIX = "NEURON_"
CONFIG_VARIABLE = "NEURON_CONFIG"
SYSTEM_PATH = "/etc/neuron/neuron.toml"


class PrefixSharing(StrEnum):
    """Whose prompts share the beginnings they have in common."""

    PRINCIPAL = "principal"
    """Those of one principal, and those of all who have none."""
    ALL = "all"
    """Those of everybody: faster, and whoever asks can find out what others have asked."""

    def salt(self, principal: str, own: str = "") -> str:
        """Return what only prompts that may share have in common; ``own`` is the client's."""
        parts = (principal if self is PrefixSharing.PRINCIPAL else "", own)
        return "\n".join(parts) if any(parts) else ""


class DaemonSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[daemon]``."""

    name: str = msgspec.field(default_factory=socket.gethostname)
    listen: str = "127.0.0.1:13131"
    devices: str = "auto"
    """``auto``, ``cpu``, or indices of GPUs such as ``0,1``."""
    harnesses: tuple[str, ...] = ("torch",)
    cache: str = ""
    """Folder for downloaded weights. Empty: ``weights`` in the service's cache, or ``neuron`` in the user's."""
    log_format: LogFormat = LogFormat.TEXT
    trace_endpoint: str = ""
    """Of an OpenTelemetry collector (OTLP over HTTP), which gets a span of each request. Empty: none is made."""
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 32 * 1024 * 1024
    body_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] = BODY_TIMEOUT_S
    """How long the body of a request may take, beside a second for each 64 KiB of it."""
    max_waiting: Annotated[int, msgspec.Meta(ge=0)] = 256
    """Choices of requests that may wait for a slot, for each model, before more are told to come back later."""
    prefix_sharing: PrefixSharing = PrefixSharing.PRINCIPAL
    """Whose prompts share the beginnings that they have in common in the cache: those of one principal, or all."""
    max_models: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256
    """Models this node knows at a time, loaded or not; beyond it the one out of use for longest is forgotten."""
    failed_kept_s: Annotated[float, msgspec.Meta(ge=0)] = 600.0
    """How long a model whose load failed is listed with its error; models of the configuration stay."""
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    """How long running requests may go on after SIGTERM."""
    step_limit_s: Annotated[float, msgspec.Meta(ge=0)] = 300.0
    """A step of a device worker that takes longer has hung: the worker is replaced. 0: no limit."""
    collective_limit_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    """How long a device waits for the others that hold a model with it before their workers are replaced."""
    stop_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    """How long a device worker may take to end before it is killed."""
    hold_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    """How long a model that was just loaded is kept for those it was loaded for to use it."""
    linger_s: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    """How long after its last request a model is kept while another waits for its room."""
    patience_s: Annotated[float, msgspec.Meta(ge=0)] = 20.0
    """How long a busy model still takes requests while another waits for its room."""
    defrag_idle_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    """How long the models of a device must have been idle before its worker is replaced (``defrag_after_cycles``)."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which callers without a secret reach the daemon, beyond addresses, its host's name and private ones."""
    secret_file: str = ""
    """A file whose first line everyone must send as ``Authorization: Bearer``, but for ``/health``. Empty: nobody."""
    tls_certificate: str = ""
    """PEM files; with them the API is served over TLS."""
    tls_key: str = ""


class ModelSettings(LoadRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of ``[[models]]``: a model this node knows, loaded at start if ``preload``."""

    preload: bool = True


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole ``neuron.toml``."""

    daemon: DaemonSettings = DaemonSettings()
    engine: EngineSettings = EngineSettings()
    models: tuple[ModelSettings, ...] = ()


def load(
    path: pathlib.Path | None,
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Return the checked configuration; without ``path`` that of ``$NEURON_CONFIG``, of /etc, or the defaults.

    Raises:
        ConfigError: the file, the environment or a flag is wrong.
    """
    environment = os.environ if environment is None else environment
    if path is None and environment.get(CONFIG_VARIABLE):
        path = pathlib.Path(environment[CONFIG_VARIABLE])
    if path is None and pathlib.Path(SYSTEM_PATH).exists():
        path = pathlib.Path(SYSTEM_PATH)
    document = settings.read_toml(path) if path else {}
    source = str(path or "defaults")
    config = settings.load(Config, document, source, prefix=ENVIRONMENT_PREFIX, environment=environment, flags=flags)
    try:
        settings.split_address(config.daemon.listen)
    except ValueError as error:
        raise ConfigError(source, "daemon.listen", str(error)) from None
    daemon = config.daemon
    settings.read_secret(daemon.secret_file, source, "daemon.secret_file")
    settings.check_certificate(daemon.tls_certificate, daemon.tls_key, source, "daemon")
    guard.check_hosts(daemon.allowed_hosts, source, "daemon.allowed_hosts")
    tracing.check(daemon.trace_endpoint, source, "daemon.trace_endpoint")
    seen: set[str] = set()
    for index, model in enumerate(config.models):
        if not model.id or model.id in seen:
            raise ConfigError(source, f"models[{index}].id", f"{model.id!r} is empty or there twice")
        seen.add(model.id)
    return config
