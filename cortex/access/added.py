"""The file of keys that administrators made at the gateway, by a command or on the dashboard.

It has the form of ``keys.toml``, in JSON, and like it no key, but the hash of each. Where it exists clients need a key,
even after the last key in it is revoked.
"""

import datetime
import logging
import pathlib
from collections.abc import Callable

import msgspec

from cortex.access.keys import ANONYMOUS, INDEX_BYTES, KeyRing, KeySettings, Time
from cortex.errors import KeyExistsError, KeyNotFoundError, KeysNotWritableError
from cortex.owned_file import OwnedFile
from cortex.settings import ConfigError, warn_if_readable_by_all

log = logging.getLogger("cortex.access")


class AddedKey(KeySettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key that was made at the gateway."""

    created_at: Time


class AddedKeysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole ``added-keys.json``."""

    keys: tuple[AddedKey, ...] = ()


_FILE = OwnedFile(AddedKeysFile, "access.added_keys", KeysNotWritableError)


def read(path: pathlib.Path | None) -> AddedKeysFile | None:
    """Return the content of the file; ``None`` if there is none, so that it requires no key.

    Raises:
        ConfigError: it cannot be read, or a key is wrong.
    """
    if path is None or (found := _FILE.read(path)) is None:
        return None
    warn_if_readable_by_all(path, "the hashes of keys")
    return found


def joined(configured: KeyRing, file: AddedKeysFile, path: pathlib.Path) -> KeyRing:
    """Return the configured keys and the added ones.

    ``keys.toml`` wins: an added key whose name or hash it has is left out, and so refused.

    Raises:
        ConfigError: an added key has the name of another one, or may do nothing.
    """
    principals = dict(configured.principals)
    theirs = {ANONYMOUS, *(principal.name for _, principal in principals.values())}
    added: dict[str, float] = {}
    for index, key in enumerate(file.keys):
        if key.name in added:
            raise ConfigError(str(path), f"keys[{index}].name", f"{key.name!r} is used twice")
        if key.may_do_nothing:
            raise ConfigError(str(path), f"keys[{index}].models", f'{key.name!r} may use no model; ["*"] is all')
        digest = bytes.fromhex(key.sha256)
        if key.name in theirs or digest[:INDEX_BYTES] in principals:
            log.warning("%s: keys[%d]: keys.toml has %r or its hash too, so this one is refused", path, index, key.name)
            continue
        principals[digest[:INDEX_BYTES]] = digest, key.principal()
        added[key.name] = key.created_at.timestamp()
    return KeyRing(principals, configured.anonymous, added)


def add(path: pathlib.Path | None, key: AddedKey) -> None:
    """Write a key to the file.

    Raises:
        KeyExistsError: the file has a key of this name.
        KeysNotWritableError: the file cannot be written, or read before it.
    """

    def added(file: AddedKeysFile | None) -> AddedKeysFile:
        keys = () if file is None else file.keys
        if any(each.name == key.name for each in keys):
            raise KeyExistsError(f"There is a key {key.name!r} already: revoke it, or take another name.", param="name")
        return AddedKeysFile((*keys, key))

    _FILE.change(path, added)


def change(path: pathlib.Path | None, name: str, changed: Callable[[AddedKey], AddedKey]) -> None:
    """Replace a key of the file by what ``changed`` makes of it. Raises as :func:`remove`, and as ``changed``."""

    def replaced(file: AddedKeysFile | None) -> AddedKeysFile:
        keys = _with(file, name)
        return AddedKeysFile(tuple(changed(each) if each.name == name else each for each in keys))

    _FILE.change(path, replaced)


def remove(path: pathlib.Path | None, name: str) -> None:
    """Take a key out of the file.

    Raises:
        KeyNotFoundError: the file has no key of this name.
        KeysNotWritableError: the file cannot be written, or read before it.
    """

    def removed(file: AddedKeysFile | None) -> AddedKeysFile:
        return AddedKeysFile(tuple(each for each in _with(file, name) if each.name != name))

    _FILE.change(path, removed)


def now() -> datetime.datetime:
    """Return the time of a key's making, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _with(file: AddedKeysFile | None, name: str) -> tuple[AddedKey, ...]:
    """Return the keys of a file that has one of this name."""
    keys = () if file is None else file.keys
    if all(each.name != name for each in keys):
        raise KeyNotFoundError(f"There is no key {name!r} among those that were made at the gateway.", param="name")
    return keys
