"""Hugging Face's hub, or a server with its API: the files of a repository, and their download.

Files are kept as the hub's own programs keep them, who share them so: each under its digest in ``blobs``, and for each
commit a folder of links in ``snapshots``. Their client is not used, as it keeps nothing of a download that was cut and
compares no digest. The environment is theirs: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``,
``HF_TOKEN`` and ``HF_TOKEN_PATH``.
"""

import contextlib
import fcntl
import functools
import os
import pathlib
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from neuron.errors import HashMismatchError, InvalidSourceError, SourceNotFoundError, SourceUnavailableError
from neuron.load.choices import SAFETENSORS, Choice, RepositoryFile, choose, find_choices
from neuron.load.download import RemoteFile, Report, disk_errors, download, get

ENDPOINT: Final = "https://huggingface.co"
_LISTING_BYTES: Final = 64 << 20
"""Longest listing of a repository that is read."""
_LOCK_CHECK_S: Final = 0.2
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[\x21-\x7e]+")

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?\Z")]


class _Lfs(msgspec.Struct):
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class _Sibling(msgspec.Struct):
    """File of a repository in the hub's listing."""

    rfilename: Annotated[str, msgspec.Meta(pattern=r"^(?!(.*/)?\.{0,2}(/|\Z))[^\x00-\x1f\x7f]{1,1024}\Z")]
    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
    blobId: Digest
    lfs: _Lfs | None = None


class _Info(msgspec.Struct):
    """The hub's description of a repository, as far as it is used."""

    sha: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}\Z")]
    siblings: list[_Sibling]


@dataclass(frozen=True, slots=True)
class HubSource:
    """Hugging Face repository, or one choice of it."""

    repository: str
    revision: str | None
    choice: str | None
    """Tag or file of the choice; ``None``: the repository's default."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Files of a repository at a commit."""

    repository: str
    commit: str
    files: tuple[RepositoryFile, ...]


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub as this process sees it."""

    endpoint: str
    cache: pathlib.Path
    token: str = ""
    offline: bool = False

    def list_files(self, source: HubSource) -> Listing:
        """Return the files of a repository. Blocks; raises as :func:`neuron.load.download.download`."""
        revision = source.revision or "main"
        quoted = urllib.parse.quote(revision, safe="")
        name = source.repository if source.revision is None else f"{source.repository}@{revision}"
        address = f"{self.endpoint}/api/models/{source.repository}/revision/{quoted}?blobs=true"
        body, _ = get(RemoteFile(address, name, headers=self._headers()), _LISTING_BYTES)
        try:
            info = msgspec.json.decode(body, type=_Info)
        except (msgspec.DecodeError, RecursionError) as error:
            raise SourceUnavailableError(f"{name}: the hub's answer is not a listing of its files: {error}.") from error
        files = (
            RepositoryFile(file.rfilename, file.size, file.lfs.sha256)
            if file.lfs is not None
            else RepositoryFile(file.rfilename, file.size, git_sha1=file.blobId)
            for file in info.siblings
        )
        return Listing(source.repository, info.sha, tuple(files))

    def fetch(self, source: HubSource, sha256: str, report: Report) -> pathlib.Path:
        """Return the path of the weights, downloaded if they are not in the cache. Blocks.

        Raises as :func:`neuron.load.download.download`; :class:`SourceNotFoundError` too where the repository has no
        such choice, and :class:`InvalidSourceError` for a ``sha256`` of several files.
        """
        with disk_errors(self.cache):
            found = self._cached(source)
            # Which GGUF file is the default depends on those that are not in the cache.
            if found is not None and (source.choice is not None or found.is_dir()):
                return found
            try:
                return self._download(source, sha256, report)
            except SourceUnavailableError:
                if found is None:
                    raise
                return found

    def remote(self, listing: Listing, file: RepositoryFile) -> RemoteFile:
        """Return a file of a repository as a file to download."""
        path = urllib.parse.quote(file.path)
        return RemoteFile(
            f"{self.endpoint}/{listing.repository}/resolve/{listing.commit}/{path}",
            f"{listing.repository}/{file.path}",
            file.size_bytes,
            file.sha256,
            file.git_sha1,
            self._headers(),
        )

    def _headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def _folder(self, repository: str) -> pathlib.Path:
        return self.cache / f"models--{repository.replace('/', '--')}"

    def cached_choices(self, source: HubSource) -> dict[Choice, pathlib.Path]:
        """Return the choices of a repository whose files are all in the cache, with the path of each."""
        folder, commit = self._folder(source.repository), source.revision or "main"
        if not _COMMIT.fullmatch(commit):
            try:
                commit = (folder / "refs" / commit).read_text().strip()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return {}
        snapshot = folder / "snapshots" / commit
        there = [path for path in snapshot.rglob("*") if path.is_file()]
        files = [RepositoryFile(str(path.relative_to(snapshot)), path.stat().st_size) for path in there]
        has_tokenizer = any(file.path.startswith(("tokenizer.", "tekken.")) for file in files)
        return {
            choice: _path(snapshot, choice)
            for choice in find_choices(files)
            if choice.tag != SAFETENSORS or has_tokenizer  # another program may have fetched the weights alone
        }

    def _cached(self, source: HubSource) -> pathlib.Path | None:
        """Return the path of a choice whose files are all in the cache."""
        choices = self.cached_choices(source)
        try:
            return choices[choose(tuple(choices), source.choice, source.repository)]
        except SourceNotFoundError:
            return None

    def _download(self, source: HubSource, sha256: str, report: Report) -> pathlib.Path:
        if self.offline:
            raise SourceUnavailableError(f"{source.repository} is not cached, and HF_HUB_OFFLINE is set.")
        listing = self.list_files(source)
        choice = choose(find_choices(listing.files), source.choice, source.repository)
        if sha256 and choice.tag != SAFETENSORS:
            _check_published(choice, sha256)
        folder = self._folder(source.repository)
        snapshot, done = folder / "snapshots" / listing.commit, 0
        for file in choice.files:
            pointer = snapshot / file.path
            if not pointer.exists():
                self._fetch_file(
                    listing, file, pointer, functools.partial(_report_part, report, done, choice.size_bytes)
                )
            done += file.size_bytes
            report(done, choice.size_bytes)
        if source.revision != listing.commit:
            ref = folder / "refs" / (source.revision or "main")
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(listing.commit)
        return _path(snapshot, choice)

    def _fetch_file(self, listing: Listing, file: RepositoryFile, pointer: pathlib.Path, report: Report) -> None:
        """Make ``pointer`` a link to a file's bytes, which one process at a time downloads unless they are there."""
        folder, digest = self._folder(listing.repository), file.sha256 or file.git_sha1
        blob = folder / "blobs" / digest
        blob.parent.mkdir(parents=True, exist_ok=True)
        partial = blob.with_name(f"{digest}.incomplete")

        def report_other() -> None:
            with contextlib.suppress(FileNotFoundError):
                report(partial.stat().st_size, 0)

        with _locked(self.cache / ".locks" / folder.name / f"{digest}.lock", report_other):
            if not blob.exists():
                download(self.remote(listing, file), blob, report)
            pointer.parent.mkdir(parents=True, exist_ok=True)
            pointer.unlink(missing_ok=True)  # a link whose target is gone
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))


