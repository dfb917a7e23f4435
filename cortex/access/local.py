"""The administrator's token of this host: a key in a file that only the gateway's user can read.

The loopback address authenticates no client: a reverse proxy on the host forwards strangers, and so does a page in a
browser there. A user who can read the file can also write ``keys.toml``, so the token is worth an administrator's key.
It is made at the first start, in the runtime or state directory of the service or user; a start without the file makes
a new one.
"""

import contextlib
import logging
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Iterator, Mapping

log = logging.getLogger("cortex.access")

PREFIX = "sk-local-"
TOKEN = re.compile(rb"sk-local-[A-Za-z0-9_-]{43}")
LISTENS = "0A"
SERVICE_FOLDERS = ("/run/cortex", "/var/lib/cortex")
"""Folders in which the service of this host keeps its token, for root's commands."""


def folders(environment: Mapping[str, str]) -> Iterator[pathlib.Path]:
    """Yield the folders where a gateway with this environment may keep its token, the best first."""
    for variable in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR", "STATE_DIRECTORY", "XDG_STATE_HOME", "HOME"):
        if not (given := environment.get(variable)):
            continue
        base = pathlib.Path(given.split(":")[0])
        below = {"HOME": ".local/state/cortex", "XDG_RUNTIME_DIR": "cortex", "XDG_STATE_HOME": "cortex"}
        yield base / below.get(variable, "")


def obtain(port: int, environment: Mapping[str, str]) -> str:
    """Return the token of the gateway at a port, made if there is none; empty where no folder can hold it."""
    for folder in folders(environment):
        path = folder / _name(port)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if found := _read(path):
                return found
            with contextlib.suppress(FileNotFoundError):
                path.unlink()  # readable by others, so no secret
            return _make(path)
        except OSError as error:
            log.info("no administrator's token in %s: %s", folder, error.strerror or error)
    log.warning("there is no folder for an administrator's token: without an administrator's key, /admin is closed")
    return ""


def find(port: int, environment: Mapping[str, str]) -> str:
    """Return the token of a gateway that runs on this host, for its operator's commands; empty if there is none."""
    for folder in (*folders(environment), *map(pathlib.Path, SERVICE_FOLDERS)):
        with contextlib.suppress(OSError):
            path = folder / _name(port)
            if (found := _read(path, is_any_owners=os.geteuid() == 0)) and _is_served_by(port, path.stat().st_uid):
                return found
    return ""


def _is_served_by(port: int, owner: int) -> bool:
    """Return whether only the token's owner or root listens at its port, so that it is sent to no other user."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for row in pathlib.Path(table).read_text().splitlines()[1:]:
                columns = row.split()
                is_there = columns[3] == LISTENS and int(columns[1].rpartition(":")[2], 16) == port
                if is_there and int(columns[7]) not in {owner, 0}:
                    return False
    return True


def _name(port: int) -> str:
    return f"admin-{port}.token"


def _make(path: pathlib.Path) -> str:
    """Return a new token, written to the file; of several workers at a time one wins, and all return its token."""
    token = PREFIX + secrets.token_urlsafe(32)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(token.encode() + b"\n")
        try:
            os.link(draft, path)
        except FileExistsError:
            return _read(path)
    finally:
        draft.unlink()
    return token


def _read(path: pathlib.Path, *, is_any_owners: bool = False) -> str:
    """Return a token that only its owner can read; empty if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        is_own = is_any_owners or status.st_uid == os.geteuid()
        if not is_own or not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) & 0o077:
            return ""
        found = TOKEN.match(file.read(256))
    return found[0].decode() if found else ""
