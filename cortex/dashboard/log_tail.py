"""The latest lines of the logs of all workers of one gateway, as they were written.

Each worker writes its own once a second (:mod:`cortex.dashboard.ring`). The cost of a line is the reference to it until
then; beyond ``MAX_CHARACTERS`` the oldest are left out.
"""

import pathlib
import re
import threading
from collections import deque
from collections.abc import Callable

from cortex import logs
from cortex.dashboard.ring import NUM_SLOTS, Rings

SLOT_BYTES = 2048
MAX_CHARACTERS = 512 * 1024
"""Characters that are kept of one second."""
CUT = b"\n...\n"

_BREAK = re.compile(r"\n(?=\d{4}-\d\d-\d\dT\d\d:|\{\")")
"""The end of a line before another; a traceback belongs to its line."""


class LogTail:
    """The writer of this worker's lines, and the reader of all workers' lines."""

    def __init__(self, folder: pathlib.Path | None = None) -> None:
        self._rings = Rings(folder, "log", SLOT_BYTES)
        self._texts: deque[str] = deque()
        self._num_characters = 0
        self._lock = threading.Lock()
        self._seen: dict[str, int] = {}
        self._end: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin to listen to this process's log."""
        self._end = logs.listen(self._record)

    def stop(self) -> None:
        """Stop listening."""
        self._end()
        self._end = lambda: None

    def read(self) -> list[str]:
        """Return the lines of all workers that were written since the last call, in the order of their times."""
        self._write()
        found = []
        for name, ring in self._rings:
            count, _ = ring.counts()
            found += [payload.decode(errors="replace") for payload in ring.since(self._seen.get(name, 0))]
            self._seen[name] = count
        return sorted(found, key=_time_of)

    def _record(self, text: str) -> None:
        with self._lock:
            self._texts.append(text)
            self._num_characters += len(text)
            while self._num_characters > MAX_CHARACTERS and len(self._texts) > 1:
                self._num_characters -= len(self._texts.popleft())

    def _write(self) -> None:
        with self._lock:
            texts, self._texts, self._num_characters = self._texts, deque(), 0
        lines = [line for text in texts for line in _BREAK.split(text)]
        ring = self._rings.own
        ring.skip(max(0, len(lines) - NUM_SLOTS))
        for line in lines[-NUM_SLOTS:]:
            ring.add(_cut(line.encode(errors="replace"), ring.payload_bytes))


def _cut(line: bytes, most: int) -> bytes:
    """Return a line without its middle if it is too long: a traceback tells most at its ends."""
    half = (most - len(CUT)) // 2
    return line if len(line) <= most else line[:half] + CUT + line[-half:]


def _time_of(line: str) -> str:
    """Return the time that a line begins with, as text that sorts, in either format."""
    return line.removeprefix('{"time":"')[:24]
