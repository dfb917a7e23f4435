"""The page's files and its feed, without a browser: what is served, to whom, how much of it, and how it ends."""

import pathlib
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import daemons
import httpx
import msgspec
import orjson
import pytest
from asgi_call import Call
from fake_node import GIB, FakeNode, error
from gateway_rig import Rig, rig, until, write_config
from key_rig import KEY
from key_rig import ring as key_ring

from cortex.access.keys import Principal
from cortex.config import Config, ModelProfile
from cortex.dashboard import assets, feed, journal, ring, view
from cortex.dashboard.feed import Feed
from cortex.dashboard.journal import Journal
from cortex.dashboard.rates import SERIES
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.service import FleetService
from cortex.fleet.state import Node
from cortex.wire.headers import CLIENT_CLOSED_REQUEST
from cortex.wire.node import (
    Device,
    DeviceKind,
    Discovery,
    Health,
    ModelState,
    ModelStatus,
    NodeState,
    WorkerHealth,
    WorkerState,
)

Events = list[tuple[str, Any]]


def events(body: bytes) -> Events:
    """Return the events of a stream."""
    found: Events = []
    for block in body.decode().split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n")
            found.append((name[7:], orjson.loads(data[6:])))
    return found


def merge(target: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """Apply a merge patch as RFC 7386 has it."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            held = target.get(key)
            target[key] = merge(held if isinstance(held, dict) else {}, value)
        else:
            target[key] = value
    return target


def state_of(found: Events) -> dict[str, Any]:
    """Return the fleet as a viewer of these events has it."""
    state: dict[str, Any] = {}
    for name, data in found:
        if name == "whole":
            state = data["state"]
        elif "patch" in data:
            state = merge(state, data["patch"])
    return state


# ------------------------------------------------------------------ files


async def test_every_file_is_served_with_its_type_and_a_strict_policy() -> None:
    async with rig() as gateway:
        paths = [
            "/",
            *(f"/dashboard/{file.name}" for file in assets.FOLDER.iterdir() if file.suffix in assets.CONTENT_TYPES),
        ]
        assert "/dashboard/index.html" in paths
        paths.remove("/dashboard/index.html")
        assert len(paths) > 15
        for path in paths:
            reply = await gateway.call("GET", path, client="10.0.0.9").end()
            assert reply.status == 200, path
            suffix = pathlib.PurePath(path).suffix or ".html"
            assert reply.headers["content-type"].encode() == assets.CONTENT_TYPES[suffix]
            policy = reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy
            assert reply.headers["x-content-type-options"] == "nosniff"
            again = await gateway.call("GET", path, headers={"if-none-match": reply.headers["etag"]}).end()
            assert (again.status, again.body) == (304, b"")
            other = await gateway.call("GET", path, headers={"if-none-match": '"other"'}).end()
            assert other.status == 200
            head = await gateway.call("HEAD", path).end()
            assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(reply.body)))
        assert (await gateway.call("POST", "/").end()).status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/",
        "/dashboard/../gateway.py",
        "/dashboard/%2e%2e/feed.py",
        "/dashboard/../../../etc/passwd",
        "/dashboard//etc/passwd",
        "/dashboard/feed.py",
        "/dashboard/meson.build",
        "/dashboard/INDEX.HTML",
        "/dashboard/style.css/",
        "/dashboard/style.css\x00",
        "//dashboard/style.css",
    ],
)
async def test_nothing_else_is_served(path: str) -> None:
    async with rig() as gateway:
        assert (await gateway.call("GET", path).end()).status == 404


def test_no_file_names_another_host() -> None:
    for path, asset in assets.read().items():
        body = asset.body.decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}|@import|\burl\(", body), path
        # Nor does any make markup of text, or keep the key where another tab finds it.
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", body), (
            path
        )
        assert path == "/dashboard/theme.js" or "localStorage" not in body, path
        assert not re.search(r"""<[^>]+\s(style|on\w+)=["']""", body), path


def test_every_import_is_of_a_file_that_is_there_and_addresses_are_relative() -> None:
    found = assets.read()
    for path, asset in found.items():
        for name in re.findall(r'from "([^"]+)"', asset.body.decode()):
            assert f"/dashboard/{name.removeprefix('./')}" in found, (path, name)
    page = found["/"].body.decode()
    for name in re.findall(r'(?:src|href)="([^"#]+)"', page):
        assert f"/{name}" in found, name


# ------------------------------------------------------------------ access


async def test_the_page_is_public_and_the_feed_needs_an_administrator() -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        assert (await gateway.call("GET", "/admin/events", b"", {"authorization": ""}).end()).status == 401
    keys = key_ring((KEY, Principal("root", (), is_admin=True)), ("user", Principal("user")))
    async with rig(FakeNode().ready("m"), keys=keys) as gateway:
        for key, status in ((None, 401), ("wrong", 401), ("user", 403)):
            given = {"authorization": f"Bearer {key}"} if key else {}
            reply = await gateway.call("GET", "/admin/events", b"", given).end()
            assert reply.status == status
            assert (await gateway.call("GET", "/", b"", given).end()).status == 200
        watching = gateway.call("GET", "/admin/events", b"", {"authorization": f"Bearer {KEY}"}, client="10.0.0.9")
        await watching.until(lambda call: bool(events(call.body)))
        assert watching.status == 200
        watching.leave()
        await watching.end()
        head = await gateway.call("HEAD", "/admin/events", b"", {"authorization": f"Bearer {KEY}"}).end()
        assert (head.status, head.body) == (200, b"")


async def test_a_key_that_is_taken_away_ends_the_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.02)
    keys = key_ring((KEY, Principal("root", (), is_admin=True)))
    async with rig(FakeNode().ready("m"), keys=keys) as gateway:
        watching = gateway.call("GET", "/admin/events", b"", {"x-api-key": KEY})
        await watching.until(lambda call: len(events(call.body)) >= 3)
        other = key_ring(("another", Principal("root", (), is_admin=True)))
        gateway.gateway.reconfigure(gateway.gateway.settings, Catalogue({}, {}), other)
        await watching.end()
        name, data = events(watching.body)[-1]
        assert (name, data["status"]) == ("refused", 401)
        assert gateway.gateway._feed._num_viewers == 0


