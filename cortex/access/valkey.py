"""The rate limiter of several gateways, in Valkey or Redis: each operation is one script, and so atomic.

Times are the server's, so the gateways' clocks do not matter. A lease that its gateway does not renew expires, so the
leases of a killed gateway are released after ``LEASE_S``.
"""

import asyncio
import contextlib
import secrets

from cortex.access.keys import Limits
from cortex.access.rate_limiter import MINUTE_S, NUM_BUCKETS, RELEASE_RETRY_S, Lease, Reason, Refusal, Usage, capped
from cortex.supervise import Supervisor
from cortex.wire.errors import UnavailableError

PREFIX = "cortex:access:"
TIMEOUT_S = 3.0
LEASE_S = 30.0

# KEYS: requests (sorted set), leases (sorted set by end), reserved (hash), buckets (hash), spent (number).
_BEGIN = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function release(id) redis.call('ZREM', KEYS[2], id); redis.call('HDEL', KEYS[3], id) end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do release(id) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[1])
local width = ARGV[2] / ARGV[3]
local current = math.floor(now / width)
local tokens, oldest = 0, current
local buckets = redis.call('HGETALL', KEYS[4])
for i = 1, #buckets, 2 do
  local number = tonumber(buckets[i])
  if number < current - ARGV[3] then
    redis.call('HDEL', KEYS[4], buckets[i])
  else
    tokens = tokens + buckets[i + 1]
    oldest = math.min(oldest, number)
  end
end
local spent = tonumber(redis.call('GET', KEYS[5]) or 0)
"""
_TAKE = (
    _BEGIN
    + """
local id, reserve, requests, concurrent = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local budget, balance, lease = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local sequences = tonumber(ARGV[11])
if concurrent > 0 and sequences > 0 and redis.call('ZCARD', KEYS[2]) + sequences > concurrent then
  return {'concurrent', sequences > concurrent and -1 or 0}
end
if requests > 0 and redis.call('ZCARD', KEYS[1]) >= requests then
  local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
  return {'requests', math.floor(first[2] + ARGV[1] - now)}
end
local reserved = 0
for _, amount in ipairs(redis.call('HVALS', KEYS[3])) do reserved = reserved + amount end
if reserve > 0 and balance > 0 and spent + reserved + reserve > balance then
  return {'balance', reserved > 0 and 0 or -1}
end
if reserve > 0 and budget > 0 and tokens + reserved + reserve > budget then
  if reserved > 0 then return {'tokens', 0} end
  return {'tokens', math.floor((oldest + ARGV[3] + 1) * width - now)}
end
if requests > 0 then
  redis.call('ZADD', KEYS[1], now, id)
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
if sequences == 0 then return {'ok', 0} end
redis.call('ZADD', KEYS[2], now + lease, id)
for number = 2, sequences do redis.call('ZADD', KEYS[2], now + lease, id .. ':' .. number) end
redis.call('HSET', KEYS[3], id, reserve)
redis.call('PEXPIRE', KEYS[2], 2 * lease)
redis.call('PEXPIRE', KEYS[3], 2 * lease)
return {'ok', 0}
"""
)
_SETTLE = (
    _BEGIN
    + """
release(ARGV[4])
for number = 2, tonumber(ARGV[6]) do release(ARGV[4] .. ':' .. number) end
if tonumber(ARGV[5]) > 0 then
  redis.call('HINCRBY', KEYS[4], current, ARGV[5])
  redis.call('PEXPIRE', KEYS[4], math.ceil(2 * ARGV[2]))
  redis.call('INCRBY', KEYS[5], ARGV[5])
end
"""
)
_USAGE = _BEGIN + "return {redis.call('ZCARD', KEYS[1]), redis.call('ZCARD', KEYS[2]), tokens, spent}"
_RENEW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], 2 * ARGV[1])
redis.call('PEXPIRE', KEYS[2], 2 * ARGV[1])
"""


class RateLimiterUnavailableError(UnavailableError):
    """The rate limiter does not answer, so no request of a principal with limits can be admitted."""

    code = "access_counters_unavailable"


