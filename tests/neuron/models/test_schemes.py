"""Quantised safetensors: the weights that their ecosystem's tools read, kept packed, expanded, and in parts."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch
import transformers
from quantised import Writer, awq, compressed, fp8, gptq, modelopt_nvfp4, quantised_copy, transformers_fp8
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cortex.wire.node import ModelSpec
from neuron.formats.matrix import QuantizedMatrix, StackedMatrix
from neuron.layers.shard import Shard
from neuron.models import decoder, quantization
from neuron.models.config import read_config
from neuron.models.errors import CorruptWeightsError, UnsupportedQuantizationError
from neuron.models.expansion import expansions
from neuron.models.model import ModelConfig
from neuron.models.sizing import plan_memory
from neuron.models.weights import open_weights
from neuron.triton_kernels.attention import attention_parts
from neuron.triton_kernels.operations import EAGER
from neuron.triton_kernels.random_batch import random_batch

from .test_parity import Recorder
from .test_quantization import HOST, allocated, dense, loaded
from .test_weights import read_all

PROMPT = torch.tensor([5, 77, 3, 120, 64, 9, 9, 31, 100, 2, 17])
SHAPES: dict[str, Any] = {
    "kind": "llama", "hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "num_hidden_layers": 2, "attention_bias": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """Format of a checkpoint."""

    config: dict[str, Any]
    write: Callable[[], Writer]
    bits: float
    """Bits of a weight on the device."""


def ct(format: str, **weights: Any) -> Case:
    wide = {"type": "int", "symmetric": True, **weights}
    config = {"quant_method": "compressed-tensors", "format": format}
    return Case(config, lambda: compressed(format, **wide), weights["num_bits"] + 1.1)


CASES = {
    "fp8-blocks": Case({"quant_method": "fp8", "weight_block_size": [128, 128]}, lambda: fp8((128, 128)), 8.3),
    "fp8-transformers": Case({"quant_method": "fp8", "weight_block_size": [64, 64]}, lambda: transformers_fp8, 8.6),
    "fp8-tensor": Case({"quant_method": "fp8", "weight_block_size": None}, fp8, 8.2),
    "fp8-rows": Case({"quant_method": "fbgemm_fp8"}, lambda: fp8(by_row=True, suffix="weight_scale"), 8.2),
    "ct-float": ct("float-quantized", type="float", num_bits=8, strategy="channel"),
    "ct-float-tensor": ct("float-quantized", type="float", num_bits=8, strategy="tensor"),
    "ct-int8": ct("int-quantized", num_bits=8, strategy="channel"),
    "ct-int8-packed": ct("pack-quantized", num_bits=8, strategy="channel"),
    "ct-int4-32": ct("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "ct-int4-64-asymmetric": ct("pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=False),
    "ct-int4-rows": ct("pack-quantized", num_bits=4, strategy="channel"),
    "ct-int8-asymmetric": ct("pack-quantized", num_bits=8, strategy="group", group_size=64, symmetric=False),
    "ct-nvfp4": ct("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16),
    "ct-mxfp4": ct("mxfp4-pack-quantized", type="float", num_bits=4, strategy="group", group_size=32),
    "modelopt-nvfp4": Case({"quant_method": "modelopt", "quant_algo": "NVFP4"}, modelopt_nvfp4, 4.7),
    "gptq-64": Case({"quant_method": "gptq", "bits": 4, "sym": False}, lambda: gptq(64), 4.4),
    "gptq-32-symmetric": Case({"quant_method": "gptq", "bits": 4, "sym": True}, lambda: gptq(32, symmetric=True), 4.6),
    "gptq-rows": Case({"quant_method": "gptq", "bits": 4, "sym": False}, lambda: gptq(0), 4.2),
    "gptq-8-bits": Case({"quant_method": "gptq", "bits": 8, "sym": False}, lambda: gptq(64, bits=8), 8.4),
    "gptq-v2": Case(
        {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq_v2"}, lambda: gptq(64, offset=0),
        4.4,
    ),
    "gptq-order": Case(
        {"quant_method": "gptq", "bits": 4, "sym": False, "desc_act": True}, lambda: gptq(64, scattered=True), 4.6
    ),
    "awq-64": Case({"quant_method": "awq", "bits": 4, "version": "gemm"}, lambda: awq(64), 4.4),
    "awq-32": Case({"quant_method": "awq", "bits": 4}, lambda: awq(32), 4.8),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoint of a case, the weights that it stands for, and transformers' logits of them."""

    path: pathlib.Path
    case: Case
    expected: dict[str, torch.Tensor]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def floats(make_checkpoint: Callable[..., pathlib.Path]) -> pathlib.Path:
    return make_checkpoint(**SHAPES)


