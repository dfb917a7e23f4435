"""The gateway's Prometheus metrics: counters, buckets, and their endpoint.

Labels are bounded: models of the catalogue or of the fleet, nodes of the configuration, dialects, statuses. A name that
a client made up is never a label, and the number of nodes' error codes is limited. The state of nodes and models is
read from the fleet at each scrape and not kept in gauges; counters of nodes and models that are gone are left out of a
scrape, and continue if these come back. With several workers the counters are shared through files
(``PROMETHEUS_MULTIPROC_DIR``), and the first worker to bind the port serves the sum.
"""

import asyncio
import functools
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    multiprocess,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cortex._fast.record import Record
from cortex.build_identity import COMMIT
from cortex.guard import Guard
from cortex.loop_lag import BUCKETS_S
from cortex.wire import VERSION
from cortex.wire.errors import ApiError

log = logging.getLogger("cortex.metrics")

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300)
DURATION_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 900, 1800, 3600)
SPEED_BUCKETS = (1, 2, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2000)

FOLD_INTERVAL_S = 0.5
"""Greatest age of a counter where workers share files; a scrape of a single process is current."""

MAX_RETRY_CODES = 64
CODE = re.compile(r"[a-z][a-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class NodeSample:
    """State of a node at a scrape."""

    node: str
    is_up: bool
    is_draining: bool
    memory_total_bytes: int
    memory_free_bytes: int


@dataclass(frozen=True, slots=True)
class ModelSample:
    """State of a model on a node at a scrape."""

    node: str
    model: str
    state: str
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class FleetSample:
    """State of the fleet at a scrape."""

    nodes: tuple[NodeSample, ...]
    models: tuple[ModelSample, ...]
    known_models: frozenset[str]
    """All models that are offered or listed, whether loaded or not."""


class _Series:
    """The counters of one model on one node in one dialect, looked up once, and their pending increments.

    Incrementing a counter takes a lock, or a write to a file that workers share.
    """

    def __init__(self, metrics: "Metrics", labels: tuple[str, str, str]) -> None:
        counters = metrics.tokens_in, metrics.tokens_out, metrics.tokens_cached
        self._tokens = tuple(counter.labels(*labels) for counter in counters)
        self._first_token_s = metrics.first_token_s.labels(*labels)
        self._duration_s = metrics.duration_s.labels(*labels)
        self._tokens_per_s = metrics.tokens_per_s.labels(*labels)
        self._requests = functools.cache(lambda status: metrics.requests.labels(*labels, status))
        self._new_requests: dict[int, int] = {}
        self._new_tokens = [0, 0, 0]

    def add(self, record: Record) -> None:
        """Take an ended request, for the next :meth:`count`."""
        self._new_requests[record.status] = self._new_requests.get(record.status, 0) + 1
        self._duration_s.observe(record.duration_s)
        first_token_s = record.first_token_s
        if first_token_s is not None:
            self._first_token_s.observe(first_token_s)
        if record.usage is not None or record.num_token_events:
            tokens_in, tokens_out, tokens_cached = record.counts()
            new = self._new_tokens
            new[0] += tokens_in
            new[1] += tokens_out
            new[2] += tokens_cached
            generation_s = record.generation_s
            if generation_s and tokens_out > 1:
                # The time to the first token is the prompt's; the speed is of the other tokens.
                self._tokens_per_s.observe((tokens_out - 1) / generation_s)

    def count(self) -> None:
        """Increment the counters."""
        for status, number in self._new_requests.items():
            self._requests(status).inc(number)
        for counter, number in zip(self._tokens, self._new_tokens, strict=True):
            if number:
                counter.inc(number)
        self._new_requests, self._new_tokens = {}, [0, 0, 0]


class _Folder(Collector):
    """The first collector of a registry, which has ended requests counted before the others collect."""

    def __init__(self, fold: Callable[[], None]) -> None:
        self._fold = fold

    def collect(self) -> Iterable[Metric]:
        self._fold()
        return ()


class _FleetCollector(Collector):
    def __init__(self, sample: Callable[[], FleetSample]) -> None:
        self._sample = sample

    def collect(self) -> Iterable[Metric]:
        sample = self._sample()
        up = GaugeMetricFamily("cortex_node_up", "Whether a node answers its polls.", labels=["node"])
        draining = GaugeMetricFamily(
            "cortex_node_draining", "Whether a node is draining and accepts nothing new.", labels=["node"]
        )
        total = GaugeMetricFamily("cortex_node_memory_total_bytes", "Device memory of a node.", labels=["node"])
        free = GaugeMetricFamily("cortex_node_memory_free_bytes", "Free device memory of a node.", labels=["node"])
        for node in sample.nodes:
            up.add_metric([node.node], float(node.is_up))
            draining.add_metric([node.node], float(node.is_draining))
            total.add_metric([node.node], node.memory_total_bytes)
            free.add_metric([node.node], node.memory_free_bytes)
        nodes_up = GaugeMetricFamily("cortex_nodes_up", "Nodes that answer their polls.")
        nodes_up.add_metric([], sum(node.is_up for node in sample.nodes))
        labels = ["node", "model"]
        state = GaugeMetricFamily(
            "cortex_model_state", "1 for the current state of a model.", labels=[*labels, "state"]
        )
        running = GaugeMetricFamily("cortex_model_running", "Requests a node is running.", labels=labels)
        waiting = GaugeMetricFamily("cortex_model_waiting", "Requests queued on a node.", labels=labels)
        for model in sample.models:
            state.add_metric([model.node, model.model, model.state], 1)
            running.add_metric([model.node, model.model], model.running)
            waiting.add_metric([model.node, model.model], model.waiting)
        build = GaugeMetricFamily("cortex_build_info", "1, with version and commit.", labels=["version", "commit"])
        build.add_metric([VERSION, COMMIT], 1)
        return up, draining, total, free, nodes_up, state, running, waiting, build


class _Current(Collector):
    """The counters of a registry, without the samples of nodes and models that are gone."""

    def __init__(self, counters: CollectorRegistry, sample: Callable[[], FleetSample]) -> None:
        self._counters = counters
        self._sample = sample

    def collect(self) -> Iterable[Metric]:
        sample = self._sample()
        current = {"node": {"", *(node.node for node in sample.nodes)}, "model": {"", *sample.known_models}}
        for metric in self._counters.collect():
            metric.samples = [
                found
                for found in metric.samples
                if all(found.labels.get(label, "") in names for label, names in current.items())
            ]
            yield metric


class Metrics:
    """The gateway's metrics, in a registry of their own."""

    def __init__(self, fleet: Callable[[], FleetSample], in_flight: Callable[[], Mapping[str, int]]) -> None:
        """``in_flight`` returns the numbers of this process's requests in flight, by node."""
        self.registry = CollectorRegistry()
        self._fleet = fleet
        self._in_flight = in_flight
        self._retry_codes: set[str] = set()
        self._series: dict[tuple[str, str, str], _Series] = {}
        self._in_flight_of: dict[str, Gauge] = {}
        self.registry.register(_Folder(self.fold))
        self.before_fold: Callable[[], None] = lambda: None
        """Hook that has ended requests counted. The thread of a scrape calls it too."""
        counter = functools.partial(Counter, registry=self.registry)
        histogram = functools.partial(Histogram, registry=self.registry)
        labels = ("model", "node", "dialect")
        self.requests = counter("cortex_requests", "Finished requests.", (*labels, "status"))
        self.tokens_in = counter("cortex_prompt_tokens", "Prompt tokens.", labels)
        self.tokens_out = counter("cortex_completion_tokens", "Generated tokens.", labels)
        self.tokens_cached = counter("cortex_cached_tokens", "Prompt tokens found in a prefix cache.", labels)
        self.first_token_s = histogram(
            "cortex_time_to_first_token_seconds",
            "From the request's arrival to the first token of a streamed answer.",
            labels,
            buckets=FIRST_TOKEN_BUCKETS_S,
        )
        self.duration_s = histogram(
            "cortex_request_duration_seconds",
            "From the request's arrival to the end of its answer.",
            labels,
            buckets=DURATION_BUCKETS_S,
        )
        self.tokens_per_s = histogram(
            "cortex_tokens_per_second",
            "Speed of a streamed answer after its first token.",
            labels,
            buckets=SPEED_BUCKETS,
        )
        self.retries = counter(
            "cortex_upstream_retries", "Requests sent again, to another replica or after a load.", ("node", "reason")
        )
        self.rejected = counter(
            "cortex_rejected_requests", "Requests refused before an endpoint: unknown path, method or key.", ("status",)
        )
        self.background_failures = counter(
            "cortex_background_failures", "Failures of background tasks, each of which was started again.", ("task",)
        )
        self.loop_lag_s = histogram(
            "cortex_loop_lag_seconds", "Lag of the event loop, measured four times a second.", buckets=BUCKETS_S
        )
        self.damaged_stores = counter("cortex_store_damaged", "Damaged store files that were moved aside and replaced.")
        self.loads = counter("cortex_model_loads", "Cold loads requested.", ("model", "outcome"))
        self.in_flight = Gauge(
            "cortex_in_flight_requests",
            "Requests in flight at a node.",
            ("node",),
            multiprocess_mode="livesum",
            registry=self.registry,
        )

    def record_retry(self, node: str, code: str) -> None:
        """Count a retry because of an error. Nodes choose the codes, but their number is limited."""
        if code not in self._retry_codes:
            if len(self._retry_codes) >= MAX_RETRY_CODES or not CODE.fullmatch(code):
                code = "other"
            self._retry_codes.add(code)
        self.retries.labels(node, code).inc()

    async def run(self) -> None:
        """Count ended requests at an interval, until cancelled."""
        while True:
            self.fold()
            await asyncio.sleep(FOLD_INTERVAL_S)

    def fold(self) -> None:
        """Count ended requests, and set the gauges of requests in flight. Any thread may call it."""
        self.before_fold()
        now = self._in_flight()
        for node in self._in_flight_of.keys() | now.keys():
            gauge = self._in_flight_of.get(node)
            if gauge is None:
                gauge = self._in_flight_of[node] = self.in_flight.labels(node)
            gauge.set(now.get(node, 0))

    def count(self, ended: Iterable[Record]) -> None:
        """Count ended requests."""
        raised: dict[tuple[str, str, str], _Series] = {}
        for record in ended:
            labels = record.model, record.node, record.dialect
            series = self._series.get(labels)
            if series is None:
                series = self._series[labels] = _Series(self, labels)
            series.add(record)
            raised[labels] = series
        for series in raised.values():
            series.count()

    def serve(self, host: str, port: int, guard: Callable[[], Guard] = Guard) -> Callable[[], None]:
        """Serve the metrics of all workers, and return a function that stops it.

        ``guard`` returns the check that refuses pages of other sites.

        Raises:
            OSError: the port is in use, as by another worker.
        """
        counters = self.registry
        registry = CollectorRegistry()
        directory = os.environ.get(MULTIPROCESS_VARIABLE)
        if directory:
            counters = CollectorRegistry()
            multiprocess.MultiProcessCollector(counters, directory)  # type: ignore[no-untyped-call]
        else:
            ProcessCollector(registry=registry)
        registry.register(_Current(counters, self._fleet))
        registry.register(_FleetCollector(self._fleet))
        server, thread = start_http_server(port, host, registry)
        server.set_app(_guarded(server.get_app(), guard))

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop


def _guarded(app: Any, guard: Callable[[], Guard]) -> Any:
    """Return a WSGI application that refuses pages of browsers.

    The ``Host`` is checked for callers on this host only, where a browser may be: Prometheus may use any.
    """

    def serve(environ: Mapping[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        def header(name: bytes) -> bytes | None:
            if name == b"host" and not str(environ.get("REMOTE_ADDR", "")).startswith(("127.", "::1")):
                return None
            value = environ.get(f"HTTP_{name.decode().upper().replace('-', '_')}")
            return None if value is None else str(value).encode("latin-1", "replace")

        try:
            guard().check_site(header, setting="gateway")
        except ApiError as error:
            start_response(f"{error.status} Forbidden", [("content-type", "text/plain; charset=utf-8")])
            return [error.message.encode()]
        found: Iterable[bytes] = app(environ, start_response)
        return found

    return serve


def folder_of_workers() -> pathlib.Path | None:
    """Return the folder of the files that all workers of this gateway share; ``None`` if there is none."""
    directory = os.environ.get(MULTIPROCESS_VARIABLE)
    return pathlib.Path(directory) if directory else None


def forget_dead_workers() -> None:
    """Delete the gauges of workers that have ended, where workers share files."""
    folder = folder_of_workers()
    if folder is None:
        return
    for path in folder.glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        if not pathlib.Path(f"/proc/{pid}").exists():
            multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
