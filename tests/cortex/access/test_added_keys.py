"""Keys that are made at the gateway: their file, the endpoints, and who is let in before and after."""

import argparse
import asyncio
import contextlib
import datetime
import hashlib
import json
import pathlib
import re
import stat
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import daemons
import httpx
import msgspec
import pytest
from asgi_call import Call
from fake_node import FakeNode, answer_after
from gateway_rig import CHAT, Running, rig, until, write_config
from key_rig import KEY, ring

from cortex import cli, gateway_client, key_commands, reload
from cortex.access import added, keys
from cortex.access.added import AddedKey
from cortex.access.keys import Principal
from cortex.errors import KeyExistsError, KeyNotFoundError, KeysNotWritableError
from cortex.settings import ConfigError

QUICK = 'metrics_listen = ""\nreload_check_s = 0.05\n'
FILE = "added-keys.json"


def entry(name: str, **fields: Any) -> AddedKey:
    sha256 = hashlib.sha256(f"sk-{name}".encode()).hexdigest()
    return AddedKey(name=name, sha256=sha256, created_at=added.now(), **{"models": ("*",), **fields})


# ------------------------------------------------------------------ the file


def test_keys_are_kept_changed_and_removed_in_a_file_of_its_owner(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / FILE
    assert added.read(path) is None
    alice, bob = entry("alice", max_concurrent=2), entry("bob", expires_at=added.now())
    added.add(path, alice)
    added.add(path, bob)
    found = added.read(path)
    assert found is not None
    assert found.keys == (alice, bob)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(KeyExistsError):
        added.add(path, entry("alice"))
    added.change(path, "alice", lambda key: msgspec.structs.replace(key, priority=1))
    found = added.read(path)
    assert found is not None
    assert [key.priority for key in found.keys] == [1, 0]
    for name in ("alice", "bob"):
        added.remove(path, name)
    assert added.read(path) == added.AddedKeysFile(), "a file without keys still requires one"
    for act in (lambda: added.remove(path, "bob"), lambda: added.change(path, "bob", lambda key: key)):
        with pytest.raises(KeyNotFoundError):
            act()


def test_processes_that_add_at_once_lose_nothing(tmp_path: pathlib.Path) -> None:
    names = [f"k{number}" for number in range(20)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: added.add(tmp_path / FILE, entry(name)), names))
    found = added.read(tmp_path / FILE)
    assert found is not None
    assert sorted(key.name for key in found.keys) == sorted(names)


