"""Where requests that have ended are written down, some together: a log line of each, its metrics, and the page's list.

Each is written once, however many ask for it: an event loop a moment after a request's end, a scrape of the metrics
from a thread of its own.
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
"""How long a request may wait for others, and how many may: together they cost a third."""

Line = tuple[float, dict[str, Any]]
"""When a request ended, in Unix time, and the fields of its log line."""


class RequestLog:
    """The requests of one process that have ended. ``on_written`` is told of those that were written down."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._ended: deque[Record] = deque()
        self._lock = threading.Lock()
        self.on_written: Callable[[Sequence[Line]], None] = lambda lines: None
        metrics.before_fold = self.write

    def record(self, record: Record) -> None:
        """Take a request at its end."""
        record.record_end()
        if record.trace is not None:
            record.trace.end(record.fields())
        self._ended.append(record)
        if len(self._ended) == 1:
            asyncio.get_running_loop().call_later(WRITE_AFTER_S, self.write)
        elif len(self._ended) >= WRITE_AFTER:
            self.write()

    def write(self) -> None:
        """Write down what has ended. Any thread may call it."""
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
        """Call one that writes requests down; that it fails is no reason to lose them for the others."""
        try:
            write(*arguments, **names)
        except Exception:
            log.exception("requests that have ended could not be written down")
