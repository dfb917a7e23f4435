"""Use per key, model and day: its rows, and the stores that keep them, each beside the store of responses.

Rows are sums, and all gateways that share a store add to the same ones. A day is one of UTC. Stores are bounded by the
number of days with any use: a clock that is set years ahead adds one day, and deletes none but the oldest.
"""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from cortex.store.interface import RecordStore
from cortex.store.sqlite import SqliteStore
from cortex.store.valkey import ValkeyStore

DAY_S = 24 * 3600.0


class UsageRow(msgspec.Struct, frozen=True):
    """Use of one model with one key on one day. An empty ``key`` is no key; ``day`` is ``YYYY-MM-DD``."""

    day: str
    key: str
    model: str
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    cost: float = 0.0
    """US dollars, by the prices at the time of each request."""
    last_used_s: float = 0.0
    """Unix time of the end of the last request."""


def total(rows: Iterable[UsageRow]) -> list[UsageRow]:
    """Return rows with those of the same day, key and model added up, in their order."""
    found: dict[tuple[str, str, str], UsageRow] = {}
    for row in rows:
        place = row.day, row.key, row.model
        known = found.get(place)
        found[place] = row if known is None else _sum(known, row)
    return [found[place] for place in sorted(found)]


def _sum(one: UsageRow, other: UsageRow) -> UsageRow:
    return UsageRow(
        one.day,
        one.key,
        one.model,
        one.requests + other.requests,
        one.tokens_in + other.tokens_in,
        one.tokens_out + other.tokens_out,
        one.tokens_cached + other.tokens_cached,
        one.cost + other.cost,
        max(one.last_used_s, other.last_used_s),
    )


FIELDS = ("day", "key", "model")
"""Fields by which use is added up."""


class UsageQuery(msgspec.Struct, frozen=True):
    """Rows that are asked for: the first and the last day, and a key and a model; ``None``: any.

    Rows are added up by the fields of ``by``; the others of ``FIELDS`` are empty in them.
    """

    first: str
    last: str
    key: str | None = None
    model: str | None = None
    by: tuple[str, ...] = FIELDS

    def answer(self, rows: Iterable[UsageRow]) -> list[UsageRow]:
        """Return those of the rows that are asked for, added up."""
        others = dict.fromkeys((field for field in FIELDS if field not in self.by), "")
        return total(msgspec.structs.replace(row, **others) for row in rows if self._has(row))

    def _has(self, row: UsageRow) -> bool:
        is_wanted = self.key in {None, row.key} and self.model in {None, row.model}
        return is_wanted and self.first <= row.day <= self.last


class UsageStore(Protocol):
    """A store of use. Its methods raise :class:`~cortex.store.interface.StoreError`."""

    persists: bool
    """Whether the rows survive this process."""

    async def add(self, rows: Sequence[UsageRow]) -> None:
        """Add rows to those that are kept, all or none; delete the oldest days above the limit."""

    async def rows(self, query: UsageQuery) -> list[UsageRow]:
        """Return the rows that are asked for, in the order of their fields."""

    async def last_used(self) -> Mapping[str, float]:
        """Return the Unix time of each key's last use."""


def make(store: RecordStore | None, num_days: int) -> UsageStore:
    """Return the store of use beside a store of responses; in memory where there is none."""
    if isinstance(store, SqliteStore):
        return SqliteUsage(store, num_days)
    if isinstance(store, ValkeyStore):
        return ValkeyUsage(store, num_days)
    return MemoryUsage(num_days)


class MemoryUsage:
    """Use of this process, since its start."""

    persists = False

    def __init__(self, num_days: int) -> None:
        self._num_days = num_days
        self._rows: list[UsageRow] = []

    async def add(self, rows: Sequence[UsageRow]) -> None:
        """Add rows."""
        rows = total([*self._rows, *rows])
        kept = set(sorted({row.day for row in rows})[-self._num_days :])
        self._rows = [row for row in rows if row.day in kept]

    async def rows(self, query: UsageQuery) -> list[UsageRow]:
        """Return rows."""
        return query.answer(self._rows)

    async def last_used(self) -> Mapping[str, float]:
        """Return the last use of each key."""
        found: dict[str, float] = {}
        for row in self._rows:
            found[row.key] = max(found.get(row.key, 0.0), row.last_used_s)
        return found


_ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    requests = requests + excluded.requests, tokens_in = tokens_in + excluded.tokens_in,
    tokens_out = tokens_out + excluded.tokens_out, tokens_cached = tokens_cached + excluded.tokens_cached,
    cost = cost + excluded.cost, last_used_s = max(last_used_s, excluded.last_used_s)
