"""``--check`` succeeds only where a start would, and a start does without optional dependencies."""

import os
import pathlib
import subprocess
import sys

import daemons
import pytest
from fake_node import FakeNode
from gateway_rig import rig, write_config
from key_rig import KEY, ring

from cortex.access.keys import Limits, Principal
from cortex.config import StoreKind, StoreSettings

BIN = pathlib.Path(sys.executable).parent


def run(program: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {
        name: value for name, value in os.environ.items() if name not in {"HOME", "XDG_STATE_HOME", "STATE_DIRECTORY"}
    }
    return subprocess.run(
        [str(BIN / program), *arguments], capture_output=True, text=True, env={**kept, **environment}, timeout=60
    )


@pytest.mark.parametrize(
    ("store", "gateway", "reason"),
    [
        ("", "", "store.path"),  # and no home to keep it in
        ('path = "/proc/nowhere/responses.db"', "", "store.path"),
        ('path = "{}"', "", "store.path"),  # a folder
        ('path = "{}/models.toml/responses.db"', "", "store.path"),
        ('kind = "valkey"\nurl = "nonsense"', "", "store.url"),
        ('kind = "none"', 'listen = "192.0.2.7:31313"', "gateway.listen"),
        ('kind = "none"', 'metrics_listen = "192.0.2.7:31314"', "gateway.metrics_listen"),
    ],
)
def test_a_check_finds_the_faults_that_a_start_would(
    tmp_path: pathlib.Path, store: str, gateway: str, reason: str
) -> None:
    path = write_config(tmp_path, FakeNode(port=1), gateway=gateway)
    text = path.read_text()
    path.write_text(text[: text.index("[store]")] + "[store]\n" + store.format(tmp_path) + "\n")
    for more in (["--check"], []):
        done = run("cortex", "serve", "--config", str(path), *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("**/*.db"))


def test_a_check_beside_a_running_gateway_succeeds(tmp_path: pathlib.Path) -> None:
    port = daemons.free_port()
    config = write_config(
        tmp_path,
        FakeNode("a", port=daemons.free_port()),
        gateway=f'listen = "127.0.0.1:{port}"\nmetrics_listen = ""',
    )
    with daemons.daemon("cortex", "serve", "--config", str(config), port=port, log=tmp_path / "log"):
        done = run("cortex", "serve", "--config", str(config), "--check")
        assert (done.returncode, done.stderr) == (0, "")


def test_a_neuron_is_checked_for_its_address() -> None:
    done = run("neuron", "--listen", "192.0.2.7:1", "--devices", "cpu", "--check")
    assert done.returncode == 2
    assert "daemon.listen" in done.stderr


async def test_a_gateway_starts_without_its_valkey() -> None:
    pytest.importorskip("redis")
    url = f"redis://127.0.0.1:{daemons.free_port()}/0"
    keys = ring((KEY, Principal("limited", limits=Limits(requests_per_minute=9))), ("free", Principal("free")))
    store = StoreSettings(kind=StoreKind.VALKEY, url=url)
    neuron = FakeNode().ready("m")
    async with rig(neuron, keys=keys, store=store, access={"counters": "valkey", "url": url}) as gateway:
        body = {"model": "m", "messages": []}
        limited = await gateway.call("POST", "/v1/chat/completions", body, {"x-api-key": KEY}).end()
        assert (limited.status, limited.json()["error"]["code"]) == (503, "access_counters_unavailable")
        assert (await gateway.call("POST", "/v1/chat/completions", body, {"x-api-key": "free"}).end()).status == 200
        found = await gateway.call("GET", "/v1/responses/resp_1", b"", {"x-api-key": "free"}).end()
        assert (found.status, found.json()["error"]["code"]) == (503, "store_unavailable")
