"""Files of gated delta nets as their owners have them: quantised, in several parts, and shared out to ranks."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hybrid_gguf import write_gguf
from hybrid_models import EXPERTS, make_model
from quantised import Writer, awq, compressed, fp8, gptq, quantised_copy
from safetensors.torch import load_file, save_file

from neuron.formats.matrix import QuantizedMatrix
from neuron.models import quantization
from neuron.models.weights import WeightSource, open_weights

from .test_parity import Recorder
from .test_quantization import allocated, check_ranks, loaded
from .test_schemes import PROMPT, logits_of, prefill, projections

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 12, "linear_key_head_dim": 16,
    "linear_value_head_dim": 128,
}  # fmt: skip
"""Rows of whole blocks of GGUF; three value heads for each key head, whose rows of q and k share a block of float8."""
WIDE_EXPERTS = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
MIXES: dict[str, Callable[[str], Kind]] = {
    # As llama.cpp's mixtures of those names.
    "Q4_K_M": lambda name: Kind.Q6_K if any(part in name for part in ("attn_v", "ffn_down", "output.")) else Kind.Q4_K,
    "MXFP4_MOE": lambda name: Kind.MXFP4 if "_exps" in name else Kind.Q8_0,
    "IQ4_XS": lambda name: Kind.Q5_K if "attn_qkv" in name else Kind.IQ4_NL if "_exps" in name else Kind.IQ4_XS,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pathlib.Path]:
    """Return a function that makes the model of a kind, once."""
    made: dict[str, pathlib.Path] = {}

    def make(kind: str) -> pathlib.Path:
        if kind not in made:
            sizes = SIZES | ({} if kind == "qwen3_5" else WIDE_EXPERTS)
            made[kind] = make_model(kind, tmp_path_factory.mktemp(kind), **sizes)
        return made[kind]

    return make


def check(source: WeightSource, logits: torch.Tensor) -> None:
    """Compare the logits of a file, packed and expanded."""
    for quant in (quantization.STORED, quantization.NONE):
        weights = loaded(source, quant=quant)
        assert any(isinstance(part, QuantizedMatrix) for part in projections(weights)) == (quant == quantization.STORED)
        assert allocated(weights) == quantization.weights_bytes(source.config, "float32", quant)
        assert (prefill(weights, source.config) - logits).abs().max() < 1e-3 * logits.abs().max()


# ------------------------------------------------------------------ GGUF


@pytest.mark.parametrize(
    ("kind", "mix", "parts"),
    [
        ("qwen3_5", "Q4_K_M", 0),
        ("qwen3_5_moe", "MXFP4_MOE", 9),
        ("qwen3_next", "IQ4_XS", 0),
        ("qwen3_next", "Q4_K_M", 7),
    ],
)
def test_mixtures_of_kinds(
    kind: str, mix: str, parts: int, folder_of: Callable[[str], pathlib.Path], tmp_path: pathlib.Path, harness: Any
) -> None:
    """Packed as on a GPU, expanded, and by the path that a CPU takes: the logits of the numbers in float32."""
    write_gguf(folder_of(kind), tmp_path / "model.gguf", MIXES[mix], tensors_of_part=parts)
    path = min(tmp_path.glob("*.gguf"))
    assert (len(list(tmp_path.glob("*.gguf"))) > 1) == bool(parts)
    floats = open_weights(write_gguf(folder_of(kind), tmp_path / "floats.gguf", MIXES[mix], expanded=True))
    logits, source = prefill(loaded(floats), floats.config), open_weights(path)
    floats.close()
    check(source, logits)
    source.close()
    logits = logits[-1]
    for dtype in ("float32", "bfloat16"):
        driver = harness()
        driver.load(path, dtype=dtype)
        model = driver.model()
        model.executor.sampler = recorder = Recorder(model.executor.sampler, model.scheduler)
        driver.output_alone(PROMPT.tolist(), 1)
        found = next(iter(recorder.logits.values()))[0]
        if dtype == "float32":
            assert (found - logits).abs().max() < 1e-3 * logits.abs().max()
        else:
            assert torch.cosine_similarity(found, logits, 0) > 0.98


# ------------------------------------------------------------------ safetensors

FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
PLAIN = ("in_proj_a.", "in_proj_b.", "in_proj_ba.")
"""Projections that the files in float8 leave as they are."""
QUANTISED: dict[str, tuple[str, dict[str, Any], Callable[[], Writer], tuple[str, ...]]] = {
    "fp8": ("qwen3_5", FP8, lambda: fp8((128, 128)), PLAIN),
    "fp8-moe": ("qwen3_5_moe", FP8, lambda: fp8((128, 128)), PLAIN),
    "fp8-next": ("qwen3_next", FP8, lambda: fp8((128, 128)), PLAIN),
    # Attention of either kind in bfloat16, and experts of 4 bits; and all projections but those of gates.
    "ct-int4": (
        "qwen3_5_moe", {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda: compressed("pack-quantized", **INT4), ("linear_attn", "self_attn", "shared_expert"),
    ),
    "awq": ("qwen3_5", {"quant_method": "awq", "bits": 4}, lambda: awq(32), PLAIN),
    "gptq-order": (
        "qwen3_5", {"quant_method": "gptq", "bits": 4, "sym": False, "desc_act": True},
        lambda: gptq(64, scattered=True), PLAIN,
    ),
    "gptq": ("qwen3_next", {"quant_method": "gptq", "bits": 4, "sym": False}, lambda: gptq(32), ()),
}  # fmt: skip
"""Model, configuration, writer, and parts of the names of what is left as it is."""


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("fp8", "wrapped"), ("fp8-moe", "wrapped"), ("fp8-moe", "stacked"), ("fp8-next", "alone")),
        *(("ct-int4", "wrapped"), ("awq", "alone"), ("gptq", "alone"), ("gptq-order", "wrapped")),
    ],
)
def test_quantised_files(
    name: str, layout: str, folder_of: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """As a model of its own; in the wrapper of images, with a head for drafts; and with experts as one tensor.

    The logits are those of transformers, of the dequantised weights.
    """
    kind, config, write, plain = QUANTISED[name]
    folder, packed = folder_of(kind), tmp_path / "packed"
    expected = quantised_copy(
        folder, packed, config, write(), plain=lambda tensor: any(part in tensor for part in plain)
    )
    if layout == "wrapped":
        wrap(packed)
    if layout == "stacked":
        stack(packed)
    shutil.copytree(folder, tmp_path / "plain")
    save_file(expected, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    source = open_weights(packed)
    assert (source.config.draft_head is not None) == (layout == "wrapped")
    check(source, logits_of(tmp_path / "plain"))
    check_ranks(source, quantization.STORED, 2)
    source.close()


def wrap(folder: pathlib.Path) -> None:
    """Make of a model the checkpoint that is published: names and lists as in the wrapper, a tower, and drafts."""
    values = json.loads((folder / "config.json").read_text())
    settings = values.pop("quantization_config")
    kind = values["model_type"].removesuffix("_text")
    excluded = ["lm_head", "model.visual.blocks.0.attn.qkv", "mtp.fc"]
    excluded += [
        f"model.language_model.layers.{n}.linear_attn.{each}" for n in range(3) for each in ("conv1d", "in_proj_a")
    ]
    wrapper = {
        "model_type": kind, "architectures": [values["architectures"][0].replace("CausalLM", "ConditionalGeneration")],
        "text_config": values, "vision_config": {"model_type": kind},
        "quantization_config": {**settings, "modules_to_not_convert": excluded},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(wrapper))
    found = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    found["model.visual.blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)
    found["mtp.fc.weight"] = torch.zeros(256, 512)
    found |= {
        f"mtp.{name}.weight": torch.zeros(256) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    found |= {
        name.replace("model.language_model.layers.3", "mtp.layers.0"): tensor.clone()
        for name, tensor in found.items()
        if "layers.3." in name
    }
    save_file(found, folder / "model.safetensors")


def stack(folder: pathlib.Path) -> None:
    """Make one tensor of all experts' gates and ups, and one of their downs, and the same of their scales."""
    found = load_file(folder / "model.safetensors")
    for number in range(4):
        prefix = f"model.layers.{number}.mlp.experts."
        for end in ("weight", "weight_scale_inv"):
            for which, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
                each = [
                    torch.cat([found.pop(f"{prefix}{expert}.{part}.{end}") for part in parts])
                    for expert in range(EXPERTS["num_experts"])
                ]
                found[prefix + which + end.removeprefix("weight")] = torch.stack(each)
    save_file(found, folder / "model.safetensors")


# ------------------------------------------------------------------ ranks


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_next"])
def test_ranks_share_the_heads_of_either_order(
    kind: str, size: int, folder_of: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """GGUF has the value heads of Qwen3.5 in tiles, of which a rank has a part each; eight share four key heads."""
    path = tmp_path / "model.gguf"
    write_gguf(folder_of(kind), path, Kind.Q8_0)
    for source in (open_weights(path), open_weights(folder_of(kind))):
        for quant in (quantization.STORED, quantization.NONE):
            check_ranks(source, quant, size)
        source.close()
