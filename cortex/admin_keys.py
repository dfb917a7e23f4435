"""The operators' endpoints of the clients' keys: a list with their use, a new key, its change, its end.

A new key is in the response to its making and nowhere else: the gateways' own file (:mod:`cortex.access.added`) has its
hash. The operator's ``keys.toml`` is never written. Each change is logged with its author.
"""

import asyncio
import logging
import pathlib
import urllib.parse
from collections.abc import Callable

import msgspec

from cortex.access import added, keys
from cortex.access.added import AddedKey
from cortex.access.authenticator import Authenticator, principal_of
from cortex.access.keys import KeyName, KeyPermissions, Limits
from cortex.access.rate_limiter import Usage
from cortex.config import Config
from cortex.dialects import fields
from cortex.errors import KeyExistsError, KeyNotAddedError, KeysNotWritableError
from cortex.http_io import Exchange
from cortex.settings import ConfigError
from cortex.store.interface import StoreError
from cortex.usage_recorder import UsageRecorder
from cortex.wire.errors import InvalidRequestError

log = logging.getLogger("cortex.access")

MAX_BODY_BYTES = 1 << 16
PATH = "/admin/keys/"


class KeyReport(Limits, frozen=True, kw_only=True):
    """A key, its permissions and its use of its limits. A limit of 0 is none, as is a time of 0.

    ``added`` is whether it was made here, and so can be changed here; times are Unix times.
    """

    name: str
    models: tuple[str, ...]
    admin: bool
    priority: int
    used: Usage
    expires_s: float = 0.0
    last_used_s: float = 0.0
    created_s: float = 0.0
    added: bool = False


class KeysReport(msgspec.Struct, frozen=True):
    """``GET /admin/keys``. ``required`` is whether clients need a key."""

    keys: tuple[KeyReport, ...]
    required: bool = True


