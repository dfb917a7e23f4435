"""A hub on the loopback interface with the faults of real ones, and what is left in the cache after each."""

import errno
import hashlib
import json
import logging
import pathlib
import shutil
import threading
from collections.abc import Iterator
from typing import IO, Any

import huggingface_hub
import pytest
from file_server import COMMIT, FileServer, publish_repository, serve_files

from cortex.wire.errors import ApiError
from neuron.errors import (
    DiskFullError,
    HashMismatchError,
    InvalidSourceError,
    SourceForbiddenError,
    SourceNotFoundError,
    SourceUnavailableError,
)
from neuron.load import download, hub, source

WEIGHTS = b"GGUF" + bytes(range(256)) * 64
LISTING = "/api/models/tiny/model/revision/main"
GGUF = "/tiny/model/resolve/" + COMMIT + "/m-Q4_K_M.gguf"
PARTS = {f"Q8_0/m-Q8_0-0000{number}-of-00002.gguf": WEIGHTS * number for number in (1, 2)}
FILES = {"m-Q4_K_M.gguf": WEIGHTS, "m-Q2_K.gguf": WEIGHTS[:500], "mmproj-F16.gguf": b"x" * 200, **PARTS}
FOLDER = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}


@pytest.fixture
def site(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A hub with ``tiny/model`` of GGUF files and ``tiny/folder`` of safetensors."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with serve_files() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        publish_repository(server, FILES)
        publish_repository(server, {**FOLDER, "notes.txt": b"not wanted"}, "tiny/folder")
        yield server


def cached(tmp_path: pathlib.Path) -> set[str]:
    """Return the names of the blobs in the cache."""
    return {path.name for path in tmp_path.glob("hf/hub/*/blobs/*")}


def test_a_tag_fetches_its_file_once_with_progress(site: FileServer) -> None:
    seen: list[tuple[int, int]] = []
    path = source.fetch("hf:tiny/model:q4_k_m", report=lambda done, total: seen.append((done, total)))
    assert path.name == "m-Q4_K_M.gguf"
    assert path.read_bytes() == WEIGHTS
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))
    assert site.hits == [f"GET {LISTING}", f"GET {GGUF}"]
    assert source.fetch("hf:tiny/model:Q4_K_M") == path
    assert len(site.hits) == 2, "a cached file needs no network"
    assert source.fetch(f"hf:tiny/model@{COMMIT}:m-Q4_K_M.gguf") == path
    assert len(site.hits) == 2


def test_all_parts_of_a_split_file(site: FileServer, tmp_path: pathlib.Path) -> None:
    path = source.fetch("hf:tiny/model:Q8_0")
    assert path.name == "m-Q8_0-00001-of-00002.gguf"
    assert {part.name: part.read_bytes() for part in path.parent.iterdir()} == {
        name.rpartition("/")[2]: data for name, data in PARTS.items()
    }
    assert source.fetch(f"hf:tiny/model:{list(PARTS)[1]}") == path, "a part stands for the whole"
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(InvalidSourceError, match="has 2"):
        source.fetch("hf:tiny/model:Q8_0", sha256="0" * 64)


