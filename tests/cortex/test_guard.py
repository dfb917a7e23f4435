"""Pages of other sites: their requests are refused by every listener, and preflights are answered."""

import asyncio
import contextlib
import http.client
import os
import pathlib
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import daemons
import loopback
import pytest
from asgi_call import Call
from asgi_client import ask
from fake_node import FakeNode
from gateway_rig import CHAT, STREAM, Running, rig, write_config
from key_rig import KEY, ring

from cortex.access import local
from cortex.access.keys import ANONYMOUS, Principal
from cortex.guard import Guard, HostNotAllowedError
from cortex.settings import ConfigError
from neuron.api import Api
from neuron.config import Config, DaemonSettings
from neuron.service import Service

HERE = {"host": "127.0.0.1:31313"}
JSON = {"content-type": "application/json"}
CROSS_SITE: dict[str, tuple[dict[str, str], int, str]] = {
    "a form's text": ({**HERE, "content-type": "text/plain"}, 415, "unsupported_media_type"),
    "a form's fields": (
        {**HERE, "content-type": "application/x-www-form-urlencoded"},
        415,
        "unsupported_media_type",
    ),
    "a form's parts": ({**HERE, "content-type": "multipart/form-data; boundary=x"}, 415, "unsupported_media_type"),
    "text that mentions JSON": (
        {**HERE, "content-type": "text/plain; charset=application/json"},
        415,
        "unsupported_media_type",
    ),
    "no type, from a page": (
        {**HERE, "origin": "http://127.0.0.1:31313", "content-length": "2"},
        415,
        "unsupported_media_type",
    ),
    "another origin": ({**HERE, **JSON, "origin": "https://evil.example"}, 403, "origin_not_allowed"),
    "another port": ({**HERE, **JSON, "origin": "http://127.0.0.1:8000"}, 403, "origin_not_allowed"),
    "a sandboxed frame": ({**HERE, **JSON, "origin": "null"}, 403, "origin_not_allowed"),
    "a file": ({**HERE, **JSON, "origin": "file://"}, 403, "origin_not_allowed"),
    "cross-site": ({**HERE, **JSON, "sec-fetch-site": "cross-site"}, 403, "origin_not_allowed"),
    "same-site": ({**HERE, **JSON, "sec-fetch-site": "same-site"}, 403, "origin_not_allowed"),
    "a name of somebody's": ({**JSON, "host": "evil.example:31313"}, 403, "host_not_allowed"),
    "and the page of that name": (
        {**JSON, "host": "evil.example", "origin": "http://evil.example", "sec-fetch-site": "same-origin"},
        403,
        "host_not_allowed",
    ),
    "an address within a name": ({**JSON, "host": "127.0.0.1.evil.example"}, 403, "host_not_allowed"),
    "a user within a host": ({**JSON, "host": "127.0.0.1@evil.example"}, 403, "host_not_allowed"),
    "an empty host": ({**JSON, "host": ""}, 403, "host_not_allowed"),
}
OWN: dict[str, dict[str, str]] = {
    "an SDK": {**HERE, **JSON},
    "with a charset": {**HERE, "content-type": "Application/JSON; charset=utf-8"},
    "no type": HERE,
    "no host": {},
    "a name": {**JSON, "host": "localhost:31313"},
    "a name without a dot": {**JSON, "host": "gpu-box:31313"},
    "a private name": {**JSON, "host": "gpu-box.lan"},
    "an address of IPv6": {**JSON, "host": "[::1]:31313"},
    "its own page": {**HERE, **JSON, "origin": "http://127.0.0.1:31313", "sec-fetch-site": "same-origin"},
    "its own page behind TLS": {**JSON, "host": "gpu-box", "origin": "https://gpu-box:443"},
    "an address that was typed": {**HERE, **JSON, "sec-fetch-site": "none"},
}


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("how", CROSS_SITE)
async def test_a_page_of_another_site_does_not_reach_a_model(how: str, body: dict[str, object]) -> None:
    headers, status, code = CROSS_SITE[how]
    neuron = FakeNode().ready("m")
    async with rig(neuron) as gateway:
        for _ in range(2):
            assert (await gateway.chat().end()).status == 200, "and the fast path is warm"
        num_asked = len(neuron.requests)
        call = await gateway.call("POST", "/v1/chat/completions", body, headers).end()
        assert (call.status, call.json()["error"]["code"]) == (status, code)
        assert len(neuron.requests) == num_asked
        assert not any(name.startswith("access-control-allow") for name in call.headers)


@pytest.mark.parametrize("how", OWN)
async def test_clients_of_its_own_are_let_in(how: str) -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        for body in (CHAT, STREAM, CHAT):
            assert (await gateway.call("POST", "/v1/chat/completions", body, OWN[how]).end()).status == 200


