"""Store of captured requests: in memory, or in files of mode 0600 in the folder that the workers share.

The files are in the temporary folder of one run of the gateway, and end with it.
"""

import abc
import os
import pathlib
from collections.abc import Sequence

PREFIX = "capture-"


class Shelf(abc.ABC):
    """Values by name, in the order of their arrival. Every method is safe in any thread."""

    @abc.abstractmethod
    def put(self, name: str, value: bytes) -> None:
        """Keep a value. Raises ``OSError``."""

    @abc.abstractmethod
    def get(self, name: str) -> bytes | None:
        """Return a value, or ``None``."""

    @abc.abstractmethod
    def names(self) -> Sequence[str]:
        """Return the names, the oldest first."""

    @abc.abstractmethod
    def size_bytes(self) -> int:
        """Return the size of all values."""

    @abc.abstractmethod
    def clear(self) -> None:
        """Remove every value."""


class MemoryShelf(Shelf):
    """Values in this process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def put(self, name: str, value: bytes) -> None:
        """Keep a value."""
        self._values[name] = value

    def get(self, name: str) -> bytes | None:
        """Return a value, or ``None``."""
        return self._values.get(name)

    def names(self) -> Sequence[str]:
        """Return the names, the oldest first."""
        return tuple(self._values)

    def size_bytes(self) -> int:
        """Return the size of all values."""
        return sum(len(value) for value in tuple(self._values.values()))

    def clear(self) -> None:
        """Remove every value."""
        self._values = {}


class FolderShelf(Shelf):
    """Values in files, for all workers of a gateway. A name has no character that means something in a path."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def put(self, name: str, value: bytes) -> None:
        """Keep a value. A reader finds all of it or nothing."""
        path = self._path(name)
        part = path.with_suffix(f".{os.getpid()}.part")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(value)
        part.replace(path)

    def get(self, name: str) -> bytes | None:
        """Return a value, or ``None``."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def names(self) -> Sequence[str]:
        """Return the names, the oldest first."""
        return [path.stem.removeprefix(PREFIX) for path in sorted(self._files(), key=_written_at)]

    def size_bytes(self) -> int:
        """Return the size of all values."""
        return sum(_size(path) for path in self._files())

    def clear(self) -> None:
        """Remove every value."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> pathlib.Path:
        return self._folder / f"{PREFIX}{name}.json"

    def _files(self) -> list[pathlib.Path]:
        return list(self._folder.glob(f"{PREFIX}*.json"))


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another worker has just removed it
        return 0


def _written_at(path: pathlib.Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
