"""The door of the gateway: who comes, whether they may, and what is booked when they have been served.

It knows keys and the ledger, not models or nodes. A principal without limits passes without a count.
"""

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Callable

from cortex.access.keys import EVERYBODY, KeyRing, Principal
from cortex.access.ledger import Lease, Ledger, Reason, Refusal
from cortex.wire.errors import ApiError, ForbiddenError, OverloadedError, UnauthorizedError

log = logging.getLogger("cortex.access")

Headers = Callable[[bytes], bytes | None]
"""Returns a request's header by its lower-case name."""

CHARACTERS_PER_TOKEN = 4
"""Of a body, for an estimate before anybody has tokenised it."""

# In a JSON string every quote is escaped, so this is found in structure only.
_MAX_TOKENS = re.compile(rb'"max_(?:completion_|output_)?tokens"\s*:\s*(\d{1,9})\b')


class LimitReachedError(OverloadedError):
    """A principal has used what it may. ``code`` says which limit it is."""

    def __init__(self, reason: Reason, message: str, retry_after_s: float | None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = reason.value


class Permit:
    """A request that was let in. Settle it in every case, once."""

    def __init__(self, ledger: Ledger | None, lease: Lease | None) -> None:
        self._ledger = ledger
        self._lease = lease

    def move(self) -> "Permit":
        """Return what this one holds; to settle this one does nothing any more."""
        moved, self._lease = Permit(self._ledger, self._lease), None
        return moved

    async def settle(self, used_tokens: int) -> None:
        """Book what was used. Goes through even if the task that calls it is being cancelled."""
        ledger, lease, self._lease = self._ledger, self._lease, None
        if ledger is not None and lease is not None:
            await asyncio.shield(asyncio.ensure_future(_settle(ledger, lease, used_tokens)))


LOCAL = Principal("local", is_admin=True)
"""Whoever can read the token of this host."""

FREE = Permit(None, None)
"""Of those whose use is not counted."""


async def _settle(ledger: Ledger, lease: Lease, used_tokens: int) -> None:
    try:
        await ledger.settle(lease, used_tokens)
    except ApiError as error:
        log.error("key=%s tokens=%d not booked: %s", lease.name, used_tokens, error.message)


def principal_of(caller: object) -> Principal:
    """Return who was let in, as the exchange has it."""
    assert isinstance(caller, Principal)  # nothing under /v1 is reached without
    return caller


class Gate:
    """Lets requests in."""

    def __init__(self, keys: KeyRing, ledger: Ledger, reserve_tokens: int, local_token: str = "") -> None:
        """``local_token`` is an administrator's, and its file's readers'."""
        self.keys = keys
        self._local = hashlib.sha256(local_token.encode()).digest() if local_token else b""
        self.ledger = ledger
        self.reserve_tokens = reserve_tokens

    def identify(self, header: Headers) -> Principal:
        """Return who asks, by the ``authorization`` or ``x-api-key`` header.

        Raises:
            UnauthorizedError: nobody who may.
            AccessMisconfiguredError: the keys cannot be read.
        """
        key = _key(header)
        return LOCAL if self._is_local(key) and self.keys.anonymous is not EVERYBODY else self.keys.identify(key)

    def is_proved(self, principal: Principal) -> bool:
        """Return whether a principal is one only for whoever presents a key."""
        return principal is not self.keys.anonymous

    def check_admin(self, header: Headers) -> None:
        """Let an operator in: by an administrator's key, or the token that lies on this host.

        Raises:
            ApiError: this is none.
        """
        key = _key(header)
        if self._is_local(key):
            return
        if key is None:
            raise UnauthorizedError(
                "/admin needs an administrator's key. On the gateway's own host 'cortex dashboard' prints a link with "
                "one, and cortex's commands find it by themselves."
            )
        principal = self.keys.identify(key) if self.keys.principals else None
        if principal is None:
            raise UnauthorizedError("This is not the token of this gateway: it has another since its last start.")
        if not principal.is_admin:
            raise ForbiddenError("This key is not an administrator's.")

    def _is_local(self, key: bytes | None) -> bool:
        return bool(self._local) and key is not None and hmac.compare_digest(hashlib.sha256(key).digest(), self._local)

    async def admit(self, principal: Principal, body: bytes) -> Permit:
        """Take what a request may need.

        Raises:
            LimitReachedError: there is not so much left.
            ApiError: the ledger does not answer.
        """
        limits = principal.limits
        if limits.are_none:
            return FREE
        reserve = prompt_tokens(body) + output_tokens(body, self.reserve_tokens)
        outcome = await self.ledger.take(principal.name, limits, reserve)
        if isinstance(outcome, Refusal):
            raise LimitReachedError(outcome.reason, _explain(principal, outcome.reason), outcome.retry_after_s)
        return Permit(self.ledger, outcome)


def prompt_tokens(body: bytes) -> int:
    """Estimate the tokens of a request's prompt."""
    return len(body) // CHARACTERS_PER_TOKEN


def output_tokens(body: bytes, otherwise: int) -> int:
    """Return how many tokens a request allows itself, or ``otherwise`` if it does not say."""
    found = _MAX_TOKENS.search(body)
    return int(found[1]) if found else otherwise


def _key(header: Headers) -> bytes | None:
    authorization = header(b"authorization")
    if authorization is not None and authorization[:7].lower() == b"bearer ":
        return authorization[7:].strip()
    return header(b"x-api-key")


def _explain(principal: Principal, reason: Reason) -> str:
    limits = principal.limits
    match reason:
        case Reason.REQUESTS:
            return f"'{principal.name}' may send {limits.requests_per_minute} requests a minute."
        case Reason.CONCURRENCY:
            return f"'{principal.name}' may have {limits.max_concurrent} requests at a time."
        case Reason.TOKENS:
            return f"'{principal.name}' may use {limits.tokens_per_window} tokens in {limits.window_s:g} s."
        case Reason.BALANCE:
            return f"'{principal.name}' has used up its {limits.balance_tokens} tokens."
