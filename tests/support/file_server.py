"""A server of files on the loopback interface, as a hub, a package index or a CDN, with the faults of such servers."""

import contextlib
import hashlib
import http.server
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import loopback

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FileServer:
    """Files by path, the requests that came, and the faults to answer with."""

    files: dict[str, bytes] = field(default_factory=dict)
    hits: list[str] = field(default_factory=list)
    """``METHOD PATH`` of each request."""
    ranges: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    """Statuses that the next requests for a path get; 200 serves the file."""
    retry_after: str = ""
    redirects: dict[str, str] = field(default_factory=dict)
    bodies: dict[str, bytes] = field(default_factory=dict)
    """Bytes served under the headers of the file: other ones, or more."""
    cut_after: list[int] = field(default_factory=list)
    """Bytes of a body after which the next connections are closed."""
    has_ranges: bool = True
    has_length: bool = True
    address: str = ""


@contextlib.contextmanager
def serve_files() -> Iterator[FileServer]:
    """Run a server for the block."""
    site = FileServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            site.hits.append(f"GET {path}")
            site.authorizations.append(self.headers.get("Authorization", ""))
            statuses = site.statuses.get(path, [])
            status = statuses.pop(0) if statuses else 200
            if path in site.redirects:
                self.answer(302, {"Location": site.redirects[path]})
            elif status != 200:
                self.answer(status, {"Retry-After": site.retry_after} if site.retry_after else {})
            elif path not in site.files:
                self.answer(404, {})
            else:
                self.send_file(path)

        def send_file(self, path: str) -> None:
            data, wanted = site.files[path], self.headers.get("Range", "")
            body = site.bodies.get(path, data)
            if wanted:
                site.ranges.append(wanted)
            if wanted and site.has_ranges:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last) + 1, len(data))
                if path not in site.bodies:
                    body = data[start:stop]
                self.answer(206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, stop - start, body)
            else:
                self.answer(200, {}, len(data), body)

        def answer(self, status: int, headers: Mapping[str, str], length: int = 0, body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if site.has_length:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body[: site.cut_after.pop(0)] if body and site.cut_after else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with loopback.serving(Handler) as site.address:
        yield site


def publish_repository(site: FileServer, files: Mapping[str, bytes], name: str = "tiny/model") -> None:
    """Serve a repository with the API of Hugging Face's hub; what is longer than 100 bytes is in LFS."""
    siblings = []
    for path, data in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        sibling: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": blob}
        if len(data) > 100:
            sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        siblings.append(sibling)
        site.files[f"/{name}/resolve/{COMMIT}/{path}"] = data
    info = json.dumps({"_id": "1", "id": name, "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
    for revision in ("main", COMMIT):
        site.files[f"/api/models/{name}/revision/{revision}"] = info