def test_the_default_is_that_of_the_repository_and_not_of_the_cache(
    site: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = source.fetch("hf:tiny/model:Q2_K")
    assert source.fetch("hf:tiny/model").name == "m-Q4_K_M.gguf"
    site.files.clear()
    assert source.fetch("hf:tiny/model:Q2_K") == other
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert source.fetch("hf:tiny/model").name == "m-Q4_K_M.gguf"


def test_a_folder_is_whole_or_not_used(
    site: FileServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/tiny/folder/resolve/{COMMIT}/tokenizer.json"
    site.statuses[path] = [404]
    with pytest.raises(SourceNotFoundError, match=r"tiny/folder/tokenizer\.json"):
        source.fetch("hf:tiny/folder")
    folder = source.fetch("hf:tiny/folder")
    assert {file.name for file in folder.iterdir()} == set(FOLDER)
    assert site.hits.count(f"GET /tiny/folder/resolve/{COMMIT}/model.safetensors") == 1
    hits = len(site.hits)
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    assert source.fetch("hf:tiny/folder") == folder
    assert len(site.hits) == hits


def test_the_cache_is_that_of_the_hubs_own_client(site: FileServer, tmp_path: pathlib.Path) -> None:
    source.fetch("hf:tiny/folder")
    cache = tmp_path / "hf" / "hub"
    for file, data in FOLDER.items():
        found = huggingface_hub.try_to_load_from_cache("tiny/folder", file, cache_dir=cache)
        assert isinstance(found, str)
        assert pathlib.Path(found).read_bytes() == data
    info = huggingface_hub.scan_cache_dir(cache)
    assert not info.warnings
    assert [repository.repo_id for repository in info.repos] == ["tiny/folder"]


def test_a_cut_download_goes_on_where_it_was_cut(site: FileServer, tmp_path: pathlib.Path) -> None:
    site.cut_after = [100_000, 1000, 500]
    assert source.fetch("hf:tiny/model:Q4_K_M").read_bytes() == WEIGHTS
    last = len(WEIGHTS) - 1
    assert site.ranges == [f"bytes=0-{last}", f"bytes=1000-{last}", f"bytes=1500-{last}"]


def test_a_later_load_goes_on_too(site: FileServer, tmp_path: pathlib.Path) -> None:
    site.cut_after = [100_000, 1000, *[0] * download.MAX_ATTEMPTS]
    with pytest.raises(SourceUnavailableError, match="ended at 1000 of"):
        source.fetch("hf:tiny/model:Q4_K_M")
    assert [name.rpartition(".")[2] for name in cached(tmp_path)] == ["incomplete"]
    site.cut_after, site.ranges = [], []
    assert source.fetch("hf:tiny/model:Q4_K_M").read_bytes() == WEIGHTS
    assert site.ranges == [f"bytes=1000-{len(WEIGHTS) - 1}"]
    assert cached(tmp_path) == {hashlib.sha256(WEIGHTS).hexdigest()}


def test_a_beginning_of_other_bytes_is_thrown_away(site: FileServer, tmp_path: pathlib.Path) -> None:
    partial = tmp_path / "hf/hub/models--tiny--model/blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"
    partial.parent.mkdir(parents=True)
    for beginning in (b"other", b"x" * len(WEIGHTS), b"x" * (len(WEIGHTS) + 1)):
        partial.write_bytes(beginning)
        path = source.fetch("hf:tiny/model:Q4_K_M")
        assert path.read_bytes() == WEIGHTS
        path.resolve().unlink()


def test_a_server_without_ranges(site: FileServer) -> None:
    site.has_ranges = False
    site.cut_after = [100_000, 1000]
    assert source.fetch("hf:tiny/model:Q4_K_M").read_bytes() == WEIGHTS


def test_a_large_file_comes_in_several_answers(site: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RANGE_BYTES", 5000)
    assert source.fetch("hf:tiny/model:Q4_K_M").read_bytes() == WEIGHTS
    assert len(site.ranges) == -(-len(WEIGHTS) // 5000)


@pytest.mark.parametrize("path", [GGUF, f"/tiny/folder/resolve/{COMMIT}/config.json"], ids=["sha256", "git"])
def test_other_bytes_than_the_listings_leave_nothing(site: FileServer, tmp_path: pathlib.Path, path: str) -> None:
    data, wanted = site.files[path], "hf:tiny/model:Q4_K_M" if path == GGUF else "hf:tiny/folder"
    site.files[path] = data[:-1] + b"?"
    with pytest.raises(HashMismatchError):
        source.fetch(wanted)
    assert not list(tmp_path.glob("hf/hub/*/blobs/*.incomplete"))
    assert not list(tmp_path.glob(f"hf/hub/*/snapshots/*/{path.rpartition('/')[2]}"))
    site.files[path] = data
    source.fetch(wanted)


def test_a_wrong_length(site: FileServer, tmp_path: pathlib.Path) -> None:
    site.has_ranges = False
    site.files[GGUF] = WEIGHTS + b"more"
    with pytest.raises(HashMismatchError, match=str(len(WEIGHTS) + 4)):
        source.fetch("hf:tiny/model:Q4_K_M")
    site.has_ranges, site.files[GGUF] = True, WEIGHTS[:-4]
    with pytest.raises(SourceUnavailableError, match="another part"):
        source.fetch("hf:tiny/model:Q4_K_M")


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_body_that_does_not_end(site: FileServer, has_ranges: bool) -> None:
    site.has_length, site.has_ranges = False, has_ranges
    site.bodies[GGUF] = WEIGHTS * 1000
    assert source.fetch("hf:tiny/model:Q4_K_M").read_bytes() == WEIGHTS, "no more is read than the listing says"


def test_a_listing_that_does_not_end(site: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_LISTING_BYTES", 1000)
    site.files[LISTING] = b"[" * 100_000
    with pytest.raises(SourceUnavailableError, match="longer than 1000"):
        source.fetch("hf:tiny/model:Q4_K_M")


def test_a_server_that_falls_silent(site: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(download, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(download, "MAX_ATTEMPTS", 2)
    monkeypatch.setattr("http.server.BaseHTTPRequestHandler.send_response", lambda *args: release.wait(5))
    try:
        with pytest.raises(SourceUnavailableError, match="timed out"):
            source.fetch("hf:tiny/model:Q4_K_M")
    finally:
        release.set()


def test_a_server_that_drips(site: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1_000_000, 61))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    site.cut_after = []
    with pytest.raises(SourceUnavailableError, match="bytes came in"):
        source.fetch("hf:tiny/model:Q4_K_M")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, SourceForbiddenError),
        (403, SourceForbiddenError),
        (404, SourceNotFoundError),
        (416, SourceUnavailableError),
        (429, SourceUnavailableError),
        (500, SourceUnavailableError),
        (503, SourceUnavailableError),
    ],
)
@pytest.mark.parametrize("path", [LISTING, GGUF], ids=["listing", "file"])
def test_statuses(site: FileServer, path: str, status: int, error: type[ApiError]) -> None:
    site.statuses[path] = [status] * 10
    with pytest.raises(error, match="tiny/model"):
        source.fetch("hf:tiny/model:Q4_K_M")
    assert len(site.hits) < 8
    site.statuses.clear()
    assert source.fetch("hf:tiny/model:Q4_K_M").read_bytes() == WEIGHTS


def test_a_busy_server_is_asked_again_when_it_says(site: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    site.statuses[LISTING], site.retry_after = [429, 503], "7"
    assert source.fetch("hf:tiny/model:Q4_K_M").read_bytes() == WEIGHTS
    assert waits == [7.0, 7.0]
    site.statuses[LISTING], site.retry_after = [429], "3600"
    with pytest.raises(SourceUnavailableError) as caught:
        source.fetch("hf:tiny/model:Q2_K")
    assert caught.value.retry_after_s == 3600


def test_a_token_goes_to_the_hub_and_not_to_its_cdn_nor_to_a_log(
    site: FileServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve_files() as cdn:
        cdn.files["/blob"] = WEIGHTS
        site.redirects[GGUF] = f"{cdn.address}/blob?signature=signed"
        assert source.fetch("hf:tiny/model:Q4_K_M").read_bytes() == WEIGHTS
        assert cdn.authorizations == [""]
        assert site.authorizations == ["Bearer hf_secret"] * 2
        cdn.statuses["/blob"] = [403] * 9
        site.redirects[GGUF.replace("Q4_K_M", "Q2_K")] = f"{cdn.address}/blob?signature=signed"
        with pytest.raises(SourceForbiddenError) as caught:
            source.fetch("hf:tiny/model:Q2_K")
    assert "secret" not in caught.value.message + caplog.text
    assert "signed" not in caught.value.message + caplog.text


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/tiny/model/loop"])
def test_redirects_that_are_not_followed(site: FileServer, target: str) -> None:
    site.redirects[GGUF] = target
    site.redirects["/tiny/model/loop"] = "/tiny/model/loop"
    with pytest.raises(SourceUnavailableError) as caught:
        source.fetch("hf:tiny/model:Q4_K_M")
    assert "passwd" not in caught.value.message


def test_a_token_that_is_none(site: FileServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("hf_secret\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    source.fetch("hf:tiny/model:Q4_K_M")
    assert set(site.authorizations) == {"Bearer hf_secret"}
    monkeypatch.setenv("HF_TOKEN", "hf_secret\nX-Injected: yes")
    with pytest.raises(InvalidSourceError) as caught:
        source.fetch("hf:tiny/model:Q2_K")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("name", ["../../escaped", "/etc/escaped", "a/../../escaped", "a//b", "", ".", "x/", "a\nb"])
def test_a_name_that_leads_out_of_the_folder(site: FileServer, tmp_path: pathlib.Path, name: str) -> None:
    info = json.loads(site.files[LISTING])
    info["siblings"].append(info["siblings"][0] | {"rfilename": f"{name}.gguf" if name[-1:].isalpha() else name})
    site.files[LISTING] = json.dumps(info).encode()
    with pytest.raises(SourceUnavailableError, match="listing"):
        source.fetch("hf:tiny/model:Q4_K_M")
    assert not list(tmp_path.rglob("*escaped*"))


LISTINGS = (
    b"",
    b"[]",
    b"{}",
    b'{"sha": "main", "siblings": []}',
    b"[" * 100_000,
    b"\xff",
    b'{"sha": 7, "siblings": 7}',
)


@pytest.mark.parametrize("listing", LISTINGS, ids=range(len(LISTINGS)))
def test_a_listing_that_is_none(site: FileServer, listing: bytes) -> None:
    site.files[LISTING] = listing
    with pytest.raises(SourceUnavailableError, match="listing"):
        source.fetch("hf:tiny/model:Q4_K_M")


def test_a_full_disk(site: FileServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(WEIGHTS) - 1))
        with pytest.raises(DiskFullError, match=f"needs {len(WEIGHTS) / 1e9:.2f} GB"):
            source.fetch("hf:tiny/model:Q4_K_M")
    opened = pathlib.Path.open

    def open_on_full_disk(path: pathlib.Path, mode: str = "r", **settings: Any) -> IO[Any]:
        if path.suffix == ".incomplete":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", open_on_full_disk)
        with pytest.raises(DiskFullError, match="no space left"):
            source.fetch("hf:tiny/model:Q4_K_M")
    assert source.fetch("hf:tiny/model:Q4_K_M").read_bytes() == WEIGHTS


def test_a_hub_that_is_down_or_not_to_be_asked(site: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceNotFoundError, match="no/model"):
        source.fetch("hf:no/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailableError, match="HF_HUB_OFFLINE"):
        source.fetch("hf:no/model")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailableError) as caught:
        source.fetch("hf:no/model")
    assert caught.value.status == 503


def test_two_loads_of_one_file_download_it_once(site: FileServer) -> None:
    threads = [threading.Thread(target=source.fetch, args=("hf:tiny/model:Q4_K_M",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.hits.count(f"GET {GGUF}") == 1


def test_a_published_hash_that_is_another_is_refused_before_the_download(site: FileServer) -> None:
    with pytest.raises(HashMismatchError):
        source.fetch("hf:tiny/model:Q4_K_M", sha256="0" * 64)
    assert site.hits == [f"GET {LISTING}"]
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    source.fetch("hf:tiny/model:Q4_K_M", sha256=digest)
    with pytest.raises(HashMismatchError):
        source.fetch("hf:tiny/model:Q4_K_M", sha256="0" * 64)


def test_a_report_that_raises_ends_the_download(site: FileServer) -> None:
    def report(done: int, total: int) -> None:
        raise SourceUnavailableError("ended")

    with pytest.raises(SourceUnavailableError, match="ended"):
        source.fetch("hf:tiny/model:Q4_K_M", report=report)
    assert source.fetch("hf:tiny/model:Q4_K_M").read_bytes() == WEIGHTS
