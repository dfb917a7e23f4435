"""Authentication of requests, and admission within each principal's limits.

It has keys and a rate limiter, no models or nodes. A principal without limits passes without a count.
"""

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from cortex.access.keys import LOCAL_NAME, KeyRing, Principal
from cortex.access.rate_limiter import Lease, RateLimiter, Reason, Refusal
from cortex.wire.errors import ApiError, ForbiddenError, OverloadedError, UnauthorizedError

log = logging.getLogger("cortex.access")

Headers = Callable[[bytes], bytes | None]
"""Returns a request's header by its lower-case name."""

CHARACTERS_PER_TOKEN = 4
"""Characters of a body per token, for an estimate of a prompt that is not tokenised yet."""

_NONE = msgspec.Raw(b"")


class _Wanted(msgspec.Struct):
    """The top-level fields of a body that bound its answers. The node validates their values."""

    max_tokens: msgspec.Raw = _NONE
    max_completion_tokens: msgspec.Raw = _NONE
    max_output_tokens: msgspec.Raw = _NONE
    n_predict: msgspec.Raw = _NONE
    n: msgspec.Raw = _NONE
    best_of: msgspec.Raw = _NONE
    prompt: msgspec.Raw = _NONE


_WANTED = msgspec.json.Decoder(_Wanted)
_NUMBER = re.compile(rb"\s*(\d{1,10})(?:\.0*)?\s*")  # no dialect takes more than 2**31
_MAX_ANSWERS = 100_000  # more than any node makes for a request, and few enough for a counter of 64 bits
_SEVERAL = re.compile(rb"\s*\[\s*[\"\[]")


@dataclass(frozen=True, slots=True)
class Need:
    """Upper bound of a request's use: tokens of its prompt, of all answers together, and concurrent answers."""

    prompt_tokens: int
    output_tokens: int
    num_sequences: int

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answers together."""
        return self.prompt_tokens + self.output_tokens


NO_NEED = Need(0, 0, 0)
"""Need of a request that is sent to no node: it counts as a request."""


class LimitReachedError(OverloadedError):
    """A principal has reached one of its limits, which ``code`` names."""

    def __init__(self, reason: Reason, message: str, retry_after_s: float | None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = reason.value


class Reservation:
    """Tokens and answers that an admitted request holds of its principal's limits. Settle it in every case, once."""

    def __init__(self, rate_limiter: RateLimiter | None, lease: Lease | None, need: Need = NO_NEED) -> None:
        self.need = need
        self._rate_limiter = rate_limiter
        self._lease = lease

    @property
    def reserved_tokens(self) -> int:
        """Tokens taken of a budget, which may be less than the need."""
        return self.need.tokens if self._lease is None else min(self.need.tokens, self._lease.reserved_tokens)

    def move(self) -> "Reservation":
        """Return a reservation that holds this one's lease; settling this one then does nothing."""
        moved, self._lease = Reservation(self._rate_limiter, self._lease, self.need), None
        return moved

    async def settle(self, used_tokens: int) -> None:
        """Record the tokens used. Completes even if the calling task is being cancelled."""
        rate_limiter, lease, self._lease = self._rate_limiter, self._lease, None
        if rate_limiter is None or lease is None:
            return
        if rate_limiter.is_local:
            await _settle(rate_limiter, lease, used_tokens)
        else:
            await asyncio.shield(asyncio.ensure_future(_settle(rate_limiter, lease, used_tokens)))


LOCAL = Principal(LOCAL_NAME, is_admin=True)
"""Principal of a caller with the administrator's token of this host."""

UNCOUNTED = Reservation(None, None)
"""Reservation of a principal without limits."""


async def _settle(rate_limiter: RateLimiter, lease: Lease, used_tokens: int) -> None:
    try:
        await rate_limiter.settle(lease, used_tokens)
    except ApiError as error:
        log.error("key=%s tokens=%d not recorded: %s", lease.name, used_tokens, error.message)


def principal_of(caller: object) -> Principal:
    """Return the principal of an authenticated exchange, from its ``caller``."""
    assert isinstance(caller, Principal)  # no handler under /v1 is called without one
    return caller


