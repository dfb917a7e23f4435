"""Hostile nodes: the client's error, and no effect on other requests."""

import asyncio
import json
import logging
import os
import pathlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from asgi_call import Call
from fake_node import FakeNode, chat_only
from gateway_rig import Rig, rig, until
from hostile import ANSWER, CHUNKED, ERROR, EVENTS, OK, Behaviour, behaviours, chunk, drip, raw, sized
from prometheus_client import generate_latest

from cortex.config import BreakerSettings, Polling, Timeouts

TIMEOUTS = Timeouts(connect_s=1, first_byte_s=0.4, answer_s=0.6, stall_s=0.3)
POLLING = Polling(interval_s=0.02, timeout_s=0.5, max_backoff_s=0.05, failure_threshold=2)
LIMIT_S = 10.0
MAX_GROWTH_BYTES = 160 * 1024 * 1024
"""An answer that is not streamed may have 64 MiB; it lies here twice for a moment."""

ALL = tuple(behaviours())


def memory_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def beside_a_sound_one(hostile: FakeNode, **settings: Any) -> AsyncIterator[Rig]:
    """Run a gateway over a hostile node and a sound one, and check that all is well when it is over."""
    sound = FakeNode("sound").ready("n")
    settings = {"timeouts": TIMEOUTS, "polling": POLLING, "breaker": BreakerSettings(failures=10**6)} | settings
    before_bytes = memory_bytes()
    async with rig(hostile, sound, **settings) as gateway:
        await until(lambda: gateway.gateway.fleet.state.nodes["sound"].up)
        async with asyncio.timeout(LIMIT_S):
            yield gateway
            assert memory_bytes() - before_bytes < MAX_GROWTH_BYTES
            for stream in (False, True):
                call = await gateway.chat(model="n", stream=stream).end()
                assert call.status == 200
                assert call.data()
            polls = hostile.num_polls, sound.num_polls
            await until(
                lambda: sound.num_polls > polls[1] + 1 and (hostile.control or hostile.num_polls > polls[0] + 1)
            )
            await until(lambda: gateway.in_flight == 0)
        gateway.gateway.metrics.fold()
        page = generate_latest(gateway.gateway.metrics.registry).decode()
        assert 'node="sound"' in page
        assert not [line for line in page.splitlines() if not line.startswith("#") and float(line.split()[-1]) < 0]


def check_error(call: Call) -> None:
    """Fail unless a call has ended in a typed error."""
    assert call.complete
    if call.status != 200:
        assert 400 <= call.status < 600
        assert call.headers["content-type"] == "application/json"
        error = call.json()["error"]
        assert error["message"]
        assert error.get("code") or error["details"]["error_code"]
        if "retry-after" in call.headers:
            assert 0 <= int(call.headers["retry-after"]) <= 3600
        return
    assert call.headers["content-type"].startswith("text/event-stream")
    *events, rest = call.data().split(b"\n\n")
    assert not rest
    data = [json.loads(event.rpartition(b"data: ")[2]) for event in events]
    assert "error" in data[-1] or data[-1].get("type") in ("error", "response.failed"), data[-1]


def check_answer(call: Call, stream: bool) -> None:
    """Fail unless a call has ended in an answer."""
    assert (call.status, call.complete) == (200, True)
    assert set(call.headers) <= {"content-type", "content-length", "x-request-id", "request-id", "cache-control",
                                 "x-accel-buffering", "x-cortex-ignored"}  # fmt: skip
    assert call.headers["x-request-id"] != "evil"
    assert "\x01" not in "".join(call.headers.values())
    if stream:
        assert b"data: [DONE]\n\n" in call.data()
    else:
        assert call.headers["content-type"] == "application/json"
        assert call.json()["choices"]


def check(call: Call, expected: str, stream: bool) -> None:
    if expected == ERROR:
        check_error(call)
    elif expected == ANSWER:
        check_answer(call, stream)


def of(name: str) -> list[Any]:
    """Return the behaviours that have an outcome of ``name``, ``whole`` or ``stream``."""
    return [pytest.param(each, id=each.name.replace(" ", "_")) for each in ALL if getattr(each, name) is not None]


def test_there_are_enough_of_them() -> None:
    assert len(ALL) == len({each.name for each in ALL}) >= 80


