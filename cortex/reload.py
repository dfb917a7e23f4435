"""The gateway's configuration files, read together and reloaded when they change, all or nothing.

``cortex.toml``, ``models.toml``, ``keys.toml`` and the files of added models and keys are checked as one before any of
it is used. An invalid change is logged with file, key and reason, and the gateway continues as before. The files are
checked every second and on SIGHUP, with the files that a rejected change names, so that correcting them is enough.

An unreadable file never means "no keys". A gateway with keys keeps them until a restart. A gateway without keys refuses
every request after a rejected change to the access settings, until that is corrected or reverted.
"""

import asyncio
import dataclasses
import logging
import pathlib
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from cortex import config
from cortex.access import added, keys
from cortex.access.keys import ANONYMOUS, CLOSED, KeyRing, Limits, Principal
from cortex.config import AccessSettings, Config
from cortex.fleet import catalogue
from cortex.fleet.catalogue import Catalogue
from cortex.owned_file import may_exist
from cortex.settings import ConfigError, convert, read_file, read_toml
from cortex.supervise import Supervisor

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

_NOT_EMPTY = rb"""(?!["']?[ \t]*=[ \t]*(?:""|'')[ \t]*(?:\#|$))"""
_ABOUT_ACCESS = re.compile(
    rb"""^[ \t]*["']?(?:access["']?[ \t]*(?:=|\.[ \t]*["']?keys?\b)|keys?\b""" + _NOT_EMPTY + rb")", re.MULTILINE
)
"""Pattern of a line in a file that is not TOML that was meant as an access setting."""


_Stamps = dict[pathlib.Path, tuple[int, ...]]
"""Versions of files."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The content of the files."""

    config: Config
    catalogue: Catalogue
    keys: KeyRing
    files: tuple[pathlib.Path, ...]
    """All files that were read, secrets and certificates included."""
    added_models: pathlib.Path | None = None
    added_keys: pathlib.Path | None = None
    """Files of the models and of the keys that commands and the dashboard add."""


def load(
    path: pathlib.Path | None,
    environment: Mapping[str, str],
    flags: Mapping[str, object] | None = None,
    files: list[pathlib.Path] | None = None,
) -> Loaded:
    """Read all files, beginning with ``cortex.toml`` at ``path``. Each is added to ``files`` before it is read.

    Without a path, ``cortex.toml`` is looked up; if there is none, its default paths are added.

    Raises:
        ConfigError: a file or a setting is wrong.
    """
    files = [] if files is None else files
    path = path or config.find(environment)
    for place in config.places() if path is None else (path,):
        files.append(place)
    try:
        return _load(path, environment, flags, files)
    except ConfigError:
        raise
    except Exception as error:  # any failure of a parser is an unreadable file
        raise ConfigError(str(files[-1]), "", f"cannot be read: {type(error).__name__}: {error}") from error


def _load(
    path: pathlib.Path | None,
    environment: Mapping[str, str],
    flags: Mapping[str, object] | None,
    files: list[pathlib.Path],
) -> Loaded:
    source = config.NO_FILE if path is None else str(path)
    settings = config.load(path, environment, flags, files)
    models = config.models_path(settings, path)
    files.append(models or pathlib.Path(settings.gateway.models))
    if (added_models := config.added_path(settings, path, environment)) is not None:
        files.append(added_models)
    offered = catalogue.load(models, {node.name for node in settings.neurons}, added_models)
    offered = dataclasses.replace(offered, discovers=settings.gateway.discover)
    added_keys = config.added_keys_path(settings, path, environment)
    ring = _ring(settings, config.keys_path(settings, path), added_keys, files)
    if ring.is_open and settings.access.anonymous:
        raise ConfigError(source, "access.anonymous", "means nothing without keys: everybody may ask")
    if not settings.counts_limits and any(not principal.limits.are_none for principal in ring.by_name()):
        reason = 'keys have limits, which several workers can only count together in "valkey"'
        raise ConfigError(source, "access.counters", reason)
    return Loaded(settings, offered, ring, tuple(dict.fromkeys(files)), added_models, added_keys)


def _ring(
    settings: Config, configured: pathlib.Path | None, added_keys: pathlib.Path | None, files: list[pathlib.Path]
) -> KeyRing:
    """Return the keys of both files; an open ring if there is neither."""
    access = settings.access
    if added_keys is not None:
        files.append(added_keys)
    there = added.read(added_keys)
    if configured is None and there is None:
        return KeyRing()
    anonymous = None
    if access.anonymous:
        limits = Limits(access.anonymous_requests_per_minute, access.anonymous_max_concurrent)
        anonymous = Principal(ANONYMOUS, access.anonymous_models, False, ANONYMOUS_PRIORITY, limits)
    ring = KeyRing(anonymous=anonymous)
    if configured is not None:
        files.append(configured)
        ring = keys.load(configured, anonymous)
    if added_keys is not None and there is not None:
        ring = added.joined(ring, there, added_keys)
    if not ring.principals:
        log.warning("there is no key in %s: every request with a key is refused", configured or added_keys)
    return ring


