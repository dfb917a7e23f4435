"""The capture of one key's requests: what is noted and what never is, its bounds, its end, and that it can be off."""

import asyncio
import pathlib
import time
from typing import Any

import orjson
import pytest
from answers import CHAT_STREAM
from fake_node import FakeNode, Line, Received
from gateway_rig import CHAT, LOCAL_TOKEN, STREAM, Rig, rig, until
from key_rig import KEY, ring

from cortex.access.keys import KeyRing, Limits, Principal
from cortex.capture import capture as module
from cortex.capture.capture import Capture
from cortex.capture.exchange import CapturedExchange
from cortex.capture.shelf import FolderShelf, MemoryShelf, Shelf

ALICE, BOB = {"authorization": "Bearer alice-key"}, {"x-api-key": "bob-key"}
PATH = "/admin/capture"


def keys() -> KeyRing:
    return ring(
        (KEY, Principal("root", (), is_admin=True)),
        ("alice-key", Principal("alice")),
        ("bob-key", Principal("bob", limits=Limits(requests_per_minute=100))),
    )


async def admin(gateway: Rig, method: str, path: str = PATH, body: Any = b"", key: str = KEY) -> tuple[int, Any]:
    reply = await gateway.call(method, path, body, {"authorization": f"Bearer {key}"}).end()
    return reply.status, orjson.loads(reply.body)


async def ask(
    gateway: Rig, headers: dict[str, str] | None = None, body: Any = CHAT, path: str = "chat/completions"
) -> Any:
    return await gateway.call("POST", f"/v1/{path}", body, headers).end()


async def captured(gateway: Rig, number: int, key: str = KEY) -> list[dict[str, Any]]:
    """Return that many captured requests, whole."""
    await until(lambda: len(gateway.gateway.capture.names()) >= number)
    _, listed = await admin(gateway, "GET", key=key)
    assert len(listed["requests"]) == number
    return [(await admin(gateway, "GET", f"{PATH}/{one['id']}", key=key))[1] for one in listed["requests"]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PUT_AFTER_S", 0.03)


# ------------------------------------------------------------------ content


async def test_requests_of_the_key_are_noted_whole_and_no_others() -> None:
    async with rig(FakeNode().ready("m"), keys=keys()) as gateway:
        await ask(gateway, ALICE)
        status, begun = await admin(gateway, "POST", body={"key": "alice", "seconds": 60})
        assert (status, begun["capture"]["key"], begun["capture"]["by"]) == (200, "alice", "root")
        headers = {**ALICE, "user-agent": "me/1", "x-secret": "hidden", "cookie": "hidden"}
        plain = await ask(gateway, headers)
        stream = await ask(gateway, ALICE, STREAM)
        refused = await ask(gateway, ALICE, {**CHAT, "model": "nobody"})
        await ask(gateway, BOB)
        assert (plain.status, stream.status, refused.status) == (200, 200, 404)
        one, two, three = await captured(gateway, 3)
        assert orjson.loads(one["body"]) == CHAT
        assert one["answer"][0][1] == plain.body.decode()
        assert (one["status"], one["method"], one["path"]) == (200, "POST", "/v1/chat/completions")
        assert one["headers"]["user-agent"] == "me/1"
        assert one["answer_headers"]["content-type"] == "application/json"
        assert one["record"]["node"] == "a"
        assert one["record"]["tokens_out"] > 0
        assert not one["is_cut"]
        assert "".join(text for _, text in two["answer"]) == stream.body.decode()
        times = [at for at, _ in two["answer"]]
        assert times == sorted(times)
        assert 0 <= times[0] <= times[-1] <= two["ended_s"]
        assert (three["status"], three["record"]["finish"]) == (404, "model_not_found")
        assert "nobody" in three["answer"][0][1]
        everything = orjson.dumps([one, two, three])
        for secret in (b"alice-key", b"hidden", b"bob"):
            assert secret not in everything


async def test_a_gateway_without_keys_is_captured_by_no_name_until_it_is_ended() -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        for _ in range(3):
            await ask(gateway)
        status, _ = await admin(gateway, "POST", body={"key": ""}, key=LOCAL_TOKEN)
        assert status == 200
        await ask(gateway)
        await ask(gateway, body={"model": "m", "input": "Hi"}, path="responses")
        await captured(gateway, 2, LOCAL_TOKEN)
        await admin(gateway, "POST", f"{PATH}/end", key=LOCAL_TOKEN)
        await ask(gateway)
        await asyncio.sleep(0.1)
        assert len(gateway.gateway.capture.names()) == 2, "what was captured stays, and no more is"
        status, left = await admin(gateway, "DELETE", key=LOCAL_TOKEN)
        assert (status, left["capture"], left["requests"]) == (200, None, [])


async def test_a_client_that_leaves_is_noted_as_far_as_it_went() -> None:
    async def begin_only(received: Received, line: Line) -> None:
        await line.start_stream()
        await line.chunk(CHAT_STREAM[1])
        await asyncio.sleep(60)

    async with rig(FakeNode(script=begin_only).ready("m"), keys=keys()) as gateway:
        await admin(gateway, "POST", body={"key": "alice"})
        call = gateway.call("POST", "/v1/chat/completions", STREAM, ALICE)
        await call.until(lambda call: bool(call.body))
        call.leave()
        await call.end()
        (one,) = await captured(gateway, 1)
        assert one["record"]["status"] == 499
        assert one["answer"]


# ------------------------------------------------------------------ bounds


async def test_it_ends_by_its_time_and_is_removed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_S", 0.3)
    capture = Capture()
    capture.begin("alice", "root", 0.05, 1000)
    assert capture.key == "alice"
    await until(lambda: capture.key is None)
    assert capture.state is not None
    assert capture.state.ended == "time"
    await until(lambda: capture.state is None)
    assert capture.names() == []


async def test_beyond_its_bytes_an_answer_is_cut_and_the_capture_ends(caplog: pytest.LogCaptureFixture) -> None:
    async with rig(FakeNode().ready("m"), keys=keys()) as gateway:
        await admin(gateway, "POST", body={"key": "alice", "max_bytes": 400})
        reply = await ask(gateway, ALICE, STREAM)
        (one,) = await captured(gateway, 1)
        assert one["is_cut"]
        assert len(one["body"]) + sum(len(text) for _, text in one["answer"]) <= 400
        assert len(reply.body) > 400, "the client gets all of it"
        await ask(gateway, ALICE)
        assert gateway.gateway.capture.state is not None
        assert gateway.gateway.capture.state.ended == "full"
    lines = [(record.getMessage(), record.__dict__["fields"]) for record in caplog.records if "capture" in record.name]
    assert lines[0] == ("capture begins", {"by": "root", "key": "alice", "seconds": 600, "max_bytes": 400})
    assert lines[-1] == ("capture ends", {"key": "alice", "reason": "full", "requests": 1})


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({"key": "nobody"}, "key"),
        ({"key": ""}, "key"),
        ({"key": "alice", "seconds": 0}, "seconds"),
        ({"key": "alice", "seconds": 1e6}, "seconds"),
        ({"key": "alice", "max_bytes": 1 << 40}, "max_bytes"),
        ({"key": "alice", "other": 1}, "other"),
        ({}, "key"),
    ],
)
async def test_a_wrong_capture_is_refused(body: dict[str, Any], wrong: str) -> None:
    async with rig(FakeNode().ready("m"), keys=keys()) as gateway:
        status, told = await admin(gateway, "POST", body=body)
        assert (status, wrong in told["error"]["message"]) == (400, True)
        assert gateway.gateway.capture.key is None