@pytest.mark.parametrize("behaviour", of("whole"))
async def test_an_answer_that_is_not_streamed(behaviour: Behaviour) -> None:
    """Over a new connection, in steps, and over one that is kept, at once."""
    node = FakeNode("hostile").ready("m")
    async with beside_a_sound_one(node) as gateway:
        await until(lambda: gateway.gateway.fleet.state.nodes["hostile"].up)
        assert (await gateway.chat().end()).status == 200
        node.script = behaviour.script
        for i in range(2):
            assert behaviour.whole is not None
            check(await gateway.chat(seed=i).end(), behaviour.whole, stream=False)


@pytest.mark.parametrize("behaviour", of("stream"))
async def test_a_stream(behaviour: Behaviour) -> None:
    node = FakeNode("hostile").ready("m")
    node.script = behaviour.script
    async with beside_a_sound_one(node) as gateway:
        await until(lambda: gateway.gateway.fleet.state.nodes["hostile"].up)
        assert behaviour.stream is not None
        check(await gateway.chat(stream=True).end(), behaviour.stream, stream=True)


OTHERS = [
    *("empty", "HTML labelled as JSON", "half the JSON", "another object", "deep", "lone surrogates", "gzip", "NaN"),
    *("choices of numbers", "status 302", "cut length", "an HTML error", "a body that drips", "endless trailers"),
    *("an event that is no JSON", "half an event", "no terminator", "an event without end", "nonsense in a stream"),
    *("an error in a stream", "usage of -1", "usage of 1e308", "a finish to log"),
]


@pytest.mark.parametrize("name", OTHERS, ids=lambda name: name.replace(" ", "_"))
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}),
        ("/v1/responses", {"input": "x", "store": False}),
        ("/v1/responses", {"input": "x"}),
    ],
    ids=["messages", "responses", "stored"],
)
async def test_what_is_translated(name: str, path: str, body: dict[str, Any]) -> None:
    (behaviour,) = (each for each in ALL if each.name == name)
    node = chat_only("hostile")
    node.script = behaviour.script
    async with beside_a_sound_one(node) as gateway:
        await until(lambda: gateway.gateway.fleet.state.nodes["hostile"].up)
        for stream, expected in ((False, behaviour.whole), (True, behaviour.stream)):
            if expected is not None:
                call = await gateway.call("POST", path, {"model": "m", "stream": stream, **body}).end()
                if expected == ERROR or call.status != 200:
                    check_error(call)
                else:
                    assert call.complete


RESPONSES = [
    *(b'{"response":1}', b'{"response":{}}', b'{"response":{"status":1}}', b'{"response":{"status":"completed"}}'),
    *(b'{"type":"response.completed"}', b"[]", b"{}", b'{"response":' + b"[" * 5000 + b"]" * 5000 + b"}"),
]


@pytest.mark.parametrize("data", RESPONSES, ids=lambda data: data[:40].decode())
@pytest.mark.parametrize("name", [b"response.completed", b"response.created", b"error", b"response.x", b"\xff"])
async def test_a_background_response_ends_whatever_its_node_sends(name: bytes, data: bytes) -> None:
    node = FakeNode("hostile").ready("m")
    wire = sized(b"event: " + name + b"\ndata: " + data + b"\n\n", b"content-type: text/event-stream\r\n")
    node.script = raw(wire)
    async with beside_a_sound_one(node) as gateway:
        await until(lambda: gateway.gateway.fleet.state.nodes["hostile"].up)
        begun = await gateway.call("POST", "/v1/responses", {"model": "m", "input": "x", "background": True}).end()
        id = begun.json()["id"]
        followed = await gateway.call("POST", "/v1/responses", {"model": "m", "input": "x", "stream": True}).end()
        assert followed.complete
        async with asyncio.timeout(5):
            while True:
                call = await gateway.call("GET", f"/v1/responses/{id}").end()
                assert call.status == 200
                if call.json()["status"] not in ("queued", "in_progress"):
                    break
                await asyncio.sleep(0.01)
        assert not gateway.gateway._background._runs


async def test_a_response_in_the_background_that_never_ends_is_ended() -> None:
    node = FakeNode("hostile").ready("m")
    node.script = drip(OK + EVENTS + CHUNKED + b"\r\n", chunk(b": still here\n\n"))
    async with beside_a_sound_one(node) as gateway:
        await until(lambda: gateway.gateway.fleet.state.nodes["hostile"].up)
        begun = await gateway.call("POST", "/v1/responses", {"model": "m", "input": "x", "background": True}).end()
        async with asyncio.timeout(5):
            while (call := await gateway.call("GET", f"/v1/responses/{begun.json()['id']}").end()).json()[
                "status"
            ] != "failed":
                await asyncio.sleep(0.02)
        assert call.json()["error"]["code"]


