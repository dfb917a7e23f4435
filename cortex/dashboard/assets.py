"""The page's files, as they lie beside this module: read once, served by exact name, asked for again by their hash.

There is nothing but what was found at the start, so no path leads anywhere else. The policy in the headers lets a page
load from this gateway alone, run no script but these files, and be framed by nobody.
"""

import hashlib
import pathlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from cortex.http_io import Exchange, Header

PREFIX = "/dashboard/"
PAGE = "index.html"
FOLDER = pathlib.Path(__file__).with_name("page")
CONTENT_TYPES = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
POLICY = b"; ".join(
    (
        b"default-src 'none'",
        b"script-src 'self'",
        b"style-src 'self'",
        b"img-src 'self'",
        b"connect-src 'self'",
        b"base-uri 'none'",
        b"form-action 'none'",
        b"frame-ancestors 'none'",
        b"require-trusted-types-for 'script'",
        b"trusted-types 'none'",
    )
)
HEADERS: tuple[Header, ...] = (
    (b"content-security-policy", POLICY),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    # Kept, and asked for each time: what comes back is nearly always 304.
    (b"cache-control", b"no-cache"),
)


@dataclass(frozen=True, slots=True)
class Asset:
    """One file."""

    body: bytes
    content_type: bytes
    etag: bytes


def read(folder: pathlib.Path = FOLDER) -> Mapping[str, Asset]:
    """Return every file of the page by the path that it is served at."""
    found = {}
    for file in sorted(folder.iterdir()):
        content_type = CONTENT_TYPES.get(file.suffix)
        if content_type is not None:
            body = file.read_bytes()
            etag = b'"' + hashlib.sha256(body).hexdigest()[:32].encode() + b'"'
            path = "/" if file.name == PAGE else PREFIX + file.name
            found[path] = Asset(body, content_type, etag)
    return found


def build_of(assets: Mapping[str, Asset]) -> str:
    """Return a name for these very files, by which a page that is open knows whether it is still the one served."""
    digest = hashlib.sha256(b"".join(asset.etag for _, asset in sorted(assets.items())))
    return digest.hexdigest()[:16]


def serve(asset: Asset) -> Callable[[Exchange], Awaitable[None]]:
    """Return the endpoint of one file."""
    headers = (*HEADERS, (b"etag", asset.etag))

    async def endpoint(exchange: Exchange) -> None:
        known = exchange.header(b"if-none-match")
        if known is not None and (known.strip() == b"*" or asset.etag in known):
            await exchange.reply(304, b"", content_type=asset.content_type, headers=headers)
        else:
            await exchange.reply(200, asset.body, content_type=asset.content_type, headers=headers)

    return endpoint
