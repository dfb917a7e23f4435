"""The operators' endpoints: reports, actions and access, over HTTP and by command."""

import json
import pathlib
import re
from typing import Any

import pytest
from fake_node import FakeNode
from gateway_rig import LOCAL_TOKEN, rig
from key_rig import KEY, ring
from rich.console import Console

from cortex import cli, report
from cortex.access.keys import KeyRing, Limits, Principal
from cortex.config import ModelProfile
from cortex.wire.node import ModelState, ModelStatus, NodeState

PROFILE = ModelProfile(id="m", source="/w", aliases=("alias",))


async def test_to_let_go_of_a_pin_that_is_gone_is_done_already() -> None:
    node = FakeNode(name="a").ready("m")
    async with rig(node) as gateway:
        acted = await gateway.call("POST", "/admin/models/unload", {"model": "m"}).end()
        assert acted.status == 200
        for where in ({}, {"node": "a"}):
            let_go = await gateway.call("POST", "/admin/models/pin", {"model": "m", "pinned": False, **where}).end()
            assert let_go.status == 200
        never = await gateway.call("POST", "/admin/models/pin", {"model": "never", "pinned": False}).end()
        assert never.status == 404


async def test_failed_and_unloaded_models_are_forgotten_and_loaded_ones_are_not() -> None:
    first, second = FakeNode(name="a").ready("m"), FakeNode(name="b")
    second.models["m"] = ModelStatus("m", ModelState.FAILED, error="no memory")
    async with rig(first, second) as gateway:
        gone = await gateway.call("POST", "/admin/models/forget", {"model": "m"}).end()
        assert (gone.status, list(gone.json()["nodes"])) == (200, ["b"])
        assert (set(first.models), set(second.models)) == ({"m"}, set())
        assert [node.name for node in gateway.gateway.fleet.state.listing["m"]] == ["a"]
        again = await gateway.call("POST", "/admin/models/forget", {"model": "m"}).end()
        assert (again.status, again.json()["error"]["code"]) == (404, "model_not_found")
        assert (await gateway.call("POST", "/admin/models/forget", {"model": "m", "node": "c"}).end()).status == 404


def test_why_a_load_failed_and_a_node_is_down_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    why = "needs 18.2 GiB, free 15.9 GiB on cuda:0; load it with fewer context_tokens, or on another node"
    failed = {"id": "big", "state": "failed", "error": why}
    nodes = [{"name": "a", "up": True, "models": [failed]}, {"name": "b", "up": False, "fault": "connection refused"}]
    report.print_fleet({"nodes": nodes, "degraded": ["metrics listener"]})
    out = capsys.readouterr().out
    for needle in (f"big on a: {why}", "b: connection refused", "does not do all that it should: metrics listener"):
        assert needle in out


def test_keys_without_limits_are_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    limited = {"name": "alice", "models": ["*"], "requests_per_minute": 60, "used": {"requests": 7}}
    report.print_keys({"keys": [limited, {"name": "bob", "models": ["m"], "used": {}}]})
    *_, alice, bob = (line.split() for line in capsys.readouterr().out.splitlines() if line.strip())
    assert alice == ["alice", "*", "0", "7/60", "-", "-", "-", "-"]
    assert bob == ["bob", "m", "0", "-", "-", "-", "-", "-"]


def test_use_is_shown_by_key_model_or_day(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"day": "", "key": "", "model": "", "requests": 1, "tokens_in": 20_000, "tokens_out": 5, "cost": 0}
    rows = [row, {**row, "key": "alice", "requests": 2, "cost": 1.234}]
    report.print_usage({"rows": rows, "first": "2027-01-01", "last": "2027-01-30", "persists": False}, "key")
    out = capsys.readouterr().out
    alice, nobody, period = [line.split() for line in out.splitlines() if line.strip()][2:]
    assert alice == ["alice", "2", "20k", "0", "5", "$1.23"]
    assert nobody == ["(no", "key)", "1", "20k", "0", "5", "-"]
    assert period[:3] == ["2027-01-01", "to", "2027-01-30"]
    assert "keeps it in memory" in out
    days = [{**row, "day": f"2027-01-0{day}", "requests": day} for day in (2, 1, 3)]
    report.print_usage({"rows": days}, "day")
    assert re.findall(r"2027-01-0\d", capsys.readouterr().out) == ["2027-01-01", "2027-01-02", "2027-01-03"]
    report.print_usage({"rows": []}, "key")
    assert "no use" in capsys.readouterr().out


