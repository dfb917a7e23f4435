"""Quantised weights on a device: the file's numbers, the planned bytes, and a rank's part of both."""

import contextlib
import dataclasses
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from cortex.wire.errors import ApiError, InvalidRequestError
from cortex.wire.node import ModelSpec
from neuron.formats import SUPER_BLOCK
from neuron.formats.matrix import Matrix, QuantizedMatrix, StackedMatrix
from neuron.formats.registry import STORED_FORMATS
from neuron.layers.cache import PagedKV
from neuron.layers.parameters import Matrix as MatrixParameter
from neuron.layers.shard import WHOLE, Shard
from neuron.layers.step import Linear, OverRanks
from neuron.models import decoder, quantization
from neuron.models.errors import UnsupportedQuantizationError
from neuron.models.gguf import TensorKind
from neuron.models.model import ModelConfig
from neuron.models.parameter_reader import ParameterReader
from neuron.models.sizing import plan_memory
from neuron.models.transfer import Transfer
from neuron.models.weights import WeightSource, open_weights
from neuron.triton_kernels.attention import attention_parts
from neuron.triton_kernels.operations import EAGER
from neuron.triton_kernels.random_batch import random_batch

from .test_weights import export_gguf

HOST = torch.device("cpu")
WIDE: dict[str, Any] = {
    "kind": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 32,
    "num_attention_heads": 4,
}


def loaded(source: WeightSource, **options: Any) -> decoder.DecoderWeights:
    loading = decoder.load_decoder(source, torch.float32, HOST, **options)
    while True:
        try:
            next(loading)
        except StopIteration as finished:
            weights: decoder.DecoderWeights = finished.value
            return weights


def matrices(weights: decoder.DecoderWeights) -> Iterator[Matrix]:
    for layer in (weights.embedding, *weights.layers, weights.head):
        yield from (loaded.weight for loaded in layer.values() if isinstance(loaded, Linear))


def dense(matrix: Matrix) -> torch.Tensor:
    match matrix:
        case torch.Tensor():
            return matrix.view(-1, matrix.shape[-1])
        case QuantizedMatrix():
            return matrix.dequantize()
        case StackedMatrix():
            return torch.cat([dense(part) for part in matrix.parts])


def allocated(weights: decoder.DecoderWeights) -> int:
    """The bytes of every array, each once however many views there are of it."""
    found: dict[int, int] = {}
    pending: list[Any] = [weights]
    while pending:
        match pending.pop():
            case torch.Tensor() as tensor:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            case tuple() as several:
                pending += several
            case dict() as named:
                pending += named.values()
            case thing if dataclasses.is_dataclass(thing):
                pending += [getattr(thing, field.name) for field in dataclasses.fields(thing)]
    return sum(found.values())


