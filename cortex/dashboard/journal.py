"""The latest ended requests of all workers of one gateway, for the page's list and charts.

Each worker writes its own once a second (:mod:`cortex.dashboard.ring`), without any text of a request.
"""

import contextlib
import pathlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from cortex.dashboard.ring import NUM_SLOTS, Rings
from cortex.request_log import Line
from cortex.wire.headers import CLIENT_CLOSED_REQUEST

SLOT_BYTES = 768


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """An ended request. ``at`` is Unix time; the other fields are of its log line."""

    at: float
    id: str
    dialect: str
    model: str
    node: str
    status: int
    stream: bool
    finish: str
    total_s: float
    key: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    ttft_s: float | None = None


def is_error(status: int) -> bool:
    """Return whether a status counts as an error; a client that disconnected does not."""
    return status >= 400 and status != CLIENT_CLOSED_REQUEST


@dataclass(slots=True)
class Batch:
    """The requests that ended since the last read. ``entries`` are the latest of them, the oldest first."""

    requests: int = 0
    errors: int = 0
    entries: list[Entry] = field(default_factory=list)


class Journal:
    """The writer of this worker's ring, and the reader of all rings."""

    def __init__(self, folder: pathlib.Path | None = None) -> None:
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(Entry).decode
        self._rings = Rings(folder, "requests", SLOT_BYTES)
        self._ended: deque[Line] = deque(maxlen=NUM_SLOTS)
        self._num_ended = self._num_errors = 0
        self._lock = threading.Lock()  # the thread of a metrics scrape may add requests too
        self._seen: dict[str, tuple[int, int]] = {}

    def record(self, lines: Sequence[Line]) -> None:
        """Take the log lines of ended requests, for the next :meth:`write`."""
        with self._lock:
            self._ended.extend(lines)
            self._num_ended += len(lines)
            self._num_errors += sum(is_error(fields["status"]) for _, fields in lines)

    def write(self) -> None:
        """Write the requests taken since the last call; those beyond the ring's size are only counted."""
        with self._lock:
            self._rings.own.skip(self._num_ended - len(self._ended), self._num_errors)
            for at, fields in self._ended:
                payload = self._encode({"at": at, **fields})
                self._rings.own.add(payload if len(payload) <= self._rings.own.payload_bytes else b"")
            self._ended.clear()
            self._num_ended = self._num_errors = 0

    def read(self) -> Batch:
        """Return the requests of all workers that ended since the last call. The first call counts none as new."""
        self.write()
        batch = Batch()
        for name, ring in self._rings:
            requests, errors = ring.counts()
            seen = self._seen.get(name)
            for payload in ring.since(seen[0] if seen else 0):
                # Another process may see a count before the slot that it counts, on some processors.
                with contextlib.suppress(msgspec.MsgspecError):
                    batch.entries.append(self._decode(payload))
            if seen:
                batch.requests += requests - seen[0]
                batch.errors += errors - seen[1]
            self._seen[name] = requests, errors
        batch.entries.sort(key=lambda entry: entry.at)
        return batch
