"""Responses in Valkey, or in Redis: for gateways on several hosts. Needs the ``redis`` package.

Each response is a key of its own with a time to live; the server's ``maxmemory`` bounds the bytes.
"""

import contextlib
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from cortex.store.interface import StoredResponse, StoreError, from_bytes, to_bytes

if TYPE_CHECKING:
    from redis.asyncio.client import Pipeline

PREFIX = "cortex:response:"
TIMEOUT_S = 5.0
RETRY_S = 2.0
"""Time for which a server counts as unavailable after a failed write."""


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

    async def open(self) -> None:
        """Check that the server answers."""
        try:
            await self._client.ping()
        except self._errors as error:
            raise self._failed(error) from error

    async def get(self, id: str) -> StoredResponse | None:
        """Return a response that has not expired."""
        try:
            value = await self._client.get(PREFIX + id)
        except self._errors as error:
            raise self._failed(error) from error
        if value is None:
            return None
        assert isinstance(value, bytes)  # the client decodes nothing
        return from_bytes(value)

    def obstacle(self, size_bytes: int) -> StoreError | None:
        """Return the error of a write that failed a moment ago, if any."""
        if time.monotonic() - self._failed_at_s < RETRY_S:
            return StoreError(f"{self._url.rpartition('@')[2]}: cannot be written to")
        return None

    async def put(self, id: str, stored: StoredResponse, chain: Sequence[str]) -> None:
        """Store a response and extend the life of its chain, in one round trip."""
        value = to_bytes(stored)
        try:
            async with self._client.pipeline(transaction=False) as pipeline:
                pipeline.set(PREFIX + id, value, px=self._ttl_ms)
                for earlier in chain:
                    pipeline.pexpire(PREFIX + earlier, self._ttl_ms)
                await pipeline.execute()
        except self._errors as error:
            self._failed_at_s = time.monotonic()
            raise self._failed(error) from error
        self._failed_at_s = -math.inf

    async def delete(self, id: str) -> bool:
        """Delete a response."""
        try:
            return bool(await self._client.delete(PREFIX + id))
        except self._errors as error:
            raise self._failed(error) from error

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

    def _failed(self, error: Exception) -> StoreError:
        return StoreError(f"{self._url.rpartition('@')[2]}: {error}")
