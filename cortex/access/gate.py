"""The door of the gateway: who comes, whether they may, and what is booked when they have been served.

It knows keys and the ledger, not models or nodes. A principal without limits passes without a count.
"""

import asyncio
import logging
import re
from collections.abc import Callable

from cortex.access.keys import KeyRing, Principal
from cortex.access.ledger import Lease, Ledger, Reason, Refusal
from cortex.wire.errors import ApiError, ForbiddenError, OverloadedError

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

    def __init__(self, keys: KeyRing, ledger: Ledger, reserve_tokens: int) -> None:
        self.keys = keys
        self.ledger = ledger
        self.reserve_tokens = reserve_tokens

    def identify(self, header: Headers) -> Principal:
        """Return who asks, by the ``authorization`` or ``x-api-key`` header.

        Raises:
            UnauthorizedError: nobody who may.
        """
        return self.keys.identify(_key(header))

    def check_admin(self, header: Headers, is_from_here: bool) -> None:
        """Let an operator in: by an administrator's key, or from this host where there is no such key.

        Raises:
            ApiError: this is none.
        """
        if self.keys.has_admin:
            if not self.identify(header).is_admin:
                raise ForbiddenError("This key is not an administrator's.")
        elif not is_from_here:
            raise ForbiddenError("Without an administrator's key in keys.toml, /admin is for this host only.")

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