# ------------------------------------------------------------------ content


async def watch(gateway: Rig) -> Call:
    watching = gateway.call("GET", "/admin/events")
    await watching.until(lambda call: bool(events(call.body)))
    return watching


async def test_a_whole_snapshot_then_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.02)
    neuron = FakeNode("a").ready("m")
    profile = ModelProfile(id="cold", source="/w", aliases=("alias",))
    async with rig(neuron, models=(profile,), aliases={"alias": "cold"}) as gateway:
        watching = await watch(gateway)
        name, whole = events(watching.body)[0]
        assert name == "whole"
        assert whole["series"] == list(SERIES)
        assert all(len(point) == len(SERIES) for point in whole["points"])
        node = whole["state"]["nodes"]["a"]
        assert node["state"] == "ready"
        assert node["devices"]["cpu:0"] | {"free": 0} == {
            "kind": "cpu", "name": "a CPU", "total": 32 * GIB, "free": 0, "cores": 2, "worker": "ready",
        }  # fmt: skip
        assert node["models"]["m"]["state"] == "ready"
        assert whole["state"]["models"]["cold"] == {"aliases": ["alias"], "source": "/w"}
        assert b"null" not in watching.body.split(b'"state"')[1]

        neuron.models["cold"] = ModelStatus("cold", ModelState.LOADING, progress=0.256)
        await watching.until(lambda call: "cold" in state_of(events(call.body))["nodes"]["a"]["models"])
        loading = state_of(events(watching.body))["nodes"]["a"]["models"]["cold"]
        assert (loading["state"], loading["progress"]) == ("loading", 0.26)
        neuron.models["cold"] = msgspec.structs.replace(neuron.models["cold"], state=ModelState.AVAILABLE)
        await watching.until(lambda call: "cold" not in state_of(events(call.body))["nodes"]["a"]["models"])
        neuron.state = NodeState.DRAINING
        await watching.until(lambda call: state_of(events(call.body))["nodes"]["a"]["state"] == "draining")
        neuron.control = error(500, "broken")
        await watching.until(lambda call: state_of(events(call.body))["nodes"]["a"]["state"] == "down")
        fault = state_of(events(watching.body))["nodes"]["a"]
        assert "broken" in fault["fault"] or "500" in fault["fault"]
        assert not fault["models"]
        # An old viewer and a new one have the same state.
        late = await watch(gateway)
        for call in (watching, late):
            call.leave()
            await call.end()
        assert state_of(events(late.body))["nodes"]["a"]["state"] == "down"