def run(
    weights: decoder.DecoderWeights, config: ModelConfig, sum_ranks: OverRanks | None = None, shard: Shard = WHOLE
) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt and three decodes: the last hidden states and their logits."""
    generator = torch.Generator().manual_seed(1)
    batch, pages = random_batch([(1, 20), (1, 3), (9, 30)], HOST)
    arrays = (batch.cu_seqlens.numpy(), batch.page_table.numpy(), batch.context_lens.numpy())
    window = max(cache.window_tokens for cache in config.caches() if isinstance(cache, PagedKV))
    parts = attention_parts(*arrays, 16, HOST, window)
    slots = torch.tensor([3, 1, 2], dtype=torch.int32)
    batch = dataclasses.replace(batch, parts=parts, num_decodes=2, state_slots=slots)
    num_pages, make = [pages] * len(config.caches()), lambda shape, dtype: torch.zeros(shape, dtype=dtype)
    caches = decoder.new_caches(config, num_pages, 4, torch.float32, make, shard).layers
    ids = torch.randint(config.vocab_size, (11,), generator=generator)
    forward = decoder.Decoder(config, weights, EAGER, sum_ranks)
    hidden = forward.hidden(ids, [batch] * len(caches), caches)
    return hidden, forward.logits(hidden)


@pytest.fixture
def gguf_of(make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    def make(stored: str, **changes: Any) -> pathlib.Path:
        path = tmp_path / f"{stored}.gguf"
        export_gguf(make_checkpoint(**WIDE | changes), path, gguf.GGMLQuantizationType[stored])
        return path

    return make


@pytest.mark.parametrize("kind", STORED_FORMATS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_blocks_are_kept_and_mean_the_same(gguf_of: Callable[..., pathlib.Path], kind: str, architecture: str) -> None:
    width = {"hidden_size": 256, "intermediate_size": 256} if STORED_FORMATS[kind].block == SUPER_BLOCK else {}
    source = open_weights(gguf_of(kind, kind=architecture, num_hidden_layers=2, head_dim=64, **width))
    kept, plain = loaded(source, quant=quantization.STORED), loaded(source)
    for matrix, expected in zip(matrices(kept), matrices(plain), strict=True):
        assert isinstance(matrix, QuantizedMatrix)
        torch.testing.assert_close(dense(matrix), dense(expected), rtol=1e-6, atol=1e-7)
    for found, expected in zip(run(kept, source.config), run(plain, source.config), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    source.close()


def test_a_number_beside_a_tensor_of_nvfp4_multiplies_it(
    make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    experts = {"kind": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    folder, kind = make_checkpoint(**WIDE | experts), gguf.GGMLQuantizationType.NVFP4
    scales = {
        "blk.0.attn_q.scale": np.array([3], np.float32),
        "blk.0.ffn_gate_exps.scale": np.array([1, 2, 5], np.float32),
    }
    sources = []
    for name, extra in (("scaled", scales), ("plain", {})):
        export_gguf(folder, tmp_path / f"{name}.gguf", kind, extra)
        sources.append(open_weights(tmp_path / f"{name}.gguf"))
    for quant in (quantization.NONE, quantization.STORED):
        scaled, plain = (loaded(source, quant=quant) for source in sources)
        rows = torch.ones(8 * 32, 1)
        rows[:128] = 3
        torch.testing.assert_close(dense(scaled.layers[0]["qkv"].weight), rows * dense(plain.layers[0]["qkv"].weight))
        rows = torch.ones(3, 2, 64, 1)
        rows[1, 0], rows[2, 0] = 2, 5
        expected = rows.view(-1, 1) * dense(plain.layers[1]["gate_up"].weight)
        torch.testing.assert_close(dense(scaled.layers[1]["gate_up"].weight), expected)
    for source in sources:
        source.close()


class RecordingTransfer(Transfer):
    """Recorder of copies."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.copied: list[tuple[torch.dtype, int]] = []

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        self.copied.append((source.dtype, source.nbytes))
        super().copy(source, destination)


def up_projection(source: WeightSource, shard: Shard = WHOLE) -> MatrixParameter:
    parameter = list(source.config.parameters(shard))[2]["gate_up"]
    assert isinstance(parameter, MatrixParameter)
    return MatrixParameter(parameter.tensors[1:])


