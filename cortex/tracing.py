"""W3C trace context: propagated, written to the log line, and a span for each request where spans are exported.

Without an exporter valid headers are forwarded unchanged; OpenTelemetry is not imported and nothing is sent. With one
(``trace_endpoint``, and the extra ``otel``) the request's span becomes the parent in the forwarded context, and a
request without a context starts a trace.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cortex.settings import ConfigError
from cortex.wire import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

Header = tuple[bytes, bytes]

TRACEPARENT, TRACESTATE = b"traceparent", b"tracestate"
_VERSION_0 = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_LATER_VERSION = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
MAX_TRACESTATE_BYTES = 512
"""Maximum size of a forwarded ``tracestate``, the standard's minimum."""

ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "tokens_in": "gen_ai.usage.input_tokens",
    "tokens_out": "gen_ai.usage.output_tokens",
    "tokens_cached": "gen_ai.usage.cache_read.input_tokens",
    "status": "http.response.status_code",
    "finish": "helexa.finish",
    "id": "helexa.request_id",
    "node": "helexa.node",
    "dialect": "helexa.dialect",
    "stream": "helexa.stream",
    "ttft_s": "helexa.time_to_first_token_s",
}
"""Span attribute of each log field. A key's name stays in the log."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Trace of a request. ``headers`` are the headers to forward."""

    trace_id: str
    headers: tuple[Header, ...]
    _span: "Span | None" = None

    def end(self, fields: Mapping[str, object]) -> None:
        """End the request's span, if there is one, with the fields of its log line."""
        if self._span is None:
            return
        for name, attribute in ATTRIBUTES.items():
            value = fields.get(name)
            if isinstance(value, str | int | float) and value != "":
                self._span.set_attribute(attribute, value)
        status = fields.get("status")
        if isinstance(status, int) and status >= 500:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, str(fields.get("finish", "")))
        self._span.end()

    def without_span(self) -> "Trace":
        """Return the same trace without its span, for another log line."""
        return replace(self, _span=None)


_provider: "TracerProvider | None" = None


def check(endpoint: str, source: str, key: str) -> None:
    """Raise :class:`ConfigError` if spans cannot be exported to ``endpoint``, which ``key`` of ``source`` names."""
    if not endpoint:
        return
    parts = urlsplit(endpoint)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(source, key, f"{endpoint!r} is not http[s]://host:port of a collector")
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError:
        raise ConfigError(source, key, "needs OpenTelemetry: pip install 'helexa-cortex[otel]'") from None


def configure(endpoint: str, service: str, instance: str) -> None:
    """Export the spans of this process to an OTLP collector over HTTP; an empty ``endpoint`` exports none.

    ``instance`` distinguishes the processes of a ``service``. Call after any fork: it starts a thread.
    """
    global _provider
    if not endpoint:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": service, "service.version": VERSION, "service.instance.id": instance})
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    url = endpoint.rstrip("/") + "/v1/traces"
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))


def is_exporting() -> bool:
    """Return whether every request gets a span, in a trace or not."""
    return _provider is not None


def shut_down() -> None:
    """Export the remaining spans and stop. Blocks for at most the collector's timeout."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
        _provider = None


def begin(name: str, header: Callable[[bytes], bytes | None]) -> Trace | None:
    """Return the trace of a request, whose headers ``header`` returns by name; ``None`` if it has none.

    An invalid context is dropped, as the standard demands, with its ``tracestate``.
    """
    traceparent = header(TRACEPARENT)
    if traceparent is None and _provider is None:
        return None
    trace_id = None if traceparent is None else _trace_id(traceparent)
    tracestate = header(TRACESTATE)
    if _provider is not None:
        return _begin_span(_provider, name, traceparent if trace_id else None, tracestate)
    if trace_id is None or traceparent is None:
        return None
    if tracestate is None or len(tracestate) > MAX_TRACESTATE_BYTES:
        return Trace(trace_id, ((TRACEPARENT, traceparent),))
    return Trace(trace_id, ((TRACEPARENT, traceparent), (TRACESTATE, tracestate)))


def _trace_id(traceparent: bytes) -> str | None:
    pattern = _VERSION_0 if traceparent.startswith(b"00") else _LATER_VERSION
    found = pattern.fullmatch(traceparent)
    if found is None or not int(found[1], 16) or not int(found[2], 16):
        return None
    return found[1].decode()


def _begin_span(provider: "TracerProvider", name: str, traceparent: bytes | None, tracestate: bytes | None) -> Trace:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {
        header: value.decode("latin-1")
        for header, value in (("traceparent", traceparent), ("tracestate", tracestate))
        if value is not None
    }
    parent = TraceContextTextMapPropagator().extract(carrier)
    span = provider.get_tracer("helexa").start_span(name, parent, kind=SpanKind.SERVER)
    context = span.get_span_context()
    headers: tuple[Header, ...] = (
        (TRACEPARENT, b"00-%032x-%016x-%02x" % (context.trace_id, context.span_id, context.trace_flags)),
    )
    if context.trace_state:
        headers += ((TRACESTATE, context.trace_state.to_header().encode("latin-1")),)
    return Trace(f"{context.trace_id:032x}", headers, span)
