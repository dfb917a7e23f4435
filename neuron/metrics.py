"""The daemon's Prometheus metrics and its one log line for each finished request.

Series of a model are removed when it is unloaded; a series that a late request creates anew is not shown. Gauges are
read at each scrape. No prompt text is logged.
"""

import functools
import logging
import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cortex import logs
from cortex.build_identity import COMMIT
from cortex.loop_lag import BUCKETS_S
from cortex.tracing import Trace
from cortex.wire import VERSION
from cortex.wire.events import Failed, Finished, InferenceEvent, Started
from cortex.wire.node import Device, ModelState, ModelStatus, WorkerHealth

_log = logging.getLogger("neuron.requests")

REGISTRY = CollectorRegistry()

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_RATE_BUCKETS = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 250, 500, 1000, 2000)

_counter = functools.partial(Counter, registry=REGISTRY)
_histogram = functools.partial(Histogram, registry=REGISTRY)
REQUESTS = _counter("neuron_requests", "Finished requests", ["model", "dialect", "status"])
TOKENS = _counter("neuron_tokens", "Tokens processed", ["model", "kind"])
BACKGROUND_FAILURES = _counter("neuron_background_failures", "Failures of background tasks", ["task"])
LOOP_LAG = _histogram(
    "neuron_loop_lag_seconds", "How late the daemon's event loop was, four times a second", buckets=BUCKETS_S
)
FIRST_TOKEN = _histogram(
    "neuron_time_to_first_token_seconds",
    "From the request's arrival to its first generated token",
    ["model"],
    buckets=_LATENCY_BUCKETS_S,
)
DURATION = _histogram(
    "neuron_request_duration_seconds",
    "From the request's arrival to the end of its answer",
    ["model"],
    buckets=_LATENCY_BUCKETS_S,
)
RATE = _histogram(
    "neuron_output_tokens_per_second",
    "Output tokens of a request over the time from its first token to its end",
    ["model"],
    buckets=_RATE_BUCKETS,
)
REJECTED = _counter(
    "neuron_rejected_requests",
    "Requests that were not let in: a path, a method or a secret that is not known",
    ["status"],
)

_OF_A_MODEL = (REQUESTS, TOKENS, FIRST_TOKEN, DURATION, RATE)


def render(models: Sequence[ModelStatus], workers: Sequence[WorkerHealth], devices: Sequence[Device]) -> bytes:
    """Return all metrics in Prometheus' text format.

    What is true now (states, queues, memory) is made from the given values at each scrape, so it cannot go stale.
    """
    now = CollectorRegistry()
    now.register(_Counted(frozenset(model.id for model in models if model.state is not ModelState.AVAILABLE)))
    now.register(_Snapshot(models, workers, devices))
    ProcessCollector(registry=now)
    return generate_latest(now)


class _Counted(Collector):
    """Counted metrics, without those of models that are not loaded."""

    def __init__(self, models: frozenset[str]) -> None:
        self._models = models | {""}

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        for metric in REGISTRY.collect():
            metric.samples = [found for found in metric.samples if found.labels.get("model", "") in self._models]
            yield metric


