"""Trace context: forwarded headers, log lines, and the spans that a collector gets."""

import asyncio
import logging
import pathlib
from collections.abc import Callable

import pytest
from fake_node import FakeNode
from gateway_rig import rig
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from cortex import config, tracing
from cortex.settings import ConfigError

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-01"


def headers(traceparent: bytes | None, tracestate: bytes | None) -> Callable[[bytes], bytes | None]:
    return {b"traceparent": traceparent, b"tracestate": tracestate}.get


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [record.fields for record in caplog.records if record.name == "cortex.request"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_a_context_reaches_the_node_and_the_log_line_as_it_came(
    caplog: pytest.LogCaptureFixture, path: str
) -> None:
    logging.getLogger("cortex").propagate = True
    neuron = FakeNode().ready("m")
    with caplog.at_level("INFO", "cortex.request"):
        async with rig(neuron) as gateway:
            headers = {"traceparent": GIVEN, "tracestate": "a=1,b=2"}
            await gateway.call("POST", path, {"model": "m"}, headers).end()
            await gateway.call("POST", path, {"model": "m"}).end()
    with_context, without = neuron.requests
    assert with_context.headers["traceparent"] == GIVEN
    assert with_context.headers["tracestate"] == "a=1,b=2"
    assert not {"traceparent", "tracestate"} & without.headers.keys()
    assert [row.get("trace") for row in logged(caplog)] == [TRACE, None]


@pytest.mark.parametrize(
    ("given", "trace_id"),
    [
        (GIVEN, TRACE),
        (f"00-{TRACE}-{PARENT}-00", TRACE),
        (f"01-{TRACE}-{PARENT}-01-what-comes-later", TRACE),
        (f"01-{TRACE}-{PARENT}-01", TRACE),
        (f"00-{TRACE}-{PARENT}-01-x", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        (f"00-{TRACE}-{PARENT}", None),
        (f"{GIVEN}\n", None),
        ("", None),
    ],
)
def test_only_a_valid_context_is_passed_on(given: str, trace_id: str | None) -> None:
    trace = tracing.begin("x", headers(given.encode(), b"a=1"))
    if trace_id is None:
        assert trace is None
    else:
        assert trace is not None
        assert trace.trace_id == trace_id
        assert trace.headers == ((b"traceparent", given.encode()), (b"tracestate", b"a=1"))


def test_a_state_without_a_context_or_of_any_length_is_not() -> None:
    assert tracing.begin("x", headers(None, b"a=1")) is None
    trace = tracing.begin("x", headers(GIVEN.encode(), b"a=" + b"1" * 600))
    assert trace is not None
    assert trace.headers == ((b"traceparent", GIVEN.encode()),)


class Collector:
    """Takes what is exported over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                assert head.startswith("POST /v1/traces ")
                headers = dict(row.lower().split(": ", 1) for row in head.split("\r\n")[1:-2])
                message = ExportTraceServiceRequest.FromString(await reader.readexactly(int(headers["content-length"])))
                for resource in message.resource_spans:
                    attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
                    self.services.add(attributes["service.name"])
                    self.spans += [span for scope in resource.scope_spans for span in scope.spans]
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


async def test_each_request_is_a_span_between_its_caller_and_its_node(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("cortex").propagate = True
    collector = Collector()
    server = await asyncio.start_server(collector, "127.0.0.1", 0)
    tracing.configure(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", "cortex", "here")
    neuron = FakeNode().ready("m")
    try:
        with caplog.at_level("INFO", "cortex.request"):
            async with rig(neuron) as gateway:
                await gateway.call(
                    "POST", "/v1/chat/completions", {"model": "m", "stream": True}, {"traceparent": GIVEN}
                ).end()
                await gateway.call("POST", "/v1/chat/completions", {"model": "m"}, {"traceparent": "nonsense"}).end()
                await gateway.call("POST", "/v1/chat/completions", {"model": "none"}).end()
    finally:
        await asyncio.to_thread(tracing.shut_down)
        server.close()
    assert collector.services == {"cortex"}
    first, second, third = collector.spans
    assert (first.trace_id.hex(), first.parent_span_id.hex(), first.name) == (TRACE, PARENT, "openai-chat")
    assert second.trace_id.hex() not in {TRACE, third.trace_id.hex()}
    assert not second.parent_span_id
    passed_on = [received.headers["traceparent"].split("-") for received in neuron.requests]
    assert [(row[1], row[2]) for row in passed_on] == [
        (span.trace_id.hex(), span.span_id.hex()) for span in (first, second)
    ]
    assert [row["trace"] for row in logged(caplog)] == [span.trace_id.hex() for span in collector.spans]
    attributes = {one.key: one.value for one in first.attributes}
    assert attributes["gen_ai.request.model"].string_value == "m"
    assert attributes["gen_ai.usage.output_tokens"].int_value == 2
    assert attributes["http.response.status_code"].int_value == 200
    assert {one.key: one.value.string_value for one in third.attributes}["helexa.finish"] == "model_not_found"
    assert first.end_time_unix_nano > first.start_time_unix_nano
    assert tracing.begin("x", headers(None, None)) is None, "after the end none is begun"


def test_a_collector_that_is_none_stops_the_start(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cortex.toml"
    node = '[[neurons]]\nname = "a"\nendpoint = "http://127.0.0.1:1"\n'
    path.write_text(f'[gateway]\ntrace_endpoint = "collector:4318"\n{node}')
    with pytest.raises(ConfigError, match=r"gateway.trace_endpoint: 'collector:4318' is not http"):
        config.load(path, {})


def test_an_exporter_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"f: k: needs OpenTelemetry: pip install 'helexa-cortex\[otel\]'"):
        tracing.check("http://127.0.0.1:1", "f", "k")


def test_nothing_of_it_is_imported_where_it_is_off() -> None:
    import subprocess
    import sys

    code = "import cortex.asgi, neuron.cli, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not [name for name in loaded if name.startswith("opentelemetry")]
