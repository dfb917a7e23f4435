"""The stores: what they keep, for how long, how much of it, and for whom. Each test runs over each of them."""

import asyncio
import contextlib
import os
import pathlib
import sqlite3
import stat
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
from daemons import free_port

from cortex import store
from cortex.config import StoreKind, StoreSettings
from cortex.settings import ConfigError
from cortex.store.clock import StoreClock
from cortex.store.interface import (
    Link,
    Record,
    RecordStore,
    StoredConversation,
    StoredItems,
    StoredResponse,
    StoreError,
    StoreFullError,
)
from cortex.store.sqlite import SqliteStore

Make = Callable[..., RecordStore]


@pytest.fixture(params=["sqlite", "valkey"])
def make(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Make:
    """Make another store over the same data."""
    if request.param == "sqlite":
        return lambda **settings: found(StoreSettings(path=str(tmp_path / "a" / "responses.db"), **settings))
    url = request.getfixturevalue("valkey")
    return lambda **settings: found(StoreSettings(kind=StoreKind.VALKEY, url=url, **settings))


def found(settings: StoreSettings) -> RecordStore:
    made = store.make(settings)
    assert made is not None
    return made


@contextlib.asynccontextmanager
async def opened(made: RecordStore) -> AsyncIterator[RecordStore]:
    """Open a store, waiting for a server that is just starting."""
    async with asyncio.timeout(10):
        while True:
            try:
                await made.open()
                break
            except StoreError:
                await asyncio.sleep(0.02)
    try:
        yield made
    finally:
        await made.close()


def response(text: str, previous: str = "") -> StoredResponse:
    return StoredResponse(previous, b"[1,2]", 1, b'{"text":"%b"}' % text.encode())


async def test_stored_responses_survive_a_restart_and_can_be_deleted(make: Make) -> None:
    async with opened(make()) as first:
        await first.put("", "resp_a", response("one"))
        await first.put("", "resp_a", response("two", "resp_0"))
        assert await first.get("", "resp_x") is None
    async with opened(make()) as again:
        kept = await again.get("", "resp_a")
        assert kept is not None
        assert kept == response("two", "resp_0")
        assert await again.delete("", "resp_a")
        assert not await again.delete("", "resp_a")
        assert await again.get("", "resp_a") is None


@pytest.mark.parametrize(
    "record",
    [
        StoredResponse("resp_0", b'[{"a":1},{"b":2}]', 1, b"{}", 7, b"data: {}\n\n", 12.5),
        StoredItems("resp_0", b"[1]", 3),
        StoredConversation(b'{"id":"conv_a"}', "turn_0", ("msg_a", "msg_b")),
    ],
    ids=lambda record: type(record).__name__,
)
async def test_a_record_of_each_kind_comes_back(make: Make, record: Record) -> None:
    async with opened(make()) as kept:
        await kept.put("alice", "x_1", record)
        assert await kept.get("alice", "x_1") == record
        assert await kept.get("bob", "x_1") is None, "another owner's"
        assert not await kept.delete("bob", "x_1")
        await kept.put("bob", "x_1", StoredItems("", b"[]"))
        assert await kept.get("alice", "x_1") == record, "and an id of both is two records"
        assert await kept.delete("alice", "x_1")
        assert await kept.delete("bob", "x_1")


async def test_a_lease_that_has_ended_is_not_renewed(make: Make) -> None:
    async with opened(make()) as kept:
        assert not await kept.renew("alice", "x_2", 9.5)
        await kept.put("alice", "x_2", msgspec.structs.replace(response("a"), lease_until=1.5))
        assert await kept.renew("alice", "x_2", 9.5)
        found = await kept.get("alice", "x_2")
        assert isinstance(found, StoredResponse)
        assert found.lease_until == 9.5
        assert [link.lease_until for link in await kept.chain("alice", "x_2", max_records=9, max_bytes=9)] == [9.5]
        await kept.put("alice", "x_2", response("cancelled elsewhere"))
        assert not await kept.renew("alice", "x_2", 99.5)
        assert await kept.get("alice", "x_2") == response("cancelled elsewhere")


async def test_a_chain_is_read_in_one_query(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(make()) as kept:
        for i in range(10):
            lease_until = 5.5 if i == 9 else 0
            record = StoredResponse(f"resp_{i - 1}" if i else "", b"[%d]" % i, 0, b"x" * 9000, lease_until=lease_until)
            await kept.put("alice", f"resp_{i}", record)
        queries = 0
        name = "_run" if isinstance(kept, SqliteStore) else "_do"
        query = getattr(kept, name)

        def counted(work: object) -> object:
            nonlocal queries
            queries += 1
            return query(work)

        monkeypatch.setattr(kept, name, counted)

        async def chain(id: str, owner: str = "alice", max_records: int = 99, max_bytes: int = 999) -> list[Link]:
            return await kept.chain(owner, id, max_records=max_records, max_bytes=max_bytes)

        found = await chain("resp_9")
        assert queries == 1
        assert found == [
            Link(f"resp_{i}", f"resp_{i - 1}" if i else "", b"[%d]" % i, 5.5 if i == 9 else 0) for i in range(9, -1, -1)
        ]
        assert await chain("resp_9", max_records=3) == found[:3]
        assert await chain("resp_9", max_bytes=9) == found[:4], "the bytes of the fourth are too many"
        assert await chain("resp_9", "bob") == await chain("resp_x") == []
        await kept.delete("alice", "resp_4")
        assert await chain("resp_9") == found[:5]
        await kept.put("alice", "resp_4", StoredItems("resp_8", b"[]"))
        assert len(await chain("resp_9", max_records=20)) == 20, "a circle ends too"


async def test_two_gateways_share_one(make: Make) -> None:
    async with opened(make()) as first, opened(make()) as second:
        await asyncio.gather(*(s.put("", f"resp_{i}", response(str(i))) for i in range(50) for s in (first, second)))
        for i in range(50):
            assert await first.get("", f"resp_{i}") == await second.get("", f"resp_{i}") != None  # noqa: E711


async def test_a_response_expires_unless_its_conversation_goes_on(make: Make) -> None:
    async with opened(make(ttl_s=0.6)) as kept:
        await kept.put("", "resp_old", response("a"))
        await kept.put("", "resp_used", response("b"))
        started = time.monotonic()
        while time.monotonic() - started < 0.9:
            await kept.put("", "resp_new", response("c", "resp_used"))
            await asyncio.sleep(0.05)
        assert await kept.get("", "resp_old") is None
        assert await kept.get("", "resp_used") is not None
        assert not await kept.delete("", "resp_old")


async def test_the_oldest_go_when_all_are_too_much(tmp_path: pathlib.Path) -> None:
    now = 0.0
    made = SqliteStore(str(tmp_path / "r.db"), ttl_s=1000, max_bytes=100_000, clock=lambda: now)
    async with opened(made) as kept:
        for i in range(300):
            now = float(i)
            await kept.put("", f"resp_{i}", response("x" * 1000))
        alive = [i for i in range(300) if await kept.get("", f"resp_{i}") is not None]
        assert alive == list(range(alive[0], 300))
        assert 30 < len(alive) < 100
        now = 2000.0
        await kept.put("", "resp_last", response("y"))
        for i in alive:
            assert not await kept.delete("", f"resp_{i}")


@pytest.mark.parametrize("path", ["/proc/nowhere/responses.db", "/"])
async def test_an_impossible_file_is_an_error(path: str) -> None:
    made = SqliteStore(path, ttl_s=1, max_bytes=1024)
    with pytest.raises(StoreError, match=r"nowhere|unable to open"):
        await made.open()
    await made.close()


async def test_a_file_that_is_something_else_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database" * 100)
    made = SqliteStore(str(tmp_path / "notes.txt"), ttl_s=1, max_bytes=1024)
    with pytest.raises(StoreError, match="not a database"):
        await made.open()
    held = [str(found.readlink()) for found in pathlib.Path("/proc/self/fd").iterdir() if found.is_symlink()]
    assert not [path for path in held if path.startswith(str(tmp_path))]
    await made.close()
    assert (tmp_path / "notes.txt").read_text().startswith("not a database")


@pytest.mark.parametrize("how", ["nonsense", "cut", "a hole", "while it is open"])
async def test_a_damaged_file_is_moved_aside_and_begun_anew(
    tmp_path: pathlib.Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "responses.db"
    made = SqliteStore(str(path), ttl_s=1000, max_bytes=10_000_000)
    async with opened(made) as kept:
        for i in range(100):
            await kept.put("", f"resp_{i}", response("x" * 2000))
        if how == "while it is open":
            with contextlib.closing(sqlite3.connect(path)) as other:
                other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            with path.open("r+b") as file:
                file.seek(4096)
                file.write(b"\xff" * 100_000)
            with contextlib.suppress(StoreError):
                for i in range(100):
                    await kept.get("", f"resp_{i}")
                    await kept.put("", f"more_{i}", response("x" * 2000))
            await kept.put("", "resp_new", response("y"))
            assert await kept.get("", "resp_new") is not None
    if how != "while it is open":
        data = path.read_bytes()
        path.write_bytes(
            {"nonsense": b"nonsense" * 1000, "cut": data[:5000], "a hole": data[:100] + b"\xff" * (len(data) - 100)}[
                how
            ]
        )
        again = SqliteStore(str(path), ttl_s=1000, max_bytes=10_000_000)
        num_damaged = 0

        def damaged() -> None:
            nonlocal num_damaged
            num_damaged += 1

        again.on_damaged = damaged
        async with opened(again) as kept:
            with contextlib.suppress(StoreError):
                await kept.put("", "resp_first", response("y"))
            await kept.put("", "resp_new", response("y"))
            assert await kept.get("", "resp_new") is not None
        assert num_damaged == 1
    assert [found.name for found in tmp_path.glob("responses.db.damaged-*")]
    assert "is damaged" in caplog.text


async def test_a_row_that_cannot_be_read_is_as_not_there(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "responses.db"
    async with opened(SqliteStore(str(path), ttl_s=1000, max_bytes=1_000_000)) as kept:
        await kept.put("", "resp_a", response("a"))
        await kept.put("", "resp_b", response("b"))
        with contextlib.closing(sqlite3.connect(path)) as other, other:
            other.execute("UPDATE records SET rest = ? WHERE id = 'resp_a'", (b"\xc1garbage",))
        assert await kept.get("", "resp_a") is None
        assert await kept.get("", "resp_b") is not None


def test_limits_that_do_not_hold_for_valkey_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    store.make(StoreSettings(kind=StoreKind.VALKEY, url="redis://127.0.0.1:1", max_bytes_per_key=1024))
    assert "do not hold for Valkey" in caplog.text


async def test_the_file_is_its_owners_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "own" / "responses.db"
    mask = os.umask(0)
    try:
        async with opened(SqliteStore(str(path), ttl_s=1000, max_bytes=100_000)) as kept:
            await kept.put("", "resp_a", response("a"))
            found = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(mask)
    assert found == {"responses.db": 0o600, "responses.db-wal": 0o600, "responses.db-shm": 0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)  # as an earlier version left it
    async with opened(SqliteStore(str(path), ttl_s=1000, max_bytes=100_000)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_one_key_does_not_push_out_anothers(tmp_path: pathlib.Path) -> None:
    now = 0.0
    made = SqliteStore(
        str(tmp_path / "r.db"), ttl_s=10_000, max_bytes=100_000, max_bytes_per_owner=60_000, clock=lambda: now
    )
    async with opened(made) as kept:
        for i in range(10):
            await kept.put("alice", f"resp_a{i}", response("x" * 1000))
        for i in range(300):
            now += 1
            await kept.put("bob", f"resp_b{i}", response("x" * 1000))
            await kept.put("carol", f"resp_c{i}", response("x" * 1000))
        assert all([await kept.get("alice", f"resp_a{i}") is not None for i in range(10)])
        for owner, letter in (("bob", "b"), ("carol", "c")):
            alive = [i for i in range(300) if await kept.get(owner, f"resp_{letter}{i}") is not None]
            assert alive == list(range(alive[0], 300))
            assert 30 < len(alive) <= 60
        with pytest.raises(StoreFullError):
            await kept.put("", "resp_big", response("x" * 60_000))
        assert isinstance(kept.obstacle(60_001), StoreFullError)
        assert kept.obstacle(1000) is None


async def test_what_an_earlier_version_stored_is_dropped(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "responses.db"
    with contextlib.closing(sqlite3.connect(path)) as before, before:
        before.execute("CREATE TABLE responses (id TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
        before.execute("CREATE TABLE owners (owner TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL)")
    async with opened(SqliteStore(str(path), ttl_s=1000, max_bytes=100_000)) as kept:
        await kept.put("", "resp_new", response("y"))
        assert await kept.get("", "resp_new") is not None
    with contextlib.closing(sqlite3.connect(path)) as after:
        tables = {name for (name,) in after.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert not tables & {"responses", "owners"}


DAY_S = 24 * 3600.0


def test_a_jump_of_the_clock_is_no_time_that_passed() -> None:
    wall, elapsed = 1e9, 0.0
    clock = StoreClock(lambda: wall, lambda: elapsed)
    clock.begin(0, 30 * DAY_S)
    wall, elapsed = wall + 31 * DAY_S, 60.0
    assert clock() == 1e9 + 60, "while it is open"
    clock.begin(1e9, 30 * DAY_S)
    assert clock() == 1e9 + 7 * DAY_S, "from one start to the next"
    wall = 0.0
    clock.begin(1e9, 30 * DAY_S)
    assert clock() == 1e9, "and not backwards"
    wall = 1e9 + DAY_S
    clock.begin(1e9, 30 * DAY_S)
    assert clock() == wall


async def test_a_clock_that_is_set_a_month_ahead_wipes_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = str(tmp_path / "r.db"), time.time
    async with opened(SqliteStore(path, ttl_s=30 * DAY_S, max_bytes=100_000)) as kept:
        await kept.put("", "resp_a", response("a"))
        monkeypatch.setattr(time, "time", lambda: real() + 31 * DAY_S)
        await kept.put("", "resp_b", response("b"))
        assert await kept.get("", "resp_a") is not None
    async with opened(SqliteStore(path, ttl_s=30 * DAY_S, max_bytes=100_000)) as kept:
        await kept.put("", "resp_c", response("c"))
        assert await kept.get("", "resp_a") is not None


async def test_a_worker_that_starts_while_another_makes_the_file_waits_for_it(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TABLE t (x)")
    other.execute("BEGIN IMMEDIATE")
    made = SqliteStore(str(path), ttl_s=1, max_bytes=1024)
    opening = asyncio.ensure_future(made.open())
    assert not (await asyncio.wait({opening}, timeout=0.1))[0]
    other.execute("ROLLBACK")
    other.close()
    await opening
    await made.close()


async def test_a_server_that_is_not_there() -> None:
    pytest.importorskip("redis")
    made = found(StoreSettings(kind=StoreKind.VALKEY, url=f"redis://user:secret@127.0.0.1:{free_port()}/0"))
    for work in (made.open(), made.get("", "x"), made.put("", "x", response("a")), made.delete("", "x")):
        with pytest.raises(StoreError) as caught:
            await work
        assert "secret" not in str(caught.value)
    await made.close()


def test_where_the_file_is() -> None:
    def path(**environment: str) -> str:
        made = store.make(StoreSettings(), environment)
        assert isinstance(made, SqliteStore)
        return made.path

    assert path(STATE_DIRECTORY="/s:/t", HOME="/h") == "/s/responses.db"
    assert path(XDG_STATE_HOME="/x", HOME="/h") == "/x/cortex/responses.db"
    assert path(HOME="/h") == "/h/.local/state/cortex/responses.db"
    with pytest.raises(ConfigError, match=r"store\.path: is empty"):
        store.make(StoreSettings(), {})
    assert store.make(StoreSettings(kind=StoreKind.NONE), {}) is None
