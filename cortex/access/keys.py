"""Keys of clients: the hash of each, with its permissions and limits, from ``keys.toml``.

A key is 32 random bytes, so one round of SHA-256 protects it as well as a slow hash would, and the time of a lookup by
hash reveals nothing of the key. Files and logs hold no key, but its name.
"""

import datetime
import hashlib
import hmac
import pathlib
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from cortex.settings import ConfigError, convert, read_toml, warn_if_readable_by_all
from cortex.wire.errors import ForbiddenError, UnauthorizedError, UnavailableError

PREFIX = "sk-cortex-"
ANONYMOUS, LOCAL_NAME = "anonymous", "local"
RESERVED = {ANONYMOUS: "those without a key", LOCAL_NAME: "the administrator of the gateway's host"}
"""Names that no new key gets, each with its bearer."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,62}\Z"
NAME_RULE = "a name is 1 to 63 of A-Z a-z 0-9 . _ @ -, and begins with a letter or a digit"

Count = Annotated[int, msgspec.Meta(ge=0)]
KeyName = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Time = Annotated[datetime.datetime, msgspec.Meta(tz=True)]
"""A time with its offset from UTC."""


class Limits(msgspec.Struct, frozen=True):
    """Limits of one principal. 0 is no limit."""

    requests_per_minute: Count = 0
    max_concurrent: Count = 0
    tokens_per_window: Count = 0
    window_s: Annotated[float, msgspec.Meta(ge=1)] = 24 * 3600.0
    """Length of the sliding window of ``tokens_per_window``."""
    balance_tokens: Count = 0
    """Tokens that it may use in all."""

    @property
    def are_none(self) -> bool:
        """Whether there is no limit, so that nothing is counted."""
        return not (self.requests_per_minute or self.max_concurrent or self.tokens_per_window or self.balance_tokens)


NO_LIMITS = Limits()


class KeyPermissions(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Permissions and limits of a key."""

    models: tuple[str, ...] = ()
    """Ids of the models it may use; an id that ends with ``*`` is a prefix."""
    admin: bool = False
    priority: int = 0
    """Priority of its requests. Below 0: they are served from spare capacity only."""
    strict: bool | None = None
    """Whether a request with an unknown member is refused; left out, ``access.strict`` decides."""
    expires_at: Time | None = None
    """Time from which the key is refused."""

    @property
    def may_do_nothing(self) -> bool:
        """Whether there is nothing that the key may do."""
        return not self.models and not self.admin


