"""Hostile model files: each is refused with a typed error, soon, and in little memory."""

import dataclasses
import json
import os
import pathlib
import random
import resource
import struct
import tracemalloc
from collections.abc import Iterator

import pytest
from model_files import (
    CONFIG,
    GENERATION,
    GGUF_VALUES,
    HOSTILE,
    NUMBERS,
    QUANTISED,
    SOUND,
    check_bytes,
    check_config,
    check_weights,
    gguf_file,
    model_of,
    mutated,
    safetensors_file,
    string,
    with_field,
)

from cortex.wire.errors import ErrorInfo
from neuron.formats.registry import STORED_FORMATS
from neuron.models import packed
from neuron.models.gguf import TensorKind
from neuron.models.model import ModelConfig

KEPT = pathlib.Path(__file__).parents[2] / "fuzz" / "corpus" / "gguf"

MOST_BYTES = 400 << 20
"""Most memory of a reader: a header of the largest size, as Python objects."""


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Limit the memory of a reader."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def test_the_sound_files_are_sound(tmp_path: pathlib.Path) -> None:
    for config in SOUND:
        files = {"config.json": json.dumps(config).encode(), "generation_config.json": json.dumps(GENERATION).encode()}
        assert isinstance(check_bytes(files, tmp_path), ModelConfig)
    assert isinstance(check_bytes({"model.gguf": gguf_file()}, tmp_path), ModelConfig)
    for kind in (TensorKind.F32, *(TensorKind[name] for name in STORED_FORMATS), TensorKind.IQ1_S):
        assert isinstance(check_bytes({"model.gguf": gguf_file(kind)}, tmp_path, weights=True), ModelConfig)
    whole = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors_file()}
    assert isinstance(check_bytes(whole, tmp_path, weights=True), ModelConfig)


@pytest.mark.parametrize(("kind", "name"), [(99, "type 99"), (41, "Q1_0")])
def test_a_tensor_of_a_kind_that_cannot_be_read_is_named(tmp_path: pathlib.Path, kind: int, name: str) -> None:
    """Its header is read: the model is refused, not the tokenizer in the file."""
    old, whole = string(b"blk.0.attn_q.weight") + struct.pack("<IQQI", 2, 256, 8, 10), gguf_file(TensorKind.Q2_K)
    assert old in whole
    data = whole.replace(old, old[:-4] + struct.pack("<I", kind))
    found = check_bytes({"model.gguf": data}, tmp_path)
    assert isinstance(found, ErrorInfo)
    assert (found.code, f"blk.0.attn_q.weight is stored as {name}," in found.message) == (
        "unsupported_quantization",
        True,
    )


@pytest.mark.parametrize("path", sorted(KEPT.iterdir()), ids=lambda path: path.name)
def test_the_kept_files_of_the_fuzzer_are_read_or_refused(tmp_path: pathlib.Path, path: pathlib.Path) -> None:
    for weights in (False, True):
        check_bytes({"model.gguf": path.read_bytes()}, tmp_path, weights=weights)


def test_a_vector_in_blocks_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    old, whole = string(b"output_norm.weight") + struct.pack("<IQI", 1, 256, 0), gguf_file(TensorKind.Q4_K)
    assert old in whole
    data = whole.replace(old, old[:-4] + struct.pack("<I", TensorKind.Q4_K))
    found = check_bytes({"model.gguf": data}, tmp_path, weights=True)
    assert isinstance(found, ErrorInfo)
    assert (found.code, "output_norm.weight is a vector" in found.message) == ("corrupt_weights", True)


def test_rows_that_are_no_whole_groups_are_for_the_eager_path(tmp_path: pathlib.Path) -> None:
    config = model_of("llama", hidden_size=84, num_attention_heads=2, num_hidden_layers=1, vocab_size=32)
    assert packed.obstacle(config) is None
    kinds = dict.fromkeys(config.tensors(), TensorKind.Q8_0)
    found = packed.obstacle(dataclasses.replace(config, tensor_kinds=kinds))
    assert found == "llama is not for the kernels: quantised rows of 84 elements are no whole groups of 32"


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("gptq", ("quant_method", "bits", "sym", "desc_act", "checkpoint_format")),
        ("fp8", ("weight_block_size", "config_groups")),
    ],
)
def test_any_field_of_a_quantisation_may_hold_anything(
    tmp_path: pathlib.Path, method: str, fields: tuple[str, ...]
) -> None:
    own = {**QUANTISED["quantization_config"], "quant_method": method}
    weights = safetensors_file(method)

    def check(value: str) -> ModelConfig | ErrorInfo:
        config = with_field(CONFIG, "quantization_config", value)
        return check_bytes({"config.json": config, "model.safetensors": weights}, tmp_path, weights=True)

    assert isinstance(check(json.dumps(own)), ModelConfig)
    for value in HOSTILE:
        check(value)
        for name in fields:
            check(with_field(own, name, value).decode())


