"""``neuron.toml``: the configuration of a daemon, checked before anything starts.

Every key has a default, so a daemon runs without a file. Overrides as in :mod:`cortex.settings`, with the prefix
``NEURON_`` in the environment (``NEURON_DAEMON__LISTEN``).
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
    """Scope within which prompts share KV pages of equal prefixes."""

    PRINCIPAL = "principal"
    """Prompts of the same principal; requests without a principal count as the same."""
    ALL = "all"
    """All prompts: faster, but a client can detect the prompts of others by timing."""

    def salt(self, principal: str, own: str = "") -> str:
        """Return the hash salt that only prompts which may share have in common; ``own`` is the client's salt."""
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
    """Address of an OpenTelemetry collector (OTLP over HTTP), which receives a span of each request. Empty: none."""
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 32 * 1024 * 1024
    body_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] = BODY_TIMEOUT_S
    """Time for the body of a request to arrive, plus a second for each 64 KiB."""
    max_waiting: Annotated[int, msgspec.Meta(ge=0)] = 256
    """Choices of requests that may wait for a slot, for each model; further ones are refused with 429."""
    prefix_sharing: PrefixSharing = PrefixSharing.PRINCIPAL
    """Scope of the prefix cache."""
    max_models: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256
    """Models in the node's table, loaded or not; beyond it the least recently used unloaded model is forgotten."""
    failed_kept_s: Annotated[float, msgspec.Meta(ge=0)] = 600.0
    """Time for which a failed load is listed with its error; configured models are always listed."""
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    """Time for running requests after SIGTERM."""
    step_limit_s: Annotated[float, msgspec.Meta(ge=0)] = 300.0
    """Time after which a step of a device worker has hung and the worker is replaced. 0: no limit."""
    collective_limit_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    """Time for which a rank waits for the others before all workers of the group are replaced."""
    stop_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    """Time for a device worker to exit before it is killed."""
    hold_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    """Time for which a newly loaded model is kept for the requests that caused the load."""
    linger_s: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    """Time after its last request for which a model is kept while another waits for its memory."""
    patience_s: Annotated[float, msgspec.Meta(ge=0)] = 20.0
    """Time for which a busy model still accepts requests while another waits for its memory."""
    defrag_idle_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    """Time for which the models of a device must be idle before its worker is replaced (``defrag_after_cycles``)."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names accepted from callers without a secret, beyond addresses, the host's own name and private names."""
    secret_file: str = ""
    """File whose first line callers must send as ``Authorization: Bearer``, except for ``/health``. Empty: none."""
    tls_certificate: str = ""
    """PEM file of the certificate; with it the API is served over TLS."""
    tls_key: str = ""


class ModelSettings(LoadRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An entry of ``[[models]]``: a model of the node's table, loaded at start if ``preload``."""

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
