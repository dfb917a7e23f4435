"""Record of use per key, model and day: ended requests are added up in memory, and written to the store in batches.

A request counts once it was sent to a node, whatever became of it. A killed process loses what it has not written: the
last ``WRITE_INTERVAL_S`` of use.
"""

import asyncio
import contextlib
import datetime
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cortex.config import Price
from cortex.request_log import Line
from cortex.store.interface import StoreError
from cortex.store.usage import DAY_S, UsageQuery, UsageRow, UsageStore, total
from cortex.supervise import Supervisor

log = logging.getLogger("cortex.usage")

WRITE_INTERVAL_S = 1.0
TASK = "usage"
"""Name of the task, and of the component that is degraded while the store cannot be written to."""


@dataclass(slots=True)
class _Sums:
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    last_used_s: float = 0.0


class UsageRecorder:
    """The use of one process that is not written yet, and its way into the store and out of it."""

    def __init__(
        self, store: UsageStore, price_of: Callable[[str], Price | None], supervisor: Supervisor | None = None
    ) -> None:
        """``price_of`` returns a model's price now."""
        self._store = store
        self._price_of = price_of
        self._supervisor = supervisor or Supervisor()
        self._new: dict[tuple[int, str, str], _Sums] = {}
        """Sums since the last write, by day (since 1970), key and model."""
        self._unwritten: list[UsageRow] = []
        """Rows that a failed write has left."""
        self._lock = threading.Lock()  # the thread of a metrics scrape records too
        self._writing = asyncio.Lock()
        self._is_failing = False

    @property
    def persists(self) -> bool:
        """Whether use survives this process."""
        return self._store.persists

    def record(self, lines: Sequence[Line]) -> None:
        """Take the log lines of ended requests, for the next :meth:`write`. Costs 0.4 us a line."""
        with self._lock:
            for at_s, fields in lines:
                if not fields["node"]:
                    continue
                place = int(at_s // DAY_S), fields.get("key", ""), fields["model"]
                sums = self._new.get(place)
                if sums is None:
                    sums = self._new[place] = _Sums()
                sums.requests += 1
                sums.last_used_s = at_s
                if "tokens_in" in fields:
                    tokens_in = fields["tokens_in"]
                    sums.tokens_in += tokens_in
                    sums.tokens_out += fields["tokens_out"]
                    sums.tokens_cached += min(fields["tokens_cached"], tokens_in)

    def _take(self) -> list[UsageRow]:
        """Return what is not written yet, with the cost of what is new."""
        with self._lock:
            new, self._new = self._new, {}
            rows, self._unwritten = self._unwritten, []
        for (day, key, model), sums in new.items():
            tokens = sums.tokens_in, sums.tokens_out, sums.tokens_cached
            cost = cost_of(self._price_of(model), *tokens)
            rows.append(UsageRow(_day(day), key, model, sums.requests, *tokens, cost, sums.last_used_s))
        return total(rows)

    async def run(self) -> None:
        """Write at an interval, until cancelled."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL_S)
            with contextlib.suppress(StoreError):  # logged, and tried again
                await self.write()

    async def write(self) -> None:
        """Write what is recorded. Completes even if the calling task is being cancelled, so that nothing counts twice.

        Raises:
            StoreError: it cannot be written, and is kept for the next time.
        """
        await asyncio.shield(asyncio.ensure_future(self._write()))

    async def _write(self) -> None:
        async with self._writing:
            rows = self._take()
            if not rows:
                return
            try:
                await self._store.add(rows)
            except BaseException as error:
                self._unwritten = rows
                if isinstance(error, StoreError) and not self._is_failing:
                    log.error("use cannot be written, and is kept in memory until it can: %s", error)
                self._mark(is_failing=True)
                raise
            self._mark(is_failing=False)

    def _mark(self, *, is_failing: bool) -> None:
        self._is_failing = is_failing
        self._supervisor.mark(TASK, is_degraded=is_failing)

    async def rows(self, query: UsageQuery) -> list[UsageRow]:
        """Return the rows that are asked for, with all that this process has recorded.

        Raises:
            StoreError: the store cannot be read, or not be written to.
        """
        await self.write()
        return await self._store.rows(query)

    async def last_used(self) -> Mapping[str, float]:
        """Return the Unix time of each key's last use. Raises as :meth:`rows`."""
        await self.write()
        return await self._store.last_used()


def cost_of(price: Price | None, tokens_in: int, tokens_out: int, tokens_cached: int) -> float:
    """Return the US dollars of so many tokens; 0 without a price. ``tokens_cached`` are of ``tokens_in``."""
    if price is None:
        return 0.0
    cached = price.input if price.cached_input is None else price.cached_input
    return ((tokens_in - tokens_cached) * price.input + tokens_cached * cached + tokens_out * price.output) / 1e6


def day_of(at_s: float) -> str:
    """Return the day of a Unix time, in UTC."""
    return _day(int(at_s // DAY_S))


def _day(number: int) -> str:
    return datetime.date.fromordinal(_EPOCH + number).isoformat()


_EPOCH = datetime.date(1970, 1, 1).toordinal()
