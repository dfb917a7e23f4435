"""Download of one file over HTTP: resumed where it was cut, bounded in time and bytes, verified before it has its name.

What has come stays beside the file as ``NAME.incomplete``. It is asked for in ranges, as a CDN may refuse to send more
than 50 GB in one answer. Credentials go only to the server that they are for, not where it redirects to, and no address
is part of an error: it may hold a signature.
"""

import contextlib
import email.message
import errno
import functools
import hashlib
import http.client
import os
import pathlib
import random
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Final

from neuron import __version__
from neuron.errors import (
    DiskFullError,
    HashMismatchError,
    SourceForbiddenError,
    SourceNotFoundError,
    SourceUnavailableError,
)

Report = Callable[[int, int], None]
"""Called with bytes done and bytes in all (0 if unknown), often; what it raises ends the download."""

TIMEOUT_S: Final = 30.0
"""Longest silence of a server."""
STALL_S: Final = 60.0
STALL_BYTES: Final = 1 << 20
"""Bytes that must come in ``STALL_S``; less is a download that would take days, and counts as cut."""
MAX_ATTEMPTS: Final = 5
"""Attempts in a row that bring less than ``STALL_BYTES``, after which the download fails."""
MAX_WAIT_S: Final = 30.0
RANGE_BYTES: Final = 8 << 30
_CHUNK_BYTES: Final = 1 << 20
_MAX_REDIRECTS: Final = 5
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """File on a server. A digest that is empty is not checked."""

    url: str
    name: str
    """Name for errors."""
    size_bytes: int | None = None
    sha256: str = ""
    git_sha1: str = ""
    """Digest that git gives a file, of its length and its bytes."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers for the server of ``url`` alone."""


