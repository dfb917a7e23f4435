"""The daemon's Prometheus metrics and its one log line for each finished request.

Series of a model are removed when it is unloaded. No prompt text ever comes here.
"""

import logging
import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cortex.wire.events import Failed, Finished, InferenceEvent, Started
from cortex.wire.node import ModelStatus, WorkerHealth

_log = logging.getLogger("neuron.requests")

REGISTRY = CollectorRegistry()

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_RATE_BUCKETS = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 250, 500, 1000, 2000)

REQUESTS = Counter("neuron_requests", "Finished requests", ["model", "dialect", "status"], registry=REGISTRY)
TOKENS = Counter("neuron_tokens", "Tokens processed", ["model", "kind"], registry=REGISTRY)
FIRST_TOKEN = Histogram(
    "neuron_time_to_first_token_seconds",
    "From the request's arrival to its first generated token",
    ["model"],
    buckets=_LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
DURATION = Histogram(
    "neuron_request_duration_seconds",
    "From the request's arrival to the end of its answer",
    ["model"],
    buckets=_LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
RATE = Histogram(
    "neuron_output_tokens_per_second",
    "Output tokens of a request over the time from its first token to its end",
    ["model"],
    buckets=_RATE_BUCKETS,
    registry=REGISTRY,
)
WORKER_RESTARTS = Counter("neuron_worker_restarts", "Restarts of a device worker", ["device"], registry=REGISTRY)

_OF_A_MODEL = (REQUESTS, TOKENS, FIRST_TOKEN, DURATION, RATE)


def render(models: Sequence[ModelStatus], workers: Sequence[WorkerHealth]) -> bytes:
    """Return all metrics in Prometheus' text format.

    What is true now (states, queues) is made from the given values at each scrape, so it cannot go stale.
    """
    now = CollectorRegistry()
    now.register(_Snapshot(models, workers))
    return generate_latest(REGISTRY) + generate_latest(now)


class _Snapshot(Collector):
    def __init__(self, models: Sequence[ModelStatus], workers: Sequence[WorkerHealth]) -> None:
        self._models = models
        self._workers = workers

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges."""
        state = GaugeMetricFamily("neuron_model_state", "1 for the state a model is in", labels=["model", "state"])
        running = GaugeMetricFamily("neuron_requests_running", "Requests being answered", labels=["model"])
        kv_cache = GaugeMetricFamily("neuron_model_kv_cache_bytes", "KV cache of a model", labels=["model"])
        for model in self._models:
            state.add_metric([model.id, str(model.state)], 1)
            running.add_metric([model.id], model.running)
            kv_cache.add_metric([model.id], model.kv_cache_bytes)
        worker_state = GaugeMetricFamily("neuron_worker_state", "1 for a worker's state", labels=["device", "state"])
        sequences = GaugeMetricFamily("neuron_worker_sequences", "Sequences in a worker", labels=["device", "state"])
        for worker in self._workers:
            worker_state.add_metric([worker.device, str(worker.state)], 1)
            sequences.add_metric([worker.device, "running"], worker.running)
            sequences.add_metric([worker.device, "waiting"], worker.waiting)
        yield from (state, running, kv_cache, worker_state, sequences)


def forget_model(model: str) -> None:
    """Remove every series of a model that is gone."""
    for metric in _OF_A_MODEL:
        metric.remove_by_labels({"model": model})


class RequestRecord:
    """What one request cost, noted while its events pass, written down once at its end."""

    def __init__(self, request_id: str, dialect: str, *, stream: bool) -> None:
        self._request_id = request_id
        self._dialect = dialect
        self._stream = stream
        self._arrived = time.monotonic()
        self._first_token_s: float | None = None
        self.model: str | None = None
        """Set once the model is known to exist: unknown names must not become label values."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.finish = ""

    def see(self, events: Sequence[InferenceEvent]) -> None:
        """Note a batch of events."""
        for event in events:
            match event:
                case Started(prompt_tokens, cached_tokens):
                    self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
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
        _log.info(
            "request id=%s dialect=%s model=%s stream=%d status=%d finish=%s prompt=%d cached=%d output=%d "
            "ttft_ms=%s total_ms=%.1f",
            self._request_id,
            self._dialect,
            self.model or "-",
            self._stream,
            status,
            self.finish or "-",
            self.prompt_tokens,
            self.cached_tokens,
            self.output_tokens,
            "-" if self._first_token_s is None else f"{self._first_token_s * 1e3:.1f}",
            total_s * 1e3,
        )
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
