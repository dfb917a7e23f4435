"""Use per key, model and day: its sums in every store, its cost, its days, and the endpoint."""

import asyncio
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from asgi_call import Call
from fake_node import FakeNode, error
from gateway_rig import CHAT, STREAM, rig
from key_rig import KEY, ring

from cortex.access.keys import Principal
from cortex.config import ModelProfile, Price, StoreKind, StoreSettings
from cortex.store import usage
from cortex.store.interface import RecordStore, StoreError
from cortex.store.sqlite import SqliteStore
from cortex.store.usage import MemoryUsage, UsageQuery, UsageRow
from cortex.store.valkey import ValkeyStore
from cortex.usage_recorder import UsageRecorder, cost_of, day_of

ANY = UsageQuery("0000-01-01", "9999-12-31")
ROW = UsageRow("2027-01-02", "alice", "m", 1, 10, 5, 4, 0.25, 100.0)
TODAY = day_of(time.time())


@pytest.fixture(params=["memory", "sqlite", "valkey"])
def below(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Callable[[], RecordStore | None]:
    """Return a maker of stores of responses, which share their data."""
    if request.param == "memory":
        return lambda: None
    if request.param == "sqlite":
        return lambda: SqliteStore(str(tmp_path / "responses.db"), ttl_s=60, max_bytes=1 << 20)
    url = request.getfixturevalue("valkey")
    return lambda: ValkeyStore(url, ttl_s=60)


async def test_processes_add_up_and_rows_are_found(below: Callable[[], RecordStore | None]) -> None:
    parts = [below(), below()]
    first, second = (usage.make(part, 3) for part in parts) if parts[0] else [usage.make(None, 3)] * 2
    if isinstance(parts[0], ValkeyStore):
        async with parts[0].pipeline() as pipeline:
            pipeline.flushall()
            await pipeline.execute()
    assert await first.rows(ANY) == []
    other = UsageRow("2027-01-01", "", "o/n:x", 2, 1, 1, 0, 0.0, 90.0)
    later = msgspec.structs.replace(ROW, last_used_s=200.0)
    await asyncio.gather(first.add([ROW, other]), second.add([later]), first.add([ROW]))
    three = UsageRow("2027-01-02", "alice", "m", 3, 30, 15, 12, 0.75, 200.0)
    for store in (first, second):
        found = await store.rows(ANY)
        # Of two gateways that write the same second, Valkey keeps the time of either.
        assert [msgspec.structs.replace(row, last_used_s=max(row.last_used_s, 200.0)) for row in found[1:]] == [three]
        assert found[0] == other
        assert await store.rows(UsageQuery("2027-01-02", "2027-01-09")) == found[1:]
        assert await store.rows(UsageQuery("2027-01-01", "2027-01-01", key="alice")) == []
        assert await store.rows(UsageQuery("2027-01-01", "2027-01-02", key="")) == [other]
        assert await store.rows(UsageQuery("2027-01-01", "2027-01-02", model="m")) == found[1:]
        by_day = await store.rows(UsageQuery("2027-01-01", "2027-01-02", by=("day",)))
        assert [(row.day, row.key, row.model, row.requests) for row in by_day] == [
            ("2027-01-01", "", "", 2),
            ("2027-01-02", "", "", 3),
        ]
        (all_of_it,) = await store.rows(msgspec.structs.replace(ANY, by=()))
        assert (all_of_it.requests, all_of_it.tokens_in, all_of_it.cost) == (5, 31, 0.75)
        assert (await store.last_used())[""] == 90.0
        assert (await store.last_used())["alice"] >= 100.0
    for part in parts:
        if part is not None:
            await part.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_the_oldest_days_are_deleted_and_no_clock_deletes_more(kind: str) -> None:
    below = SqliteStore(":memory:", ttl_s=60, max_bytes=1 << 20) if kind == "sqlite" else None
    store = usage.make(below, 3)
    assert not store.persists
    for day in ("2027-01-01", "2027-01-02", "2027-01-04", "2099-01-01"):  # the last is of a clock that was set ahead
        await store.add([msgspec.structs.replace(ROW, day=day)])
    assert [row.day for row in await store.rows(ANY)] == ["2027-01-02", "2027-01-04", "2099-01-01"]


async def test_use_survives_a_restart_in_its_file(tmp_path: pathlib.Path) -> None:
    for requests in (1, 2):
        below = SqliteStore(str(tmp_path / "responses.db"), ttl_s=60, max_bytes=1 << 20)
        store = usage.make(below, 400)
        assert store.persists
        await store.add([ROW])
        assert [row.requests for row in await store.rows(ANY)] == [requests]
        await below.close()


@pytest.mark.parametrize(
    ("price", "cost"),
    [
        (None, 0.0),
        (Price(), 0.0),
        (Price(1.0, 4.0), (1000 * 1.0 + 100 * 4.0) / 1e6),
        (Price(1.0, 4.0, 0.1), (600 * 1.0 + 400 * 0.1 + 100 * 4.0) / 1e6),
    ],
)
def test_the_cost_of_a_request(price: Price | None, cost: float) -> None:
    assert cost_of(price, 1000, 100, 400) == pytest.approx(cost)


@pytest.mark.parametrize(
    ("at_s", "day"), [(0.0, "1970-01-01"), (86399.9, "1970-01-01"), (1798675200.0, "2026-12-31"), (1e10, "2286-11-20")]
)
def test_a_day_is_one_of_utc(at_s: float, day: str) -> None:
    assert day_of(at_s) == day


# ------------------------------------------------------------------ the recorder


class Failing(MemoryUsage):
    """A store that fails while it is told to, and that takes its time."""

    fails = False
    go_on: asyncio.Event | None = None

    async def add(self, rows: Sequence[UsageRow]) -> None:
        if self.go_on is not None:
            await self.go_on.wait()
        if self.fails:
            raise StoreError("the disk is full")
        await super().add(rows)


def line(**fields: Any) -> tuple[float, dict[str, Any]]:
    tokens = {"tokens_in": 3, "tokens_out": 0, "tokens_cached": 0}
    return 100.0, {"model": "m", "node": "a", "key": "alice", **tokens, **fields}


async def test_what_cannot_be_written_is_kept_and_told(caplog: pytest.LogCaptureFixture) -> None:
    store = Failing(3)
    recorder = UsageRecorder(store, lambda model: None)
    store.fails = True
    for _ in range(2):
        recorder.record([line()])
        with pytest.raises(StoreError):
            await recorder.write()
    assert caplog.text.count("use cannot be written") == 1
    assert recorder._supervisor.degraded == ("usage",)
    store.fails = False
    (row,) = await recorder.rows(ANY)
    assert (row.requests, row.tokens_in) == (2, 6)
    assert recorder._supervisor.degraded == ()


async def test_a_write_that_is_cancelled_counts_once() -> None:
    store = Failing(3)
    store.go_on = asyncio.Event()
    recorder = UsageRecorder(store, lambda model: None)
    recorder.record([line()])
    writing = asyncio.ensure_future(recorder.write())
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait({writing})
    store.go_on.set()
    assert [row.requests for row in await recorder.rows(ANY)] == [1]


async def test_requests_that_reached_no_node_are_no_use_and_the_others_are_added_up() -> None:
    recorder = UsageRecorder(MemoryUsage(3), lambda model: Price(1.0))
    recorder.record([line(node="")] * 3 + [line()] * 5000 + [line(key="bob", tokens_in=1_000_000)])
    assert len(recorder._new) == 2, "added up, however long the store takes"
    rows = await recorder.rows(ANY)
    assert [(row.key, row.requests) for row in rows] == [("alice", 5000), ("bob", 1)]
    assert rows[1].cost == 1.0
    recorder.record([line(key="carol", tokens_in=10, tokens_cached=20)])  # by a node that counts wrong
    assert (await recorder.rows(msgspec.structs.replace(ANY, key="carol")))[0].cost > 0


# ------------------------------------------------------------------ over HTTP


async def test_use_is_reported_by_key_and_model(tmp_path: pathlib.Path) -> None:
    keys = ring((KEY, Principal("alice", is_admin=True)), ("b", Principal("bob")))
    models = (ModelProfile(id="m", source="/w", price=Price(1.0, 10.0)),)
    store = StoreSettings(path=str(tmp_path / "responses.db"))
    async with rig(FakeNode().ready("m"), keys=keys, models=models, store=store) as gateway:

        async def ask(path: str) -> Any:
            call = await gateway.call("GET", f"/admin/usage{path}", b"", {"x-api-key": KEY}).end()
            return call.json() if call.status == 200 else (call.status, call.json()["error"]["code"])

        for body, key in ((CHAT, KEY), (STREAM, KEY), (CHAT, "b"), ({**CHAT, "model": "none"}, "b")):
            await gateway.call("POST", "/v1/chat/completions", body, {"authorization": f"Bearer {key}"}).end()
        await asyncio.sleep(0.02)  # of the log's batch
        report = await ask("")
        assert (report["last"], report["persists"]) == (TODAY, True)
        assert [(row["key"], row["model"], row["requests"]) for row in report["rows"]] == [
            ("alice", "m", 2),
            ("bob", "m", 1),
        ]
        bob = report["rows"][1]
        assert (bob["tokens_in"], bob["tokens_out"], bob["tokens_cached"], bob["day"]) == (7, 2, 3, TODAY)
        assert bob["cost"] == pytest.approx((7 * 1.0 + 2 * 10.0) / 1e6)
        assert (await ask("?key=bob&model=m"))["rows"] == [bob]
        assert (await ask("?key="))["rows"] == []
        assert (await ask("?from=2020-01-01&to=2020-12-31"))["rows"] == []
        for wrong in ("from=today", "to=2027-1-1x", "from=2027-02-30", "to=2000-01-01&from=2001-01-01"):
            assert await ask(f"?{wrong}") == (400, "invalid_value"), wrong
        (summed,) = (await ask("?by=model"))["rows"]
        assert (summed["key"], summed["model"], summed["requests"]) == ("", "m", 3)
        assert await ask("?by=day,node") == (400, "invalid_value")
        assert await ask("?sort=day") == (400, "unsupported_parameter")
        listed = await gateway.call("GET", "/admin/keys", b"", {"x-api-key": KEY}).end()
        assert {row["name"]: row["last_used_s"] > time.time() - 60 for row in listed.json()["keys"]} == {
            "alice": True,
            "bob": True,
        }
        for headers, status in (({"x-api-key": "b"}, 403), ({}, 401)):
            assert (await gateway.call("GET", "/admin/usage", b"", headers).end()).status == status


async def test_use_that_is_not_written_yet_is_written_at_the_end(tmp_path: pathlib.Path) -> None:
    store = StoreSettings(path=str(tmp_path / "responses.db"))
    async with rig(FakeNode().ready("m"), store=store) as gateway:
        await gateway.chat().end()
        await asyncio.sleep(0.02)
    async with rig(FakeNode().ready("m"), store=store) as gateway:
        rows = (await gateway.call("GET", "/admin/usage").end()).json()["rows"]
    assert [(row["key"], row["requests"]) for row in rows] == [("", 1)]


async def test_a_gateway_without_a_store_keeps_use_for_its_own_time() -> None:
    async with rig(
        FakeNode(script=error(500, "server_error")).ready("m"), store=StoreSettings(kind=StoreKind.NONE)
    ) as gateway:
        call: Call = gateway.chat()
        await call.end()
        await asyncio.sleep(0.02)
        report = (await gateway.call("GET", "/admin/usage").end()).json()
    assert not report["persists"]
    assert [(row["requests"], row["tokens_in"]) for row in report["rows"]] == [(1, 0)]


async def test_a_store_that_does_not_answer_is_told() -> None:
    store = StoreSettings(kind=StoreKind.VALKEY, url="redis://127.0.0.1:1/0")
    async with rig(FakeNode().ready("m"), store=store) as gateway:
        call = await gateway.call("GET", "/admin/usage").end()
        assert (call.status, call.json()["error"]["code"]) == (503, "store_unavailable")
        assert (await gateway.call("GET", "/admin/keys").end()).status == 200