@pytest.mark.parametrize("shard", [WHOLE, Shard(1, 2)])
def test_blocks_are_copied_as_the_file_has_them(gguf_of: Callable[..., pathlib.Path], shard: Shard) -> None:
    """Blocks are converted on the device: a host takes ten times as long as the copy over the bus."""
    source = open_weights(gguf_of("Q4_0"))
    reader = ParameterReader(source, torch.float32, HOST, quantization.STORED)
    reader._transfer = recorder = RecordingTransfer(HOST)
    assert reader._matrix(up_projection(source, shard)).shape == (192 // shard.size, 128)
    assert recorder.copied == [(torch.uint8, 192 // shard.size * 128 // 32 * 18)]
    source.close()


@pytest.mark.parametrize(
    ("stored", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_floats_are_copied_as_the_file_has_them(
    gguf_of: Callable[..., pathlib.Path], stored: str, dtype: torch.dtype
) -> None:
    source, recorder = open_weights(gguf_of(stored)), RecordingTransfer(HOST)
    part = torch.empty((100, 60))
    source.read_into(
        "model.layers.0.mlp.up_proj.weight", part, transfer=recorder, first_row=70, columns=(range(40, 100),)
    )
    assert recorder.copied == [(dtype, 100 * 60 * dtype.itemsize)]
    whole = torch.empty((192, 128))
    source.read_into("model.layers.0.mlp.up_proj.weight", whole)
    assert torch.equal(part, whole[70:170, 40:100])
    source.close()


def test_an_error_while_blocks_are_read_is_reported(gguf_of: Callable[..., pathlib.Path]) -> None:
    """The exception holds a view of the mapping, which can be closed only after it is gone."""
    source = open_weights(gguf_of("Q4_0"))
    reader = ParameterReader(source, torch.float32, HOST, quantization.STORED)

    class Full(Transfer):
        def copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("no memory")

    reader._transfer = Full(HOST)
    with pytest.raises(torch.OutOfMemoryError), contextlib.closing(source):
        reader._matrix(up_projection(source))


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama", "attention_bias": True},
    "llama-tied": {"kind": "llama", "tie_word_embeddings": True},
    "qwen2": {"kind": "qwen2"},
    "qwen3": {"kind": "qwen3"},
    "qwen3-moe": {
        "kind": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "gemma3": {"kind": "gemma3", "sliding_window": 20, "sliding_window_pattern": 3, "final_logit_softcapping": 5.0},
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 2])
def test_the_plan_counts_every_byte(
    make_checkpoint: Callable[..., pathlib.Path], gguf_of: Callable[..., pathlib.Path], architecture: str, size: int
) -> None:
    changes = WIDE | ARCHITECTURES[architecture]
    paths = {
        make_checkpoint(**changes): ("none", "int8", "int4", "fp8"),
        gguf_of("Q8_0", **changes): ("none", "stored"),
    }
    for path, quants in paths.items():
        source = open_weights(path)
        for quant in quants:
            for rank in range(size):
                shard = Shard(rank, size)
                weights = loaded(source, quant=quant, shard=shard)
                assert allocated(weights) == quantization.weights_bytes(source.config, "float32", quant, shard)
                del weights
        source.close()


def check_ranks(source: WeightSource, quant: str, size: int) -> None:
    """Run the parts of a model on threads that add up as a collective does, and compare with the whole of it."""
    hidden, logits = run(loaded(source, quant=quant), source.config)
    barrier, given, results = threading.Barrier(size, timeout=30), [hidden] * size, [(hidden, logits)] * size

    def work(rank: int) -> None:
        def sum_ranks(x: torch.Tensor) -> torch.Tensor:
            given[rank] = x
            barrier.wait()
            total = torch.stack(given).sum(0)
            barrier.wait()
            return total

        shard = Shard(rank, size)
        weights = loaded(source, quant=quant, shard=shard)
        assert allocated(weights) == quantization.weights_bytes(source.config, "float32", quant, shard)
        results[rank] = run(weights, source.config, sum_ranks, shard)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found - hidden).abs().max() < 1e-4 * hidden.abs().max() for found, _ in results)
    assert (torch.cat([found for _, found in results], -1) - logits).abs().max() < 1e-4 * logits.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quant", ["none", "stored"])
@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_two_ranks_together_are_the_model(
    gguf_of: Callable[..., pathlib.Path], architecture: str, quant: str, num_kv_heads: int
) -> None:
    """A single key-value head is on both."""
    changes = WIDE | ARCHITECTURES[architecture] | {"num_key_value_heads": num_kv_heads}
    source = open_weights(gguf_of("Q8_0", **changes))
    check_ranks(source, quant, 2)
    source.close()


@pytest.mark.parametrize("quant", ["int8", "int4", "fp8"])
def test_floats_are_rounded_while_they_are_read(make_checkpoint: Callable[..., pathlib.Path], quant: str) -> None:
    source = open_weights(make_checkpoint(**WIDE))
    rounded, plain = loaded(source, quant=quant), loaded(source)
    for layer, expected in zip(rounded.layers, plain.layers, strict=True):
        for name in layer.keys() & {"qkv", "output", "gate_up", "down"}:
            matrix, exact = layer[name].weight, expected[name].weight
            assert isinstance(matrix, QuantizedMatrix)
            error = (matrix.dequantize() - exact).abs().max() / exact.abs().max()
            assert 0 < error < {"int8": 0.005, "int4": 0.08, "fp8": 0.05}[quant]
    assert isinstance(rounded.embedding["table"].weight, torch.Tensor)
    source.close()


def test_values_stored_finer_than_queries_are_a_part_of_their_own(
    gguf_of: Callable[..., pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Q4_K_M files; here some are not kept at all."""
    source = open_weights(gguf_of("Q8_0"))
    kinds = {name: TensorKind.F16 if "v_proj" in name else kind for name, kind in source.config.tensor_kinds.items()}
    source.config = dataclasses.replace(source.config, tensor_kinds=kinds)
    kept, plain = loaded(source, quant=quantization.STORED), loaded(source)
    matrix = kept.layers[0]["qkv"].weight
    assert isinstance(matrix, StackedMatrix)
    assert [type(part) for part in matrix.parts] == [QuantizedMatrix, torch.Tensor]
    torch.testing.assert_close(dense(matrix), plain.layers[0]["qkv"].weight)
    torch.testing.assert_close(run(kept, source.config)[1], run(plain, source.config)[1], rtol=1e-4, atol=1e-4)
    assert allocated(kept) == quantization.weights_bytes(source.config, "float32", quantization.STORED)
    source.close()


def test_values_of_quant(gguf_of: Callable[..., pathlib.Path], make_checkpoint: Callable[..., pathlib.Path]) -> None:
    folder = make_checkpoint(**WIDE)
    floats, blocks = open_weights(folder), open_weights(gguf_of("Q8_0"))

    def plan(source: WeightSource, quant: str, device: str = "cuda:0", dtype: str = "auto", **options: bool) -> str:
        spec = ModelSpec("m", "x", quant=quant, dtype=dtype)
        return plan_memory(source.config, spec, device, 8 << 30, **options).quant

    assert [plan(floats, quant) for quant in ("auto", "none", "int8")] == ["none", "none", "int8"]
    assert [plan(blocks, quant) for quant in ("auto", "none")] == ["stored", "none"]
    assert plan(blocks, "auto", dtype="float32") == "none"
    assert plan(blocks, "auto", "cpu:0") == "none"
    for source, quant, device, reason in (
        (floats, "int3", "cuda:0", "quant is 'int3'; it can be auto, none, int8, int4, fp8"),
        (blocks, "int4", "cuda:0", "quantised already"),
        (floats, "int4", "cpu:0", "which is for GPUs"),
    ):
        with pytest.raises(UnsupportedQuantizationError, match=reason) as caught:
            plan(source, quant, device)
        assert isinstance(caught.value, ApiError)
        assert caught.value.info().param == "quant"
    assert plan(floats, "int4", "cpu:0", cpu_kernels=False) == "int4"
    floats.close()
    blocks.close()


def test_quantised_weights_take_less_memory(gguf_of: Callable[..., pathlib.Path]) -> None:
    source = open_weights(gguf_of("Q4_0", tie_word_embeddings=True))
    plans = [
        plan_memory(source.config, ModelSpec("m", "x", quant=quant, dtype="bfloat16"), "cuda:0", 1 << 30)
        for quant in ("auto", "none")
    ]
    assert plans[0].weights_bytes < 0.35 * plans[1].weights_bytes
    source.close()


def test_how_many_ranks_there_can_be() -> None:
    """Every query head is on one rank, which has the key-value head that it reads."""
    for num_heads, num_kv_heads in ((4, 4), (4, 2), (6, 2), (4, 1), (12, 3), (9, 3)):
        for size in range(1, num_heads + 2):
            shards = [Shard(rank, size) for rank in range(size)]
            if size > num_kv_heads and (size % num_kv_heads or size > num_heads):
                with pytest.raises(
                    InvalidRequestError, match=f"the model's {num_heads} heads and {num_kv_heads} key-v"
                ):
                    shards[0].query_heads(num_heads, num_kv_heads)
                continue
            heads = [shard.query_heads(num_heads, num_kv_heads) for shard in shards]
            assert [head for own in heads for head in own] == list(range(num_heads))
            for own, shard in zip(heads, shards, strict=True):
                kv_heads = shard.kv_heads(num_kv_heads)
                assert {head * num_kv_heads // num_heads for head in own} == set(kv_heads)
                assert len(own) % len(kv_heads) == 0


# ------------------------------------------------------------------ copies


class FakeEvent:
    """Event that logs waits on the tape of a fake device."""

    def __init__(self, tape: list[str], number: int) -> None:
        self.tape, self.number = tape, number

    def record(self) -> None:
        self.tape.append(f"record {self.number}")

    def synchronize(self) -> None:
        self.tape.append(f"wait {self.number}")


def test_copies_alternate_between_two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    tape: list[str] = []
    events = iter(range(9))
    transfer = Transfer(
        torch.device("cuda"),
        buffer_bytes=64,
        allocate=lambda size: torch.empty(size, dtype=torch.uint8),
        event=lambda: FakeEvent(tape, next(events)),
    )
    source = torch.randn(5, 12)
    whole, part = torch.empty(5, 12, dtype=torch.bfloat16), torch.empty(5, 3)
    transfer.copy(source, whole)
    transfer.copy(source[:, 4:7], part)
    assert torch.equal(whole, source.bfloat16())
    assert torch.equal(part, source[:, 4:7])
    # 60 elements of 2 bytes in two runs, then 5 rows of 12 bytes in one of 64 bytes: the third waits for the first.
    assert tape == ["wait 0", "record 0", "wait 1", "record 1", "wait 0", "record 0"]
    with pytest.raises(ValueError, match="from \\[5, 12\\] to \\[5, 3\\]"):
        transfer.copy(source, part)