class KeySettings(KeyPermissions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of ``[[keys]]``."""

    name: KeyName
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]

    def principal(self) -> "Principal":
        """Return the principal whose key this is."""
        expires_s = self.expires_at.timestamp() if self.expires_at else 0.0
        limits = msgspec.convert(self, Limits, from_attributes=True)
        return Principal(self.name, self.models, self.admin, self.priority, limits, self.strict, expires_s)


class KeysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole ``keys.toml``."""

    keys: tuple[KeySettings, ...] = ()


@dataclass(frozen=True, slots=True)
class Principal:
    """The identity on whose behalf a request is made, with its permissions. It holds no secret."""

    name: str = ""
    models: tuple[str, ...] = ("*",)
    is_admin: bool = False
    priority: int = 0
    limits: Limits = NO_LIMITS
    is_strict: bool | None = None
    """Whether its requests with unknown members are refused; ``None`` leaves it to the gateway."""
    expires_s: float = 0.0
    """Unix time from which its key is refused; 0: never."""

    def may_use(self, model: str) -> bool:
        """Return whether it may use a model, by its id."""
        return "*" in self.models or any(
            model.startswith(allowed[:-1]) if allowed.endswith("*") else model == allowed for allowed in self.models
        )

    @property
    def uses_spare_capacity(self) -> bool:
        """Whether its requests are served from spare capacity only."""
        return self.priority < 0

    @property
    def has_expired(self) -> bool:
        """Whether its key is refused now because of its age."""
        return bool(self.expires_s) and time.time() >= self.expires_s


EVERYBODY = Principal()
"""Principal of every request where no keys are configured."""

INDEX_BYTES = 8
NO_KEY = (bytes(32), EVERYBODY)
"""Entry for an unknown key, with a hash that no key has."""


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys, and the principal of requests without one; ``None``: these are refused.

    ``principals`` are indexed by the first bytes of a key's hash; the whole hash is then compared in constant time.
    ``added`` has the keys that administrators made at the gateway (:mod:`cortex.access.added`), and when: Unix times by
    name.
    """

    principals: Mapping[bytes, tuple[bytes, Principal]] = field(default_factory=dict)
    anonymous: Principal | None = EVERYBODY
    added: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed: there is no file of keys."""
        return self.anonymous is EVERYBODY

    def identify(self, key: bytes | None) -> Principal:
        """Return the principal of ``key``.

        Raises:
            UnauthorizedError: the key is required and missing, or unknown. The message does not repeat it.
            KeyExpiredError: the key has expired.
        """
        if key is None or (not self.principals and self.anonymous is not None):
            if self.anonymous is None:
                raise UnauthorizedError("No API key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.")
            return self.anonymous
        digest = hashlib.sha256(key).digest()
        known, principal = self.principals.get(digest[:INDEX_BYTES], NO_KEY)
        if not hmac.compare_digest(known, digest):
            raise UnauthorizedError("Incorrect API key provided.")
        if principal.expires_s and principal.has_expired:
            raise KeyExpiredError(f"The API key '{principal.name}' has expired.")
        return principal

    def by_name(self) -> Sequence[Principal]:
        """Return all principals, by name."""
        principals = [principal for _, principal in self.principals.values()]
        if self.anonymous is not None and self.anonymous is not EVERYBODY:
            principals.append(self.anonymous)
        return sorted(principals, key=lambda principal: principal.name)


class KeyExpiredError(UnauthorizedError):
    """The key was valid until a time that has passed."""

    code = "api_key_expired"


class AccessMisconfiguredError(UnavailableError):
    """The access settings were changed and cannot be read, so every request is refused until they can."""

    code = "access_misconfigured"


@dataclass(frozen=True, slots=True)
class _Closed(KeyRing):
    """The key ring in place of keys that cannot be read."""

    anonymous: Principal | None = None

    def identify(self, key: bytes | None) -> Principal:
        """Raise :class:`AccessMisconfiguredError`."""
        message = "The gateway's keys cannot be read, so it refuses every request until its configuration is corrected."
        raise AccessMisconfiguredError(message, retry_after_s=10)


CLOSED: KeyRing = _Closed()


def check_model(principal: Principal, model: str) -> None:
    """Raise :class:`ForbiddenError` if ``principal`` may not use ``model``."""
    if not principal.may_use(model):
        raise ForbiddenError(f"This key may not use the model '{model}'.", param="model")


def load(path: pathlib.Path, anonymous: Principal | None = None) -> KeyRing:
    """Return the keys in a file.

    Raises:
        ConfigError: it cannot be read, an entry is invalid, a name or hash is there twice, or a key has no models.
    """
    source = str(path)
    principals: dict[bytes, tuple[bytes, Principal]] = {}
    names = {ANONYMOUS}
    for index, key in enumerate(convert(read_toml(path), KeysFile, source).keys):
        if key.name in names:
            raise ConfigError(source, f"keys[{index}].name", f"{key.name!r} is taken")
        names.add(key.name)
        digest = bytes.fromhex(key.sha256)
        if digest[:INDEX_BYTES] in principals:
            other = principals[digest[:INDEX_BYTES]][1].name
            raise ConfigError(source, f"keys[{index}].sha256", f"is also {other!r}'s")
        if key.may_do_nothing:
            raise ConfigError(source, f"keys[{index}].models", f'{key.name!r} may use no model; ["*"] is all of them')
        principals[digest[:INDEX_BYTES]] = digest, key.principal()
    warn_if_readable_by_all(path, "the hashes of keys")
    return KeyRing(principals, anonymous)


def check_name(name: str) -> None:
    """Raise :class:`ValueError`, with the rule, for a name that no key can have."""
    if not re.match(NAME_PATTERN, name):
        raise ValueError(f"{name!r} cannot be a key's name: {NAME_RULE}")
    if name in RESERVED:
        raise ValueError(f"{name!r} is taken: it stands for {RESERVED[name]}")


def new_key() -> tuple[str, str]:
    """Return a new key, and its hash for the file."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, hashlib.sha256(key.encode()).hexdigest()