def hub_of(environment: Mapping[str, str]) -> Hub:
    """Return the hub that environment variables describe.

    Raises :class:`InvalidSourceError` if the token is none.
    """
    home = pathlib.Path(
        environment.get("HF_HOME") or pathlib.Path(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    ).expanduser()
    cache = environment.get("HF_HUB_CACHE") or home / "hub"
    token = environment.get("HF_TOKEN") or ""
    if not token:
        with contextlib.suppress(OSError):
            token = pathlib.Path(environment.get("HF_TOKEN_PATH") or home / "token").expanduser().read_text()
    token = token.strip()
    if token and not _TOKEN.fullmatch(token):
        raise InvalidSourceError("The token for the hub (HF_TOKEN) has characters that no token has.", param="source")
    return Hub(
        (environment.get("HF_ENDPOINT") or ENDPOINT).rstrip("/"),
        pathlib.Path(cache).expanduser(),
        token,
        environment.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"},
    )


def _path(snapshot: pathlib.Path, choice: Choice) -> pathlib.Path:
    return snapshot if choice.tag == SAFETENSORS else snapshot / choice.files[0].path


def _check_published(choice: Choice, sha256: str) -> None:
    """Raise unless ``sha256`` is the digest of the only file of a choice, before it is downloaded."""
    if len(choice.files) > 1:
        raise InvalidSourceError(
            f"sha256 is that of one file, and {choice.name} has {len(choice.files)}; each is compared with the hub's.",
            param="sha256",
        )
    published = choice.files[0].sha256
    if published and published != sha256.lower():
        raise HashMismatchError(
            f"{choice.files[0].path} has sha256 {published}, expected {sha256.lower()}.", param="sha256"
        )


def _report_part(report: Report, before: int, total: int, done: int, _: int) -> None:
    """Report the progress of a file whose choice has ``before`` bytes in other files and ``total`` in all."""
    report(before + done, total)


@contextlib.contextmanager
def _locked(path: pathlib.Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock that the hub's programs use for a file; call ``wait`` while another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait()
                time.sleep(_LOCK_CHECK_S)
        yield