async def test_a_key_is_proof_enough_and_being_anonymous_is_none() -> None:
    keys = ring((KEY, Principal("alice")), anonymous=Principal(ANONYMOUS))
    foreign = {"host": "gateway.example.com", "origin": "app://notes", "sec-fetch-site": "cross-site", **JSON}
    async with rig(FakeNode().ready("m"), keys=keys) as gateway:
        for given, status in (({"x-api-key": KEY}, 200), ({}, 403), ({"x-api-key": "wrong"}, 401)):
            for body in (CHAT, STREAM, CHAT):
                call = await gateway.call("POST", "/v1/chat/completions", body, {**foreign, **given}).end()
                assert call.status == status
        plain = {"x-api-key": KEY, "content-type": "text/plain"}
        assert (await gateway.call("POST", "/v1/chat/completions", CHAT, plain).end()).status == 415


CONTROL = [
    ("/models/load", {"id": "n", "source": "/"}),
    ("/models/fit", {"id": "n", "source": "hf:o/n"}),
    ("/models/pull", {"id": "n", "source": "/"}),
    ("/models/unload", {"id": "m"}),
    ("/models/pin", {"id": "m", "pinned": True}),
    ("/drain", {"draining": True}),
    ("/v1/chat/completions", CHAT),
]


@pytest.mark.parametrize("how", CROSS_SITE)
async def test_a_page_of_another_site_does_not_reach_a_neuron(how: str) -> None:
    headers, status, code = CROSS_SITE[how]
    api = Api(Service(Config(), harnesses={}, workers={}))
    for path, body in CONTROL:
        reply = await ask(api, "POST", path, body, headers=headers)
        assert (reply.status, reply.json()["error"]["code"]) == (status, code), path
    if status == 403:
        for path in ("/models", "/discovery", "/metrics", "/v1/models"):
            assert (await ask(api, "GET", path, headers=headers)).status == 403
    assert (await ask(api, "GET", "/health", headers=headers)).status == 200


@pytest.mark.parametrize("how", OWN)
async def test_a_neuron_lets_gateways_in(how: str) -> None:
    api = Api(Service(Config(), harnesses={}, workers={}))
    reply = await ask(api, "POST", "/drain", {"draining": True}, headers=OWN[how])
    assert (reply.status, reply.json().get("state")) == (200, "draining")


async def test_other_host_names_are_configured(tmp_path: pathlib.Path) -> None:
    daemon = DaemonSettings(allowed_hosts=("gpu.example.com",))
    api = Api(Service(Config(daemon), harnesses={}, workers={}))
    for host, status in (("gpu.example.com:13131", 200), ("GPU.example.com.", 200), ("example.com", 403)):
        assert (await ask(api, "GET", "/models", headers={"host": host})).status == status
    async with rig(FakeNode().ready("m"), allowed_hosts=("gateway.example.com",)) as gateway:
        for _ in range(2):
            headers = {"host": "gateway.example.com", **JSON}
            assert (await gateway.call("POST", "/v1/chat/completions", CHAT, headers).end()).status == 200


@pytest.mark.parametrize("how", [how for how, (_, status, _) in CROSS_SITE.items() if status == 403])
async def test_a_page_of_another_site_does_not_read_metrics(how: str) -> None:
    async with rig(FakeNode()) as gateway:
        port = daemons.free_port()
        stop = gateway.gateway.metrics.serve("127.0.0.1", port, lambda: gateway.gateway.guard)
        try:
            url = f"http://127.0.0.1:{port}/metrics"
            assert await asyncio.to_thread(status_of, url) == 200
            assert await asyncio.to_thread(lambda: status_of(url, None, **CROSS_SITE[how][0])) == 403
        finally:
            await asyncio.to_thread(stop)


# ------------------------------------------------------------------ allowed requests

CHAT_PAGE = "https://chat.example.com"


async def test_an_allowed_origin_may_send_and_read() -> None:
    async with rig(FakeNode().ready("m"), allowed_origins=(CHAT_PAGE, "http://localhost:3000")) as gateway:
        headers = {**HERE, **JSON, "origin": CHAT_PAGE, "sec-fetch-site": "cross-site"}
        for body in (CHAT, STREAM, {**CHAT, "model": "nobody"}):
            call = await gateway.call("POST", "/v1/chat/completions", body, headers).end()
            assert call.status == (404 if body.get("model") == "nobody" else 200)
            assert call.headers["access-control-allow-origin"] == CHAT_PAGE
            assert "x-request-id" in call.headers["access-control-expose-headers"]
            assert "Origin" in call.headers["vary"]
            assert "access-control-allow-credentials" not in call.headers
        other = await gateway.call(
            "POST", "/v1/chat/completions", CHAT, {**headers, "origin": "https://x.example"}
        ).end()
        assert (other.status, other.headers.get("access-control-allow-origin")) == (403, None)