WRONG = {
    "no JSON": (b"{", ""),
    "nested": (b"[" * 100_000, ""),
    "no name": (b'{"keys": [{}]}', "keys[0].name"),
    "an unknown field": (b'{"keys": [], "key": 1}', "key"),
    "no model": (None, "keys[0].models"),
    "a name twice": (None, "keys[1].name"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_file_is_named_and_neither_replaced_nor_taken_for_no_keys(tmp_path: pathlib.Path, what: str) -> None:
    data, key = WRONG[what]
    if data is None:
        rows = [entry("a", models=())] if what == "no model" else [entry("a"), entry("a")]
        data = json.dumps({"keys": [{"name": r.name, "sha256": r.sha256, "models": r.models,
                                     "created_at": r.created_at.isoformat()} for r in rows]}).encode()  # fmt: skip
    config = write_config(tmp_path, FakeNode(port=1))
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        reload.load(config, {})
    assert caught.value.source == str(tmp_path / FILE)
    assert caught.value.key == key
    if key not in {"keys[0].models", "keys[1].name"}:
        with pytest.raises(KeysNotWritableError, match="correct the file"):
            added.add(tmp_path / FILE, entry("b"))
    assert (tmp_path / FILE).read_bytes() == data


def test_a_file_that_cannot_be_written_is_an_error_that_names_the_setting(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / FILE, None):
        with pytest.raises(KeysNotWritableError, match=r"access\.added_keys"):
            added.add(path, entry("a"))


def test_the_operators_file_wins(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, path = tmp_path / "keys.toml", tmp_path / FILE
    theirs.write_text(f'[[keys]]\nname = "alice"\nsha256 = "{"0" * 64}"\nmodels = ["m"]\n')
    for key in (entry("alice"), entry("bob"), entry("carol", admin=True, models=())):
        added.add(path, key)
    file = added.read(path)
    assert file is not None
    found = added.joined(keys.load(theirs), file, path)
    assert {each.name: each.models for each in found.by_name()} == {"alice": ("m",), "bob": ("*",), "carol": ()}
    assert found.added.keys() == {"bob", "carol"}
    assert "keys.toml has 'alice'" in caplog.text


# ------------------------------------------------------------------ over HTTP


class Clients:
    """Requests to a running gateway: of its administrator, and of clients with a key or without."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.app = running.app

    async def admin(self, method: str, path: str = "", **body: Any) -> Any:
        call = await self._running.call(method, f"/admin/keys{path}", json.dumps(body).encode() if body else b"")
        return call.json() if call.status == 200 else (call.status, call.json()["error"]["code"])

    async def chat(self, key: str = "") -> Any:
        headers = {"authorization": f"Bearer {key}"} if key else None
        call = await Call(self.app, "POST", "/v1/chat/completions", CHAT, headers).end()
        return call.status if call.status == 200 else call.json()["error"]["code"]

    async def until_chat(self, wanted: Any, key: str = "") -> None:
        async with asyncio.timeout(10):
            while await self.chat(key) != wanted:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(folder: pathlib.Path, access: str = "", gateway: str = QUICK) -> AsyncIterator[Clients]:
    neuron = FakeNode().ready("m")
    async with neuron.serving():
        path = write_config(folder, neuron, gateway=gateway)
        path.write_text(path.read_text() + access)
        async with Running(path) as found:
            await found.until_named("m")
            yield Clients(found)


async def test_a_key_is_made_used_changed_and_revoked(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path) as clients:
        assert await clients.admin("GET") == {"keys": [], "required": False}
        assert await clients.chat("any") == 200
        made = await clients.admin("POST", name="alice", models=["m"], priority=1)
        key = made["key"]
        assert await clients.chat() == "invalid_api_key", "from the first key on, every client needs one"
        assert await clients.chat("any") == "invalid_api_key"
        assert await clients.chat(key) == 200
        assert await clients.admin("POST", name="alice") == (409, "key_exists")
        listed = await clients.admin("GET")
        assert listed["required"]
        assert key not in json.dumps(listed)
        (row,) = listed["keys"]
        assert (row["name"], row["models"], row["priority"], row["added"]) == ("alice", ["m"], 1, True)
        assert abs(row["created_s"] - time.time()) < 60
        assert key not in (tmp_path / FILE).read_text()

        changed = await clients.admin("PATCH", "/alice", models=["other"], requests_per_minute=5)
        assert (changed["models"], changed["requests_per_minute"], changed["priority"]) == (["other"], 5, 1)
        assert await clients.chat(key) == "permission_denied"
        assert (await clients.admin("PATCH", "/alice", models=["*"], priority=None))["priority"] == 0
        assert await clients.chat(key) == 200

        assert await clients.admin("DELETE", "/alice") == {"name": "alice"}
        assert await clients.chat(key) == "invalid_api_key"
        assert await clients.chat() == "invalid_api_key", "the last key's end does not open the gateway"
        assert await clients.admin("DELETE", "/alice") == (404, "key_not_found")
        assert await clients.admin("PATCH", "/alice", priority=1) == (404, "key_not_found")
    text = "".join(capsys.readouterr())
    assert re.findall(r"key (\w+) key=(\w+) by=(\w+)", text) == [
        (act, "alice", "local") for act in ("added", "changed", "changed", "revoked")
    ]
    assert key not in text


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"models": ["*"]}, "missing_required_parameter"),
        ({"name": "a b"}, "invalid_type"),
        ({"name": "anonymous"}, "invalid_value"),
        ({"name": "local"}, "invalid_value"),
        ({"name": "a", "models": []}, "invalid_value"),
        ({"name": "a", "max_concurrent": -1}, "invalid_type"),
        ({"name": "a", "model": ["m"]}, "invalid_json"),
        ({"name": "a", "expires_at": "2030-01-01T00:00:00"}, "invalid_type"),
        ({"name": "a", "sha256": "0" * 64}, "invalid_json"),
    ],
)
async def test_a_wrong_key_is_refused_and_closes_nothing(tmp_path: pathlib.Path, body: Any, code: str) -> None:
    async with running(tmp_path) as clients:
        assert await clients.admin("POST", **body) == (400, code)
        assert not (tmp_path / FILE).exists()
        assert await clients.chat() == 200


async def test_a_change_that_no_key_may_have_changes_nothing(tmp_path: pathlib.Path) -> None:
    async with running(tmp_path) as clients:
        await clients.admin("POST", name="alice", max_concurrent=3)
        before = (tmp_path / FILE).read_bytes()
        for change in ({"models": []}, {"max_concurrent": "x"}, {"name": "bob"}, {"key": "x"}):
            assert (await clients.admin("PATCH", "/alice", **change))[0] == 400
        assert (tmp_path / FILE).read_bytes() == before


async def test_a_configured_key_stays_with_its_file(tmp_path: pathlib.Path) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    (tmp_path / "keys.toml").write_text(f'[[keys]]\nname = "root"\nsha256 = "{digest}"\nmodels = ["*"]\n')
    async with running(tmp_path, '[access]\nkeys = "keys.toml"\nanonymous = true\n') as clients:
        for name in ("root", "anonymous"):
            assert await clients.admin("DELETE", f"/{name}") == (409, "key_not_added")
            assert await clients.admin("PATCH", f"/{name}", priority=1) == (409, "key_not_added")
        assert await clients.admin("POST", name="root") == (409, "key_exists")
        key = (await clients.admin("POST", name="alice@example.com"))["key"]
        assert [await clients.chat(each) for each in (KEY, key)] == [200, 200]
        assert await clients.admin("DELETE", "/alice%40example.com") == {"name": "alice@example.com"}
        assert [await clients.chat(each) for each in (KEY, key)] == [200, "invalid_api_key"]


async def test_gateways_of_a_host_share_the_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "other").mkdir()
    async with (
        running(tmp_path) as first,
        running(tmp_path / "other", f'[access]\nadded_keys = "{tmp_path / FILE}"\n') as second,
    ):
        assert await second.chat() == 200
        key = (await first.admin("POST", name="alice"))["key"]
        await second.until_chat("invalid_api_key")
        assert await second.chat(key) == 200
        await second.admin("DELETE", "/alice")
        await first.until_chat("invalid_api_key", key)


async def test_workers_share_keys_and_add_up_use(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    neuron, port = FakeNode().ready("m"), daemons.free_port()
    async with neuron.serving():
        settings = f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""\nworkers = 2\nreload_check_s = 0.05\n'
        config = write_config(tmp_path, neuron, gateway=settings)
        served = daemons.daemon("cortex", "serve", "--config", str(config), port=port, log=tmp_path / "log")
        with contextlib.ExitStack() as stack:
            gateway = await asyncio.to_thread(stack.enter_context, served)

            async def ask(method: str, path: str, key: str, body: Any = None) -> httpx.Response:
                async with httpx.AsyncClient() as client:  # of one connection, so that either worker answers
                    headers = {"authorization": f"Bearer {key}"}
                    return await client.request(method, f"{gateway.url}{path}", json=body, headers=headers)

            async def until_all(status: int) -> int:
                """Ask until a row of requests has the status; return how many were answered."""
                answered = in_a_row = 0
                async with asyncio.timeout(20):
                    while in_a_row < 16:
                        found = (await ask("POST", "/v1/chat/completions", key, CHAT)).status_code
                        in_a_row = in_a_row + 1 if found == status else 0
                        answered += found == 200
                return answered

            made = await ask("POST", "/admin/keys", gateway.token(), {"name": "alice"})
            key = made.json()["key"]
            answered = await until_all(200)
            # A command on this host needs no key of its own.
            options = argparse.Namespace(url=gateway.url, key_file=None, ca_file=None)
            monkeypatch.delenv("CORTEX_KEY", raising=False)
            listed = await asyncio.to_thread(gateway_client.ask, options, "GET", "/v1/models")
            assert [model["id"] for model in json.loads(listed)["data"]] == ["m"]
            async with asyncio.timeout(20):  # of the other worker's write
                while True:
                    # Of any key: the other worker may not have known yet that it needs one.
                    rows = (await ask("GET", "/admin/usage?by=model", gateway.token())).json()["rows"]
                    if [row["requests"] for row in rows] == [answered]:
                        break
                    await asyncio.sleep(0.05)
            await ask("DELETE", "/admin/keys/alice", gateway.token())
            await until_all(401)


async def test_a_key_expires_also_where_its_access_is_cached(tmp_path: pathlib.Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    async with running(tmp_path) as clients:
        past = await clients.admin("POST", name="past", expires_at=(now - datetime.timedelta(days=1)).isoformat())
        assert await clients.chat(past["key"]) == "api_key_expired"
        soon = now + datetime.timedelta(seconds=0.5)
        key = (await clients.admin("POST", name="soon", expires_at=soon.isoformat()))["key"]
        assert await clients.chat(key) == 200
        await clients.until_chat("api_key_expired", key)
        assert datetime.datetime.now(datetime.UTC) >= soon
        assert (await clients.admin("PATCH", "/soon", expires_at=None))["expires_at"] is None
        assert await clients.chat(key) == 200


async def test_an_answer_that_has_begun_is_finished_when_its_key_is_revoked(tmp_path: pathlib.Path) -> None:
    neuron = FakeNode().ready("m")
    go_on = asyncio.Event()
    async with neuron.serving():
        path = write_config(tmp_path, neuron, gateway=QUICK)
        async with Running(path) as found:
            await found.until_named("m")
            clients = Clients(found)
            key = (await clients.admin("POST", name="alice"))["key"]
            neuron.script = answer_after(go_on)
            headers = {"authorization": f"Bearer {key}"}
            call = Call(found.app, "POST", "/v1/chat/completions", {**CHAT, "stream": True}, headers)
            await until(lambda: neuron.requests)
            await clients.admin("DELETE", "/alice")
            assert await clients.chat(key) == "invalid_api_key"
            go_on.set()
            await call.end()
            assert call.status == 200
            assert b"data: [DONE]" in call.body


async def test_an_unreadable_file_closes_an_open_gateway_and_keeps_the_keys_of_another(tmp_path: pathlib.Path) -> None:
    path = tmp_path / FILE
    async with running(tmp_path) as clients:
        path.write_text("{")
        await clients.until_chat("access_misconfigured")
        assert await clients.admin("POST", name="alice") == (500, "keys_not_writable")
        path.unlink()
        await clients.until_chat(200)
        key = (await clients.admin("POST", name="alice"))["key"]
        good = path.read_bytes()
        for damage in (lambda: path.write_bytes(good[:-9]), path.unlink):
            damage()
            await asyncio.sleep(0.15)
            assert [await clients.chat(each) for each in ("", key)] == ["invalid_api_key", 200]
            path.write_bytes(good)


async def test_what_is_written_and_not_in_force_is_told(tmp_path: pathlib.Path) -> None:
    async with running(tmp_path) as clients:
        await clients.admin("POST", name="alice")
        (tmp_path / "models.toml").write_text("[[models")
        assert await clients.admin("POST", name="bob") == (500, "keys_not_writable")
        assert "bob" not in (tmp_path / FILE).read_text()
        assert await clients.admin("DELETE", "/alice") == (500, "keys_not_writable")
        assert "alice" not in (tmp_path / FILE).read_text()


async def test_limits_that_workers_could_not_count_are_refused(tmp_path: pathlib.Path) -> None:
    async with running(tmp_path, gateway=f"{QUICK}workers = 2\n") as clients:
        assert await clients.admin("POST", name="a", requests_per_minute=1) == (400, "invalid_value")
        await clients.admin("POST", name="a")
        assert await clients.admin("PATCH", "/a", requests_per_minute=1) == (400, "invalid_value")


async def test_only_administrators_may_and_no_page_of_another_site() -> None:
    rows = ring((KEY, Principal("root", (), is_admin=True)), ("user", Principal("user")))
    async with rig(FakeNode().ready("m"), keys=rows) as gateway:
        for method, path in (("GET", ""), ("POST", ""), ("PATCH", "/user"), ("DELETE", "/user")):
            for key, status in (("user", 403), ("nobody", 401), (None, 401)):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                call = await gateway.call(method, f"/admin/keys{path}", {"name": "x"}, headers).end()
                assert call.status == status, (method, key)
            preflight = {"origin": "https://evil.example", "access-control-request-method": method}
            call = await gateway.call("OPTIONS", f"/admin/keys{path}", b"", preflight).end()
            assert b"access-control-allow-origin" not in dict(call.headers)
        plain = {"authorization": f"Bearer {KEY}", "content-type": "text/plain", "origin": "https://evil.example"}
        for method, path in (("POST", ""), ("PATCH", "/user"), ("DELETE", "/user")):
            call = await gateway.call(method, f"/admin/keys{path}", b'{"name": "x"}', plain).end()
            assert call.status == 415


async def test_a_gateway_without_a_place_for_the_file_says_so() -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        call = await gateway.call("POST", "/admin/keys", {"name": "a"}).end()
    assert (call.status, call.json()["error"]["code"]) == (500, "keys_not_writable")
    assert "access.added_keys" in call.json()["error"]["message"]


# ------------------------------------------------------------------ the command


def test_the_command_sends_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[Any, ...]] = []

    def answer(options: Any, method: str, path: str, body: Any = None) -> bytes:
        sent.append((method, path, body))
        return json.dumps({"name": "a@b", "key": "sk-new", "keys": [], "required": False}).encode()

    monkeypatch.setattr(key_commands, "ask", answer)
    given = ["--models", "qwen*, m", "--admin", "--max-concurrent", "0", "--window", "12h", "--expires", "2099-01-31"]
    assert cli.main(["keys", "add", "a@b", *given]) == 0
    assert capsys.readouterr().out == "The key, shown this once: sk-new\n"
    assert cli.main(["keys", "rm", "a@b"]) == 0
    assert capsys.readouterr().out == "a@b: revoked\n"
    assert cli.main(["keys"]) == 0
    assert "makes the first one" in capsys.readouterr().out
    body = {
        "name": "a@b",
        "models": ["qwen*", "m"],
        "admin": True,
        "max_concurrent": 0,
        "window_s": 12 * 3600.0,
        "expires_at": "2099-01-31T00:00:00+00:00",
    }
    paths = [("POST", "/admin/keys"), ("DELETE", "/admin/keys/a%40b"), ("GET", "/admin/keys")]
    assert sent == [(*each, more) for each, more in zip(paths, (body, None, None), strict=True)]


def test_the_command_of_use_asks_for_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[str] = []

    def answer(options: Any, method: str, path: str) -> bytes:
        sent.append(path)
        return b'{"rows": []}'

    monkeypatch.setattr(key_commands, "ask", answer)
    assert cli.main(["usage"]) == 0
    assert cli.main(["usage", "--from", "2027-01-01", "--key", "", "--model", "a b", "--by", "day"]) == 0
    assert sent == ["/admin/usage?by=key", "/admin/usage?by=day&from=2027-01-01&key=&model=a+b"]


@pytest.mark.parametrize(
    "words",
    [
        ["add"],
        ["rm"],
        ["list", "a"],
        ["rm", "a", "--admin"],
        ["rm", "a", "--priority", "0"],
        ["list", "--models", ""],
        ["add", "a b"],
        ["add", "a", "--expires", "soon"],
        ["add", "a", "--window", "0h"],
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert cli.main(["keys", *words]) == 2
    except SystemExit as ended:  # of argparse
        assert ended.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("cortex")
