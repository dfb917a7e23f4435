"""An unreadable file never means "no keys": at the start, at a reload, and after a correction."""

import asyncio
import hashlib
import os
import pathlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from asgi_call import Call
from fake_node import FakeNode
from gateway_rig import Running, write_config

from cortex.reload import sets_access

QUICK = 'metrics_listen = ""\nreload_check_s = 0.05\n'
KEY = "sk-cortex-abc"
ROW = f'[[keys]]\nname = "alice"\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\nmodels = ["*"]\n'
ACCESS = '[access]\nkeys = "keys.toml"\n'


def nested(path: pathlib.Path) -> None:
    path.write_text("x = " + "[" * 3000 + "]" * 3000)


def pipe(path: pathlib.Path) -> None:
    os.mkfifo(path)


BROKEN: dict[str, Callable[[pathlib.Path], object]] = {
    "missing": lambda path: None,
    "no TOML": lambda path: path.write_text("[[keys"),
    "an unknown key": lambda path: path.write_text(ROW + "model = 1\n"),
    "a wrong type": lambda path: path.write_text("keys = 5\n"),
    "nested 3,000 deep": nested,
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00" + ROW.encode()),
    "a number of 5,000 digits": lambda path: path.write_text("x = " + "1" * 5000),
    "a folder": lambda path: path.mkdir(),
    "a pipe": pipe,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


def clear(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@asynccontextmanager
async def running(tmp_path: pathlib.Path, access: str = "") -> AsyncIterator[tuple[Running, pathlib.Path]]:
    neuron = FakeNode().ready("m")
    async with neuron.serving():
        path = write_config(tmp_path, neuron, gateway=QUICK)
        path.write_text(path.read_text() + access)
        async with Running(path) as found:
            yield found, path


async def status(found: Running, key: str = "") -> int:
    headers = {"authorization": f"Bearer {key}"} if key else None
    return (await Call(found.app, "GET", "/v1/models", headers=headers).end()).status


async def until_status(found: Running, wanted: int, key: str = "") -> None:
    async with asyncio.timeout(10):
        while await status(found, key) != wanted:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", BROKEN)
async def test_an_open_gateway_closes_at_keys_that_cannot_be_read_and_notices_their_mending(
    tmp_path: pathlib.Path, how: str
) -> None:
    keys = tmp_path / "keys.toml"
    async with running(tmp_path) as (found, path):
        assert await status(found) == 200
        BROKEN[how](keys)
        path.write_text(path.read_text() + ACCESS)
        await until_status(found, 503)
        call = await Call(found.app, "POST", "/v1/chat/completions", {"model": "m", "messages": []}).end()
        assert (call.status, call.json()["error"]["code"]) == (503, "access_misconfigured")
        clear(keys)
        keys.write_text(ROW)  # and nothing else: the file is watched though it was never in force
        await until_status(found, 401)
        assert await status(found, KEY) == 200


@pytest.mark.parametrize("how", BROKEN)
async def test_a_gateway_with_keys_goes_on_with_them(tmp_path: pathlib.Path, how: str) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(ROW)
    async with running(tmp_path, ACCESS) as (found, _):
        assert (await status(found), await status(found, KEY)) == (401, 200)
        clear(keys)
        BROKEN[how](keys)
        await asyncio.sleep(0.2)
        assert (await status(found), await status(found, KEY)) == (401, 200)
        clear(keys)
        keys.write_text(ROW.replace(hashlib.sha256(KEY.encode()).hexdigest(), "0" * 64))  # revoked
        await until_status(found, 401, KEY)


@pytest.mark.parametrize("how", BROKEN)
def test_a_start_is_refused(tmp_path: pathlib.Path, how: str) -> None:
    path = write_config(tmp_path, FakeNode(port=1))
    path.write_text(path.read_text() + ACCESS)
    BROKEN[how](tmp_path / "keys.toml")
    program = str(pathlib.Path(sys.executable).with_name("cortex"))
    ended = subprocess.run([program, "serve", "--config", str(path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("cortex: ")
    assert "keys.toml" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_running_gateway_does_not_give_up_its_keys(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys.toml").write_text(ROW)
    async with running(tmp_path, ACCESS) as (found, path):
        text = path.read_text()
        path.write_text(text.removesuffix(ACCESS))  # a half-written file looks like this
        await asyncio.sleep(0.2)
        assert (await status(found), await status(found, KEY)) == (401, 200)
        path.write_text(text)
        (tmp_path / "keys.toml").write_text("")
        await until_status(found, 401, KEY)  # no key in the file is no key that is let in
    assert "does not give up its keys" in "".join(capsys.readouterr())


async def test_an_open_gateway_opens_again_when_the_change_is_taken_back(tmp_path: pathlib.Path) -> None:
    async with running(tmp_path) as (found, path):
        text = path.read_text()
        path.write_text(text + '[access]\nkeys = "keys.toml\n')  # which is not even TOML
        await until_status(found, 503)
        path.write_text(text)
        await until_status(found, 200)


async def test_the_watch_outlives_a_file_that_breaks_its_reader(tmp_path: pathlib.Path) -> None:
    async with running(tmp_path) as (found, path):
        text = path.read_text()
        for broken in ("x = " + "[" * 3000 + "]" * 3000, "x = " + "1" * 5000, "\x00"):
            path.write_text(broken)
            await asyncio.sleep(0.1)
        assert (await found.get("/health"))["degraded"] == []
        path.write_text(text)
        (tmp_path / "models.toml").write_text('[[models]]\nid = "new"\nsource = "/w"\n')
        await found.until_named("m", "new")


@pytest.mark.parametrize(
    ("text", "is_about_it"),
    [
        ("[[neurons", False),
        ('[access]\n# keys = ""\n[[neurons', False),
        ('[access]\nkeys = ""\n[[neurons', False),
        ('[access]\nkeys = "keys.toml\n', True),
        ("[access]\nkeys keys.toml\n", True),
        ("[access]\nkey = keys.toml\n", True),
        ("access.keys = keys.toml\n", True),
        ("[access]\nkeys = 5\n", True),
        ('[access]\nkey = "keys.toml"\n', True),
        ('[access]\ncounters = "memory"\n', False),
        ("[access]\nanonymous = true\n", True),
    ],
)
def test_which_rejected_changes_set_access(tmp_path: pathlib.Path, text: str, is_about_it: bool) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(text)
    assert sets_access(path, {}) is is_about_it
    assert sets_access(path, {"CORTEX_ACCESS__KEYS": "keys.toml"})