@pytest.mark.parametrize("config", SOUND, ids=lambda config: config["model_type"])
def test_any_field_of_a_configuration_may_hold_anything(tmp_path: pathlib.Path, config: dict[str, object]) -> None:
    refused = 0
    for name in config:
        for value in HOSTILE:
            refused += isinstance(check_bytes({"config.json": with_field(config, name, value)}, tmp_path), ErrorInfo)
    assert refused > len(config) * len(HOSTILE) // 2


def test_any_default_of_sampling_may_hold_anything(tmp_path: pathlib.Path) -> None:
    sound = json.dumps(CONFIG).encode()
    for name in GENERATION:
        for value in HOSTILE:
            check_bytes({"config.json": sound, "generation_config.json": with_field(GENERATION, name, value)}, tmp_path)


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "1_Pooling/config.json", "model.safetensors.index.json"]
)
def test_a_file_without_an_end_is_not_waited_for(tmp_path: pathlib.Path, file: str) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(safetensors_file())
    path = tmp_path / file
    for make in (
        os.mkfifo,
        lambda where: where.symlink_to("/dev/zero"),
        lambda where: where.symlink_to(where),
        lambda where: where.mkdir(),
        lambda where: os.truncate(os.open(where, os.O_CREAT | os.O_WRONLY), 1 << 40),
        lambda where: where.write_text("[" * 1_000_000),
        lambda where: where.write_text('{"eos_token_id": "' + "x" * (3 << 20) + '"}'),
    ):
        path.unlink(missing_ok=True)
        make(path)
        refusal = check_weights(tmp_path)
        if isinstance(refusal, ModelConfig):
            assert file == "1_Pooling/config.json", "only what is not needed may be of no use"
        if path.is_dir():
            path.rmdir()


def test_a_name_leads_nowhere_else(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b.safetensors", 7, None, ["x"]):
        index = {"weight_map": {"model.norm.weight": name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert isinstance(check_weights(tmp_path), ErrorInfo)
    for index in ({}, {"weight_map": []}, {"weight_map": None}, {"weight_map": {}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert isinstance(check_weights(tmp_path), ErrorInfo)


def test_an_index_of_many_tensors_is_read_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(40_000)}
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(header, "a.safetensors")})
    )
    refusal = check_weights(tmp_path)
    assert isinstance(refusal, ErrorInfo)
    assert "lacks" in refusal.message


@pytest.mark.parametrize("length", NUMBERS)
def test_a_header_of_any_length(tmp_path: pathlib.Path, length: int) -> None:
    data = struct.pack("<Q", length) + safetensors_file()[8:]
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": data}
    assert isinstance(check_bytes(files, tmp_path, weights=True), ErrorInfo)
    files["model.safetensors"] = b""
    assert isinstance(check_bytes(files, tmp_path, weights=True), ErrorInfo)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        (b'"F32"', b'"I32"'),
        (b'"F32"', b'"F99"'),
        (b'"F32"', b"7"),
        (b"[16, 8]", b"[8, 16]"),
        (b"[16, 8]", b"[-1, 8]"),
        (b"[16, 8]", b"[9223372036854775807, 9223372036854775807]"),
        (b"[16, 8]", b"[" + b"1," * 2000 + b"128]"),
        (b"[0, 512]", b"[512, 0]"),
        (b"[0, 512]", b"[0, 99999999]"),
        (b"[0, 512]", b"[18446744073709551615, 512]"),
        (b"[512, 544]", b"[0, 32]"),
        (b"model.norm.weight", b"model.embed_tokens.weight"),
        (b"model.norm.weight", b"model.norm.weight\\ud800"),
    ],
)
def test_a_safetensors_header_that_lies(tmp_path: pathlib.Path, was: bytes, becomes: bytes) -> None:
    data = safetensors_file()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length]
    assert was in header
    header = header.replace(was, becomes, 1)
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": struct.pack("<Q", len(header)) + header + data[8 + length :],
    }
    assert isinstance(check_bytes(files, tmp_path, weights=True), ErrorInfo)


