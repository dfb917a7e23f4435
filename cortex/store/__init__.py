"""Storage of responses, items and conversations, in SQLite or Valkey: records under ids, whatever they mean."""

import logging
import os
import pathlib
from collections.abc import Mapping
from typing import assert_never

from cortex.config import StoreKind, StoreSettings
from cortex.settings import ConfigError, state_folder
from cortex.store.interface import RecordStore, StoreError

log = logging.getLogger("cortex.store")


def make(settings: StoreSettings, environment: Mapping[str, str] = os.environ) -> RecordStore | None:
    """Return the configured store, not yet open, or ``None``.

    Raises:
        ConfigError: it cannot be made.
    """
    match settings.kind:
        case StoreKind.NONE:
            return None
        case StoreKind.SQLITE:
            from cortex.store.sqlite import SqliteStore

            path = settings.path or str(_state_folder(environment) / "responses.db")
            per_key = settings.max_bytes_per_key or settings.max_bytes // 4
            return SqliteStore(path, ttl_s=settings.ttl_s, max_bytes=settings.max_bytes, max_bytes_per_owner=per_key)
        case StoreKind.VALKEY:
            from cortex.store.valkey import ValkeyStore

            if settings.max_bytes_per_key or settings.max_bytes != StoreSettings().max_bytes:
                log.warning(
                    "max_bytes and max_bytes_per_key of [store] do not hold for Valkey: its own maxmemory bounds it"
                )
            try:
                return ValkeyStore(settings.url, ttl_s=settings.ttl_s)
            except StoreError as error:
                raise ConfigError("cortex.toml", "store.url", str(error)) from None
        case _:
            assert_never(settings.kind)


def _state_folder(environment: Mapping[str, str]) -> pathlib.Path:
    folder = state_folder(environment)
    if folder is None:
        raise ConfigError(
            "cortex.toml", "store.path", "is empty, and neither $STATE_DIRECTORY nor $HOME says where to keep it"
        )
    return folder
