"""Ring buffers of the latest records of a worker, which the other workers of a gateway can read.

Each worker writes into a ring of its own, which is a file where workers share a folder and memory where there is one
worker; a worker with viewers reads them all. A ring has one writer, which writes the count after the slot, so a reader
that compares the count before and after finds the slots that may have changed meanwhile.
"""

import mmap
import os
import pathlib
import struct
from collections.abc import Iterator

NUM_SLOTS = 256
_COUNTS = struct.Struct("<QQ")
_LENGTH = struct.Struct("<H")


class Ring:
    """The ring buffer of one worker. The slots between two values of its count are the new ones.

    Its second count is the caller's own.
    """

    def __init__(self, memory: mmap.mmap, slot_bytes: int) -> None:
        self._memory = memory
        self._slot_bytes = slot_bytes

    @property
    def payload_bytes(self) -> int:
        """Size of the largest payload."""
        return self._slot_bytes - _LENGTH.size

    def counts(self) -> tuple[int, int]:
        """Return both counts so far."""
        count, other = _COUNTS.unpack_from(self._memory)
        return count, other

    def add(self, payload: bytes) -> None:
        """Add a record; one without a payload is only counted."""
        count, other = self.counts()
        at = _COUNTS.size + count % NUM_SLOTS * self._slot_bytes
        _LENGTH.pack_into(self._memory, at, len(payload))
        self._memory[at + _LENGTH.size : at + _LENGTH.size + len(payload)] = payload
        _COUNTS.pack_into(self._memory, 0, count + 1, other)

    def skip(self, num_records: int, other: int = 0) -> None:
        """Count records whose slots would be overwritten, and add ``other`` to the second count."""
        count, other_before = self.counts()
        for number in range(count, count + min(num_records, NUM_SLOTS)):
            _LENGTH.pack_into(self._memory, _COUNTS.size + number % NUM_SLOTS * self._slot_bytes, 0)
        _COUNTS.pack_into(self._memory, 0, count + num_records, other_before + other)

    def since(self, count: int) -> list[bytes]:
        """Return the payloads that were added after ``count`` and are still there."""
        last, _ = self.counts()
        first = max(count, last - NUM_SLOTS)
        found = []
        for number in range(first, last):
            at = _COUNTS.size + number % NUM_SLOTS * self._slot_bytes
            (length,) = _LENGTH.unpack_from(self._memory, at)
            found.append(bytes(self._memory[at + _LENGTH.size : at + _LENGTH.size + length]))
        # The writer may meanwhile have overwritten the oldest slots, including the one that it is writing.
        torn = self.counts()[0] + 1 - NUM_SLOTS - first
        return [payload for payload in found[max(0, torn) :] if payload]


class Rings:
    """The rings of one kind, of all workers that share a folder: ``own``, and by iteration all of them by name."""

    def __init__(self, folder: pathlib.Path | None, kind: str, slot_bytes: int) -> None:
        self._folder = folder
        self._kind = kind
        self._slot_bytes = slot_bytes
        self._size_bytes = _COUNTS.size + NUM_SLOTS * slot_bytes
        name = f"{kind}-{os.getpid()}.ring"
        if folder is None:
            memory = mmap.mmap(-1, self._size_bytes)
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with os.fdopen(os.open(folder / name, flags, 0o600), "w+b") as file:
                file.truncate(self._size_bytes)
                memory = mmap.mmap(file.fileno(), self._size_bytes)
        self.own = Ring(memory, slot_bytes)
        self._found = {name: self.own}

    def __iter__(self) -> Iterator[tuple[str, Ring]]:
        if self._folder is not None:
            for path in self._folder.glob(f"{self._kind}-*.ring"):
                if path.name not in self._found and path.stat().st_size == self._size_bytes:
                    with path.open("rb") as file:
                        memory = mmap.mmap(file.fileno(), self._size_bytes, access=mmap.ACCESS_READ)
                    self._found[path.name] = Ring(memory, self._slot_bytes)
        yield from self._found.items()
