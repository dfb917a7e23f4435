"""The bench's own tools: a load that passes wrong answers, or counts what is not there, would praise a bad gateway."""

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from gateway import gateways, rig
from gateway.run import DIRECT, Scenario, Table
from gateway.scale import wait_until_still

from cortex import cli


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with rig.mock(tmp_path_factory.mktemp("mock")) as port:
        yield port


def ask(port: int, connections: int, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [str(rig.build("load")), str(port), str(connections), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_load_and_the_mock_node_count_alike(node: int) -> None:
    before = rig.counts(node)
    answers = json.loads(ask(node, 4, "--answers", "50", "--body", "60000").stdout)
    streams = json.loads(ask(node, 3, "--answers", "5", "--sse-events", "200").stdout)
    paced = json.loads(ask(node, 2, "--answers", "1", "--sse-events", "10", "--pace", "2").stdout)
    after = rig.counts(node)
    assert answers["total_answers"] == answers["answers"] == 200
    assert streams["total_answers"] == 15
    assert streams["total_sse_events"] == streams["sse_events"] == 3000
    assert paced["total_sse_events"] == 20
    assert 0.017 < paced["seconds"] < 30
    assert {key: after[key] - before[key] for key in ("requests", "streams", "sse_events", "cut")} == {
        "requests": 200 + 15 + 2,
        "streams": 17,
        "sse_events": 3020,
        "cut": 0,
    }


def test_the_measured_command_is_that_of_cortex_serve(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's options are those of the command."""
    options_used: dict[str, Any] = {}

    class ServerCreated(Exception):
        """In the place of a server that runs."""

    def server(target: str, **options: Any) -> None:
        options_used.update(options, target=target)
        raise ServerCreated

    monkeypatch.setattr("granian.Granian", server)
    *arguments, target = map(str, gateways.cortex_command("rsgi", 1, [2], tmp_path).arguments[1:])
    with pytest.raises(ServerCreated):
        cli.main(["serve", "--config", str(tmp_path / "cortex.toml"), "--listen", f"127.0.0.1:{rig.free_ports()}"])
    measured = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert target == options_used["target"]
    assert measured["--interface"] == options_used["interface"].value
    assert measured["--loop"] == options_used["loop"].value
    assert measured["--backpressure"] == str(options_used["backpressure"])
    assert options_used["log_access"] is False


class Proxy:
    """Passes one client's requests on, and the answers back with ``old`` as ``new``, ``size`` bytes at a time."""

    def __init__(self, node: int, old: bytes, new: bytes, size: int) -> None:
        self._node, self._old, self._new, self._size = node, old, new, size
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            client.settimeout(10)
            with client, socket.create_connection(("127.0.0.1", self._node), timeout=10) as server:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while request := client.recv(1 << 20):
                    server.sendall(request)
                    answer = b""
                    while not answer.endswith((b"0\r\n\r\n", b"}}")):
                        answer += server.recv(1 << 20)
                    answer = answer.replace(self._old, self._new, 1)
                    for start in range(0, len(answer), self._size):
                        client.sendall(answer[start : start + self._size])


@contextlib.contextmanager
def proxy(node: int, old: bytes = b"", new: bytes = b"", *, size: int = 1 << 20) -> Iterator[int]:
    running = Proxy(node, old, new, size)
    try:
        yield running.port
    finally:
        running.close()


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("kind", [(), ("--sse-events", "5")])
def test_the_load_reads_an_answer_in_any_pieces(node: int, kind: tuple[str, ...], size: int) -> None:
    with proxy(node, size=size) as port:
        done = ask(port, 1, "--answers", "2", *kind)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total_answers"] == 2


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ((), b"200 OK", b"502 OK", "status"),
        ((), b"#00000000", b"#00000001", "not the answer to this request"),
        ((), b" word word\"", b" word wore\"", "not the answer to this request"),
        (("--sse-events", "5"), b"200 OK", b"429 OK", "status"),
        (("--sse-events", "5"), b"#0003", b"#0004", "not the next SSE event"),
        (("--sse-events", "5"), b"#0002", b"!0002", "not the next SSE event"),
        (("--sse-events", "5"), b"[DONE]", b"[DOME]", "a stream ends too early"),
    ],
)  # fmt: skip
def test_a_wrong_answer_ends_the_load(node: int, kind: tuple[str, ...], old: bytes, new: bytes, message: str) -> None:
    with proxy(node, old, new) as port:
        done = ask(port, 1, "--answers", "1", *kind)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_stalled_load_reads_nothing_until_its_signal(node: int) -> None:
    before = rig.counts(node)
    command = [*rig.load_command(node, 2, sse_events=20_000, answers=1), "--stall"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
        assert load.stdout is not None
        assert load.stdout.readline() == "stalled\n"
        wait_until_still(node)
        stuck = rig.counts(node)["sse_events"] - before["sse_events"]
        assert 0 < stuck < 2 * 20_000 / 4
        load.send_signal(signal.SIGUSR1)
        figures = rig.read_figures(load.stdout.read(), "", load.wait(60))
    assert figures["total_sse_events"] == 2 * 20_000 == rig.counts(node)["sse_events"] - before["sse_events"]


def test_cpu_time_is_of_the_whole_tree(tmp_path: pathlib.Path) -> None:
    spin = "import time; t = time.process_time\nwhile t() < 0.3: pass\nprint(flush=True); time.sleep(60)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    with rig.Server([sys.executable, "-c", script], pinned=rig.cores()[:1], log=tmp_path / "log") as server:
        deadline = time.monotonic() + 60
        while not server.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(server.processes()) == 2
        assert 0.3 <= server.cpu_s() < 3
    assert server.processes() == []


def test_a_run_that_failed_once_has_no_figure(node: int) -> None:
    table, scenario = Table(), Scenario("16", 2)
    table.run(DIRECT, scenario, node, None, 0.05)
    assert (table.median(DIRECT, "16", "answers_per_s") or 0) > 100
    assert table.ratio(DIRECT, DIRECT, "16", "answers_per_s") == 1.0
    table.run(DIRECT, scenario, rig.free_ports(), None, 0.05)
    assert table.median(DIRECT, "16", "answers_per_s") is None
    assert len(table.failures) == 1