"""
_FORGET = """
DELETE FROM usage WHERE day < (SELECT min(day) FROM (SELECT DISTINCT day FROM usage ORDER BY day DESC LIMIT ?))
"""
_USED = """
INSERT INTO last_used VALUES (?, ?) ON CONFLICT DO UPDATE SET at = max(at, excluded.at)
"""
_FIND = """
SELECT {fields}, sum(requests), sum(tokens_in), sum(tokens_out), sum(tokens_cached), sum(cost), max(last_used_s)
    FROM usage WHERE day BETWEEN :first AND :last AND (:key IS NULL OR key = :key)
    AND (:model IS NULL OR model = :model) GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""


class SqliteUsage:
    """Tables in the SQLite file of the responses."""

    def __init__(self, store: SqliteStore, num_days: int) -> None:
        self.persists = store.persists
        self._store = store
        self._num_days = num_days
        self._latest = ""
        """Latest day that was added: the oldest ones are looked for once a day."""

    async def add(self, rows: Sequence[UsageRow]) -> None:
        """Add rows in one transaction."""
        latest = max((row.day for row in rows), default=self._latest)

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany(_ADD, [msgspec.structs.astuple(row) for row in rows])
                connection.executemany(_USED, [(row.key, row.last_used_s) for row in rows])
                if latest > self._latest:
                    connection.execute(_FORGET, (self._num_days,))

        await self._store.run(write)
        self._latest = max(self._latest, latest)

    async def rows(self, query: UsageQuery) -> list[UsageRow]:
        """Return rows."""
        statement = _FIND.format(fields=", ".join(field if field in query.by else "''" for field in FIELDS))
        values = {"first": query.first, "last": query.last, "key": query.key, "model": query.model}

        def read(connection: sqlite3.Connection) -> list[UsageRow]:
            return [UsageRow(*row) for row in connection.execute(statement, values)]

        return await self._store.run(read)

    async def last_used(self) -> Mapping[str, float]:
        """Return the last use of each key."""
        return await self._store.run(lambda connection: dict(connection.execute("SELECT * FROM last_used").fetchall()))


PREFIX = "cortex:usage:"
DAYS, LAST_USED = f"{PREFIX}days", f"{PREFIX}last"
_COUNTS = ("requests", "tokens_in", "tokens_out", "tokens_cached")


class ValkeyUsage:
    """A hash for each day in the Valkey of the responses, a set of the days, and a hash of each key's last use.

    A field of a day's hash is the JSON array of a number's name, the key and the model. The hash expires by itself. A
    write that the server made and whose answer was lost counts twice.
    """

    persists = True

    def __init__(self, store: ValkeyStore, num_days: int) -> None:
        self._store = store
        self._num_days = num_days

    async def add(self, rows: Sequence[UsageRow]) -> None:
        """Add rows in one transaction."""
        async with self._store.pipeline() as pipeline:
            for row in rows:
                day = PREFIX + row.day
                for name in _COUNTS:
                    pipeline.hincrby(day, _field(name, row), getattr(row, name))
                pipeline.hincrbyfloat(day, _field("cost", row), row.cost)
                pipeline.hset(day, _field("last_used_s", row), repr(row.last_used_s))
                pipeline.expire(day, round(self._num_days * DAY_S))
                pipeline.sadd(DAYS, row.day)
                pipeline.hset(LAST_USED, row.key, repr(row.last_used_s))
            await pipeline.execute()

    async def rows(self, query: UsageQuery) -> list[UsageRow]:
        """Return rows."""
        async with self._store.pipeline() as pipeline:
            pipeline.smembers(DAYS)
            (known,) = await pipeline.execute()
            days = [day for day in map(bytes.decode, known) if query.first <= day <= query.last]
            for day in days:
                pipeline.hgetall(PREFIX + day)
            hashes = await pipeline.execute()
        numbers = (_number(day, *item) for day, found in zip(days, hashes, strict=True) for item in found.items())
        return query.answer(numbers)

    async def last_used(self) -> Mapping[str, float]:
        """Return the last use of each key."""
        async with self._store.pipeline() as pipeline:
            pipeline.hgetall(LAST_USED)
            (found,) = await pipeline.execute()
        return {key.decode(): float(value) for key, value in found.items()}


def _field(name: str, row: UsageRow) -> bytes:
    return msgspec.json.encode((name, row.key, row.model))


def _number(day: str, field: bytes, value: bytes) -> UsageRow:
    """Return a row with one number."""
    name, key, model = msgspec.json.decode(field, type=tuple[str, str, str])
    number = int(value) if name in _COUNTS else float(value)
    return msgspec.structs.replace(UsageRow(day, key, model), **{name: number})