async def test_a_model_is_loaded_pinned_and_unloaded() -> None:
    first, second = FakeNode("a"), FakeNode("b", free_bytes=1 << 30)
    async with rig(first, second, models=(PROFILE,), aliases={"alias": "m"}) as gateway:

        async def act(what: str, **body: Any) -> Any:
            call = await gateway.call("POST", f"/admin/models/{what}", body).end()
            return call.json() if call.status == 200 else (call.status, call.json()["error"]["code"])

        assert (await act("load", model="alias"))["nodes"]["a"]["state"] == "ready"
        assert list((await act("load", model="m", node="b"))["nodes"]) == ["b"]
        assert set((await act("pin", model="m"))["nodes"]) == {"a", "b"}
        assert first.models["m"].pinned
        assert not (await act("pin", model="m", node="a", pinned=False))["nodes"]["a"]["pinned"]
        assert list((await act("unload", model="m", node="b"))["nodes"]) == ["b"]
        assert second.models["m"].state is ModelState.AVAILABLE
        assert list((await act("unload", model="alias"))["nodes"]) == ["a"]
        assert await act("unload", model="m") == (404, "model_not_found")
        assert await act("load", model="nobody") == (404, "model_not_found")
        assert await act("load", model="m", node="c") == (404, "node_not_found")
        assert await act("load") == (400, "missing_required_parameter")
        assert (await act("load", model="m", nodes="a"))[0] == 400


async def test_a_node_is_drained_and_opened_again() -> None:
    neuron = FakeNode().ready("m")
    async with rig(neuron) as gateway:
        assert (await gateway.call("POST", "/admin/nodes/drain", {"node": "a"}).end()).json()["state"] == "draining"
        assert neuron.state is NodeState.DRAINING
        assert (await gateway.chat().end()).status == 503
        await gateway.call("POST", "/admin/nodes/drain", {"node": "a", "draining": False}).end()
        assert (await gateway.chat().end()).status == 200


async def test_admin_needs_an_administrators_key() -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        for client in ("127.0.0.1", "10.0.0.9"):
            assert (await gateway.call("GET", "/admin/fleet", client=client).end()).status == 200
            for given in ({"authorization": ""}, {"authorization": "Bearer sk-local-other"}):
                call = await gateway.call("GET", "/admin/fleet", b"", given, client=client).end()
                assert (call.status, call.json()["error"]["code"]) == (401, "invalid_api_key")
    keys = ring((KEY, Principal("root", (), is_admin=True)), ("user", Principal("user")))
    async with rig(FakeNode().ready("m"), keys=keys) as gateway:
        for key, status in ((None, 401), ("wrong", 401), ("user", 403), (KEY, 200)):
            given = {"authorization": f"Bearer {key}"} if key else {}
            for client in ("127.0.0.1", "10.0.0.9"):
                assert (await gateway.call("GET", "/admin/fleet", b"", given, client=client).end()).status == status
        call = await gateway.call("POST", "/v1/chat/completions", {"model": "m"}, {"x-api-key": KEY}).end()
        assert call.status == 403, "an administrator's key without models asks for none"


@pytest.mark.parametrize("keys", [None, ring((KEY, Principal("user")))], ids=["no keys", "none an administrator's"])
async def test_to_come_from_this_host_opens_nothing(keys: KeyRing | None) -> None:
    """A proxy on this host that adds no header looks like a command on this host."""
    async with rig(FakeNode().ready("m"), keys=keys) as gateway:
        for headers in ({"host": "127.0.0.1:31313"}, {"host": "localhost"}, {}):
            for method, path in (("GET", "/admin/fleet"), ("GET", "/admin/events"), ("POST", "/admin/models/pin")):
                given = {"authorization": "", **headers}
                assert (await gateway.call(method, path, {"model": "m"}, given).end()).status == 401, (path, headers)
        pinned = await gateway.call("POST", "/admin/models/pin", {"model": "m"}).end()
        assert pinned.status == 200, "with the token of this host"


