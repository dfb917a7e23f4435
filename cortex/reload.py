"""Everything a gateway reads from files, read together, and read again when they change: all of it or nothing.

``cortex.toml``, ``models.toml`` and ``keys.toml`` are checked as one before any of it is used. A change that is not
valid is logged with file, key and reason, and the gateway goes on as it was. Looked at every second, and on SIGHUP.
"""

import asyncio
import logging
import pathlib
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from cortex import config
from cortex.access import keys
from cortex.access.keys import ANONYMOUS, KeyRing, Limits, Principal
from cortex.config import Config, CountersKind
from cortex.fleet import catalogue
from cortex.fleet.catalogue import Catalogue
from cortex.settings import ConfigError

log = logging.getLogger("cortex.config")

ANONYMOUS_PRIORITY = -100
FIXED = (
    "listen",
    "metrics_listen",
    "workers",
    "log_format",
    "tls_certificate",
    "tls_key",
    "drain_timeout_s",
    "trace_endpoint",
)
"""Keys of ``[gateway]`` that a running process cannot change."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the files say."""

    config: Config
    catalogue: Catalogue
    keys: KeyRing
    files: tuple[pathlib.Path, ...]


def load(path: pathlib.Path, environment: Mapping[str, str], flags: Mapping[str, object] | None = None) -> Loaded:
    """Read everything, beginning with ``cortex.toml`` at ``path``.

    Raises:
        ConfigError: any of it is wrong.
    """
    settings = config.load(path, environment, flags)
    models = config.models_path(settings, path)
    offered = catalogue.load(models, {node.name for node in settings.neurons})
    ring = KeyRing()
    files: tuple[pathlib.Path, ...] = (path, models)
    access = settings.access
    if (keys_file := config.keys_path(settings, path)) is not None:
        anonymous = None
        if access.anonymous:
            limits = Limits(access.anonymous_requests_per_minute, access.anonymous_max_concurrent)
            anonymous = Principal(ANONYMOUS, access.anonymous_models, False, ANONYMOUS_PRIORITY, limits)
        ring, files = keys.load(keys_file, anonymous), (*files, keys_file)
        is_shared = settings.gateway.workers > 1 and access.counters is CountersKind.MEMORY
        if is_shared and any(not principal.limits.are_none for principal in ring.by_name()):
            reason = 'keys have limits, which several workers can only count together in "valkey"'
            raise ConfigError(str(path), "access.counters", reason)
    elif access.anonymous:
        raise ConfigError(str(path), "access.anonymous", "means nothing without access.keys: everybody may ask")
    return Loaded(settings, offered, ring, files)


class Reloader:
    """Reads the files again, and hands on what they say if all of it is right and something has changed."""

    def __init__(
        self, path: pathlib.Path, environment: Mapping[str, str], loaded: Loaded, apply: Callable[[Loaded], None]
    ) -> None:
        self._path = path
        self._environment = environment
        self._loaded = loaded
        self._apply = apply
        self._seen = _stamps(loaded.files)
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.error: ConfigError | None = None
        """Why the files as they are now are not what the gateway goes by."""

    def start(self) -> None:
        """Begin to watch, and to listen for SIGHUP where this is a process's main thread."""
        self._task = asyncio.create_task(self._watch(), name="watch the configuration")
        try:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._asked.set)
        except (RuntimeError, ValueError):  # the server runs its loop in another thread
            log.info("SIGHUP is not heard here; the files are watched")

    async def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def reload(self) -> None:
        """Read the files now.

        Raises:
            ConfigError: something in them is wrong; nothing has changed.
        """
        # Before reading, so that what is written meanwhile is seen as another change.
        self._seen = _stamps(self._loaded.files)
        try:
            found = load(self._path, self._environment)
        except ConfigError as error:
            self.error = error
            log.error("configuration not reloaded: %s", error)
            raise
        self.error = None
        before = self._loaded
        later = [key for key in FIXED if getattr(found.config.gateway, key) != getattr(before.config.gateway, key)]
        later += [] if found.config.store == before.config.store else ["store"]
        fixed = {key: getattr(before.config.gateway, key) for key in FIXED}
        settings = msgspec.structs.replace(
            found.config, gateway=msgspec.structs.replace(found.config.gateway, **fixed), store=before.config.store
        )
        self._loaded = Loaded(settings, found.catalogue, found.keys, found.files)
        self._seen = {
            **_stamps(found.files),
            **{path: seen for path, seen in self._seen.items() if path in found.files},
        }
        self._apply(self._loaded)
        log.info(
            "configuration reloaded nodes=%d models=%d keys=%d",
            len(settings.neurons),
            len(found.catalogue.profiles),
            len(found.keys.principals),
        )
        if later:
            log.warning("configuration needs a restart for: %s", ", ".join(later))

    async def _watch(self) -> None:
        while True:
            pause_s = self._loaded.config.gateway.reload_check_s or None
            try:
                async with asyncio.timeout(pause_s):
                    await self._asked.wait()
            except TimeoutError:
                if _stamps(self._loaded.files) == self._seen:
                    continue
            self._asked.clear()
            try:
                self.reload()
            except ConfigError:
                continue  # logged


def _stamps(files: tuple[pathlib.Path, ...]) -> dict[pathlib.Path, tuple[int, int, int]]:
    """Return what tells one version of a file from another; a file that is not there has a version too."""
    found = {}
    for path in files:
        try:
            status = path.stat()
        except OSError:
            found[path] = (0, 0, 0)
        else:
            found[path] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return found
