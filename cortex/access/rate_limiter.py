"""Rate limits and token budgets of principals: the interface, and the counters of one process.

A request *takes* a lease before it is sent and *settles* it when it has ended. Taking counts the request and its
concurrent answers and reserves the tokens it may need, all or nothing; settling releases them and records the tokens
used. So limits are exact under any concurrency, and a budget is overdrawn by no more than the estimates were short.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import msgspec

from cortex.access.keys import Limits
from cortex.supervise import Supervisor

MINUTE_S = 60.0
NUM_BUCKETS = 60
"""Buckets of a token window, which slides by one bucket at a time."""
RELEASE_RETRY_S = 1.0
"""``Retry-After`` where a running request has to end first."""


class Reason(StrEnum):
    """Limit that is reached; the value is the error's code."""

    REQUESTS = "requests_per_minute_exceeded"
    CONCURRENCY = "concurrency_exceeded"
    TOKENS = "token_budget_exceeded"
    BALANCE = "insufficient_quota"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Refusal of a request; ``retry_after_s`` is ``None`` where a wait does not help."""

    reason: Reason
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class Lease:
    """Lease of an admitted request on its principal's limits."""

    name: str
    number: str
    reserved_tokens: int
    window_s: float
    num_sequences: int = 1
    """Concurrent answers."""


class Usage(msgspec.Struct, frozen=True):
    """Use of a principal: requests of the last minute, answers now, tokens in its window, and tokens in all."""

    requests: int = 0
    running: int = 0
    tokens: int = 0
    spent_tokens: int = 0


class RateLimiter(Protocol):
    """The counters of all principals, with a clock of their own."""

    is_local: bool
    """Whether the counters are in this process, so that nothing is awaited."""

    async def take(self, name: str, limits: Limits, reserve_tokens: int, num_sequences: int = 1) -> Lease | Refusal:
        """Return a lease for a request, or its refusal. A request for no answers and no tokens is only counted."""

    async def settle(self, lease: Lease, used_tokens: int) -> None:
        """End a request and record the tokens used."""

    async def usage(self, name: str, limits: Limits) -> Usage:
        """Return the use of a principal."""

    async def open(self, supervisor: Supervisor) -> None:
        """Start, with background tasks under ``supervisor``."""

    async def close(self) -> None:
        """Stop, and close the connections."""


@dataclass(slots=True)
class _Account:
    requests: deque[float] = field(default_factory=deque)
    running: int = 0
    reserved_tokens: int = 0
    buckets: deque[list[float]] = field(default_factory=deque)
    """Buckets of the window, each a pair of its number and the tokens used in it."""
    tokens: int = 0
    """Sum of the buckets."""
    spent_tokens: int = 0


class MemoryRateLimiter:
    """The counters of one process, which a restart resets."""

    is_local = True

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._numbers = itertools.count()

    async def take(self, name: str, limits: Limits, reserve_tokens: int, num_sequences: int = 1) -> Lease | Refusal:
        """Return a lease for a request, or its refusal. Nothing is awaited, so check and count are atomic."""
        now = self._clock()
        account = self._current(name, limits, now)
        if limits.max_concurrent and num_sequences and account.running + num_sequences > limits.max_concurrent:
            return Refusal(Reason.CONCURRENCY, None if num_sequences > limits.max_concurrent else RELEASE_RETRY_S)
        if limits.requests_per_minute and len(account.requests) >= limits.requests_per_minute:
            return Refusal(Reason.REQUESTS, account.requests[0] + MINUTE_S - now)
        reserve_tokens = capped(reserve_tokens, limits)
        needed = account.reserved_tokens + reserve_tokens
        if reserve_tokens and limits.balance_tokens and account.spent_tokens + needed > limits.balance_tokens:
            return Refusal(Reason.BALANCE, RELEASE_RETRY_S if account.reserved_tokens else None)
        if reserve_tokens and limits.tokens_per_window and account.tokens + needed > limits.tokens_per_window:
            if account.reserved_tokens or not account.buckets:
                return Refusal(Reason.TOKENS, RELEASE_RETRY_S)
            width_s = limits.window_s / NUM_BUCKETS
            return Refusal(Reason.TOKENS, (account.buckets[0][0] + NUM_BUCKETS + 1) * width_s - now)
        if limits.requests_per_minute:
            account.requests.append(now)
        account.running += num_sequences
        account.reserved_tokens += reserve_tokens
        return Lease(name, str(next(self._numbers)), reserve_tokens, limits.window_s, num_sequences)

    async def settle(self, lease: Lease, used_tokens: int) -> None:
        """End a request and record the tokens used."""
        account = self._accounts[lease.name]
        account.running -= lease.num_sequences
        account.reserved_tokens -= lease.reserved_tokens
        if not used_tokens:
            return
        account.spent_tokens += used_tokens
        account.tokens += used_tokens
        number = self._clock() // (lease.window_s / NUM_BUCKETS)
        if account.buckets and account.buckets[-1][0] == number:
            account.buckets[-1][1] += used_tokens
        else:
            account.buckets.append([number, used_tokens])

    async def usage(self, name: str, limits: Limits) -> Usage:
        """Return the use of a principal."""
        account = self._current(name, limits, self._clock())
        return Usage(len(account.requests), account.running, account.tokens, account.spent_tokens)

    async def open(self, supervisor: Supervisor) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    def _current(self, name: str, limits: Limits, now: float) -> _Account:
        account = self._accounts.setdefault(name, _Account())
        while account.requests and account.requests[0] <= now - MINUTE_S:
            account.requests.popleft()
        oldest = now // (limits.window_s / NUM_BUCKETS) - NUM_BUCKETS
        while account.buckets and account.buckets[0][0] < oldest:
            account.tokens -= int(account.buckets.popleft()[1])
        return account


def capped(reserve_tokens: int, limits: Limits) -> int:
    """Return a reservation capped at the budget: a request larger than that is admitted while nothing is used."""
    for budget in (limits.tokens_per_window, limits.balance_tokens):
        if budget:
            reserve_tokens = min(reserve_tokens, budget)
    return reserve_tokens