class _Looked(list[pathlib.Path]):
    """A list of files with the version that each had just before it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.stamps: _Stamps = {}

    def append(self, path: pathlib.Path) -> None:
        """Add a file that is about to be read."""
        self.stamps.setdefault(path, _stamp(path))
        super().append(path)


def sets_access(path: pathlib.Path | None, environment: Mapping[str, str]) -> bool:
    """Return whether a rejected configuration sets keys or anonymous access, as far as it can be read."""
    if environment.get(f"{config.ENVIRONMENT_PREFIX}ACCESS__KEYS"):
        return True
    path = path or config.find(environment)
    if path is None:
        return False
    try:
        access = read_toml(path).get("access", {})
    except ConfigError:
        pass
    else:
        try:
            settings = convert(access, AccessSettings, str(path))
        except ConfigError:
            return True
        is_added = bool(settings.added_keys) and may_exist(path.parent / settings.added_keys)
        return bool(settings.keys) or settings.anonymous or is_added
    try:
        return _ABOUT_ACCESS.search(read_file(path)) is not None
    except ConfigError:
        return path.exists()  # unreadable, so it may set access


class Reloader:
    """The watch of the files, which applies a changed and valid configuration."""

    def __init__(
        self, path: pathlib.Path | None, environment: Mapping[str, str], loaded: Loaded, apply: Callable[[Loaded], None]
    ) -> None:
        self._path = path
        self._environment = environment
        self._loaded = loaded
        self._apply = apply
        self._files = loaded.files
        """Files in force, and files that a rejected change names."""
        self._seen = _stamps(loaded.files)
        self._is_open = loaded.keys.is_open
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.error: ConfigError | None = None
        """Reason why the current files are not in force."""

    @property
    def added_models(self) -> pathlib.Path | None:
        """Path of the file of added models, as configured."""
        return self._loaded.added_models

    @property
    def added_keys(self) -> pathlib.Path | None:
        """Path of the file of added keys, as configured."""
        return self._loaded.added_keys

    def start(self, supervisor: Supervisor) -> None:
        """Start the watch, and handle SIGHUP where this is a process's main thread."""
        self._task = supervisor.start("watch the configuration", self._watch)
        try:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._asked.set)
        except (RuntimeError, ValueError):  # the server runs its loop in another thread
            log.info("SIGHUP is not handled here; the files are watched")

    async def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def reload(self) -> None:
        """Read the files now.

        Raises:
            ConfigError: a setting is wrong; nothing has changed.
        """
        # Before reading, so that a write meanwhile counts as another change.
        seen = _stamps(self._files)
        looked_at = _Looked()
        try:
            found = load(self._path, self._environment, files=looked_at)
            if not self._is_open and found.keys.is_open:
                reason = "are gone: a running gateway does not give up its keys; restart it to let everybody in"
                raise ConfigError(str(self._path or config.NO_FILE), "access.keys", reason)
        except ConfigError as error:
            self._watch_also(looked_at.stamps | seen, (*self._loaded.files, *looked_at))
            self._reject(error)
            raise
        self.error = None
        before = self._loaded
        later = [key for key in FIXED if getattr(found.config.gateway, key) != getattr(before.config.gateway, key)]
        later += [] if found.config.store == before.config.store else ["store"]
        fixed = {key: getattr(before.config.gateway, key) for key in FIXED}
        settings = msgspec.structs.replace(
            found.config, gateway=msgspec.structs.replace(found.config.gateway, **fixed), store=before.config.store
        )
        gone = before.catalogue.withdrawn.union(before.catalogue.profiles).difference(found.catalogue.profiles)
        catalogue = dataclasses.replace(found.catalogue, withdrawn=gone)
        self._loaded = dataclasses.replace(found, config=settings, catalogue=catalogue)
        self._watch_also(looked_at.stamps | seen, found.files)
        self._is_open = found.keys.is_open
        try:
            self._apply(self._loaded)
        except Exception as error:
            failed = ConfigError(
                str(self._path or config.NO_FILE), "", f"could not be put in force: {type(error).__name__}: {error}"
            )
            self._seen = {}  # it is tried again
            self._reject(failed)
            raise failed from error
        log.info(
            "configuration reloaded nodes=%d models=%d keys=%d",
            len(settings.neurons),
            len(found.catalogue.profiles),
            len(found.keys.principals),
        )
        if newly := gone - before.catalogue.withdrawn:
            log.info("models are no longer offered: %s (cortex unload frees them)", ", ".join(sorted(newly)))
        if later:
            log.warning("configuration needs a restart for: %s", ", ".join(later))

    def _watch_also(self, seen: _Stamps, files: tuple[pathlib.Path, ...]) -> None:
        self._files = tuple(dict.fromkeys(files))
        self._seen = {path: seen[path] for path in self._files}

    def _reject(self, error: ConfigError) -> None:
        """Keep the configuration; without keys, refuse every request if the change set access, or added a key."""
        self.error = error
        log.error("configuration not reloaded: %s", error)
        added_keys = self._loaded.added_keys
        adds_keys = added_keys is not None and may_exist(added_keys)
        if self._is_open and (adds_keys or sets_access(self._path, self._environment)):
            log.critical("every request is refused until the configuration, which sets access, is corrected")
            closed = dataclasses.replace(self._loaded, keys=CLOSED)
            self._apply(closed)

    async def _watch(self) -> None:
        while True:
            pause_s = self._loaded.config.gateway.reload_check_s or None
            try:
                async with asyncio.timeout(pause_s):
                    await self._asked.wait()
            except TimeoutError:
                if _stamps(self._files) == self._seen:
                    continue
            self._asked.clear()
            try:
                self.reload()
            except ConfigError:
                continue  # logged


def _stamps(files: tuple[pathlib.Path, ...]) -> _Stamps:
    return {path: _stamp(path) for path in files}


def _stamp(path: pathlib.Path) -> tuple[int, ...]:
    """Return the version of a file, also of a missing one.

    Permissions are part of it, so it has the inode's change time, or the reason why the file cannot be read.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        return (getattr(error, "errno", None) or -1,)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev
