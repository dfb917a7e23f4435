"""The stores: what they keep, for how long, how much of it, and for whom. Each test runs over each of them."""

import asyncio
import contextlib
import pathlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
from daemons import free_port

from cortex import store
from cortex.config import StoreKind, StoreSettings
from cortex.settings import ConfigError
from cortex.store.interface import ResponseStore, StoredResponse, StoreError
from cortex.store.sqlite import SqliteStore

Make = Callable[..., ResponseStore]


@pytest.fixture(params=["sqlite", "valkey"])
def make(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Make:
    """Make another store over the same data."""
    if request.param == "sqlite":
        return lambda **settings: found(StoreSettings(path=str(tmp_path / "a" / "responses.db"), **settings))
    url = request.getfixturevalue("valkey")
    return lambda **settings: found(StoreSettings(kind=StoreKind.VALKEY, url=url, **settings))


def found(settings: StoreSettings) -> ResponseStore:
    made = store.make(settings)
    assert made is not None
    return made


@contextlib.asynccontextmanager
async def opened(made: ResponseStore) -> AsyncIterator[ResponseStore]:
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


def turn(text: str, previous: str = "") -> StoredResponse:
    return StoredResponse(previous, msgspec.Raw(b"[]"), msgspec.Raw(b'{"text":"%b"}' % text.encode()))


async def test_what_is_kept_survives_a_restart_and_can_be_forgotten(make: Make) -> None:
    async with opened(make()) as first:
        await first.put("resp_a", turn("one"), ())
        await first.put("resp_a", turn("two", "resp_0"), ())
        assert await first.get("resp_x") is None
    async with opened(make()) as again:
        kept = await again.get("resp_a")
        assert kept is not None
        assert (kept.previous, bytes(kept.items), bytes(kept.body)) == ("resp_0", b"[]", b'{"text":"two"}')
        assert await again.delete("resp_a")
        assert not await again.delete("resp_a")
        assert await again.get("resp_a") is None


async def test_two_gateways_share_one(make: Make) -> None:
    async with opened(make()) as first, opened(make()) as second:
        await asyncio.gather(*(s.put(f"resp_{i}", turn(str(i)), ()) for i in range(50) for s in (first, second)))
        for i in range(50):
            assert await first.get(f"resp_{i}") == await second.get(f"resp_{i}") != None  # noqa: E711


async def test_a_response_expires_unless_its_conversation_goes_on(make: Make) -> None:
    async with opened(make(ttl_s=0.6)) as kept:
        await kept.put("resp_old", turn("a"), ())
        await kept.put("resp_used", turn("b"), ())
        started = time.monotonic()
        while time.monotonic() - started < 0.9:
            await kept.put("resp_new", turn("c", "resp_used"), ["resp_used"])
            await asyncio.sleep(0.05)
        assert await kept.get("resp_old") is None
        assert await kept.get("resp_used") is not None
        assert not await kept.delete("resp_old")


async def test_the_oldest_go_when_all_are_too_much(tmp_path: pathlib.Path) -> None:
    now = 0.0
    made = SqliteStore(str(tmp_path / "r.db"), ttl_s=1000, max_bytes=100_000, clock=lambda: now)
    async with opened(made) as kept:
        for i in range(300):
            now = float(i)
            await kept.put(f"resp_{i}", turn("x" * 1000), ())
        alive = [i for i in range(300) if await kept.get(f"resp_{i}") is not None]
        assert alive == list(range(alive[0], 300))
        assert 30 < len(alive) < 100
        now = 2000.0
        await kept.put("resp_last", turn("y"), ())
        for i in alive:
            assert not await kept.delete(f"resp_{i}")


@pytest.mark.parametrize("path", ["/proc/nowhere/responses.db", "/"])
async def test_a_file_that_cannot_be_is_said_so(path: str) -> None:
    made = SqliteStore(path, ttl_s=1, max_bytes=1024)
    with pytest.raises(StoreError, match=r"nowhere|unable to open"):
        await made.open()
    await made.close()


async def test_a_file_that_is_something_else(tmp_path: pathlib.Path) -> None:
    (tmp_path / "r.db").write_text("not a database" * 100)
    made = SqliteStore(str(tmp_path / "r.db"), ttl_s=1, max_bytes=1024)
    with pytest.raises(StoreError, match="not a database"):
        await made.open()
    held = [str(found.readlink()) for found in pathlib.Path("/proc/self/fd").iterdir() if found.is_symlink()]
    assert not [path for path in held if path.startswith(str(tmp_path))]
    await made.close()


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
    for work in (made.open(), made.get("x"), made.put("x", turn("a"), ()), made.delete("x")):
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