async def test_a_preflight_is_answered() -> None:
    async with rig(FakeNode().ready("m"), allowed_origins=(CHAT_PAGE,)) as gateway:
        asks = {
            **HERE,
            "origin": CHAT_PAGE,
            "access-control-request-method": "POST",
            "access-control-request-headers": "Authorization,content-type, x-api-key,anthropic-beta,x-stainless-os,dnt",
            "access-control-request-private-network": "true",
        }
        call = await gateway.call("OPTIONS", "/v1/chat/completions", b"", asks).end()
        assert (call.status, call.body) == (204, b"")
        assert call.headers["access-control-allow-origin"] == CHAT_PAGE
        assert "POST" in call.headers["access-control-allow-methods"]
        allowed = call.headers["access-control-allow-headers"].split(", ")
        assert allowed == ["authorization", "content-type", "x-api-key", "anthropic-beta", "x-stainless-os"]
        assert call.headers["access-control-allow-private-network"] == "true"
        assert call.headers["vary"].startswith("Origin")
        refused = await gateway.call(
            "OPTIONS", "/v1/chat/completions", b"", {**asks, "origin": "https://x.example"}
        ).end()
        assert (refused.status, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in refused.headers
        plain = await gateway.call("OPTIONS", "/v1/chat/completions", b"", HERE).end()
        assert (plain.status, "POST" in plain.headers["allow"]) == (204, True)


@pytest.mark.parametrize("path", ["/admin/fleet", "/admin/models", "/admin/reload", "/health"])
async def test_no_origin_is_allowed_outside_of_the_clients_paths(path: str) -> None:
    async with rig(FakeNode().ready("m"), allowed_origins=(CHAT_PAGE,)) as gateway:
        asks = {**HERE, "origin": CHAT_PAGE, "access-control-request-method": "GET"}
        for method in ("OPTIONS", "GET", "POST"):
            call = await gateway.call(method, path, b"", asks).end()
            assert not any(name.startswith("access-control") for name in call.headers)


async def test_every_origin_is_for_requests_with_a_key() -> None:
    keys = ring((KEY, Principal("alice")), anonymous=Principal(ANONYMOUS))
    async with rig(FakeNode().ready("m"), keys=keys, allowed_origins=("*",)) as gateway:
        headers = {**HERE, **JSON, "origin": "https://any.example"}
        call = await gateway.call("POST", "/v1/chat/completions", CHAT, {**headers, "x-api-key": KEY}).end()
        assert (call.status, call.headers["access-control-allow-origin"]) == (200, "https://any.example")
        assert (await gateway.call("POST", "/v1/chat/completions", CHAT, headers).end()).status == 403


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ('allowed_origins = ["*"]', "needs a key"),
        ('allowed_origins = ["chat.example.com"]', "is not an origin"),
        ('allowed_origins = ["https://chat.example.com/"]', "is not an origin"),
        ('allowed_origins = ["null"]', "is not an origin"),
        ('allowed_hosts = ["http://gateway.example.com"]', "is not a host's name"),
        ('allowed_hosts = [""]', "is not a host's name"),
    ],
)
def test_settings_that_allow_nothing_sensible(tmp_path: pathlib.Path, settings: str, reason: str) -> None:
    from cortex.reload import load

    with pytest.raises(ConfigError, match=reason):
        load(write_config(tmp_path, FakeNode(port=1), gateway=settings), {})


async def test_a_reload_allows_and_forbids(tmp_path: pathlib.Path) -> None:
    quick = 'metrics_listen = ""\nreload_check_s = 0.02\n'
    neuron = FakeNode().ready("m")
    async with neuron.serving():
        path = write_config(tmp_path, neuron, gateway=quick)
        async with Running(path) as running:
            status = 0

            async def becomes(wanted: int) -> bool:
                headers = {**HERE, **JSON, "origin": CHAT_PAGE}
                call = await Call(running.app, "POST", "/v1/chat/completions", CHAT, headers).end()
                return call.status == wanted

            assert await becomes(403)
            for more, status in ((f'allowed_origins = ["{CHAT_PAGE}"]\n', 200), ("", 403)):
                write_config(tmp_path, neuron, gateway=quick + more)
                for _ in range(500):
                    if await becomes(status):
                        break
                assert await becomes(status)


# ------------------------------------------------------------------ a proxy on the host