class _CutError(Exception):
    """The server failed in a way that may pass; ``after_s`` is how long it asked to wait."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


def download(remote: RemoteFile, path: pathlib.Path, report: Report) -> str:
    """Download ``remote`` to ``path`` and return its sha256. Blocks.

    Raises:
        SourceNotFoundError, SourceForbiddenError: the server says so.
        SourceUnavailableError: it does not answer, or stops answering; what has come is kept.
        DiskFullError: the file does not fit the disk; what has come is kept.
        HashMismatchError: the bytes are not those of the digests; nothing is kept.
    """
    partial = path.with_name(f"{path.name}.incomplete")
    with contextlib.ExitStack() as stack:
        with disk_errors(path.parent):
            file = stack.enter_context(partial.open("a+b"))
        part = _Part(remote, file, path.parent)
        continued = part.read()
        _complete(part, report)
        if not part.is_right() and continued:
            # Another program's beginning, or that of a file that has changed since.
            part.restart()
            _complete(part, report)
        if not part.is_right():
            partial.unlink(missing_ok=True)
            check_digest(part.sha256.hexdigest(), remote.sha256, remote.name)
            raise HashMismatchError(f"{remote.name} is not the file that its listing names.", param="source")
    partial.replace(path)
    return part.sha256.hexdigest()


def get(remote: RemoteFile, max_bytes: int) -> tuple[bytes, email.message.Message]:
    """Return the body, at most ``max_bytes``, and the headers of an answer. Raises as :func:`download`."""
    attempt = 0
    while True:
        try:
            with _open(remote, None) as reply:
                body = bytearray()
                for chunk in _chunks(reply, max_bytes + 1):
                    body += chunk
            if len(body) > max_bytes:
                raise SourceUnavailableError(f"{remote.name}: the answer is longer than {max_bytes} bytes.")
            return bytes(body), reply.headers
        except _CutError as error:
            attempt += 1
            _wait(remote, attempt, error)


def read_range(remote: RemoteFile, start: int, stop: int) -> bytes:
    """Return bytes ``start`` to ``stop`` of a file. Raises as :func:`download`."""
    attempt = 0
    while True:
        try:
            with _open(remote, (start, stop)) as reply:
                if reply.status != http.HTTPStatus.PARTIAL_CONTENT or _place(reply)[0] != start:
                    raise SourceUnavailableError(f"{remote.name}: the server sends no parts of files.")
                return b"".join(_chunks(reply, stop - start))
        except _CutError as error:
            attempt += 1
            _wait(remote, attempt, error)


def hash_file(path: pathlib.Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(found: str, expected: str, name: str) -> None:
    """Raise :class:`HashMismatchError` unless ``found`` is the sha256 ``expected``, which may be empty."""
    if expected and found.strip() != expected.lower():
        raise HashMismatchError(f"{name} has sha256 {found.strip()}, expected {expected.lower()}.", param="sha256")


def check_space(folder: pathlib.Path, needed_bytes: int, name: str) -> None:
    """Raise :class:`DiskFullError` if the disk of ``folder`` has not ``needed_bytes`` free."""
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        has = f"{folder} has {free_bytes / 1e9:.2f} GB free"
        advice = "make room, or move the cache (HF_HOME, cache in neuron.toml)"
        raise DiskFullError(f"{name} needs {needed_bytes / 1e9:.2f} GB; {has}: {advice}.")


class _Part:
    """The bytes of a file that have come, on disk and hashed."""

    def __init__(self, remote: RemoteFile, file: IO[bytes], folder: pathlib.Path) -> None:
        self.remote, self.file, self.folder = remote, file, folder
        self.size_bytes = remote.size_bytes
        self.reset()

    def reset(self) -> None:
        self.done = 0
        self.sha256 = hashlib.sha256()
        self.git_sha1 = hashlib.sha1(b"blob %d\0" % (self.remote.size_bytes or 0), usedforsecurity=False)

    def read(self) -> bool:
        """Hash what an earlier download left, and return whether there was something."""
        left = self.file.seek(0, os.SEEK_END)
        if left and (self.remote.size_bytes is None or left > self.remote.size_bytes):
            self.restart()
            return False
        self.file.seek(0)
        while chunk := self.file.read(_CHUNK_BYTES):
            self._hash(chunk)
        return self.done > 0

    def restart(self) -> None:
        self.file.truncate(0)
        self.reset()

    def append(self, chunk: bytes) -> None:
        with disk_errors(self.folder):
            self.file.write(chunk)
        self._hash(chunk)

    def is_right(self) -> bool:
        remote = self.remote
        return (not remote.sha256 or self.sha256.hexdigest() == remote.sha256.lower()) and (
            not remote.git_sha1 or self.git_sha1.hexdigest() == remote.git_sha1
        )

    def _hash(self, chunk: bytes) -> None:
        self.sha256.update(chunk)
        if self.remote.git_sha1:
            self.git_sha1.update(chunk)
        self.done += len(chunk)


def _complete(part: _Part, report: Report) -> None:
    """Fetch what is missing of a file."""
    attempt, mark = 0, part.done
    while part.size_bytes is None or part.done < part.size_bytes:
        try:
            _append_range(part, report)
        except _CutError as error:
            attempt = 1 if abs(part.done - mark) >= STALL_BYTES else attempt + 1
            mark = part.done
            _wait(part.remote, attempt, error)
    with disk_errors(part.folder):
        part.file.flush()
    report(part.done, part.size_bytes)


def _append_range(part: _Part, report: Report) -> None:
    remote, size_bytes = part.remote, part.size_bytes
    wanted = None if size_bytes is None else (part.done, min(size_bytes, part.done + RANGE_BYTES))
    with _open(remote, wanted) as reply:
        if reply.status == http.HTTPStatus.PARTIAL_CONTENT:
            start, total = _place(reply)
            if start != part.done or total not in {None, size_bytes}:
                raise SourceUnavailableError(f"{remote.name}: the server sent another part than was asked for.")
            most = 0 if wanted is None else wanted[1] - wanted[0]
        else:
            if part.done:
                part.restart()
            length = reply.headers.get("Content-Length", "")
            found = int(length) if length.isdecimal() else None
            if size_bytes is None:
                part.size_bytes = size_bytes = found
            if size_bytes is None:
                raise SourceUnavailableError(f"{remote.name}: the server does not say how long it is.")
            if found not in {None, size_bytes}:
                raise HashMismatchError(f"{remote.name} has {found} bytes, expected {size_bytes}.", param="source")
            most = size_bytes
        assert size_bytes is not None
        check_space(part.folder, size_bytes - part.done, remote.name)
        before = part.done
        for chunk in _chunks(reply, most):
            part.append(chunk)
            report(part.done, size_bytes)
    if part.done - before < most:
        raise _CutError(f"ended at {part.done} of {size_bytes} bytes")


def _chunks(reply: http.client.HTTPResponse, max_bytes: int) -> Iterator[bytes]:
    """Yield at most ``max_bytes`` of an answer's body as it comes."""
    marked_at, marked, done = time.monotonic(), 0, 0
    while done < max_bytes:
        try:
            chunk = reply.read1(min(_CHUNK_BYTES, max_bytes - done))
        except (OSError, http.client.HTTPException) as error:
            raise _CutError(_reason(error)) from error
        if not chunk:
            return
        done += len(chunk)
        yield chunk
        if (now := time.monotonic()) - marked_at > STALL_S:
            if done - marked < STALL_BYTES:
                raise _CutError(f"{done - marked} bytes came in {now - marked_at:.0f} s")
            marked_at, marked = now, done


