"""Models in several GGUF files: read as one, and refused where their parts are not those of one model."""

import os
import pathlib
import re
import struct

import gguf
import pytest
import torch
from model_files import string

from neuron.models.config import read_config
from neuron.models.errors import CorruptWeightsError
from neuron.models.gguf_parts import read_parts

from .test_weights import export_gguf, read_all


def test_a_model_in_parts_is_the_same_model(tiny_llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """As the library's writer splits it."""
    whole = tmp_path / "whole.gguf"
    export_gguf(tiny_llama, whole, gguf.GGMLQuantizationType.F16)
    export_gguf(tiny_llama, tmp_path / "model.gguf", gguf.GGMLQuantizationType.F16, tensors_of_part=9)
    first, *others = sorted(tmp_path.glob("model-*.gguf"))
    assert len(others) >= 2
    assert read_config(first) == read_config(whole)
    expected = read_all(whole)
    for name, tensor in read_all(first).items():
        assert torch.equal(tensor, expected[name])
    with pytest.raises(CorruptWeightsError, match="is no first part of"):
        read_config(others[0])


def part(
    number: object = 0, count: object = 3, total: object = 3, names: tuple[str, ...] = (), architecture: str = "llama"
) -> bytes:
    """Return a file of vectors of one float32 each; a number that is a string is one in the metadata."""

    def value(given: object) -> bytes:
        if isinstance(given, str):
            return struct.pack("<I", 8) + string(given.encode())
        return struct.pack("<Iq", 11, given)

    values = {
        "general.architecture": value(architecture), "split.no": value(number), "split.count": value(count),
        "split.tensors.count": value(total),
    }  # fmt: skip
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), len(values))
    head += b"".join(string(key.encode()) + value for key, value in values.items())
    for position, name in enumerate(names):
        head += string(name.encode()) + struct.pack("<IQIQ", 1, 1, 0, 32 * position)
    return head + bytes(-len(head) % 32) + bytes(32 * len(names))


SOUND = [part(0, names=("a",)), part(1, names=("b",)), part(2, names=("c",))]


def written(folder: pathlib.Path, parts: list[bytes | None], stem: str = "model") -> pathlib.Path:
    for number, data in enumerate(parts, start=1):
        if data is not None:
            (folder / f"{stem}-{number:05}-of-{len(parts):05}.gguf").write_bytes(data)
    return folder / f"{stem}-00001-of-{len(parts):05}.gguf"


def with_part(number: int, data: bytes | None) -> list[bytes | None]:
    return [data if number == at else sound for at, sound in enumerate(SOUND)]


@pytest.mark.parametrize(
    ("parts", "file", "reason"),
    [
        (with_part(1, None), 1, "lacks model-00002-of-00003.gguf in its folder"),
        ([SOUND[0], None, None], 1, "lacks model-00002-of-00003.gguf, model-00003-of-00003.gguf in"),
        (with_part(1, SOUND[2]), 2, "split.no is 2, not 1"),
        (with_part(2, part(2, total=4, names=("c",))), 3, "split.tensors.count is 4, in the first part 3"),
        (with_part(2, part(2, count=4, names=("c",))), 3, "split.count is 4, in the first part 3"),
        (with_part(2, part(2, names=("c",), architecture="qwen3")), 3, "general.architecture is 'qwen3', in the first"),
        (with_part(2, part(2, names=("a",))), 3, "has 'a', as model-00001-of-00003.gguf has"),
        (with_part(2, part(2, names=("c", "d"))), 1, "split.tensors.count is 3, but its parts have 4"),
        (with_part(2, part(2)), 1, "split.tensors.count is 3, but its parts have 2"),
        (with_part(2, SOUND[2][:-30]), 3, "ends at byte"),
        (with_part(2, b"GGUF"), 3, "too few"),
        (with_part(0, SOUND[1]), 1, "split.no is 1, not 0"),
        (with_part(0, part(0, count=2, total=1, names=("a",))), 1, "is no first part of 2"),
        (with_part(0, part(0, count=1 << 40, names=("a",))), 1, "split.count is 1099511627776, not a number from 1 to"),
        (with_part(0, part(0, count=-1, names=("a",))), 1, "split.count is -1"),
        (with_part(0, part(0, count="../x", names=("a",))), 1, "split.count is '../x'"),
        (with_part(0, part(0, total="3", names=("a",))), 1, "split.tensors.count is '3'"),
        (with_part(0, part(0, total=1 << 40, names=("a",))), 1, "split.tensors.count is 1099511627776"),
    ],
)
def test_parts_that_are_not_of_one_model_are_refused(
    tmp_path: pathlib.Path, parts: list[bytes | None], file: int, reason: str
) -> None:
    first = written(tmp_path, parts)
    with pytest.raises(CorruptWeightsError, match=re.escape(reason)) as caught:
        read_parts(first)
    assert f"model-{file:05}-of-" in caught.value.message


def test_parts_are_of_the_folder_and_name_of_the_first(tmp_path: pathlib.Path) -> None:
    """A link to the first part, as caches of downloads have them, does not lead to another folder."""
    blobs, names = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    names.mkdir()
    for number, data in enumerate(SOUND):
        (blobs / f"{number}").write_bytes(data)
        (names / f"a b-{number + 1:05}-of-00003.gguf").symlink_to(blobs / f"{number}")
    header = read_parts(names / "a b-00001-of-00003.gguf")
    assert [(tensor.name, tensor.file.parent) for tensor in header.tensors] == [(name, names) for name in "abc"]
    renamed = names / "whole.gguf"
    renamed.symlink_to(blobs / "0")
    with pytest.raises(CorruptWeightsError, match=re.escape("does not end with -00001-of-00003.gguf")):
        read_parts(renamed)


def test_a_part_that_is_a_pipe_is_not_waited_for(tmp_path: pathlib.Path) -> None:
    first = written(tmp_path, with_part(1, None))
    os.mkfifo(tmp_path / "model-00002-of-00003.gguf")
    with pytest.raises(CorruptWeightsError, match="not a file"):
        read_parts(first)