class NewKey(KeyPermissions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /admin/keys``: without ``models``, the key may use all."""

    name: KeyName
    models: tuple[str, ...] = ("*",)


class MadeKey(msgspec.Struct, frozen=True):
    """Response of ``POST /admin/keys``, the only one with the key itself."""

    name: str
    key: str


class RevokedKey(msgspec.Struct, frozen=True):
    """Response of ``DELETE /admin/keys/{name}``."""

    name: str


class KeyAdmin:
    """The endpoints of keys, after authentication."""

    def __init__(
        self,
        authenticator: Authenticator,
        usage: UsageRecorder,
        settings: Callable[[], Config],
        reload: Callable[[], None],
        added_keys: Callable[[], pathlib.Path | None],
    ) -> None:
        """``added_keys`` returns the path of the file of added keys."""
        self._authenticator = authenticator
        self._usage = usage
        self._settings = settings
        self._reload = reload
        self._added_keys = added_keys

    async def list(self, exchange: Exchange) -> None:
        """``GET /admin/keys``: every key by name, without the key itself."""
        ring = self._authenticator.keys
        try:
            last_used_s = await self._usage.last_used()
        except StoreError:  # logged, and no reason to hide the keys
            last_used_s = {}
        rows = []
        for principal in ring.by_name():
            limits = principal.limits
            used = Usage() if limits.are_none else await self._authenticator.rate_limiter.usage(principal.name, limits)
            rows.append(
                KeyReport(
                    name=principal.name,
                    models=principal.models,
                    admin=principal.is_admin,
                    priority=principal.priority,
                    **msgspec.structs.asdict(limits),
                    used=used,
                    expires_s=principal.expires_s,
                    last_used_s=last_used_s.get(principal.name, 0.0),
                    created_s=ring.added.get(principal.name, 0.0),
                    added=principal.name in ring.added,
                )
            )
        await exchange.reply(200, msgspec.json.encode(KeysReport(tuple(rows), not ring.is_open)))

    async def add(self, exchange: Exchange) -> None:
        """``POST /admin/keys``: makes a key. From the first key on, clients need one."""
        asked = fields.decode(await exchange.read_body(MAX_BODY_BYTES), NewKey)
        try:
            keys.check_name(asked.name)
        except ValueError as error:
            raise InvalidRequestError(f"{error}.", param="name") from None
        self._check(asked)
        self._reread()
        if any(principal.name == asked.name for principal in self._authenticator.keys.by_name()):
            raise KeyExistsError(
                f"There is a key {asked.name!r} already: revoke it, or take another name.", param="name"
            )
        key, sha256 = keys.new_key()
        entry = AddedKey(sha256=sha256, created_at=added.now(), **msgspec.structs.asdict(asked))
        await self._change("added", exchange, asked.name, lambda path: added.add(path, entry))
        # No copy of it stays with the browser or a proxy.
        await exchange.reply(
            200, msgspec.json.encode(MadeKey(asked.name, key)), headers=((b"cache-control", b"no-store"),)
        )

    async def change(self, exchange: Exchange) -> None:
        """``PATCH /admin/keys/{name}``: changes what the body has; ``null`` is the default."""
        name = self._added_name(exchange)
        given = fields.decode(await exchange.read_body(MAX_BODY_BYTES), dict[str, object])
        permissions = KeyPermissions()

        def merged(key: AddedKey) -> AddedKey:
            nonlocal permissions
            permissions = msgspec.convert(key, KeyPermissions, from_attributes=True)
            members = {**msgspec.structs.asdict(permissions), **given}
            data = msgspec.json.encode({name: value for name, value in members.items() if value is not None})
            permissions = fields.decode(data, KeyPermissions)
            self._check(permissions)
            return msgspec.structs.replace(key, **msgspec.structs.asdict(permissions))

        await self._change("changed", exchange, name, lambda path: added.change(path, name, merged))
        await exchange.reply(200, msgspec.json.encode(permissions))

    async def revoke(self, exchange: Exchange) -> None:
        """``DELETE /admin/keys/{name}``: refuses the key from now on. Answers that have begun are finished."""
        name = self._added_name(exchange)
        await self._change("revoked", exchange, name, lambda path: added.remove(path, name))
        await exchange.reply(200, msgspec.json.encode(RevokedKey(name)))

    def _check(self, permissions: KeyPermissions) -> None:
        """Raise :class:`InvalidRequestError` for permissions that no key can have here."""
        if permissions.may_do_nothing:
            raise InvalidRequestError('The key may use no model; ["*"] is all of them.', param="models")
        limits = msgspec.convert(permissions, Limits, from_attributes=True)
        if not limits.are_none and not self._settings().counts_limits:
            raise InvalidRequestError(
                "This gateway has several workers, which can only count limits together in Valkey: set "
                'access.counters = "valkey", or make a key without limits.'
            )

    def _added_name(self, exchange: Exchange) -> str:
        """Return the name in the path, which must be that of an added key."""
        name = urllib.parse.unquote(exchange.path.removeprefix(PATH))
        ring = self._authenticator.keys
        if name not in ring.added and any(principal.name == name for principal in ring.by_name()):
            place = "[access] of cortex.toml" if name == keys.ANONYMOUS else self._settings().access.keys
            raise KeyNotAddedError(f"The key {name!r} is in {place}: change it there.", param="name")
        return name

    def _reread(self) -> None:
        """Read the files, so that no key is made that could not be put in force."""
        try:
            self._reload()
        except ConfigError as error:
            raise KeysNotWritableError(f"The configuration cannot be read, so no key is made: {error}") from None

    async def _change(
        self, act: str, exchange: Exchange, name: str, change: Callable[[pathlib.Path | None], None]
    ) -> None:
        """Change the file of added keys, log who did, and put it in force."""
        await asyncio.to_thread(change, self._added_keys())
        fields = {"key": name, "by": principal_of(exchange.caller).name, "id": exchange.request_id}
        log.info("key %s", act, extra={"fields": fields})
        try:
            self._reload()
        except ConfigError as error:
            raise KeysNotWritableError(f"The key is {act} in the file, but this is not in force: {error}") from None
