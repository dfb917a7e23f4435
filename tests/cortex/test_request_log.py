"""Finished requests are written once each, whichever triggers the write, with the same lines as one by one."""

import asyncio
import io
import logging
import threading
import time
from collections.abc import Iterator

import pytest
from answers import CHAT_STREAM, MESSAGES_STREAM, RESPONSE, RESPONSES_STREAM, event, message_event
from fake_node import FakeNode, Line, Received
from gateway_rig import rig, until

from cortex import logs, request_log
from cortex._fast.record import Record
from cortex.dialects.usage import Usage
from cortex.logs import JsonFormatter, LogFormat, TextFormatter
from cortex.metrics import FleetSample, Metrics
from cortex.request_log import RequestLog

LINES = [
    (0.0, {"id": "a", "n": 1, "x": 1.23456789, "b": True}),
    (1789000000.9996, {"id": 'a b="c"', "empty": "", "é": "ü", "large": 2**60, "none": None}),
    (1789000001.25, {}),
]


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger("cortex.request")
    yield found
    logging.getLogger("cortex").handlers.clear()
    logging.getLogger("cortex").propagate = True


def ended(number: int) -> Record:
    record = Record(f"r{number}", "openai-chat")
    record.model, record.node, record.status, record.finish = "m", "a", 200, "stop"
    record.usage = Usage(prompt_tokens=3, completion_tokens=2)
    return record


def make() -> tuple[Metrics, RequestLog]:
    metrics = Metrics(lambda: FleetSample((), (), frozenset({"m"})), dict)
    return metrics, RequestLog(metrics)


@pytest.mark.parametrize("log_format", LogFormat)
@pytest.mark.parametrize("constant", [{}, {"worker": "cuda:0"}])
def test_lines_written_together_equal_lines_written_alone(
    logger: logging.Logger, log_format: LogFormat, constant: dict[str, str]
) -> None:
    logs.configure(log_format, **constant)
    (handler,) = logging.getLogger("cortex").handlers
    assert isinstance(handler, logging.StreamHandler)
    written = io.StringIO()
    handler.setStream(written)
    logs.info_each(logger, "request", LINES)
    assert isinstance(handler.formatter, TextFormatter | JsonFormatter)
    alone = [handler.formatter.format(logs._Line(logger.name, "request", fields, at)) for at, fields in LINES]
    assert written.getvalue() == "\n".join(alone) + "\n"


def test_other_handlers_get_them_one_by_one(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cortex")
    logs.info_each(logger, "request", LINES)
    assert [(record.created, record.fields) for record in caplog.records] == LINES
    caplog.clear()
    logger.setLevel(logging.WARNING)
    logs.info_each(logger, "request", LINES)
    logger.setLevel(logging.NOTSET)
    assert not caplog.records


def test_a_line_that_cannot_be_written_fails_nothing_else(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(LogFormat.TEXT)
    logs.info_each(logger, "request", [(1.0, {"id": "a"}), (float("nan"), {}), (2.0, {"id": "b"})])
    written = capsys.readouterr().err
    assert "Logging error" in written
    assert "1970-01-01T00:00:01.000Z INFO cortex.request request id=a\n" in written
    assert "1970-01-01T00:00:02.000Z INFO cortex.request request id=b\n" in written


async def test_some_are_written_together_and_none_waits_for_long() -> None:
    metrics, writer = make()
    batches: list[int] = []
    writer.on_written = lambda lines: batches.append(len(lines))
    for number in range(request_log.WRITE_AFTER + 5):
        writer.record(ended(number))
    assert batches == [request_log.WRITE_AFTER]
    begun = time.monotonic()
    while len(batches) < 2:
        assert time.monotonic() < begun + 5
        await asyncio.sleep(request_log.WRITE_AFTER_S)
    assert batches == [request_log.WRITE_AFTER, 5]
    labels = {"model": "m", "node": "a", "dialect": "openai-chat"}
    value = metrics.registry.get_sample_value
    assert value("cortex_requests_total", {**labels, "status": "200"}) == request_log.WRITE_AFTER + 5
    assert value("cortex_prompt_tokens_total", labels) == 3 * (request_log.WRITE_AFTER + 5)
    assert value("cortex_completion_tokens_total", labels) == 2 * (request_log.WRITE_AFTER + 5)
    assert value("cortex_request_duration_seconds_count", labels) == request_log.WRITE_AFTER + 5


async def test_a_scrape_has_all_and_counts_none_twice() -> None:
    """While another thread scrapes, as the server of the metrics does."""
    metrics, writer = make()
    seen: list[str] = []
    writer.on_written = lambda lines: seen.extend(fields["id"] for _, fields in lines)
    is_over = threading.Event()

    def scrape() -> None:
        while not is_over.is_set():
            metrics.fold()

    thread = threading.Thread(target=scrape)
    thread.start()
    for number in range(20_000):
        writer.record(ended(number))
        if number % 100 == 0:
            await asyncio.sleep(0)
    is_over.set()
    thread.join()
    metrics.fold()
    assert sorted(seen) == sorted(f"r{number}" for number in range(20_000))
    labels = {"model": "m", "node": "a", "dialect": "openai-chat", "status": "200"}
    assert metrics.registry.get_sample_value("cortex_requests_total", labels) == 20_000


@pytest.mark.parametrize(
    ("path", "events", "expected"),
    [
        (
            "/v1/chat/completions",
            (*CHAT_STREAM[:3], b'data: {"error":{"message":"x","type":"server_error","code":"answer_cut"}}\n\n'),
            (503, "answer_cut"),
        ),
        (
            "/v1/chat/completions",
            (*CHAT_STREAM[:3], b'data: {"error":{"message":"x","type":"rate_limit_error","code":"theirs"}}\n\n'),
            (429, "theirs"),
        ),
        (
            "/v1/messages",
            (
                *MESSAGES_STREAM[:5],
                message_event("error", error={"type": "overloaded_error", "message": "x"}),
            ),
            (529, "failed"),
        ),
        (
            "/v1/responses",
            (
                *RESPONSES_STREAM[:3],
                event("error", 3, code="answer_cut", message="x", param=None),
                event(
                    "response.failed", 4, response=RESPONSE | {"status": "failed", "error": {"code": "server_error"}}
                ),
            ),
            (503, "answer_cut"),
        ),
    ],
)
async def test_a_stream_that_ends_in_an_error_is_written_down_as_its_client_saw_it(
    path: str, events: tuple[bytes, ...], expected: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cortex")

    async def script(received: Received, line: Line) -> None:
        await line.start_stream()
        for each in events:
            await line.chunk(each)
        await line.end()

    async with rig(FakeNode(script=script).ready("m")) as gateway:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "input": "x", "stream": True}
        body |= {"max_tokens": 5} if path == "/v1/messages" else {}
        assert (await gateway.call("POST", path, body).end()).status == 200
        await until(lambda: [record for record in caplog.records if record.name == "cortex.request"])
        out = gateway.metric(
            "cortex_completion_tokens_total", model="m", node="a", dialect=f"openai-{path[4:].split('/')[0]}"
        )
    (record,) = (record for record in caplog.records if record.name == "cortex.request")
    assert (record.fields["status"], record.fields["finish"]) == expected
    num_tokens = record.fields["tokens_out"]
    assert num_tokens in (1, 2)
    assert out in (0, num_tokens)