@pytest.mark.parametrize("is_one_event", [False, True])
async def test_a_response_in_the_background_that_is_too_long_ends_as_failed(
    is_one_event: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex.responses.background.MAX_BYTES", 10_000)
    node = FakeNode("hostile").ready("m")
    delta = b'event: response.x\ndata: {"x":"' + b"y" * (20_000 if is_one_event else 1_000) + b'"}\n\n'
    node.script = raw(sized(delta * (1 if is_one_event else 20), b"content-type: text/event-stream\r\n"))
    async with beside_a_sound_one(node) as gateway:
        await until(lambda: gateway.gateway.fleet.state.nodes["hostile"].up)
        body = {"model": "m", "input": "x" * 20_000, "background": True}
        begun = await gateway.call("POST", "/v1/responses", body).end()
        path = f"/v1/responses/{begun.json()['id']}"
        async with asyncio.timeout(5):
            while (call := await gateway.call("GET", path).end()).json()["status"] != "failed":
                await asyncio.sleep(0.02)
        assert "longer than" in call.json()["error"]["message"] or "more than" in call.json()["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [
        b'{"type":"response.completed"}',
        b'{"type":"response.completed","response":{"status":"completed","output":[]}}',
        b'{"type":"response.completed","response":{"id":"resp_1","status":"completed","output":7}}',
        b'{"type":"response.completed","response":{"id":"resp_1","status":"completed","output":[7]}}',
        b'{"type":"response.completed","response":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=["no response", "no id", "no list", "no items", "deep"],
)
async def test_a_stream_that_ends_in_no_response_ends_in_an_error(data: bytes) -> None:
    node = FakeNode("hostile").ready("m")
    node.script = raw(
        sized(b"event: response.completed\ndata: " + data + b"\n\n", b"content-type: text/event-stream\r\n")
    )
    async with rig(node) as gateway:
        call = await gateway.call("POST", "/v1/responses", {"model": "m", "input": "x", "stream": True}).end()
        assert call.complete
        assert call.status == 502 or (b"event: error" in call.body and b"response.failed" in call.body)
        assert b"internal_error" not in call.body


# ------------------------------------------------------------------ the control plane

HEALTH = {"state": "ready", "uptime_s": 1.0, "workers": [{"device": "cpu:0", "state": "ready", "restarts": 0}]}
DEVICE = {"id": "cpu:0", "kind": "cpu", "name": "c", "memory_total_bytes": 9, "memory_free_bytes": 9, "worker": "ready"}
DISCOVERY = {
    "name": "x",
    "version": "0",
    "hostname": "h",
    "os": "o",
    "driver_version": None,
    "cuda_version": None,
    "devices": [DEVICE],
    "harnesses": ["torch"],
    "dialects": ["openai-chat"],
}
MODEL = {"id": "m", "state": "ready", "weights_bytes": 1, "kv_cache_bytes": 1}
GOOD = {"/health": HEALTH, "/discovery": DISCOVERY, "/models": {"models": [MODEL]}}

JUNK: dict[str, bytes] = {
    "nothing": b"",
    "deep": b"[" * 200_000,
    "deep and whole": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not UTF-8": b'{"state":"\xff"}',
    "a list": b"[]",
    "null": b"null",
    "HTML": b"<html></html>",
    "long": b'"' + b"x" * 9_000_000 + b'"',
    "blank": b" " * 1000,
    "NaN": b"NaN",
}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "negative memory": ("/discovery", DISCOVERY | {"devices": [DEVICE | {"memory_free_bytes": -1}]}),
    "memory of 1e308": ("/discovery", DISCOVERY | {"devices": [DEVICE | {"memory_total_bytes": 1e308}]}),
    "memory of 2^70": ("/discovery", DISCOVERY | {"devices": [DEVICE | {"memory_total_bytes": 2.0**70}]}),
    "a capability that is no number": ("/discovery", DISCOVERY | {"devices": [DEVICE | {"compute_capability": "x.y"}]}),
    "a thousand and more devices": ("/discovery", DISCOVERY | {"devices": [DEVICE] * 2000}),
    "a name of a megabyte": ("/discovery", DISCOVERY | {"hostname": "x" * 1_000_000}),
    "an uptime of -1": ("/health", HEALTH | {"uptime_s": -1}),
    "an uptime of 1e308": ("/health", HEALTH | {"uptime_s": 1e308}),
    "a state that is none": ("/health", HEALTH | {"state": "evil"}),
    "running -5": ("/health", HEALTH | {"workers": [HEALTH["workers"][0] | {"running": -5}]}),  # type: ignore[index]
    "no models": ("/models", {}),
    "models that are none": ("/models", {"models": {"m": 1}}),
}


