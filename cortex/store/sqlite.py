"""Records and use in an SQLite file: the default, for the gateways of one host.

All statements run on one thread, so a slow disk delays only requests that need the store. The file is bounded by the
age of a record since its last use, by the bytes of each key and by those of all; the oldest are deleted first, and
above the limit for all, the oldest of the key that has most. Sums kept by triggers make that cheap, and right for
several processes. The file's mode is 0600. A damaged file is moved aside and begun anew.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import math
import os
import pathlib
import sqlite3
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cortex.store.clock import StoreClock
from cortex.store.interface import Link, Record, Row, StoreError, StoreFullError, from_row, to_row

log = logging.getLogger("cortex.store")

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0
"""Time for which a statement waits for another process's."""

EVICTION_BATCH = 64

SPARE_BYTES = 1024 * 1024
"""Bytes of the disk that are left free."""
RETRY_S = 5.0
"""Time for which a store counts as unwritable after a failed write."""
MAGIC = b"SQLite format 3\0"
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

_SCHEMA = """
DROP TABLE IF EXISTS responses; -- of an earlier version, as the next two
DROP TABLE IF EXISTS owners;
DROP TABLE IF EXISTS total;
CREATE TABLE IF NOT EXISTS records (
    owner TEXT NOT NULL, id TEXT NOT NULL, expires_at REAL NOT NULL, size_bytes INTEGER NOT NULL,
    previous TEXT NOT NULL, lease_until REAL NOT NULL, items BLOB NOT NULL, rest BLOB NOT NULL,
    PRIMARY KEY (owner, id)
);
CREATE INDEX IF NOT EXISTS by_age ON records (expires_at);
CREATE INDEX IF NOT EXISTS by_owner ON records (owner, expires_at);
CREATE TABLE IF NOT EXISTS owner_sizes (owner TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS gained AFTER INSERT ON records BEGIN
    INSERT INTO owner_sizes VALUES (NEW.owner, NEW.size_bytes)
        ON CONFLICT (owner) DO UPDATE SET size_bytes = size_bytes + excluded.size_bytes;
END;
CREATE TRIGGER IF NOT EXISTS lost AFTER DELETE ON records
    BEGIN UPDATE owner_sizes SET size_bytes = size_bytes - OLD.size_bytes WHERE owner = OLD.owner; END;
CREATE TABLE IF NOT EXISTS seen (at REAL NOT NULL);
INSERT INTO seen SELECT 0 WHERE NOT EXISTS (SELECT * FROM seen);
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, requests INTEGER NOT NULL, tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL, tokens_cached INTEGER NOT NULL, cost REAL NOT NULL, last_used_s REAL NOT NULL,
    PRIMARY KEY (day, key, model)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS last_used (key TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
"""
_CHAIN = """
WITH RECURSIVE chain (id, previous, items, lease_until, size_bytes, number) AS (
    SELECT id, previous, items, lease_until, length(items), 1 FROM records
        WHERE owner = :owner AND id = :id AND expires_at > :now
    UNION ALL
    SELECT records.id, records.previous, records.items, records.lease_until,
            chain.size_bytes + length(records.items), number + 1
        FROM chain JOIN records ON records.id = chain.previous
        WHERE owner = :owner AND expires_at > :now AND number < :max_records AND chain.size_bytes <= :max_bytes
)
SELECT id, previous, items, lease_until FROM chain
"""
_REFRESH = """
WITH RECURSIVE chain (id) AS (
    SELECT :previous
    UNION SELECT records.previous FROM chain JOIN records ON records.owner = :owner AND records.id = chain.id
)
UPDATE records SET expires_at = :expires_at
    WHERE owner = :owner AND id IN (SELECT id FROM chain) AND expires_at < :stale
"""
REFRESH_S = 60.0
"""Time after which the life of a chain's record is extended again: not every turn writes the whole chain."""