class _Snapshot(Collector):
    def __init__(
        self, models: Sequence[ModelStatus], workers: Sequence[WorkerHealth], devices: Sequence[Device]
    ) -> None:
        self._models = models
        self._workers = workers
        self._devices = devices

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        state = GaugeMetricFamily("neuron_model_state", "1 for the state a model is in", labels=["model", "state"])
        running = GaugeMetricFamily("neuron_requests_running", "Requests being answered", labels=["model"])
        weights = GaugeMetricFamily("neuron_model_weights_bytes", "Weights of a loaded model", labels=["model"])
        kv_cache = GaugeMetricFamily("neuron_model_kv_cache_bytes", "KV cache of a loaded model", labels=["model"])
        download = GaugeMetricFamily(
            "neuron_model_download_bytes", "Download of a model that is being loaded", labels=["model", "state"]
        )
        for model in self._models:
            state.add_metric([model.id, str(model.state)], 1)
            if model.download_bytes:
                download.add_metric([model.id, "done"], model.downloaded_bytes)
                download.add_metric([model.id, "missing"], model.download_bytes - model.downloaded_bytes)
            if model.state is not ModelState.AVAILABLE:
                running.add_metric([model.id], model.running)
                weights.add_metric([model.id], model.weights_bytes)
                kv_cache.add_metric([model.id], model.kv_cache_bytes)
        yield from (state, running, weights, kv_cache, download)
        worker_state = GaugeMetricFamily("neuron_worker_state", "1 for a worker's state", labels=["device", "state"])
        sequences = GaugeMetricFamily("neuron_worker_sequences", "Sequences in a worker", labels=["device", "state"])
        restarts = CounterMetricFamily(
            "neuron_worker_restarts", "Restarts of a device worker after a fault", labels=["device"]
        )
        recycles = CounterMetricFamily(
            "neuron_worker_recycles", "Replacements of a device worker to defragment its memory", labels=["device"]
        )
        for worker in self._workers:
            worker_state.add_metric([worker.device, str(worker.state)], 1)
            sequences.add_metric([worker.device, "running"], worker.running)
            sequences.add_metric([worker.device, "waiting"], worker.waiting)
            restarts.add_metric([worker.device], worker.restarts)
            recycles.add_metric([worker.device], worker.recycles)
        yield from (worker_state, sequences, restarts, recycles)
        total = GaugeMetricFamily("neuron_device_memory_total_bytes", "Memory of a device", labels=["device"])
        free = GaugeMetricFamily("neuron_device_memory_free_bytes", "Free memory of a device", labels=["device"])
        for device in self._devices:
            total.add_metric([device.id], device.memory_total_bytes)
            free.add_metric([device.id], device.memory_free_bytes)
        yield from (total, free)
        build = GaugeMetricFamily("neuron_build_info", "1, with what is running", labels=["version", "commit"])
        build.add_metric([VERSION, COMMIT], 1)
        yield build


def forget_model(model: str) -> None:
    """Remove every series of an unloaded model."""
    for metric in _OF_A_MODEL:
        metric.remove_by_labels({"model": model})


class RequestRecord:
    """Figures of a request, gathered from its events and logged once at its end."""

    def __init__(self, request_id: str, dialect: str, trace: Trace | None = None) -> None:
        self._request_id = request_id
        self._dialect = dialect
        self._trace = trace
        self._arrived = time.monotonic()
        self._first_token_s: float | None = None
        self.model: str | None = None
        """Name of the model, set once it is found: unknown names must not become label values."""
        self.is_stream = False
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.finish = ""

    def observe(self, events: Sequence[InferenceEvent]) -> None:
        """Count a batch of events."""
        for event in events:
            match event:
                case Started(prompt_tokens, cached_tokens):
                    # One for each prompt of a call.
                    self.prompt_tokens += prompt_tokens
                    self.cached_tokens += cached_tokens
                case Finished():
                    self.output_tokens += event.output_tokens
                    self.finish = str(event.reason)
                case Failed(error):
                    self.finish = error.code
                case _:
                    if self._first_token_s is None:
                        self._first_token_s = time.monotonic() - self._arrived

    def close(self, status: int) -> None:
        """Write the log line and the metrics. ``status`` is the HTTP status, 499 for a client that left."""
        total_s = time.monotonic() - self._arrived
        first_token_s = self._first_token_s
        fields: dict[str, object] = {
            "id": self._request_id,
            "dialect": self._dialect,
            "model": self.model or "",
            "status": status,
            "stream": self.is_stream,
            "finish": self.finish,
            "tokens_in": self.prompt_tokens,
            "tokens_out": self.output_tokens,
            "tokens_cached": self.cached_tokens,
            **({} if first_token_s is None else {"ttft_s": round(first_token_s, 6)}),
            "total_s": round(total_s, 6),
        }
        if self._trace is not None:
            fields["trace"] = self._trace.trace_id
            self._trace.end(fields)
        logs.info(_log, "request", fields)
        REQUESTS.labels(self.model or "", self._dialect, str(status)).inc()
        if self.model is None:
            return
        DURATION.labels(self.model).observe(total_s)
        for kind, count in (
            ("prompt", self.prompt_tokens),
            ("cached", self.cached_tokens),
            ("output", self.output_tokens),
        ):
            TOKENS.labels(self.model, kind).inc(count)
        if self._first_token_s is not None:
            FIRST_TOKEN.labels(self.model).observe(self._first_token_s)
            if self.output_tokens > 1 and total_s > self._first_token_s:
                RATE.labels(self.model).observe((self.output_tokens - 1) / (total_s - self._first_token_s))
