"""Language models within wrappers: the same as transformers computes, and typed errors for files that lack a part."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from neuron.models.config import read_config
from neuron.models.errors import CorruptWeightsError, UnsupportedArchitectureError
from neuron.models.wrappers import text_name

from .test_parity import assert_close, expected_of, run_engine
from .test_weights import read_all

TEXT: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 77, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
QWEN_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
QWEN3_5_VISION: dict[str, Any] = {key: QWEN_VISION[key] for key in QWEN_VISION if key != "deepstack_visual_indexes"}
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 4, "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2],
    },
}  # fmt: skip
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3", {
        "text_config": {**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 9, "num_hidden_layers": 6},
        "vision_config": {**VISION, "image_size": 16}, "mm_tokens_per_image": 4,
    }),
    "mistral3": ("Mistral3", {
        "text_config": {**TEXT, "model_type": "mistral", "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8, "image_size": 16},
    }),
    "qwen3_5": ("Qwen3_5", {"text_config": {**TEXT, **DELTA}, "vision_config": QWEN3_5_VISION}),
    "qwen3_5_moe": ("Qwen3_5Moe", {
        "text_config": {
            **{key: value for key, value in TEXT.items() if key != "intermediate_size"}, **DELTA, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 20,
        },
        "vision_config": QWEN3_5_VISION,
    }),
    "qwen3_vl": ("Qwen3VL", {"text_config": {**TEXT, "rope_parameters": QWEN_ROPE}, "vision_config": QWEN_VISION}),
    "qwen3_vl_moe": ("Qwen3VLMoe", {
        "text_config": {
            **TEXT, "rope_parameters": QWEN_ROPE, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 28,
        },
        "vision_config": QWEN_VISION,
    }),
}  # fmt: skip


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return a checkpoint that transformers has written."""
    name, parts = WRAPPERS[request.param]
    torch.manual_seed(2)
    config = getattr(transformers, name + "Config")(**parts)
    model = getattr(transformers, name + "ForConditionalGeneration")(config)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


def test_the_language_model_of_a_wrapper_equals_transformers(
    wrapper: pathlib.Path, harness: Callable[..., Any]
) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(wrapper, dtype=torch.float32)
    prompt = torch.arange(3, 43).tolist()
    tokens, logits = expected_of(model, prompt, 8)
    found_tokens, found = run_engine(harness, wrapper, [prompt], 16, 8)
    assert found_tokens[0] == tokens
    assert_close(found[0], logits)


def test_either_prefix_is_read(wrapper: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tensors = load_file(wrapper / "model.safetensors")
    swap = {"model.language_model.": "language_model.model.", "language_model.model.": "model.language_model."}
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in swap if name.startswith(prefix)), "")
        # Published files of Qwen3-VL-MoE have the matrices of experts the other way round.
        tensor = tensor.mT.contiguous() if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else tensor
        renamed[swap.get(prefix, "") + name.removeprefix(prefix)] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((wrapper / "config.json").read_text())
    expected = read_all(wrapper)
    for name, values in read_all(tmp_path).items():
        assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_wrappers_of_qwen3_8_are_those_of_qwen3_5(tmp_path: pathlib.Path, kind: str) -> None:
    """Whether or not the type of the language model is told."""
    name, parts = WRAPPERS[kind]
    found = []
    for model_type in (kind, kind.replace("5", "8")):
        for told in ({}, {"model_type": f"{model_type}_text"}):
            text = {**parts["text_config"], "rms_norm_eps": 1e-6, **told}
            values = {"model_type": model_type, "architectures": [f"{name}ForConditionalGeneration"]}
            (tmp_path / "config.json").write_text(json.dumps({**values, "text_config": text}))
            found.append(read_config(tmp_path))
    assert all(config == found[0] for config in found)


@pytest.mark.parametrize("classes", [["Mistral3ForConditionalGeneration"], None])
@pytest.mark.parametrize("text", [None, 3, [], "text"])
def test_a_wrapper_without_a_language_model_is_refused(tmp_path: pathlib.Path, text: object, classes: object) -> None:
    values = {"model_type": "mistral3", "architectures": classes, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CorruptWeightsError, match="text_config is"):
        read_config(tmp_path)


def test_a_wrapper_around_an_unknown_model_is_refused_by_its_name(tmp_path: pathlib.Path) -> None:
    values = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "x"},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedArchitectureError, match="'x'"):
        read_config(tmp_path)


def test_tensors_of_encoders_are_left() -> None:
    assert text_name("model.vision_tower.vision_model.head.weight") is None
    assert text_name("multi_modal_projector.linear_1.weight") is None
    assert text_name("model.visual.blocks.0.norm1.weight") is None
    assert text_name("language_model.lm_head.weight") == "lm_head.weight"
    assert text_name("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