class ValkeyRateLimiter:
    """A rate limiter at ``redis://[user:password@]host:port[/database]``. Needs the ``redis`` package."""

    is_local = False

    def __init__(self, url: str) -> None:
        """Raises ``ValueError`` where the client library is not installed or the URL is invalid."""
        try:
            from redis import asyncio as client
            from redis import exceptions
        except ImportError:
            raise ValueError("needs the redis package: pip install 'helexa-cortex[valkey]'") from None
        self._errors: tuple[type[Exception], ...] = (exceptions.RedisError, OSError)
        self._client = client.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, decode_responses=True
        )
        self._take = self._client.register_script(_TAKE)
        self._settle = self._client.register_script(_SETTLE)
        self._usage = self._client.register_script(_USAGE)
        self._renew = self._client.register_script(_RENEW)
        self._held: dict[str, set[str]] = {}
        self._renewing: asyncio.Task[None] | None = None

    async def take(self, name: str, limits: Limits, reserve_tokens: int, num_sequences: int = 1) -> Lease | Refusal:
        """Return a lease for a request, or its refusal.

        Raises:
            RateLimiterUnavailableError: the server does not answer.
        """
        number = secrets.token_hex(12)
        reserve_tokens = capped(reserve_tokens, limits)
        num_members = num_sequences if limits.max_concurrent else min(1, num_sequences)
        more: list[str | int] = [number, reserve_tokens, limits.requests_per_minute, limits.max_concurrent]
        more += [limits.tokens_per_window, limits.balance_tokens, round(LEASE_S * 1000), num_members]
        try:
            outcome, wait_ms = await self._take(keys=_keys(name), args=[*_windows(limits.window_s), *more])
        except self._errors as error:
            raise RateLimiterUnavailableError(f"The access counters do not answer: {error}.", retry_after_s=2) from None
        wait_s = None if wait_ms < 0 else wait_ms / 1000 or RELEASE_RETRY_S
        match outcome:
            case "ok":
                lease = Lease(name, number, reserve_tokens, limits.window_s, num_members)
                if num_members:
                    self._held.setdefault(name, set()).update(_members(lease))
                return lease
            case "concurrent":
                return Refusal(Reason.CONCURRENCY, wait_s)
            case "requests":
                return Refusal(Reason.REQUESTS, wait_s)
            case "tokens":
                return Refusal(Reason.TOKENS, wait_s)
            case _:
                return Refusal(Reason.BALANCE, wait_s)

    async def settle(self, lease: Lease, used_tokens: int) -> None:
        """End a request and record the tokens used.

        Raises:
            RateLimiterUnavailableError: the server does not answer; the lease ends by itself.
        """
        held = self._held.get(lease.name, set())
        held.difference_update(_members(lease))
        if not held:
            self._held.pop(lease.name, None)
        try:
            await self._settle(
                keys=_keys(lease.name),
                args=[*_windows(lease.window_s), lease.number, max(0, used_tokens), lease.num_sequences],
            )
        except self._errors as error:
            raise RateLimiterUnavailableError(f"The access counters do not answer: {error}.") from None

    async def usage(self, name: str, limits: Limits) -> Usage:
        """Return the use of a principal.

        Raises:
            RateLimiterUnavailableError: the server does not answer.
        """
        try:
            return Usage(*await self._usage(keys=_keys(name), args=_windows(limits.window_s)))
        except self._errors as error:
            raise RateLimiterUnavailableError(f"The access counters do not answer: {error}.", retry_after_s=2) from None

    async def open(self, supervisor: Supervisor) -> None:
        """Start to renew the leases of this process."""
        self._renewing = supervisor.start("renew access leases", self._keep)

    async def close(self) -> None:
        """Stop, and close the connections."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self._client.aclose()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            for name, numbers in [*self._held.items()]:
                with contextlib.suppress(*self._errors):
                    await self._renew(keys=_keys(name)[1:3], args=[round(LEASE_S * 1000), *numbers])


def _members(lease: Lease) -> list[str]:
    """Return the members of the set of leases that represent a lease, one for each of its sequences."""
    return [lease.number, *(f"{lease.number}:{number}" for number in range(2, lease.num_sequences + 1))]


def _keys(name: str) -> list[str]:
    # The braces keep one principal's keys on one server of a cluster, as scripts need.
    return [f"{PREFIX}{{{name}}}:{part}" for part in ("requests", "leases", "reserved", "buckets", "spent")]


def _windows(window_s: float) -> list[int]:
    return [round(MINUTE_S * 1000), round(window_s * 1000), NUM_BUCKETS]