@pytest.fixture(scope="module", params=CASES)
def checkpoint(
    request: pytest.FixtureRequest, floats: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    case = CASES[request.param]
    path = tmp_path_factory.mktemp("quantised") / "model"
    expected = quantised_copy(floats, path, case.config, case.write())
    return Checkpoint(path, case, expected, logits_of(floats, expected))


def logits_of(folder: pathlib.Path, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Return transformers' logits of the model in a folder, with other weights where given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if weights is not None:
        model.load_state_dict(weights)
    with torch.inference_mode():
        return model(PROMPT[None]).logits[0]


def prefill(weights: decoder.DecoderWeights, config: ModelConfig) -> torch.Tensor:
    batch, pages = random_batch([(len(PROMPT), len(PROMPT))], HOST)
    arrays = (batch.cu_seqlens.numpy(), batch.page_table.numpy(), batch.context_lens.numpy())
    slots = torch.tensor([1], dtype=torch.int32)
    batch = dataclasses.replace(batch, parts=attention_parts(*arrays, 16, HOST, 0), state_slots=slots)
    num_pages, make = [pages] * len(config.caches()), lambda shape, dtype: torch.zeros(shape, dtype=dtype)
    caches = decoder.new_caches(config, num_pages, 2, torch.float32, make).layers
    forward = decoder.Decoder(config, weights, EAGER)
    return forward.logits(forward.hidden(PROMPT, [batch] * len(caches), caches))


def projections(weights: decoder.DecoderWeights) -> list[Any]:
    """Return the parts of the layers' matrices, but for routers."""
    found = [
        each.weight
        for layer in weights.layers
        for key, each in layer.items()
        if hasattr(each, "weight") and key != "router"
    ]
    return [part for matrix in found for part in (matrix.parts if isinstance(matrix, StackedMatrix) else (matrix,))]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_packed_weights_give_transformers_logits(checkpoint: Checkpoint) -> None:
    source = open_weights(checkpoint.path)
    weights = loaded(source, quant=quantization.STORED)
    parts = projections(weights)
    assert all(isinstance(part, QuantizedMatrix) for part in parts)
    num_bits = 8 * sum(part.nbytes for part in parts)
    assert num_bits / sum(part.shape[0] * part.shape[1] for part in parts) < checkpoint.case.bits
    assert_close(prefill(weights, source.config), checkpoint.logits)
    assert allocated(weights) == quantization.weights_bytes(source.config, "float32", quantization.STORED)
    source.close()


def test_expanded_weights_are_the_same(checkpoint: Checkpoint) -> None:
    source = open_weights(checkpoint.path)
    for name, shape in source.config.tensor_shapes().items():
        found = torch.empty(shape)
        source.read_into(name, found)
        torch.testing.assert_close(found, checkpoint.expected[name], rtol=1e-6, atol=1e-7)
    name, part = "model.layers.1.mlp.down_proj.weight", torch.empty(100, 70)
    source.read_into(name, part, first_row=33, columns=(range(50, 120),))
    torch.testing.assert_close(part, checkpoint.expected[name][33:133, 50:120], rtol=1e-6, atol=1e-7)
    source.close()


def test_the_cpu_kernels_compute_the_same_model(checkpoint: Checkpoint, harness: Callable[..., Any]) -> None:
    """In float32, where every weight is expanded; and as the formats are, where activations are rounded."""
    expected = checkpoint.logits[-1]
    assert_close(native_logits(harness(), checkpoint.path, "float32"), expected)
    found = native_logits(harness(), checkpoint.path, "bfloat16")
    assert torch.cosine_similarity(found, expected, 0) > 0.98


def native_logits(driver: Any, path: pathlib.Path, dtype: str) -> torch.Tensor:
    driver.load(path, dtype=dtype)
    assert driver.model().plan.native
    model = driver.model()
    model.executor.sampler = recorder = Recorder(model.executor.sampler, model.scheduler)
    driver.output_alone(PROMPT.tolist(), 1)
    return next(iter(recorder.logits.values()))[0]


def test_blocks_for_the_cpu_kernels_hold_the_same_numbers(checkpoint: Checkpoint) -> None:
    source = open_weights(checkpoint.path)
    for name in source.config.tensor_kinds:
        stored = source.read_stored(name)
        if stored is None:
            continue
        kind, shape = gguf.GGMLQuantizationType(stored.kind), source.config.tensor_shapes()[name]
        found = torch.from_numpy(gguf.quants.dequantize(stored.packed.reshape(shape[0], -1), kind))
        expected = checkpoint.expected[name]
        # Scales, and zero points times scales, are rounded to float16.
        assert (found - expected).abs().max() <= 2**-10 * expected.abs().max()
    source.close()


@pytest.mark.parametrize("name", ["fp8-blocks", "gptq-64", "gptq-order", "awq-64", "ct-int4-64-asymmetric", "ct-nvfp4"])
def test_parts_of_ranks_are_parts_of_the_weights(name: str, floats: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The MLP is cut at 128 of 320 columns, within groups; what cannot stay packed is expanded."""
    case = CASES[name]
    expected = quantised_copy(floats, tmp_path, case.config, case.write())
    source = open_weights(tmp_path)
    for rank in range(2):
        shard = Shard(rank, 2)
        weights = loaded(source, quant=quantization.STORED, shard=shard)
        assert allocated(weights) == quantization.weights_bytes(source.config, "float32", quantization.STORED, shard)
        declared = list(source.config.parameters(shard))
        for layer, parameters in zip(weights.layers, declared[1:-1], strict=True):
            for key in layer.keys() & {"qkv", "output", "gate_up", "down"}:
                parts = [
                    expected[tensor.name][rows.start : rows.stop, columns.start : columns.stop]
                    for tensor in parameters[key].tensors
                    for rows, columns in [(*tensor.rows, *tensor.columns)]
                ]
                torch.testing.assert_close(dense(layer[key].weight), torch.cat(parts), rtol=1e-6, atol=1e-7)
    source.close()


def test_modules_left_as_they_are_and_mixed_schemes(floats: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The lists of modules name them with other prefixes, or by patterns; the tensors tell."""
    writers = {"v_proj": gptq(32, symmetric=True), "up_proj": gptq(64, bits=8, symmetric=True)}
    usual = gptq(64, symmetric=True)
    config = {"quant_method": "gptq", "bits": 4, "sym": True, "modules_to_not_convert": ["re:.*k_proj", "other.o_proj"]}

    def write(weight: torch.Tensor, name: str) -> Any:
        return next((own for end, own in writers.items() if end in name), usual)(weight)

    expected = quantised_copy(floats, tmp_path, config, write, plain=lambda name: "k_proj" in name or "o_proj" in name)
    source = open_weights(tmp_path)
    weights = loaded(source, quant=quantization.STORED)
    parts = weights.layers[0]["qkv"].weight.parts
    assert [type(part) for part in parts] == [QuantizedMatrix, torch.Tensor, QuantizedMatrix]
    assert_close(prefill(weights, source.config), logits_of(floats, expected))
    assert allocated(weights) == quantization.weights_bytes(source.config, "float32", quantization.STORED)
    source.close()


def test_scales_of_activations_and_caches_are_left_alone(floats: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantised_copy(floats, tmp_path, CASES["fp8-tensor"].config, fp8())
    tensors = load_file(tmp_path / "model.safetensors")
    for end in ("q_proj.activation_scale", "q_proj.input_scale", "k_scale", "k_proj.k_scale"):
        tensors[f"model.layers.0.self_attn.{end}"] = torch.ones(())
    save_file(tensors, tmp_path / "model.safetensors")
    open_weights(tmp_path).close()


def test_a_bias_of_zeros_is_none(floats: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantised_copy(floats, tmp_path, CASES["gptq-64"].config, gptq(64))
    tensors = load_file(tmp_path / "model.safetensors")
    for value in (0.0, 0.5):
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.full((320,), value, dtype=torch.float16)
        save_file(tensors, tmp_path / "model.safetensors")
        if value:
            with pytest.raises(CorruptWeightsError, match="unexpected"):
                open_weights(tmp_path)
        else:
            open_weights(tmp_path).close()


@pytest.mark.parametrize("name", ["fp8-blocks", "awq-32", "gptq-order"])
@pytest.mark.parametrize("family", ["qwen3_moe", "phi3"])
def test_experts_and_fused_projections(
    family: str, name: str, make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Each expert's matrices are quantised apart; queries, keys and values are rows of one matrix, gate and up too."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    shapes = {key: value for key, value in SHAPES.items() if key not in ("kind", "attention_bias", "head_dim")}
    floats = make_checkpoint(family, **shapes, **(experts | {"head_dim": 64} if family == "qwen3_moe" else {}))
    expected = quantised_copy(floats, tmp_path / "packed", CASES[name].config, CASES[name].write())
    shutil.copytree(floats, tmp_path / "plain")
    save_file(expected, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    source = open_weights(tmp_path / "packed")
    weights = loaded(source, quant=quantization.STORED)
    scattered = name == "gptq-order" and family == "qwen3_moe"
    assert all(isinstance(part, QuantizedMatrix) for part in projections(weights) if not scattered)
    assert_close(prefill(weights, source.config), logits_of(tmp_path / "plain"))
    assert allocated(weights) == quantization.weights_bytes(source.config, "float32", quantization.STORED)
    source.close()


@pytest.mark.parametrize("name", ["fp8-transformers", "ct-mxfp4"])
def test_stacks_of_experts(name: str, make_checkpoint: Callable[..., pathlib.Path], tmp_path: pathlib.Path) -> None:
    """As transformers writes experts in float8, and gpt-oss ships its own: one tensor for all of a layer."""
    shapes = {key: value for key, value in SHAPES.items() if key not in ("kind", "attention_bias")}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    floats = make_checkpoint("qwen3_moe", **shapes, **experts)
    method = {"fp8-transformers": CASES[name].config, "ct-mxfp4": {"quant_method": "mxfp4"}}[name]
    expected = quantised_copy(
        floats, tmp_path / "packed", method, CASES[name].write(), plain=lambda tensor: "experts" not in tensor
    )
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        for stack, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            names = [[f"{prefix}{number}.{part}." for part in parts] for number in range(4)]
            ends = [key.removeprefix(names[0][0]) for key in packed if key.startswith(names[0][0])]
            for end in ends:
                whole = torch.stack([torch.cat([packed.pop(part + end) for part in own]) for own in names])
                if end == "weight_packed":
                    whole = whole.view(*whole.shape[:2], -1, 16)
                packed[prefix + stack + STACKED[end]] = whole
    save_file(packed, tmp_path / "packed" / "model.safetensors")
    if name == "ct-mxfp4":
        own = [packed[f"model.layers.0.mlp.experts.gate_up_proj_{end}"] for end in ("blocks", "scales")]
        told = convert_moe_packed_tensors(*own, dtype=torch.float32)
        assert torch.equal(told[2, :, :64].T, expected["model.layers.0.mlp.experts.2.gate_proj.weight"])
    shutil.copytree(floats, tmp_path / "plain")
    save_file(expected, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    source = open_weights(tmp_path / "packed")
    weights = loaded(source, quant=quantization.STORED)
    assert isinstance(weights.layers[1]["gate_up"].weight, QuantizedMatrix)
    assert_close(prefill(weights, source.config), logits_of(tmp_path / "plain"))
    for key, tensor in read_all(tmp_path / "packed").items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)
    assert allocated(weights) == quantization.weights_bytes(source.config, "float32", quantization.STORED)
    source.close()


STACKED = {"weight": "", "weight_scale_inv": "_scale_inv", "weight_packed": "_blocks", "weight_scale": "_scales"}
GPTQ: Any = CASES["gptq-64"].config
AWQ: Any = CASES["awq-64"].config
Q = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("case", "end", "change", "reason"),
    [
        ("fp8-blocks", "weight_scale_inv", lambda t: t[:1], "scales of .1, 2. fit no groups"),
        ("fp8-blocks", "weight_scale_inv", None, "has no scale"),
        ("fp8-blocks", "weight_scale_inv", lambda t: t.int(), "scales in I32"),
        ("fp8-blocks", "weight", lambda t: t[:100], "has no scale, or is not"),
        ("fp8-blocks", "weight_scale_inv", lambda t: t * float("nan"), "a scale is not a number"),
        ("fp8-blocks", "weight_scale_inv", lambda t: t / 0, "a scale is not a number, or infinite"),
        ("gptq-64", "qweight", lambda t: t[:-1], "is stored as"),
        ("gptq-64", "scales", lambda t: t[:-1], "groups of 256 columns|scales"),
        ("gptq-64", "qzeros", lambda t: t[:, :-1], "zero points"),
        ("gptq-64", "g_idx", lambda t: t.flip(0), "g_idx scatters groups"),
        ("gptq-64", "g_idx", lambda t: t[:-1], "groups of columns"),
        ("gptq-64", "g_idx", lambda t: t - 7, "g_idx scatters groups"),
        ("gptq-order", "g_idx", lambda t: t * 0, "groups of columns are not of 64 each"),
        ("gptq-order", "g_idx", lambda t: t + (1 << 30), "groups of columns are not of 64 each"),
        ("gptq-32-symmetric", "qzeros", lambda t: t * 0, "not in the middle"),
        ("awq-64", "qzeros", None, "zero points None"),
        ("awq-64", "scales", lambda t: t.double(), "scales"),
    ],
)
def test_tensors_that_contradict_each_other(
    case: str, end: str, change: Any, reason: str, floats: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    quantised_copy(floats, tmp_path, CASES[case].config, CASES[case].write())
    tensors = load_file(tmp_path / "model.safetensors")
    tensor = tensors.pop(Q + end)
    if change is not None:
        tensors[Q + end] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises((CorruptWeightsError, UnsupportedQuantizationError), match=reason) as caught:
        read_all(tmp_path)
    assert "q_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported; supported are fp8, .*gptq"),
        ({"quant_method": "hqq"}, "'hqq' is not supported"),
        ({"quant_method": None}, "None is not supported"),
        ("fp8", "'fp8' is not supported"),
        (GPTQ | {"checkpoint_format": "marlin"}, "layout 'marlin'"),
        (AWQ | {"version": "gemv"}, "layout 'gemv'"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "blocks of .0, 128."),
        ({"quant_method": "fp8", "weight_block_size": 128}, "blocks of 128"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"block_structure": "x"}}}}, "'x'"),
    ],
)
def test_methods_that_are_not_known(config: Any, reason: str, floats: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantised_copy(floats, tmp_path, config, gptq(64))
    with pytest.raises((CorruptWeightsError, UnsupportedQuantizationError), match=reason):
        read_config(tmp_path)


def test_what_is_expanded_is_told(floats: pathlib.Path, tmp_path: pathlib.Path, harness: Any, caplog: Any) -> None:
    """The CPU kernels have no float8; in float32 everything is wider. A GPU keeps it."""
    quantised_copy(floats, tmp_path, CASES["fp8-tensor"].config, fp8())
    driver = harness()
    driver.load(tmp_path, dtype="bfloat16")
    config, elements = read_config(tmp_path), 2 * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 320)
    assert "14 weights in fp8 by tensor are expanded to bfloat16: 1 MiB more than in the file" in caplog.text
    assert 0.98 * elements < driver.sent[-1].result.expanded_bytes < 1.1 * elements
    plans = {
        device: plan_memory(config, ModelSpec("m", "x", dtype=dtype), device, 1 << 32).expanded_bytes
        for device, dtype in (("cuda:0", "bfloat16"), ("cpu:0", "float32"))
    }
    assert plans["cuda:0"] == 0
    assert 2.9 * elements < plans["cpu:0"] < 3.2 * elements


def test_weights_that_a_rank_must_expand_are_told(floats: pathlib.Path, tmp_path: pathlib.Path) -> None:
    quantised_copy(floats, tmp_path, CASES["gptq-order"].config, CASES["gptq-order"].write())
    found = expansions(read_config(tmp_path), "bfloat16", quantization.STORED, Shard(0, 2), native=False)
    assert [each.num_weights for each in found] == [4], "the outputs and the down projections, whose columns are cut"
    assert "int4 in groups of 64 are expanded to bfloat16" in str(found[0])
