"""The latest ended requests of all workers of one gateway, for the page's list and charts.

Each worker writes once a second into a ring buffer of its own, which is a file where workers share a folder and memory
where there is one worker; a worker with viewers reads them all. A ring has one writer, which writes the count after the
slot, so a reader that compares the count before and after finds the slots that may have changed meanwhile. No ring
holds any text of a request.
"""

import contextlib
import mmap
import os
import pathlib
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from cortex.request_log import Line
from cortex.wire.headers import CLIENT_CLOSED_REQUEST

NUM_SLOTS = 256
SLOT_BYTES = 768
_COUNTS = struct.Struct("<QQ")
_LENGTH = struct.Struct("<H")
_RING_BYTES = _COUNTS.size + NUM_SLOTS * SLOT_BYTES


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


class _Ring:
    """The ring buffer of one worker. The slots between two values of the count are the new ones."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def counts(self) -> tuple[int, int]:
        """Return the numbers of requests and of errors so far."""
        requests, errors = _COUNTS.unpack_from(self._memory)
        return requests, errors

    def add(self, payload: bytes) -> None:
        """Add a request; one without a payload is only counted."""
        requests, errors = self.counts()
        at = _COUNTS.size + requests % NUM_SLOTS * SLOT_BYTES
        _LENGTH.pack_into(self._memory, at, len(payload))
        self._memory[at + _LENGTH.size : at + _LENGTH.size + len(payload)] = payload
        _COUNTS.pack_into(self._memory, 0, requests + 1, errors)

    def skip(self, requests: int, errors: int) -> None:
        """Count requests whose slots would be overwritten, and the errors among them and the next requests."""
        before, errors_before = self.counts()
        for number in range(before, before + min(requests, NUM_SLOTS)):
            _LENGTH.pack_into(self._memory, _COUNTS.size + number % NUM_SLOTS * SLOT_BYTES, 0)
        _COUNTS.pack_into(self._memory, 0, before + requests, errors_before + errors)

    def since(self, count: int) -> list[bytes]:
        """Return the payloads that were added after ``count`` and are still there."""
        last, _ = self.counts()
        first = max(count, last - NUM_SLOTS)
        found = []
        for number in range(first, last):
            at = _COUNTS.size + number % NUM_SLOTS * SLOT_BYTES
            (length,) = _LENGTH.unpack_from(self._memory, at)
            found.append(bytes(self._memory[at + _LENGTH.size : at + _LENGTH.size + length]))
        # The writer may meanwhile have overwritten the oldest slots, including the one that it is writing.
        torn = self.counts()[0] + 1 - NUM_SLOTS - first
        return [payload for payload in found[max(0, torn) :] if payload]


class Journal:
    """The writer of this worker's ring, and the reader of all rings."""

    def __init__(self, folder: pathlib.Path | None = None) -> None:
        self._folder = folder
        self._own = f"requests-{os.getpid()}.ring"
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(Entry).decode
        if folder is None:
            own = mmap.mmap(-1, _RING_BYTES)
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with os.fdopen(os.open(folder / self._own, flags, 0o600), "w+b") as file:
                file.truncate(_RING_BYTES)
                own = mmap.mmap(file.fileno(), _RING_BYTES)
        self._ring = _Ring(own)
        self._rings = {self._own: self._ring}
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
            self._ring.skip(self._num_ended - len(self._ended), self._num_errors)
            for at, fields in self._ended:
                payload = self._encode({"at": at, **fields})
                self._ring.add(payload if len(payload) <= SLOT_BYTES - _LENGTH.size else b"")
            self._ended.clear()
            self._num_ended = self._num_errors = 0

    def read(self) -> Batch:
        """Return the requests of all workers that ended since the last call. The first call counts none as new."""
        self.write()
        batch = Batch()
        for name, ring in self._all():
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

    def _all(self) -> Iterator[tuple[str, _Ring]]:
        if self._folder is not None:
            for path in self._folder.glob("requests-*.ring"):
                if path.name not in self._rings and path.stat().st_size == _RING_BYTES:
                    with path.open("rb") as file:
                        memory = mmap.mmap(file.fileno(), _RING_BYTES, access=mmap.ACCESS_READ)
                    self._rings[path.name] = _Ring(memory)
        yield from self._rings.items()
