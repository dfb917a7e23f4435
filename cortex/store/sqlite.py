"""Responses in an SQLite file: the default, for the gateways of one host.

All statements run on one thread, so a slow disk delays nobody but who waits for it. The file is bounded twice: by the
age of a response since it was last part of a conversation, and by the bytes of all, of which the oldest go first. A sum
kept by triggers makes the second cheap, and right for several processes.
"""

import asyncio
import pathlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cortex.store.interface import StoredResponse, StoreError, from_bytes, to_bytes

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0
"""How long a statement waits for another process's."""

EVICTION_BATCH = 64

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, value BLOB NOT NULL, size_bytes INTEGER NOT NULL, expires_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_age ON responses (expires_at);
CREATE TABLE IF NOT EXISTS total (size_bytes INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT * FROM total);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON responses
    BEGIN UPDATE total SET size_bytes = size_bytes + NEW.size_bytes; END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON responses
    BEGIN UPDATE total SET size_bytes = size_bytes - OLD.size_bytes; END;
"""


class SqliteStore:
    """A store in one file; ``:memory:`` keeps it in this process alone."""

    def __init__(self, path: str, *, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "cortex-store")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Open the file, making it and its folder if need be."""
        await self._run(self._open)

    async def get(self, id: str) -> StoredResponse | None:
        """Return a response that has not expired."""

        def read(connection: sqlite3.Connection) -> StoredResponse | None:
            statement = "SELECT value FROM responses WHERE id = ? AND expires_at > ?"
            row = connection.execute(statement, (id, self._clock())).fetchone()
            if row is None:
                return None
            return from_bytes(row[0])

        return await self._run(lambda: read(self._open()))

    async def put(self, id: str, stored: StoredResponse, chain: Sequence[str]) -> None:
        """Keep a response; forget what has expired, and the oldest while all are too many bytes."""
        value = to_bytes(stored)

        def write(connection: sqlite3.Connection) -> None:
            now = self._clock()
            expires_at = now + self._ttl_s
            with connection:
                connection.execute("DELETE FROM responses WHERE expires_at <= ?", (now,))
                # Not REPLACE: it would skip the trigger that counts.
                connection.execute("DELETE FROM responses WHERE id = ?", (id,))
                connection.execute("INSERT INTO responses VALUES (?, ?, ?, ?)", (id, value, len(value), expires_at))
                refresh = "UPDATE responses SET expires_at = ? WHERE id = ?"
                connection.executemany(refresh, [(expires_at, earlier) for earlier in chain])
                while connection.execute("SELECT size_bytes FROM total").fetchone()[0] > self._max_bytes:
                    oldest = "SELECT id FROM responses ORDER BY expires_at LIMIT ?"
                    connection.execute(f"DELETE FROM responses WHERE id IN ({oldest})", (EVICTION_BATCH,))

        await self._run(lambda: write(self._open()))

    async def delete(self, id: str) -> bool:
        """Forget a response."""

        def remove(connection: sqlite3.Connection) -> bool:
            with connection:
                statement = "DELETE FROM responses WHERE id = ? AND expires_at > ?"
                return connection.execute(statement, (id, self._clock())).rowcount > 0

        return await self._run(lambda: remove(self._open()))

    async def close(self) -> None:
        """Close the file after what is under way."""

        def shut() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        await self._run(shut)
        self._thread.shutdown(wait=False)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            if self.path != ":memory:":
                pathlib.Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)
            try:
                # Readers and a writer at a time; a crash of the host may lose the last responses and never the file.
                _switch_to_wal(connection)
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(_SCHEMA)
            except sqlite3.Error:
                connection.close()  # each request tries anew
                raise
            self._connection = connection
        return self._connection

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path}: {error}") from error


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
