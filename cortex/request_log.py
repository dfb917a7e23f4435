"""Log of finished requests: a log line of each, metrics and the dashboard's list, written in batches.

Each request is written once, whichever triggers the write: the event loop a moment after the request's end, or a scrape
of the metrics on a thread of its own.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

from cortex import logs
from cortex._fast.record import Record
from cortex.metrics import Metrics

log = logging.getLogger("cortex.request")

P = ParamSpec("P")

WRITE_AFTER_S = 0.01
WRITE_AFTER = 128
"""Seconds that a request waits for others, and the number of requests that are written at once: a batch costs a third.
"""

Line = tuple[float, dict[str, Any]]
"""Unix time of a request's end, and the fields of its log line."""


class RequestLog:
    """Finished requests of one process. ``on_written`` receives each batch that was written."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._ended: deque[Record] = deque()
        self._lock = threading.Lock()
        self.on_written: Callable[[Sequence[Line]], None] = lambda lines: None
        metrics.before_fold = self.write

    def record(self, record: Record) -> None:
        """Record a request at its end."""
        record.record_end()
        if record.trace is not None:
            record.trace.end(record.fields())
        self._ended.append(record)
        if len(self._ended) == 1:
            asyncio.get_running_loop().call_later(WRITE_AFTER_S, self.write)
        elif len(self._ended) >= WRITE_AFTER:
            self.write()

    def write(self) -> None:
        """Write the requests that have ended. Thread-safe."""
        with self._lock:
            ended = []
            while self._ended:
                ended.append(self._ended.popleft())
            if ended:
                lines = [(record.ended_at, record.fields()) for record in ended]
                self._pass_on(logs.info_each, log, "request", lines)
                self._pass_on(self._metrics.count, ended)
                self._pass_on(self.on_written, lines)

    def _pass_on(self, write: Callable[P, object], *arguments: P.args, **names: P.kwargs) -> None:
        """Call a writer; its failure must not lose the requests for the other writers."""
        try:
            write(*arguments, **names)
        except Exception:
            log.exception("finished requests could not be logged")
