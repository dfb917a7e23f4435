"""Token rows on their way from a worker to the one consumer of a sequence.

A worker's message carries one row for each sequence of a step. A :class:`RowQueue` is a sink for those of one
sequence: its consumer is woken once for all rows since its last read, and gets them as one list.
"""

import asyncio
from collections.abc import AsyncIterator

from cortex.wire.errors import ApiError
from neuron.device.jobs import TokenRow


class RowQueue(AsyncIterator[list[TokenRow]]):
    """A sink that is also an iterator over lists of rows, for one consumer on one event loop.

    It ends after the row with an ``end``. An error is raised when the rows before it have been taken.
    """

    __slots__ = ("_closed", "_error", "_rows", "_waiter")

    def __init__(self) -> None:
        self._rows: list[TokenRow] = []
        self._error: ApiError | None = None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def __call__(self, item: TokenRow | ApiError) -> None:
        """Take a row, or the error that ends the sequence."""
        if isinstance(item, ApiError):
            self._error = item
        else:
            self._rows.append(item)
            self._closed = item.end is not None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __anext__(self) -> list[TokenRow]:
        """Wait for rows and return all there are. Raises the sequence's error; safe to cancel."""
        while not self._rows:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        rows, self._rows = self._rows, []
        return rows