async def test_a_request_is_listed_with_its_usage_and_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.02)
    async with rig(FakeNode("a").ready("m")) as gateway:
        watching = await watch(gateway)
        message = {"role": "user", "content": "a secret word"}
        await gateway.chat(stream=True, messages=[message]).end()
        await gateway.call("POST", "/v1/chat/completions", {"model": "nobody", "messages": [message]}).end()

        def entries(call: Call) -> list[Any]:
            return [entry for _, data in events(call.body) for entry in data.get("requests", ())]

        await watching.until(lambda call: len(entries(call)) == 2)
        good, wrong = entries(watching)
        assert good | {"at": 0, "id": "", "ttft_s": 0, "total_s": 0} == {
            "at": 0, "id": "", "dialect": "openai-chat", "model": "m", "node": "a", "status": 200, "stream": True,
            "finish": "stop", "total_s": 0, "tokens_in": 7, "tokens_out": 2, "tokens_cached": 3, "ttft_s": 0,
        }  # fmt: skip
        assert (wrong["status"], wrong["model"], wrong["finish"]) == (404, "", "model_not_found")
        points = [
            dict(zip(SERIES, data["point"], strict=True)) for name, data in events(watching.body) if name == "tick"
        ]
        assert sum(point["requests"] for point in points) == 2
        assert sum(point["errors"] for point in points) == 1
        assert any(point["ttft_p50_s"] is not None for point in points)
        late = await watch(gateway)
        assert [entry["status"] for entry in entries(late)] == [200, 404]
        for call in (watching, late):
            call.leave()
            await call.end()
        assert b"secret" not in watching.body + late.body


async def test_nodes_come_and_go_with_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.02)
    first, second = FakeNode("a").ready("m"), FakeNode("b").ready("m")
    async with second.serving(), rig(first) as gateway:
        watching = await watch(gateway)
        inner = gateway.gateway
        both = tuple(
            msgspec.structs.replace(inner.settings.neurons[0], name=n.name, endpoint=n.url) for n in (first, second)
        )
        for nodes in (both, both[1:]):
            settings = msgspec.structs.replace(inner.settings, neurons=nodes)
            inner.reconfigure(settings, Catalogue({}, {}), inner.authenticator.keys)
            names = {node.name for node in nodes}
            await watching.until(lambda call, names=names: state_of(events(call.body))["nodes"].keys() == names)  # type: ignore[misc]
        watching.leave()
        await watching.end()


async def test_a_viewer_that_disconnects_is_released_and_one_too_many_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.02)
    monkeypatch.setattr(feed, "MAX_VIEWERS", 2)
    async with rig(FakeNode().ready("m")) as gateway:
        watching = [await watch(gateway) for _ in range(2)]
        refused = await gateway.call("GET", "/admin/events").end()
        assert (refused.status, refused.headers["retry-after"]) == (429, "30")
        for call in watching:
            call.leave()
            await call.end()
        assert gateway.gateway._feed._num_viewers == 0
        await until(lambda: not gateway.gateway._feed._state)  # without viewers, nothing is kept


async def test_a_slow_viewer_gets_the_whole_state_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.005)
    async with rig(FakeNode("a").ready("m")) as gateway:
        watching = await watch(gateway)
        inner = gateway.gateway._feed
        watching.hold()
        begun = inner._number
        await until(lambda: inner._number > begun + 3 * feed.KEPT_SSE_EVENTS)
        assert len(inner._sse_events) == feed.KEPT_SSE_EVENTS
        watching.release()
        await watching.until(lambda call: [name for name, _ in events(call.body)].count("whole") == 2)
        watching.leave()
        await watching.end()


async def test_the_feed_ends_with_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        watching = await watch(gateway)
        gateway.gateway.prepare_to_stop()
        await watching.end(2)
        assert events(watching.body)[-1] == ("bye", {})
        assert watching.complete


def test_an_open_page_does_not_hold_up_the_end_of_a_server(tmp_path: pathlib.Path) -> None:
    port = daemons.free_port()
    config = write_config(
        tmp_path, FakeNode("a", port=daemons.free_port()), gateway=f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""'
    )
    with (
        daemons.daemon("cortex", "serve", "--config", str(config), port=port, log=tmp_path / "log") as running,
        running.client() as client,
        client.stream("GET", f"{running.url}/admin/events", timeout=20) as reply,
    ):
        chunks = reply.iter_bytes()
        assert b"event: whole" in next(chunks)
        running.process.terminate()
        began = time.monotonic()
        assert b"event: bye" in b"".join(chunks)
        assert running.process.wait(20) == 0
        assert time.monotonic() - began < 10, "it waited for a page"


