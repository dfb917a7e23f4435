"""The file of models that commands and the dashboard added, which the gateways of a host own together.

It has the form of ``models.toml``, in JSON. A change reads the file anew under a lock and replaces it whole, so that no
process sees half of it and none undoes another's change. :mod:`cortex.reload` reads it like the operator's files.
"""

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import msgspec

from cortex.config import ModelProfile, ModelsFile
from cortex.errors import CatalogueNotWritableError
from cortex.settings import ConfigError, convert, read_file


def read(path: pathlib.Path) -> ModelsFile:
    """Return the content of the file; nothing if there is none.

    Raises:
        ConfigError: it cannot be read, or a key is wrong.
    """
    if not path.exists():
        return ModelsFile()
    data = read_file(path)
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(str(path), "", f"is not JSON: {error}") from None
    return convert(document, ModelsFile, str(path))


def add(path: pathlib.Path | None, profile: ModelProfile) -> None:
    """Write a model to the file, in place of the one of the same id.

    Raises:
        CatalogueNotWritableError: the file cannot be written, or read before it.
    """
    _change(path, lambda models: (*(each for each in models if each.id != profile.id), profile))


def remove(path: pathlib.Path | None, model: str) -> None:
    """Take a model out of the file. Raises as :func:`add`."""
    _change(path, lambda models: tuple(each for each in models if each.id != model))


def _change(path: pathlib.Path | None, change: Callable[[tuple[ModelProfile, ...]], tuple[ModelProfile, ...]]) -> None:
    if path is None:
        raise CatalogueNotWritableError(
            "There is no file for added models: neither $STATE_DIRECTORY nor $HOME is set; name one as "
            "gateway.added_models."
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path):
            before = read(path)
            _replace(path, msgspec.structs.replace(before, models=change(before.models)))
    except OSError as error:
        raise CatalogueNotWritableError(
            f"{path} cannot be written: {error.strerror or error}; give the gateway the right to, or name another file "
            "as gateway.added_models."
        ) from error
    except ConfigError as error:
        raise CatalogueNotWritableError(f"{error}; correct or delete the file.") from error


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Hold the lock of the file, which is another one beside it: the file itself is replaced."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: pathlib.Path, file: ModelsFile) -> None:
    """Replace the file by a whole new one, with the fields that are not the defaults."""
    document = {"models": [_written(profile) for profile in file.models], "aliases": file.aliases}
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


def _written(profile: ModelProfile) -> dict[str, object]:
    plain = ModelProfile(id="", source="")
    values = {name: getattr(profile, name) for name in profile.__struct_fields__}
    return {name: value for name, value in values.items() if value != getattr(plain, name)}