class Authenticator:
    """Authenticates requests, and admits them within their principal's limits."""

    def __init__(self, keys: KeyRing, rate_limiter: RateLimiter, reserve_tokens: int, local_token: str = "") -> None:
        """``local_token`` is the administrator's token of this host; empty: there is none."""
        self.keys = keys
        self._local = hashlib.sha256(local_token.encode()).digest() if local_token else b""
        self.rate_limiter = rate_limiter
        self.reserve_tokens = reserve_tokens

    def identify(self, header: Headers) -> Principal:
        """Return the principal of a request, by its ``authorization`` or ``x-api-key`` header.

        Raises:
            UnauthorizedError: the key is missing or unknown.
            AccessMisconfiguredError: the keys cannot be read.
        """
        key = _key(header)
        return LOCAL if not self.keys.is_open and self._is_local(key) else self.keys.identify(key)

    def is_proved(self, principal: Principal) -> bool:
        """Return whether a principal presented a key."""
        return principal is not self.keys.anonymous

    def check_admin(self, header: Headers) -> Principal:
        """Return the principal of a request with an administrator's key, or the administrator's token of this host.

        Raises:
            ApiError: it has neither.
        """
        key = _key(header)
        if self._is_local(key):
            return LOCAL
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
        return principal

    def _is_local(self, key: bytes | None) -> bool:
        return bool(self._local) and key is not None and hmac.compare_digest(hashlib.sha256(key).digest(), self._local)

    async def admit(
        self, principal: Principal, size_bytes: int, bounds: bytes, *, generates: bool = True
    ) -> Reservation:
        """Reserve the need of a request with a body of that size; with ``generates`` false, the tokens of its prompt
        only. For ``bounds`` see :func:`need_of`.

        Raises:
            LimitReachedError: the principal's limits do not leave so much.
            ApiError: the rate limiter does not answer.
        """
        limits = principal.limits
        if limits.are_none:
            return UNCOUNTED
        return await self._take(principal, need_of(size_bytes, bounds, self.reserve_tokens, generates=generates))

    async def count(self, principal: Principal) -> None:
        """Count a request that is sent to no node. Raises as :meth:`admit` does."""
        if principal.limits.requests_per_minute:
            await self._take(principal, NO_NEED)

    async def _take(self, principal: Principal, need: Need) -> Reservation:
        outcome = await self.rate_limiter.take(principal.name, principal.limits, need.tokens, need.num_sequences)
        if isinstance(outcome, Refusal):
            raise LimitReachedError(outcome.reason, _explain(principal, outcome.reason), outcome.retry_after_s)
        return Reservation(self.rate_limiter, outcome, need)


def need_of(size_bytes: int, bounds: bytes, otherwise: int, *, generates: bool = True) -> Need:
    """Return the need of a request with a body of that size.

    ``bounds`` is an object of the members that bound its answers, as :attr:`cortex._fast.peek.Peek.bounds` has them.
    ``otherwise`` is the number of tokens of an answer where they set no limit.
    """
    prompt = size_bytes // CHARACTERS_PER_TOKEN
    if not generates:
        return Need(prompt, 0, 1)
    try:
        wanted = _WANTED.decode(bounds)
    except (msgspec.DecodeError, RecursionError):
        return Need(prompt, otherwise, 1)  # for the node to refuse
    limits = (wanted.max_tokens, wanted.max_completion_tokens, wanted.max_output_tokens, wanted.n_predict)
    numbers = [number for field in limits if (number := _number(field)) is not None]
    num_answers = max(1, _number(wanted.n) or 1, _number(wanted.best_of) or 1) * _num_prompts(bytes(wanted.prompt))
    num_answers = min(num_answers, _MAX_ANSWERS)
    return Need(prompt, (max(numbers) if numbers else otherwise) * num_answers, num_answers)


def _number(field: msgspec.Raw) -> int | None:
    found = _NUMBER.fullmatch(bytes(field))
    return int(found[1]) if found else None


def _num_prompts(prompt: bytes) -> int:
    """Return the number of prompts of a text completion: a list is of prompts, or of the tokens of one prompt."""
    if not _SEVERAL.match(prompt):
        return 1
    try:
        return max(1, len(msgspec.json.decode(prompt, type=list[msgspec.Raw])))
    except msgspec.DecodeError:
        return 1


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
            return f"'{principal.name}' may have {limits.max_concurrent} answers at a time; each of 'n' is one."
        case Reason.TOKENS:
            return f"'{principal.name}' may use {limits.tokens_per_window} tokens in {limits.window_s:g} s."
        case Reason.BALANCE:
            return f"'{principal.name}' has used up its {limits.balance_tokens} tokens."
