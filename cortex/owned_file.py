"""JSON files that the gateways of a host own together, beside the operator's: added models, added keys.

A change reads the file anew under a lock and replaces it whole, so that no process sees half of it and none undoes
another's change. A file that cannot be read is never replaced. Only its owner can read it. :mod:`cortex.reload` reads
the files like the operator's.
"""

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from cortex.settings import ConfigError, convert, read_file
from cortex.wire.errors import ApiError

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class OwnedFile(Generic[T]):
    """Form of a file: its content, the setting that names it, and the error of a file that cannot be changed."""

    kind: type[T]
    setting: str
    error: type[ApiError]

    def read(self, path: pathlib.Path) -> T | None:
        """Return the content of a file; ``None`` if there is none.

        Raises:
            ConfigError: it cannot be read, or a key is wrong.
        """
        if not may_exist(path):
            return None
        data = read_file(path)
        try:
            document = msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(str(path), "", f"is not JSON: {error}") from None
        return convert(document, self.kind, str(path))

    def change(self, path: pathlib.Path | None, change: Callable[[T | None], T]) -> None:
        """Replace the content by what ``change`` makes of it. An error of ``change`` leaves the file as it is.

        Raises:
            ApiError: of this form's kind; nothing says where the file is, or it cannot be read or written.
        """
        if path is None:
            raise self.error(
                f"Nothing says where to keep this: neither $STATE_DIRECTORY nor $HOME is set; name a file as "
                f"{self.setting}."
            )
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(path):
                _replace(path, change(self.read(path)))
        except OSError as error:
            raise self.error(
                f"{path} cannot be written: {error.strerror or error}; give the gateway the right to, or name another "
                f"file as {self.setting}."
            ) from error
        except ConfigError as error:
            raise self.error(f"{error}; correct the file.") from error


def without_defaults(struct: msgspec.Struct) -> dict[str, object]:
    """Return the fields of a struct that do not have their defaults."""
    found = {}
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if value != default:
            found[field.encode_name] = value
    return found


def may_exist(path: pathlib.Path) -> bool:
    """Return whether something is at a path, or may be: a folder that may not be searched hides its files."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a file, which is another one beside it: the file itself is replaced."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: pathlib.Path, content: msgspec.Struct) -> None:
    """Replace a file by a whole new one of mode 0600, which a crash of the host keeps or loses whole."""
    document = {
        name: [without_defaults(each) for each in value] if isinstance(value, tuple) else value
        for name, value in msgspec.structs.asdict(content).items()
    }
    data = msgspec.json.format(msgspec.json.encode(document)) + b"\n"
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        pathlib.Path(draft).replace(path)
    except BaseException:
        pathlib.Path(draft).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