async def test_it_is_an_administrators_act() -> None:
    async with rig(FakeNode().ready("m"), keys=keys()) as gateway:
        await admin(gateway, "POST", body={"key": "alice"})
        await ask(gateway, ALICE)
        (one,) = await captured(gateway, 1)
        for method, path in (("GET", PATH), ("POST", PATH), ("DELETE", PATH), ("GET", f"{PATH}/{one['id']}")):
            assert (await gateway.call(method, path, b"{}", ALICE).end()).status == 403
        assert (await admin(gateway, "GET", f"{PATH}/req_of_nobody"))[0] == 404
        assert (await admin(gateway, "GET", f"{PATH}/state"))[0] == 404


async def test_while_it_is_off_an_exchange_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("a request was tapped")

    monkeypatch.setattr(Capture, "tap", fail)
    monkeypatch.setattr(CapturedExchange, "__init__", fail)
    async with rig(FakeNode().ready("m"), keys=keys()) as gateway:
        assert (await ask(gateway, ALICE, STREAM)).status == 200
        assert (await ask(gateway, BOB)).status == 200


# ------------------------------------------------------------------ workers


@pytest.fixture(params=["memory", "folder"])
def shelf(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Shelf:
    return MemoryShelf() if request.param == "memory" else FolderShelf(tmp_path)


def test_a_shelf_keeps_values_in_order(shelf: Shelf, tmp_path: pathlib.Path) -> None:
    assert (shelf.names(), shelf.get("one"), shelf.size_bytes()) in [([], None, 0), ((), None, 0)]
    for name in ("one", "two"):
        shelf.put(name, name.encode() * 2)
        time.sleep(0.01)
    assert list(shelf.names()) == ["one", "two"]
    assert (shelf.get("two"), shelf.size_bytes()) == (b"twotwo", 12)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    shelf.clear()
    assert list(shelf.names()) == []
    assert list(tmp_path.iterdir()) == []


async def test_workers_follow_one_another(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.02)
    changes: list[int] = []
    one, two = Capture(FolderShelf(tmp_path)), Capture(FolderShelf(tmp_path), lambda: changes.append(1))
    following = asyncio.ensure_future(two.refresh())
    one.begin("alice", "root", 60, 1000)
    await until(lambda: two.key == "alice")
    assert changes == [1]
    one.end("by root")
    await until(lambda: two.key is None)
    one.remove("root")
    await until(lambda: two.state is None)
    following.cancel()
    one.close()
    assert list(tmp_path.iterdir()) == []
