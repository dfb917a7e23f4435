"""The file of models that commands and the dashboard added. It has the form of ``models.toml``, in JSON."""

import pathlib

import msgspec

from cortex.config import ModelProfile, ModelsFile
from cortex.errors import CatalogueNotWritableError
from cortex.owned_file import OwnedFile

_FILE = OwnedFile(ModelsFile, "gateway.added_models", CatalogueNotWritableError)


def read(path: pathlib.Path) -> ModelsFile:
    """Return the content of the file; nothing if there is none.

    Raises:
        ConfigError: it cannot be read, or a key is wrong.
    """
    return _FILE.read(path) or ModelsFile()


def add(path: pathlib.Path | None, profile: ModelProfile) -> None:
    """Write a model to the file, in place of the one of the same id.

    Raises:
        CatalogueNotWritableError: the file cannot be written, or read before it.
    """

    def added(before: ModelsFile | None) -> ModelsFile:
        before = before or ModelsFile()
        others = (each for each in before.models if each.id != profile.id)
        return msgspec.structs.replace(before, models=(*others, profile))

    _FILE.change(path, added)


def remove(path: pathlib.Path | None, model: str) -> None:
    """Take a model out of the file. Raises as :func:`add`."""

    def removed(before: ModelsFile | None) -> ModelsFile:
        before = before or ModelsFile()
        return msgspec.structs.replace(before, models=tuple(each for each in before.models if each.id != model))

    _FILE.change(path, removed)
