"""The GGUF header reader: against the ``gguf`` library's writer and reader, and against damage."""

import pathlib
import struct

import gguf
import numpy as np
import pytest
from gguf_blocks import random_blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuron.models.errors import CorruptWeightsError
from neuron.models.gguf import UNREADABLE, TensorKind, read_header


def write_sample(path: pathlib.Path, alignment: int = 32) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "Ġ", "été", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_int64("an.int64", -5)
    writer.add_float64("a.double", 2.5)
    writer.add_tensor("token_embd.weight", np.arange(24, dtype=np.float32).reshape(4, 6))
    blocks = gguf.quants.quantize(
        np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    write_sample(path)
    return path


def test_block_sizes_equal_the_library() -> None:
    for kind in TensorKind:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.block, kind.block_bytes)
        assert gguf.GGMLQuantizationType[kind.name] == kind


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_a_written_file_is_read_back(tmp_path: pathlib.Path, alignment: int) -> None:
    path = tmp_path / "a.gguf"
    write_sample(path, alignment)
    header = read_header(path)
    assert header.version == 3
    assert header.metadata["general.alignment"] == alignment
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    assert header.metadata["tokenizer.ggml.tokens"] == ["<s>", "Ġ", "été", ""]
    assert header.metadata["tokenizer.ggml.scores"] == [0.5, -1.0]
    assert header.metadata["an.int64"] == -5
    assert header.metadata["a.double"] == 2.5
    embedding, query = header.tensors
    assert (embedding.name, embedding.shape, embedding.kind) == ("token_embd.weight", (4, 6), TensorKind.F32)
    assert (query.shape, query.kind, query.nbytes) == ((2, 64), TensorKind.Q8_0, 2 * 2 * 34)
    data = path.read_bytes()
    assert np.frombuffer(data[embedding.offset :][: embedding.nbytes], np.float32).tolist() == list(range(24))
    for tensor in header.tensors:
        assert tensor.offset % alignment == 0


def test_the_real_model_reads_as_the_library_reads_it(smollm2_gguf: pathlib.Path) -> None:
    header = read_header(smollm2_gguf)
    library = gguf.GGUFReader(smollm2_gguf)
    assert [(t.name, t.shape, t.kind, t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, tuple(map(int, t.shape[::-1])), t.tensor_type, int(t.data_offset), t.n_bytes) for t in library.tensors
    ]
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152
    for key, value in header.metadata.items():
        if not isinstance(value, list):
            assert library.fields[key].contents() == value


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def file_of(
    *, version: int = 3, values: bytes = b"", num_values: int = 0, tensors: bytes = b"", num_tensors: int = 0
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values)
    return (head + values + tensors).ljust(64, b"\0")


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_an_unknown_kind_leaves_the_rest_readable(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "newer.gguf"
    path.write_bytes(file_of(num_tensors=2, tensors=tensor(b"t", (5, 3), kind=77) + tensor(b"u", (4,))) + bytes(128))
    newer, known = read_header(path).tensors
    assert (newer.kind, newer.shape, newer.nbytes) == (77, (3, 5), 0)
    assert (known.kind, known.nbytes) == (TensorKind.F32, 16)


@pytest.mark.parametrize("kind", TensorKind, ids=lambda kind: kind.name)
def test_kinds_are_those_that_the_library_reads(kind: TensorKind) -> None:
    library = gguf.GGMLQuantizationType(kind)
    if kind in UNREADABLE:
        with pytest.raises(NotImplementedError):
            gguf.quants.dequantize(random_blocks(library, 2), library)
    else:
        assert np.isfinite(gguf.quants.dequantize(np.zeros((1, kind.block_bytes), np.uint8), library)).all()


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too few"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (file_of(version=1), "version 1"),
        (file_of(version=3 << 24), "little-endian"),
        (file_of(num_tensors=HUGE), "cannot be in"),
        (file_of(num_values=HUGE), "cannot be in"),
        (file_of(num_values=1, values=struct.pack("<Q", HUGE) + b"key"), "metadata key at byte"),
        (file_of(num_values=1, values=string(b"\xff") + struct.pack("<II", 4, 1)), "not UTF-8"),
        (file_of(num_values=1, values=string(b"k") + struct.pack("<I", 77)), "unknown type 77"),
        (file_of(num_values=1, values=string(b"k") + struct.pack("<IIQ", 9, 8, 9)), "strings of 'k'"),
        (file_of(num_values=1, values=string(b"k") + struct.pack("<IIQ", 9, 8, HUGE)), "more than any model"),
        (file_of(num_values=1, values=string(b"k") + struct.pack("<IIQ", 9, 6, 1 << 40)), "more than any model"),
        (file_of(num_values=1, values=string(b"k") + struct.pack("<IIQQ", 9, 8, 1, HUGE)), "a string of 'k'"),
        (file_of(num_values=1, values=string(b"k") + struct.pack("<IIQ", 9, 6, 1 << 20)), "k at byte"),
        (file_of(num_values=1, values=string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "nested type 9"),
        (file_of(num_values=2, values=2 * (string(b"k") + struct.pack("<II", 4, 1))), "appears twice"),
        (file_of(num_values=1, values=string(b"general.alignment") + struct.pack("<II", 4, 3)), "power of two"),
        (file_of(num_tensors=1, tensors=tensor(b"t", ())), "0 dimensions"),
        (file_of(num_tensors=1, tensors=tensor(b"t", (1,) * 5)), "5 dimensions"),
        (file_of(num_tensors=1, tensors=tensor(b"t", (31,), kind=8)), "impossible shape"),
        (file_of(num_tensors=1, tensors=tensor(b"t", (0,))), "impossible shape"),
        (file_of(num_tensors=1, tensors=tensor(b"t", (4,), offset=8)), "not aligned"),
        (file_of(num_tensors=1, tensors=tensor(b"t", (HUGE, HUGE))), "ends at byte"),
        (file_of(num_tensors=2, tensors=2 * tensor(b"t", (1,))) + bytes(64), "appears twice"),
        (file_of(num_tensors=2, tensors=tensor(b"t", (9,)) + tensor(b"u", (1,), offset=32)) + bytes(99), "overlap"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: pathlib.Path, data: bytes, reason: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(CorruptWeightsError, match=reason) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert caught.value.info().status == 422
    assert caught.value.info().code == "corrupt_weights"


def test_every_truncation_is_an_error(sample: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = sample.read_bytes()
    header = read_header(sample)
    needed = max(tensor.offset + tensor.nbytes for tensor in header.tensors)
    path = tmp_path / "cut.gguf"
    for length in range(needed):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptWeightsError):
            read_header(path)


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 900),
            st.sampled_from([b"\0", b"\xff", b"\x01", b"\x09", b"\x08", b"\xff" * 8, bytes(8)])
            | st.binary(min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=4,
    ),
    cut=st.none() | st.integers(0, 900),
)  # fmt: skip
def test_a_fuzzed_header_is_read_or_refused(
    sample: pathlib.Path, tmp_path: pathlib.Path, edits: list[tuple[int, bytes]], cut: int | None
) -> None:
    data = bytearray(sample.read_bytes())
    for position, replacement in edits:
        data[position : position + len(replacement)] = replacement
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(bytes(data[:cut]))
    try:
        header = read_header(path)
    except CorruptWeightsError:
        return
    for tensor in header.tensors:
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)
