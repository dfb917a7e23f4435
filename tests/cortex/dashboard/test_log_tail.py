"""The latest lines of the log, as the page gets them: of every worker, in order, whole, bounded, in both formats."""

import io
import logging
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import orjson
import pytest
from fake_node import FakeNode
from gateway_rig import rig, until

from cortex import logs
from cortex.dashboard import feed, log_tail, ring
from cortex.dashboard.log_tail import LogTail
from cortex.logs import LogFormat

log = logging.getLogger("cortex.test_log_tail")


@pytest.fixture(params=LogFormat)
def configured(request: pytest.FixtureRequest) -> Iterator[LogFormat]:
    """The log, configured as a gateway's; its lines go nowhere else."""
    root = logging.getLogger("cortex")
    before = root.handlers[:], root.level, root.propagate
    root.handlers = []
    logs.configure(request.param)
    handler = root.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(io.StringIO())
    yield request.param
    root.handlers, root.level, root.propagate = before


@pytest.fixture
def tail(configured: LogFormat) -> Iterator[LogTail]:
    found = LogTail()
    found.start()
    yield found
    found.stop()


def raise_deep() -> None:
    try:
        raise ValueError("of all things")
    except ValueError:
        log.exception("it failed")


def test_lines_of_every_way_to_log_arrive_whole_and_once(tail: LogTail, configured: LogFormat) -> None:
    assert tail.read() == []
    log.warning("look here", extra={"fields": {"id": "req_1"}})
    raise_deep()
    logs.info_each(log, "request", [(2e9, {"id": "req_2"}), (2e9 + 1, {"id": "req_3"})])
    found = tail.read()
    assert len(found) == 4
    assert "look here" in found[0]
    assert "req_1" in found[0]
    assert "Traceback" in found[1]
    assert "of all things" in found[1]
    assert ["req_2" in found[2], "req_3" in found[3]] == [True, True]
    if configured is LogFormat.JSON:
        assert [orjson.loads(line)["level"] for line in found] == ["warning", "error", "info", "info"]
    assert tail.read() == []
    tail.stop()
    log.warning("nobody listens")
    assert tail.read() == []


def test_a_burst_and_a_long_line_are_cut(tail: LogTail) -> None:
    logs.info_each(log, "request", [(2e9 + i, {"number": f"<{i}>"}) for i in range(1000)])
    found = tail.read()
    assert ["<999>" in found[-1], len(found)] == [True, ring.NUM_SLOTS - 1]
    log.warning("begin %s end", "x" * 5000)
    (line,) = tail.read()
    assert len(line) <= log_tail.SLOT_BYTES
    assert "begin xxx" in line
    assert "x end" in line.replace('"', " ")
    for _ in range(100):
        log.warning("y" * 10_000)
    assert tail._num_characters <= log_tail.MAX_CHARACTERS


def test_workers_read_one_anothers_lines(configured: LogFormat, tmp_path: pathlib.Path) -> None:
    script = (
        "import logging, pathlib, sys; from cortex import logs; from cortex.dashboard.log_tail import LogTail\n"
        "logs.configure(logs.LogFormat(sys.argv[2])); tail = LogTail(pathlib.Path(sys.argv[1])); tail.start()\n"
        "logging.getLogger('cortex').warning('of another'); tail.read()"
    )
    own = LogTail(tmp_path)
    own.start()
    log.warning("of this one")
    subprocess.run([sys.executable, "-c", script, str(tmp_path), configured], check=True, capture_output=True)
    found = own.read()
    own.stop()
    assert ["of this one" in found[0], "of another" in found[1], len(found)] == [True, True, 2]
    for path in tmp_path.glob("*.ring"):
        assert path.stat().st_mode & 0o777 == 0o600


async def test_a_request_has_its_line_in_the_feed(configured: LogFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.02)
    async with rig(FakeNode().ready("m")) as gateway:
        await gateway.chat(messages=[{"role": "user", "content": "a secret"}]).end()
        watching = gateway.call("GET", "/admin/events")
        await until(lambda: b'"log"' in watching.body and b"openai-chat" in watching.body)
        watching.leave()
        await watching.end()
    assert b"a secret" not in watching.body
