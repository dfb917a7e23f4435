"""The checks of ``cortex serve --check`` beyond the settings: the store, the access counters and the addresses.

Nothing is created, opened for writing or awaited. A gateway that runs at the same address is no error, since an
operator checks a change before a reload.
"""

import os
import pathlib
from collections.abc import Mapping

from cortex import store
from cortex.access.valkey import ValkeyRateLimiter
from cortex.config import Config, CountersKind
from cortex.settings import ConfigError, check_address
from cortex.store.sqlite import SqliteStore


def check(config: Config, source: str, environment: Mapping[str, str]) -> None:
    """Raise :class:`ConfigError` if a gateway with this configuration would not start."""
    found = store.make(config.store, environment)  # no home, or a package that is missing
    if isinstance(found, SqliteStore) and found.path != ":memory:":
        _check_file(pathlib.Path(found.path), source)
    if config.access.counters is CountersKind.VALKEY:
        try:
            ValkeyRateLimiter(config.access.url)
        except ValueError as error:
            raise ConfigError(source, "access.url", str(error)) from None
    for key in ("listen", "metrics_listen"):
        if address := getattr(config.gateway, key):
            check_address(address, source, f"gateway.{key}")


def _check_file(path: pathlib.Path, source: str) -> None:
    """Raise :class:`ConfigError` unless a store could be opened or created at a path."""
    if path.exists() and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
        raise ConfigError(source, "store.path", f"{path} is no file that can be written to")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or str(folder).startswith("/proc"):
        raise ConfigError(source, "store.path", f"{path} cannot be made: {folder} is no folder that can be written to")