async def test_the_token_of_this_host_is_an_administrators_key() -> None:
    keys = ring((KEY, Principal("root", (), is_admin=True)))
    async with rig(FakeNode().ready("m"), keys=keys) as gateway:
        given = {"authorization": f"Bearer {LOCAL_TOKEN}"}
        assert (await gateway.call("GET", "/admin/fleet", b"", given).end()).status == 200
        body = {"model": "m", "messages": []}
        assert (await gateway.call("POST", "/v1/chat/completions", body, given).end()).status == 200


async def test_the_use_of_keys_is_shown_without_the_keys() -> None:
    limits = Limits(requests_per_minute=10, tokens_per_window=2_000_000, balance_tokens=15_000)
    keys = ring((KEY, Principal("alice", ("*",), True, limits=limits)), ("b", Principal("bob", ("m",), priority=-1)))
    async with rig(FakeNode().ready("m"), keys=keys) as gateway:
        given = {"x-api-key": KEY}
        await gateway.call("POST", "/v1/chat/completions", {"model": "m", "messages": []}, given).end()
        call = await gateway.call("GET", "/admin/keys", b"", given).end()
    alice, bob = call.json()["keys"]
    assert alice["used"] == {"requests": 1, "running": 0, "tokens": 9, "spent_tokens": 9}
    assert (bob["name"], bob["priority"]) == ("bob", -1)
    assert KEY.encode() not in call.body
    console = Console(width=80, record=True)
    report.print_keys(call.json(), console)
    text = console.export_text()
    assert "1/10" in text
    assert "9/2M" in text
    assert "9/15k" in text


def test_tables_fit_80_columns() -> None:
    devices = [
        {"id": f"cuda:{i}", "name": "NVIDIA H100 80GB HBM3", "worker": "ready", "memory_free_bytes": 5 << 33,
         "memory_total_bytes": 80 << 30} for i in range(2)
    ]  # fmt: skip
    models = [
        {
            "id": "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8",
            "state": "loading",
            "progress": 0.42,
            "context_tokens": 262144,
        },
        {"id": "small", "state": "ready", "weights_bytes": 1 << 30, "running": 12, "waiting": 3, "pinned": True},
    ]
    node = {"name": "gpu-host-17.rack-3.example", "endpoint": "https://gpu-host-17.example.com:13131", "up": True,
            "state": "ready", "version": "0.1.0", "in_flight": 1234, "devices": devices, "models": models}  # fmt: skip
    fleet = {"nodes": [node, {**node, "name": "b", "up": False, "fault": "no connection"}], "config_error": "a: b: c"}
    offers = [
        {"id": model["id"], "state": model["state"], "context_length": 262144, "capabilities": ["chat", "tools"],
         "nodes": [{"name": node["name"], "state": "ready"}]} for model in models
    ]  # fmt: skip
    console = Console(width=80, record=True)
    report.print_fleet(fleet, console)
    report.print_models({"data": offers}, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for needle in ("loading 42%", "small *", "1234", "262144", "no connection", "not in force"):
        assert needle in text, needle


def test_a_new_key_and_a_gateway_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["keys", "add", "alice", "--print", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["key"].startswith("sk-cortex-")
    assert cli.main(["keys", "add", "alice", "--print", "--expires", "2099-01-31"]) == 0
    out = capsys.readouterr().out
    path = tmp_path / "keys.toml"
    path.write_text(out.split("For keys.toml:")[1])
    from cortex.access import keys

    key = out.split("once: ")[1].split()[0]
    assert keys.load(path).identify(key.encode()).name == "alice"
    assert cli.main(["drain", "a", "--url", "http://127.0.0.1:1"]) == 1
    assert "no gateway answers" in capsys.readouterr().err
    assert cli.main(["load", "m", "--url", "nonsense"]) == 2