def answered_by_each(folder: pathlib.Path) -> list[int]:
    """Return how many requests have ended at each worker of the gateway that keeps its files in ``folder``."""
    rings = folder.glob("cortex-metrics-*/requests-*.ring")
    return [int.from_bytes(ring.read_bytes()[:8], "little") for ring in rings]


def test_the_feed_of_a_worker_has_the_requests_of_all(tmp_path: pathlib.Path) -> None:
    port = daemons.free_port()
    absent = FakeNode("a", port=daemons.free_port())
    config = write_config(tmp_path, absent, gateway=f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""\nworkers = 2\n')
    asked: set[str] = set()
    with (
        daemons.daemon(
            "cortex", "serve", "--config", str(config), port=port, log=tmp_path / "log", TMPDIR=str(tmp_path)
        ) as running,
        running.client() as client,
        client.stream("GET", f"{running.url}/admin/events", timeout=20) as reply,
    ):

        def ask() -> bool:
            name = f"r{len(asked)}"
            asked.add(name)
            headers = {"x-request-id": name}
            assert httpx.post(f"{running.url}/v1/chat/completions", content=b"{}", headers=headers).status_code == 400
            counts = answered_by_each(tmp_path)
            return len(counts) == 2 and min(counts) > 0

        daemons.until(ask, 60, "both workers have been asked")
        body = b""
        for chunk in reply.iter_bytes():
            body += chunk
            listed = [
                entry["id"] for _, data in events(body.rpartition(b"\n\n")[0]) for entry in data.get("requests", ())
            ]
            if asked <= set(listed):
                break
        assert len(listed) == len(set(listed)), "each is listed once"


# ------------------------------------------------------------------ size


def node_of(number: int, dice: random.Random, uptime_s: float = 0.0) -> Node:
    """Return a busy node with eight GPUs and five models."""
    name = f"gpu-{number:03}"
    devices = tuple(
        Device(
            f"cuda:{i}",
            DeviceKind.CUDA,
            "NVIDIA H100 80GB HBM3",
            80 * GIB,
            dice.randrange(80 * GIB),
            "9.0",
            0,
            WorkerState.READY,
        )
        for i in range(8)
    )
    workers = tuple(
        WorkerHealth(device.id, WorkerState.READY, 0, 4, dice.randrange(3), generated=int(uptime_s * 900))
        for device in devices
    )
    models = {
        f"model-{i}": ModelStatus(
            f"model-{i}", ModelState.READY, "/w", ("cuda:0",), context_tokens=32768, weights_bytes=GIB,
            kv_cache_bytes=GIB, running=dice.randrange(40), last_used_at=time.time(), loaded_at=1.0,
        )
        for i in range(5)
    }  # fmt: skip
    return Node(
        name, f"http://{name}:13131", True, True,
        Discovery(name, "1.0.0", name, "linux", "570", "12.8", devices, ("torch",), ("openai-chat",)),
        Health(NodeState.READY, uptime_s, workers), models,
    )  # fmt: skip


def make_feed(folder: pathlib.Path | None = None) -> tuple[Feed, FleetService]:
    service = FleetService(Config(), Catalogue({}, {}))
    return Feed(service, lambda: None, lambda exchange: None, "build", folder), service


async def test_a_hundred_busy_nodes_cost_a_bounded_number_of_bytes_and_little_time() -> None:
    dice = random.Random(1)
    inner, service = make_feed()
    service.fleet.reconfigure([node_of(number, dice) for number in range(100)])
    inner._num_viewers = 1
    whole = inner._whole()
    assert len(whole) < 400_000
    ticks, times = [], []
    for second in range(1, 31):
        for number in range(100):
            if (number + second) % 2:  # each is polled every two seconds, and half of them were
                service.fleet.state = service.fleet.state.with_node(node_of(number, dice, float(second)))
        for _ in range(200):
            ended = {"id": "r" * 32, "dialect": "openai-chat", "model": "model-1", "node": "gpu-001", "status": 200,
                     "stream": True, "finish": "stop", "total_s": 1.5, "tokens_in": 900, "tokens_out": 300,
                     "ttft_s": 0.25}  # fmt: skip
            inner.journal.record([(time.time(), ended)])
        began = time.process_time()
        inner.tick()
        times.append(time.process_time() - began)
        ticks.append(len(inner._sse_events[-1]))
    print(f"whole {len(whole)} bytes; a tick {max(ticks)} bytes at most; {1e3 * sorted(times)[15]:.1f} ms of CPU")
    assert max(ticks) < 60_000, "a second of the busiest fleet is less than 60 kB"
    assert sorted(times)[15] < 0.05

    # An idle fleet sends only the point of its charts.
    inner.tick()
    inner.tick()
    assert len(inner._sse_events[-1]) < 200
    state = orjson.loads(whole.split(b"data: ")[1])["state"]
    assert set(state["nodes"]) == {f"gpu-{number:03}" for number in range(100)}


async def test_patches_add_up_to_the_whole() -> None:
    dice = random.Random(2)
    before: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for _ in range(200):
        after = _tree(dice)
        patch = orjson.loads(orjson.dumps(view.difference(before, after)))
        known = merge(known, patch)
        assert known == after
        assert view.difference(after, after) == {}
        before = after


def _tree(dice: random.Random, depth: int = 3) -> dict[str, Any]:
    def value() -> Any:
        return (
            dice.choice([1, 2, "x", [], ["a"], True]) if depth == 0 or dice.random() < 0.4 else _tree(dice, depth - 1)
        )

    return {name: value() for name in "abcd" if dice.random() < 0.7}


async def test_speed_is_the_nodes_own_count_over_its_own_clock() -> None:
    inner, service = make_feed()
    dice = random.Random(3)
    quiet = node_of(1, dice, 10.0)
    service.fleet.reconfigure([quiet])
    inner.tick()

    def speed(uptime_s: float, generated: int) -> float:
        workers = (WorkerHealth("cuda:0", WorkerState.READY, 0, generated=generated),)
        service.fleet.state = service.fleet.state.with_node(
            replace(quiet, health=Health(NodeState.READY, uptime_s, workers))
        )
        inner.tick()
        found = inner._rates.points[-1][SERIES.index("tokens_per_s")]
        assert found is not None
        return found

    assert speed(100.0, 1000) == 0  # it has counted otherwise before: only a difference of two counts means anything
    assert speed(102.0, 1500) == 250
    assert speed(102.1, 1600) == 250  # too soon for a new value
    assert speed(104.0, 1500) == 0
    assert speed(1.0, 900) == 0  # started anew
    assert speed(3.0, 1000) == 50


# ------------------------------------------------------------------ the ring of ended requests


def fields(number: int, status: int = 200) -> dict[str, object]:
    return {"id": f"r{number}", "dialect": "d", "model": "m", "node": "n", "status": status, "stream": False,
            "finish": "stop", "total_s": 0.1}  # fmt: skip


def test_a_ring_counts_everything_and_keeps_the_latest() -> None:
    one = Journal()
    assert one.read() == journal.Batch()
    for number in range(1000):
        status = 500 if number % 10 == 0 else CLIENT_CLOSED_REQUEST if number % 10 == 1 else 200
        one.record([(time.time(), fields(number, status))])
    batch = one.read()
    assert (batch.requests, batch.errors) == (1000, 100)
    assert [entry.id for entry in batch.entries] == [f"r{number}" for number in range(1000 - ring.NUM_SLOTS + 1, 1000)]
    one._rings.own.add(b'{"half')
    assert one.read() == journal.Batch(requests=1)
    one.record([(time.time(), fields(1000) | {"model": "x" * 1000})])
    batch = one.read()
    assert (batch.requests, batch.entries) == (1, [])  # too long to be listed, and counted all the same


def test_workers_read_one_anothers_rings_while_they_are_written(tmp_path: pathlib.Path) -> None:
    reader = Journal(tmp_path)
    reader.read()
    script = (
        "import sys, pathlib; from cortex.dashboard.journal import Journal\n"
        "one = Journal(pathlib.Path(sys.argv[1])); print('ready', flush=True); sys.stdin.readline()\n"
        "for i in range(20000):\n"
        " one.record([(float(i), {'id': f'r{i}', 'dialect': 'd' * (i % 90), 'model': 'm', 'node': 'n',"
        " 'status': 200, 'stream': False, 'finish': 'stop', 'total_s': float(i)})])\n"
        " if i % 7 == 6 or i > 19990: one.write()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        assert reader.read().requests == 0  # its ring is known now
        process.stdin.write(b"\n")
        process.stdin.close()
        total, seen = 0, 0
        while total < 20000:
            batch = reader.read()
            total += batch.requests
            for entry in batch.entries:  # none is torn: each has the same number three times
                number = int(entry.id[1:])
                assert (len(entry.dialect), entry.total_s) == (number % 90, float(number))
                seen += 1
            assert process.poll() in {None, 0}
    assert total == 20000
    assert seen >= ring.NUM_SLOTS - 1
