"""Reloads of the files: all of a change, or nothing."""

import asyncio
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import pytest
from asgi_call import Call
from fake_node import FakeNode
from gateway_rig import Running, until, write_config

from cortex.config import Config
from cortex.reload import load
from cortex.settings import ConfigError


def model(name: str) -> str:
    return f'[[models]]\nid = "{name}"\nsource = "/w"\n'


def logged(capsys: pytest.CaptureFixture[str], *texts: str) -> Callable[[], bool]:
    """Return a function that returns whether all of ``texts`` have been logged."""
    seen = ""

    def look() -> bool:
        nonlocal seen
        seen += "".join(capsys.readouterr())
        return all(text in seen for text in texts)

    return look


QUICK = 'metrics_listen = ""\nreload_check_s = 0.05\n'
SLOW = 'metrics_listen = ""\nreload_check_s = 0\n'


async def test_a_change_is_seen_and_a_bad_one_changes_nothing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = FakeNode("a"), FakeNode("b").ready("there")
    async with first.serving(), second.serving():
        path = write_config(tmp_path, first, models=model("one"), gateway=QUICK)
        async with Running(path) as running:
            await running.until_named("one")
            write_config(tmp_path, first, second, models=model("two"), gateway=QUICK)
            await running.until_named("two", "there")
            assert (await running.get("/health"))["nodes"] == 2
            (tmp_path / "models.toml").write_text(model("three") + "nonsense = 1\n")
            await until(logged(capsys, "configuration not reloaded: ", "nonsense: unknown key"))
            report = await running.get("/admin/fleet")
            assert "unknown key" in report["config_error"]
            assert await running.names() == {"two", "there"}
            (tmp_path / "cortex.toml").write_text("[[neurons")
            (tmp_path / "models.toml").write_text(model("four"))
            await asyncio.sleep(0.2)
            assert await running.names() == {"two", "there"}, "half of it is right, and none of it is used"
            write_config(tmp_path, second, models=model("four"), gateway=QUICK)
            await running.until_named("four", "there")
            assert (await running.get("/admin/fleet"))["config_error"] is None
            assert (await running.get("/health"))["nodes"] == 1


async def test_a_hangup_reads_the_files_and_so_does_admin(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neuron = FakeNode()
    async with neuron.serving():
        path = write_config(tmp_path, neuron, models=model("one"), gateway=SLOW)
        async with Running(path) as running:
            (tmp_path / "models.toml").write_text(model("two"))
            await asyncio.sleep(0.1)
            assert await running.names() == {"one"}
            os.kill(os.getpid(), signal.SIGHUP)
            await running.until_named("two")
            (tmp_path / "models.toml").write_text("[")
            os.kill(os.getpid(), signal.SIGHUP)
            await until(logged(capsys, "configuration not reloaded: ", "is not TOML"))
            call = await running.call("POST", "/admin/reload", b"{}")
            assert (call.status, "is not TOML" in call.json()["error"]["message"]) == (400, True)
            assert await running.names() == {"two"}
            (tmp_path / "models.toml").write_text(model("three"))
            assert (await running.call("POST", "/admin/reload", b"{}")).status == 200
            assert await running.names() == {"three"}


async def test_running_requests_outlive_their_node(tmp_path: pathlib.Path) -> None:
    neuron, go = FakeNode("a").ready("m"), asyncio.Event()
    answer = neuron.script

    async def script(received: Any, line: Any) -> None:
        await go.wait()
        await answer(received, line)

    neuron.script = script
    other = FakeNode("b").ready("n")
    async with neuron.serving(), other.serving():
        path = write_config(tmp_path, neuron, gateway=QUICK)
        async with Running(path) as running:
            call = Call(running.app, "POST", "/v1/chat/completions", {"model": "m", "messages": []})
            await until(lambda: neuron.requests)
            write_config(tmp_path, other, gateway=QUICK)
            await running.until_named("n")
            go.set()
            assert (await call.end()).status == 200
            assert (await running.get("/health"))["in_flight"] == 0


async def test_settings_that_need_a_restart_are_logged(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neuron = FakeNode().ready("m")
    async with neuron.serving():
        path = write_config(tmp_path, neuron, gateway=QUICK)
        async with Running(path) as running:
            write_config(tmp_path, neuron, gateway=QUICK + 'listen = "127.0.0.1:7"\nworkers = 2\n')
            await until(logged(capsys, "needs a restart for: listen, workers"))
            assert await running.names() == {"m"}


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ('[access]\nkeys = "no.toml"\n', "", "cannot be read"),
        ("[access]\nanonymous = true\n", "access.anonymous", "means nothing without keys"),
        ('[access]\nkeys = "keys.toml"\n[gateway]\nworkers = 2\n', "access.counters", "only count together"),
    ],
)
def test_access_that_makes_no_sense(tmp_path: pathlib.Path, text: str, key: str, reason: str) -> None:
    path = write_config(tmp_path, FakeNode(port=1))
    rest = path.read_text().replace("[gateway]\n", "" if "[gateway]" in text else "[gateway]\n")
    path.write_text(text + rest)
    row = f'[[keys]]\nname = "a"\nsha256 = "{"0" * 64}"\nmodels = ["*"]\nmax_concurrent = 1\n'
    (tmp_path / "keys.toml").write_text(row)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert caught.value.key == key
    assert reason in caught.value.reason
    assert Config().access.keys == ""


async def test_a_model_that_is_removed_from_the_catalogue_is_not_offered_even_if_loaded(
    tmp_path: pathlib.Path,
) -> None:
    neuron = FakeNode("a").ready("one", "two", "of-the-node")
    async with neuron.serving():
        path = write_config(tmp_path, neuron, models=model("one") + model("two"), gateway=QUICK)
        async with Running(path) as running:
            await running.until_named("one", "two", "of-the-node")
            asked = {"model": "two", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
            assert (await Call(running.app, "POST", "/v1/chat/completions", asked).end()).status == 200
            num_asked = len(neuron.requests)
            (tmp_path / "models.toml").write_text(model("one"))
            await running.until_named("one", "of-the-node")
            for dialect in ("/v1/chat/completions", "/v1/messages", "/v1/completions"):
                for stream in (False, True):
                    body = {**asked, "prompt": "Hi", "stream": stream}
                    refused = await Call(running.app, "POST", dialect, body).end()
                    assert refused.status == 404, (dialect, stream)
            assert (await Call(running.app, "GET", "/v1/models/two").end()).status == 404
            assert len(neuron.requests) == num_asked
            (tmp_path / "models.toml").write_text(model("one") + model("two"))
            await running.until_named("one", "two", "of-the-node")
            assert (await Call(running.app, "POST", "/v1/chat/completions", asked).end()).status == 200


async def test_models_that_only_nodes_list_are_not_offered_without_discovery(tmp_path: pathlib.Path) -> None:
    neuron = FakeNode("a").ready("one", "of-the-node")
    async with neuron.serving():
        path = write_config(tmp_path, neuron, models=model("one"), gateway=QUICK + "discover = false\n")
        async with Running(path) as running:
            await until(lambda: running.app.gateway.fleet.state.complete)
            assert await running.names() == {"one"}
            body = {"model": "of-the-node", "messages": [{"role": "user", "content": "Hi"}]}
            assert (await Call(running.app, "POST", "/v1/chat/completions", body).end()).status == 404