def control(path: str, body: bytes, status: int = 200) -> Callable[[Any, Any], Any]:
    """Return a control plane that is right but for one path."""

    async def script(received: Any, line: Any) -> None:
        sent = body if received.path == path else orjson.dumps(GOOD[received.path])
        await line.reply(status if received.path == path else 200, sent)

    return script


async def check_poller(script: Any, *, is_up: bool = False) -> Rig:
    node = FakeNode("hostile", control=script).ready("m")
    async with beside_a_sound_one(node) as gateway:
        fleet = gateway.gateway.fleet
        if is_up:
            await until(lambda: fleet.state.nodes["hostile"].up)
        else:
            await until(lambda: fleet.state.nodes["hostile"].failed_polls >= 3)
            assert not fleet.state.nodes["hostile"].up
            assert fleet.state.nodes["hostile"].fault
            call = await gateway.chat().end()
            assert (call.status, call.json()["error"]["code"]) == (503, "no_node")
        for path in ("/v1/models", "/admin/fleet", "/health"):
            assert (await gateway.call("GET", path).end()).status == 200
        node.control = None
        await until(lambda: fleet.state.nodes["hostile"].up and "m" in fleet.state.nodes["hostile"].models)
        assert (await gateway.chat().end()).status == 200
    return gateway


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("name", JUNK)
async def test_a_control_plane_that_answers_junk_is_a_node_that_is_down(name: str, path: str) -> None:
    await check_poller(control(path, JUNK[name]))


@pytest.mark.parametrize("name", ODD)
async def test_a_node_with_an_absurd_status_is_down(name: str) -> None:
    path, value = ODD[name]
    await check_poller(control(path, orjson.dumps(value)))


@pytest.mark.parametrize("status", [204, 301, 401, 404, 500, 503])
async def test_a_control_plane_that_refuses_is_a_node_that_is_down(status: int) -> None:
    await check_poller(control("/health", b"" if status == 204 else b'{"x":1}', status))


@pytest.mark.parametrize("name", ["silence", "an endless body", "an endless head", "a body that drips", "no HTTP"])
async def test_a_control_plane_that_does_not_end_is_a_node_that_is_down(name: str) -> None:
    (behaviour,) = (each for each in ALL if each.name == name)
    await check_poller(behaviour.script)


ROWS: dict[str, Any] = {
    "negative": MODEL | {"id": "x", "running": -5},
    "huge": MODEL | {"id": "x", "context_tokens": 1e300},
    "an empty name": MODEL | {"id": ""},
    "a name of a megabyte": MODEL | {"id": "x" * 1_000_000},
    "a name with a line end": MODEL | {"id": "x\nevil 1"},
    "a name with an escape": MODEL | {"id": "x\x1b[31m"},
    "a state that is none": MODEL | {"id": "x", "state": "evil"},
    "progress of 7": MODEL | {"id": "x", "progress": 7},
    "a number": 1,
    "null": None,
    "a list": [],
}


@pytest.mark.parametrize("name", ROWS)
async def test_a_model_that_cannot_be_is_left_out_and_the_others_are_served(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cortex")
    node = FakeNode("hostile", control=control("/models", orjson.dumps({"models": [ROWS[name], MODEL]})))
    async with beside_a_sound_one(node) as gateway:
        await until(lambda: gateway.gateway.fleet.state.nodes["hostile"].up)
        listed = (await gateway.call("GET", "/v1/models").end()).json()["data"]
        assert [model["id"] for model in listed] == ["m", "n"]
        assert (await gateway.chat().end()).status == 200
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len([record for record in warnings if "cannot be read" in record.getMessage()]) == 1
    assert all("\n" not in record.getMessage() for record in warnings)


@pytest.mark.parametrize("kind", ["many", "one name"])
async def test_a_list_of_eighty_thousand_models_is_cut_and_delays_no_request(kind: str) -> None:
    rows = [MODEL] + [MODEL | {"id": "m" if kind == "one name" else f"m{i}"} for i in range(80_000)]
    node = FakeNode("hostile", control=control("/models", orjson.dumps({"models": rows})))
    async with beside_a_sound_one(node) as gateway:
        await until(lambda: gateway.gateway.fleet.state.nodes["hostile"].up)
        num_listed = len(gateway.gateway.fleet.state.nodes["hostile"].models)
        assert num_listed == (1 if kind == "one name" else 4096)
        assert (await gateway.chat().end()).status == 200