@contextlib.contextmanager
def proxy(to: int) -> Iterator[str]:
    """A reverse proxy on this host that adds no header, and asks for the address it was given."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            passed = {name: value for name, value in self.headers.items() if name.lower() not in {"host", "connection"}}
            there = http.client.HTTPConnection("127.0.0.1", to, timeout=20)
            there.request(self.command, self.path, body or None, passed)
            reply = there.getresponse()
            data = reply.read()
            there.close()
            self.send_response(reply.status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with loopback.serving(Handler) as url:
        yield url


def status_of(url: str, data: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(url, data, headers | ({"content-type": "application/json"} if data else {}))
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_proxy_on_the_host_opens_nothing_and_the_commands_find_the_token(tmp_path: pathlib.Path) -> None:
    runtime = tmp_path / "runtime"
    port = daemons.free_port()
    config = write_config(
        tmp_path,
        FakeNode("a", port=daemons.free_port()),
        gateway=f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""',
    )
    environment = {"RUNTIME_DIRECTORY": str(runtime)}
    with daemons.daemon(
        "cortex", "serve", "--config", str(config), port=port, log=tmp_path / "log", **environment
    ) as running:
        with proxy(port) as url:
            assert status_of(f"{url}/v1/models") == 200
            for path, data in (
                ("/admin/fleet", None),
                ("/admin/keys", None),
                ("/admin/events", None),
                ("/admin/reload", b"{}"),
                ("/admin/nodes/drain", b'{"node":"a"}'),
            ):
                assert status_of(url + path, data) == 401, path
        (file,) = runtime.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
        program = str(pathlib.Path(sys.executable).with_name("cortex"))

        def run(*arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
            there = {**os.environ, **environment, **more}
            return subprocess.run([program, *arguments], capture_output=True, text=True, env=there, timeout=60)

        assert run("status", "--url", running.url).returncode == 0
        assert run("status", "--config", str(config)).returncode == 0
        link = run("dashboard", "--config", str(config)).stdout.strip()
        assert link.startswith(f"http://127.0.0.1:{port}/#key=sk-local-")
        assert status_of(f"{running.url}/admin/fleet", authorization=f"Bearer {link.partition('=')[2]}") == 200
        elsewhere = run("status", "--url", running.url, RUNTIME_DIRECTORY=str(tmp_path), HOME=str(tmp_path))
        assert elsewhere.returncode == 1
        assert "administrator's key" in elsewhere.stderr
        text = (tmp_path / "log").read_text()
        assert "sk-local-" not in text


def test_a_token_that_others_can_read_is_made_anew(tmp_path: pathlib.Path) -> None:
    environment = {"RUNTIME_DIRECTORY": str(tmp_path / "own")}
    first = local.obtain(7, environment)
    assert local.obtain(7, environment) == first == local.find(7, environment)
    assert local.obtain(8, environment) != first
    file = tmp_path / "own" / "admin-7.token"
    file.chmod(0o644)
    assert local.find(7, environment) == ""
    second = local.obtain(7, environment)
    assert second not in ("", first)
    file.unlink()
    file.symlink_to(tmp_path / "own" / "admin-8.token")
    with contextlib.suppress(OSError):
        assert local.find(7, environment) == ""
    assert local.obtain(7, {}) == ""


def test_no_token_is_sent_to_another_users_listener(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RUNTIME_DIRECTORY": str(tmp_path)}
    port = daemons.free_port()
    token = local.obtain(port, environment)
    table = tmp_path / "tcp"
    real = pathlib.Path.read_text

    def read(path: pathlib.Path, *more: object) -> str:
        return real(table) if str(path).startswith("/proc/net/tcp") else real(path)

    monkeypatch.setattr(pathlib.Path, "read_text", read)
    for owner, found in ((os.getuid(), token), (0, token), (12345, "")):
        row = f"0: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000 {owner} 0 1"
        table.write_text(f"head\n{row}\n")
        assert local.find(port, environment) == found


def test_valid_host_names() -> None:
    guard = Guard(hosts=("gateway.example.com",))
    for host, is_own in (
        ("gateway.example.com", True),
        ("GATEWAY.EXAMPLE.COM:443", True),
        ("10.0.0.7:31313", True),
        ("[fe80::1]", True),
        ("cortex", True),
        ("cortex.default.svc.cluster.local", True),
        ("evil.com", False),
        ("gateway.example.com.evil.com", False),
        ("local.evil.com", False),
        ("a b", False),
        ("evil.com:80:80", False),
        ("\x00", False),
    ):
        headers = {b"host": host.encode()}
        try:
            guard.check_site(headers.get, setting="gateway")
        except HostNotAllowedError:
            assert not is_own, host
        else:
            assert is_own, host
