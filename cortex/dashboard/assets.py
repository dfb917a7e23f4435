"""The page's files: read once from the folder beside this module, served by exact name, revalidated by their hash.

Each dialect of the playground brings a module of its own, with a conversation's request body and the reader of its SSE
events; ``dialects.js`` lists them. A conversation is a list of ``{role, text, calls}``: a message of the user, or of
the model with its calls, each ``{id, name, arguments, result}``. A reader takes an SSE event and calls its callbacks:
``text(delta)``, ``reasoning(delta)``, ``call(index, name, id)``, ``argument(index, delta)``, ``finish(reason)``,
``usage({input, output, cached})``, ``fail(message)``. ``python`` says how the dialect's SDK makes the same request and
prints the answer; parameters in ``unknown`` are not, or no longer, the SDK's.

Only the files found at the start are served, so no path leads elsewhere. The policy in the headers restricts the page
to this gateway and these scripts, and forbids frames.
"""

import hashlib
import pathlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from cortex.dialects import registry
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
    # Cached and always revalidated, nearly always with 304.
    (b"cache-control", b"no-cache"),
)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page, with its headers."""

    body: bytes
    content_type: bytes
    etag: bytes


def read(folder: pathlib.Path = FOLDER) -> Mapping[str, Asset]:
    """Return every file of the page by its URL path."""
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix in CONTENT_TYPES}
    files |= {f"{one.name}.js": one.page.read_bytes() for one in registry.DIALECTS if one.page is not None}
    files["dialects.js"] = _list_of_dialects()
    return {"/" if name == PAGE else PREFIX + name: _asset(name, body) for name, body in files.items()}


def _list_of_dialects() -> bytes:
    """Return the module that lists the dialects of the playground."""
    names = [one.name for one in registry.DIALECTS if one.page is not None]
    imports = [f'import {{ dialect as dialect{at} }} from "./{name}.js";\n' for at, name in enumerate(names)]
    listed = ", ".join(f"dialect{at}" for at in range(len(names)))
    return "".join([*imports, f"\nexport const dialects = [{listed}];\n"]).encode()


def _asset(name: str, body: bytes) -> Asset:
    etag = b'"' + hashlib.sha256(body).hexdigest()[:32].encode() + b'"'
    return Asset(body, CONTENT_TYPES[pathlib.PurePath(name).suffix], etag)


def build_of(assets: Mapping[str, Asset]) -> str:
    """Return a hash of all files, by which an open page detects that the gateway serves another version."""
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