class SqliteStore:
    """A store in one file; ``:memory:`` keeps it in this process alone."""

    def __init__(
        self,
        path: str,
        *,
        ttl_s: float,
        max_bytes: int,
        max_bytes_per_owner: int = 0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """``max_bytes_per_owner`` 0 means no limit for each owner."""
        self.path = path
        self.on_damaged: Callable[[], None] = lambda: None
        """Callback for a damaged file that was moved aside, in any thread."""
        self._max_bytes_per_owner = max_bytes_per_owner or max_bytes
        self._own_clock = StoreClock() if clock is None else None
        self._failed_at_s = -math.inf
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock: Callable[[], float] = clock or StoreClock() if self._own_clock is None else self._own_clock
        self._thread = ThreadPoolExecutor(1, "cortex-store")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Open the file, making it and its folder if need be."""
        await self._run(self._open)

    async def get(self, owner: str, id: str) -> Record | None:
        """Return a record that has not expired."""

        def read(connection: sqlite3.Connection) -> Record | None:
            columns = "SELECT previous, items, lease_until, rest FROM records"
            statement = f"{columns} WHERE owner = ? AND id = ? AND expires_at > ?"
            row = connection.execute(statement, (owner, id, self._clock())).fetchone()
            return None if row is None else from_row(Row(*row))

        return await self.run(read)

    async def chain(self, owner: str, id: str, *, max_records: int, max_bytes: int) -> list[Link]:
        """Return the chain that ends with a record, in one statement."""

        def read(connection: sqlite3.Connection) -> list[Link]:
            limits = {"max_records": max_records, "max_bytes": max_bytes}
            given = {"id": id, "owner": owner, "now": self._clock(), **limits}
            return list(map(Link._make, connection.execute(_CHAIN, given)))

        return await self.run(read)

    def obstacle(self, size_bytes: int) -> StoreError | None:
        """Return the error that a write of so many bytes would raise, as far as it is known before."""
        if size_bytes > min(self._max_bytes, self._max_bytes_per_owner):
            return StoreFullError(f"{self.path}: {size_bytes} bytes are more than one key may keep")
        if time.monotonic() - self._failed_at_s < RETRY_S:
            return StoreError(f"{self.path}: cannot be written to")
        if self.path != ":memory:":
            try:
                disk = os.statvfs(pathlib.Path(self.path).parent)
            except OSError:
                return None  # it will be created
            if disk.f_bavail * disk.f_frsize < size_bytes + SPARE_BYTES:
                return StoreFullError(f"{self.path}: its disk is full")
        return None

    async def put(self, owner: str, id: str, record: Record) -> None:
        """Store a record; delete expired ones, and the oldest above the limits."""
        row = to_row(record)
        size_bytes = len(row.items) + len(row.rest)
        if size_bytes > min(self._max_bytes, self._max_bytes_per_owner):
            raise StoreFullError(f"{self.path}: {size_bytes} bytes are more than one key may keep")

        def write(connection: sqlite3.Connection) -> None:
            now = self._clock()
            expires_at = now + self._ttl_s
            with connection:
                connection.execute("UPDATE seen SET at = ? WHERE at < ?", (now, now))
                connection.execute("DELETE FROM records WHERE expires_at <= ?", (now,))
                # Not REPLACE: it would skip the trigger that counts.
                connection.execute("DELETE FROM records WHERE owner = ? AND id = ?", (owner, id))
                columns = owner, id, expires_at, size_bytes, row.previous, row.lease_until, row.items, row.rest
                connection.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)", columns)
                if row.previous:
                    stale = expires_at - min(REFRESH_S, self._ttl_s / 16)
                    times = {"expires_at": expires_at, "stale": stale}
                    connection.execute(_REFRESH, {"owner": owner, "previous": row.previous, **times})
                self._make_room(connection, id, owner)

        try:
            await self.run(write)
        except StoreError:
            self._failed_at_s = time.monotonic()
            raise
        self._failed_at_s = -math.inf

    def _make_room(self, connection: sqlite3.Connection, id: str, owner: str) -> None:
        """Delete the oldest of an owner, then of the owner with most, above the limits; but not ``id``."""

        def has(of: str) -> int:
            found = connection.execute("SELECT size_bytes FROM owner_sizes WHERE owner = ?", (of,)).fetchone()
            return int(found[0]) if found else 0

        def forget(of: str, excess: int) -> bool:
            oldest = "SELECT id, size_bytes FROM records WHERE owner = ? AND id != ? ORDER BY expires_at LIMIT ?"
            gone = []
            for other, size_bytes in connection.execute(oldest, (of, id, EVICTION_BATCH)).fetchall():
                if excess <= 0:
                    break
                gone.append((of, other))
                excess -= size_bytes
            connection.executemany("DELETE FROM records WHERE owner = ? AND id = ?", gone)
            return bool(gone)

        while (excess := has(owner) - self._max_bytes_per_owner) > 0 and forget(owner, excess):
            pass
        total = "SELECT sum(size_bytes) FROM owner_sizes"
        while (excess := connection.execute(total).fetchone()[0] - self._max_bytes) > 0:
            richest = connection.execute("SELECT owner FROM owner_sizes ORDER BY size_bytes DESC").fetchone()[0]
            if not (forget(richest, excess) or forget(owner, excess)):
                break

    async def renew(self, owner: str, id: str, lease_until: float) -> bool:
        """Give the lease of a record another end."""

        def write(connection: sqlite3.Connection) -> bool:
            with connection:
                change = "UPDATE records SET lease_until = ?, expires_at = ?"
                statement = f"{change} WHERE owner = ? AND id = ? AND lease_until > 0"
                values = lease_until, self._clock() + self._ttl_s, owner, id
                return connection.execute(statement, values).rowcount > 0

        return await self.run(write)

    async def delete(self, owner: str, id: str) -> bool:
        """Delete a record."""

        def remove(connection: sqlite3.Connection) -> bool:
            with connection:
                statement = "DELETE FROM records WHERE owner = ? AND id = ? AND expires_at > ?"
                return connection.execute(statement, (owner, id, self._clock())).rowcount > 0

        return await self.run(remove)

    @property
    def persists(self) -> bool:
        """Whether the data survive this process."""
        return self.path != ":memory:"

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return the result of ``work``, for other tables of the file. It runs on the store's thread.

        Raises:
            StoreError: the file cannot be read, or be written to.
        """
        return await self._run(lambda: work(self._open()))

    async def close(self) -> None:
        """Close the file after the statements under way."""

        def shut() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        await self._run(shut)
        self._thread.shutdown(wait=False)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            try:
                self._connection = self._connect()
            except sqlite3.DatabaseError as error:
                if not _is_damaged(error):
                    raise
                self._move_aside(error)
                self._connection = self._connect()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        if self.path != ":memory:":
            path = pathlib.Path(self.path)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives the files beside it the mode of this one.
            with contextlib.suppress(OSError):  # SQLite reports it
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            for name in (self.path, f"{self.path}-wal", f"{self.path}-shm"):
                with contextlib.suppress(OSError):  # absent, or another user's
                    if pathlib.Path(name).is_file() and stat.S_IMODE(pathlib.Path(name).stat().st_mode) & 0o077:
                        pathlib.Path(name).chmod(0o600)
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)
        try:
            # Readers and a writer at a time; a crash of the host may lose the last records and never the file.
            _switch_to_wal(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_SCHEMA)
            if self._own_clock is not None:
                self._own_clock.begin(connection.execute("SELECT at FROM seen").fetchone()[0], self._ttl_s)
        except sqlite3.Error:
            connection.close()  # each request tries anew
            raise
        return connection

    def _move_aside(self, error: sqlite3.Error) -> None:
        """Move a damaged file aside; of several processes that find it, one does.

        A file with neither the header nor the name of a store stays: the path may be a mistake.
        """
        with pathlib.Path(self.path).open("rb") as file:
            is_store = file.read(len(MAGIC)) == MAGIC
        if not is_store and pathlib.Path(self.path).suffix not in {".db", ".sqlite", ".sqlite3"}:
            return
        folder = os.open(pathlib.Path(self.path).parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if not _is_file_damaged(self.path):
                return  # another process was here
            there = f"{self.path}.damaged-{time.strftime('%Y%m%dT%H%M%S')}"
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    pathlib.Path(self.path + suffix).rename(there + suffix)
            self.on_damaged()
            log.error("the store %s is damaged (%s): moved to %s, and begun anew", self.path, error, there)
        finally:
            os.close(folder)

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._do(work))
        except sqlite3.Error as error:
            kind = StoreFullError if error.sqlite_errorcode == sqlite3.SQLITE_FULL else StoreError
            raise kind(f"{self.path}: {error}") from error
        except OSError as error:
            kind = StoreFullError if error.errno in {errno.ENOSPC, errno.EDQUOT} else StoreError
            raise kind(f"{self.path}: {error}") from error

    def _do(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except sqlite3.DatabaseError as error:
            if self._connection is not None and _is_damaged(error) and self.path != ":memory:":
                self._connection.close()
                self._connection = None
                self._move_aside(error)
            raise


def _is_damaged(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _is_file_damaged(path: str) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok")
    except sqlite3.Error as error:
        return _is_damaged(error)


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Change the journal's mode. Unlike all else this does not wait for a lock, and workers start at one time."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