@contextlib.contextmanager
def _open(remote: RemoteFile, wanted: tuple[int, int] | None) -> Iterator[http.client.HTTPResponse]:
    """Ask for a file, or for the bytes ``wanted`` of it, and yield the answer to read from."""
    request = urllib.request.Request(remote.url)
    for name, value in remote.headers.items():
        request.add_unredirected_header(name, value)
    if wanted is not None:
        request.add_header("Range", f"bytes={wanted[0]}-{wanted[1] - 1}")
    try:
        reply = _opener().open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(remote, error) from None
    except ValueError:  # an address that is none; a header that is none would be quoted, and may be a secret
        raise SourceUnavailableError(f"{remote.name}: its address or the token cannot be sent.") from None
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(_reason(error)) from None
    with reply:
        yield reply


def _refusal(remote: RemoteFile, error: urllib.error.HTTPError) -> Exception:
    match error.code:
        case 401 | 403:
            return SourceForbiddenError(
                f"{remote.name}: the server answered {error.code}: it does not exist, or needs a token (HF_TOKEN) of "
                "an account that has accepted its terms.",
                param="source",
            )
        case 404 | 410:
            return SourceNotFoundError(f"{remote.name} does not exist on the server.", param="source")
        case 408 | 425 | 429 | 500 | 502 | 503 | 504:
            asked = error.headers.get("Retry-After", "")
            return _CutError(f"the server answered {error.code}", float(asked) if asked.isdecimal() else 0.0)
        case _:
            return SourceUnavailableError(f"{remote.name}: the server answered {error.code}.")


def _wait(remote: RemoteFile, attempt: int, error: _CutError) -> None:
    """Wait before the next attempt, longer after each that brought nothing; raise after ``MAX_ATTEMPTS``."""
    if attempt >= MAX_ATTEMPTS or error.after_s > MAX_WAIT_S:
        raise SourceUnavailableError(
            f"The download of {remote.name} failed: {error}; what has come is kept, and the next one resumes it.",
            retry_after_s=max(error.after_s, MAX_WAIT_S),
        ) from error
    time.sleep(max(error.after_s, min(MAX_WAIT_S, 2.0**attempt / 4) * random.uniform(0.5, 1.0)))


def _place(reply: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Return the first byte of a partial answer and the file's length, where it is said."""
    found = _RANGE.fullmatch(reply.headers.get("Content-Range", ""))
    if found is None:
        return -1, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error) or type(error).__name__


@contextlib.contextmanager
def disk_errors(folder: pathlib.Path) -> Iterator[None]:
    """Translate the errors of writing to ``folder``: :class:`DiskFullError` and :class:`SourceUnavailableError`."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFullError(f"{folder} has no space left.") from error
        raise SourceUnavailableError(f"{folder} cannot be used: {error.strerror}.") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, with credentials only to the server that they are for, and never from https to http."""

    max_redirections = _MAX_REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        before, after = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if after.scheme not in {"https", before.scheme}:
            fp.close()
            raise urllib.error.URLError(f"a redirect from {before.scheme} to {after.scheme} is not followed")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (before.scheme, before.netloc) == (after.scheme, after.netloc):
            for name, value in req.unredirected_hdrs.items():
                request.add_unredirected_header(name, value)
        return request


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Return what opens ``http`` and ``https`` addresses, through the proxies of the environment, and no others."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", f"helexa-neuron/{__version__}")]
    return opener