@pytest.mark.parametrize("key", [key for key, _ in GGUF_VALUES], ids=lambda key: key.decode())
def test_any_value_of_a_gguf_may_be_anything(tmp_path: pathlib.Path, key: bytes) -> None:
    nested = struct.pack("<IIQ", 9, 9, 1) * 1000
    values = [
        *(struct.pack("<IQ", 10, number) for number in NUMBERS),
        *(struct.pack("<If", 6, number) for number in (0.0, -1.0, float("nan"), float("inf"), 1e-38, 3e38)),
        struct.pack("<IB", 7, 1),
        struct.pack("<I", 8) + string(b""),
        struct.pack("<I", 8) + string(b"../../etc/passwd"),
        struct.pack("<I", 8) + struct.pack("<Q", 3) + b"\xff\xfe\xfd",
        struct.pack("<I", 8) + string(b"x" * 100_000),
        struct.pack("<IIQ", 9, 4, 3) + struct.pack("<3I", 1, 2, 3),
        struct.pack("<IIQ", 9, 4, 300) + struct.pack("<300I", *range(300)),
        struct.pack("<IIQ", 9, 8, 0),
        struct.pack("<I", 77),
        nested,
    ]
    whole = gguf_file()
    old = next(value for name, value in GGUF_VALUES if name == key)
    at = whole.index(string(key)) + len(string(key))
    for value in values:
        check_bytes({"model.gguf": whole[:at] + value + whole[at + len(old) :]}, tmp_path, weights=True)


def test_no_count_in_a_gguf_is_believed(tmp_path: pathlib.Path) -> None:
    """Memory is bounded by the file's own bytes, also where its counts are larger, and where it is sparse."""
    whole, path = gguf_file(), tmp_path / "sparse.gguf"
    tracemalloc.start()
    for at in range(8, 24, 8):
        for number in NUMBERS:
            path.write_bytes(whole[:at] + struct.pack("<Q", number) + whole[at + 8 :])
            os.truncate(path, 1 << 40)
            assert number < 20 or isinstance(check_config(path), ErrorInfo)
    most = 1 << 21
    for kind, count in [(8, most), *((kind, count) for kind in (0, 4, 7, 8, 10) for count in (most + 1, 1 << 40))]:
        value = string(b"k") + struct.pack("<IIQ", 9, kind, count)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value)
        os.truncate(path, 1 << 40)
        assert isinstance(check_config(path), ErrorInfo)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 60_000))
    os.truncate(path, 1 << 40)
    assert isinstance(check_config(path), ErrorInfo)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MOST_BYTES


def test_factors_of_a_rotary_embedding_are_as_many_as_a_head_has(tmp_path: pathlib.Path) -> None:
    whole, path = gguf_file(), tmp_path / "sparse.gguf"
    name = string(b"rope_freqs.weight")
    at = whole.index(name) + len(name) + 4
    path.write_bytes(whole[:at] + struct.pack("<Q", 1 << 36) + whole[at + 8 :])
    os.truncate(path, 1 << 40)
    refusal = check_config(path)
    assert isinstance(refusal, ErrorInfo)
    assert "rope_freqs" in refusal.message


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere(tmp_path: pathlib.Path, seed: int) -> None:
    rng = random.Random(seed)
    sound = json.dumps(CONFIG).encode()
    for _ in range(100):
        check_bytes({"model.gguf": mutated(gguf_file(), rng)}, tmp_path, weights=True)
        check_bytes(
            {"config.json": sound, "model.safetensors": mutated(safetensors_file(), rng)}, tmp_path, weights=True
        )
        check_bytes(
            {"config.json": mutated(sound, rng), "model.safetensors": safetensors_file()}, tmp_path, weights=True
        )
        quantised = {"config.json": json.dumps(QUANTISED).encode(), "model.safetensors": safetensors_file("gptq")}
        name = rng.choice(list(quantised))
        check_bytes(quantised | {name: mutated(quantised[name], rng)}, tmp_path, weights=True)
