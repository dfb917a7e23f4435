"""Records in Valkey, or in Redis: for gateways on several hosts. Needs the ``redis`` package.

Each record is a hash with a time to live; the server's ``maxmemory`` bounds the bytes. What concerns a chain is a
script in the server, so that it is one round trip. Scripts find the keys of a chain as they go, which a cluster does
not allow.
"""

import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from cortex.store.interface import Link, Record, Row, StoreError, from_row, to_row

if TYPE_CHECKING:
    from redis.asyncio.client import Pipeline

PREFIX = "cortex:record:"
TIMEOUT_S = 5.0
RETRY_S = 2.0
"""Time for which a server counts as unavailable after a failed write."""

CHAIN = """
local prefix, id = KEYS[1], ARGV[1]
local max_records, max_bytes, size, found = tonumber(ARGV[2]), tonumber(ARGV[3]), 0, {}
while id ~= '' and #found < max_records and size <= max_bytes do
    local row = redis.call('HMGET', prefix .. id, 'previous', 'items', 'lease_until')
    if not row[1] then break end
    found[#found + 1] = {id, row[1], row[2], row[3]}
    id, size = row[1], size + #row[2]
end
return found
"""
PUT = """
local prefix, id, ttl_ms, left, previous = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
redis.call('HSET', prefix .. id, 'previous', previous, 'items', ARGV[5], 'lease_until', ARGV[6], 'rest', ARGV[7])
redis.call('PEXPIRE', prefix .. id, ttl_ms)
while previous and previous ~= '' and left > 0 do
    redis.call('PEXPIRE', prefix .. previous, ttl_ms)
    previous, left = redis.call('HGET', prefix .. previous, 'previous'), left - 1
end
"""
RENEW = """
if tonumber(redis.call('HGET', KEYS[1], 'lease_until') or '0') == 0 then return 0 end
redis.call('HSET', KEYS[1], 'lease_until', ARGV[1])
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
MAX_REFRESHED = 10_000
"""Greatest number of records whose life a write extends; more than any chain has."""


class ValkeyStore:
    """A store at ``redis://[user:password@]host:port[/database]``."""

    def __init__(self, url: str, *, ttl_s: float) -> None:
        """Raises :class:`StoreError` if the client library is not installed, or the address is invalid."""
        try:
            from redis import asyncio as client
            from redis import exceptions
        except ImportError:
            raise StoreError("the store needs the redis package: pip install 'helexa-cortex[valkey]'") from None
        self._url = url
        self._failed_at_s = -math.inf
        self._ttl_ms = round(ttl_s * 1000)
        self._errors: tuple[type[Exception], ...] = (exceptions.RedisError, OSError)
        try:
            self._client = client.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        except ValueError as error:
            raise StoreError(f"{url}: {error}") from None
        self._chain, self._put, self._renew = map(self._client.register_script, (CHAIN, PUT, RENEW))

    async def open(self) -> None:
        """Check that the server answers."""
        await self._do(self._client.ping)

    async def get(self, owner: str, id: str) -> Record | None:
        """Return a record that has not expired."""
        names = ["previous", "items", "lease_until", "rest"]
        previous, items, lease, rest = await self._do(lambda: self._client.hmget(_prefix(owner) + id, names))
        return None if rest is None else from_row(Row(previous.decode(), items, float(lease), rest))

    async def chain(self, owner: str, id: str, *, max_records: int, max_bytes: int) -> list[Link]:
        """Return the chain that ends with a record, in one round trip."""
        rows = await self._do(lambda: self._chain(keys=[_prefix(owner)], args=[id, max_records, max_bytes]))
        return [Link(id.decode(), previous.decode(), items, float(lease)) for id, previous, items, lease in rows]

    def obstacle(self, size_bytes: int) -> StoreError | None:
        """Return the error of a write that failed a moment ago, if any."""
        if time.monotonic() - self._failed_at_s < RETRY_S:
            return StoreError(f"{self._url.rpartition('@')[2]}: cannot be written to")
        return None

    async def put(self, owner: str, id: str, record: Record) -> None:
        """Store a record and extend the life of its chain, in one round trip."""
        row = to_row(record)
        args: list[str | bytes | float] = [id, self._ttl_ms, MAX_REFRESHED]
        args += row.previous, row.items, row.lease_until, row.rest
        try:
            await self._do(lambda: self._put(keys=[_prefix(owner)], args=args))
        except StoreError:
            self._failed_at_s = time.monotonic()
            raise
        self._failed_at_s = -math.inf

    async def renew(self, owner: str, id: str, lease_until: float) -> bool:
        """Give the lease of a record another end, in one round trip."""
        args = [lease_until, self._ttl_ms]
        return bool(await self._do(lambda: self._renew(keys=[_prefix(owner) + id], args=args)))

    async def delete(self, owner: str, id: str) -> bool:
        """Delete a record."""
        return bool(await self._do(lambda: self._client.delete(_prefix(owner) + id)))

    @contextlib.asynccontextmanager
    async def pipeline(self) -> AsyncIterator["Pipeline"]:
        """Yield a pipeline of transactions, for other data that are kept here.

        Raises:
            StoreError: the server does not answer.
        """
        try:
            async with self._client.pipeline(transaction=True) as pipeline:
                yield pipeline
        except self._errors as error:
            raise self._failed(error) from error

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _do(self, work: Callable[[], Any]) -> Any:
        try:
            return await work()
        except self._errors as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> StoreError:
        return StoreError(f"{self._url.rpartition('@')[2]}: {error}")


def _prefix(owner: str) -> str:
    """Return the prefix of an owner's keys. Ids have no colon, so that no two owners share a key."""
    return f"{PREFIX}{owner}:"
