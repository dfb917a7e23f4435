"""What the loader and the engine make of a model of each family, kept in golden.json: shapes, names, bytes, tokens.

``python tests/neuron/models/test_golden.py`` writes the file anew. Weights come from the names of the tensors, so that
no other library's random initialisation is part of it.
"""

import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cortex.wire.node import ModelSpec
from neuron.layers.shard import Shard
from neuron.models import quantization
from neuron.models.config import read_config
from neuron.models.sizing import least_bytes

FILE = pathlib.Path(__file__).with_name("golden.json")
COMMON: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5,
}  # fmt: skip
SHARED: dict[str, Any] = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-bias": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_theta": 1e6},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 5,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    },
    "ministral3": {
        "model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"],
        "rope_parameters": {
            "type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "glm4_moe": {
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 3, "topk_group": 2,
        "first_k_dense_replace": 1, "routed_scaling_factor": 1.8, "attention_bias": True, "use_qk_norm": True,
    },
    "phi3": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]},
    },
    "qwen3_5": {
        "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], **DELTA, "linear_num_value_heads": 6,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"], "tie_word_embeddings": True,
    },
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"], **DELTA, **SHARED,
        "full_attention_interval": 2,
    },
    "qwen3_next": {
        "model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], **DELTA, **SHARED,
        "full_attention_interval": 3, "mlp_only_layers": [1], "norm_topk_prob": False,
    },
    "gemma3": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 20,
        "sliding_window_pattern": 3, "query_pre_attn_scalar": 9, "final_logit_softcapping": 5.0,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    },
}  # fmt: skip
PLACES = (
    ("bfloat16", "none", Shard()), ("float32", "none", Shard()), ("bfloat16", "int8", Shard()),
    ("bfloat16", "int4", Shard()), ("float16", "fp8", Shard(0, 2)), ("bfloat16", "none", Shard(1, 2)),
    ("bfloat16", "int8", Shard(3, 4)),
)  # fmt: skip
NUM_TOKENS = 24


def write_model(folder: pathlib.Path, name: str) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(COMMON | CONFIGS[name]))
    tensors = {}
    for tensor_name, shape in read_config(folder).tensor_shapes().items():
        random = np.random.default_rng(zlib.crc32(tensor_name.encode()))
        values = random.uniform(0.5, 1.5, shape) if len(shape) == 1 else random.normal(0, 0.3, shape)
        if tensor_name.endswith("A_log"):
            values = np.log(values / 20)  # else a state is forgotten at once
        tensors[tensor_name] = torch.from_numpy(values.astype(np.float32))
    save_file(tensors, folder / "model.safetensors")
    return folder


def sizes_of(folder: pathlib.Path) -> dict[str, Any]:
    config = read_config(folder)
    return {
        "parameters": config.num_parameters(),
        "tensors": {name: [tensor.gguf, *tensor.shape] for name, tensor in config.tensors().items()},
        "weights_bytes": {
            f"{dtype} {quant} {shard.rank}/{shard.size}": quantization.weights_bytes(config, dtype, quant, shard)
            for dtype, quant, shard in PLACES
        },
        # On a CPU they depend on the number of cores.
        "least_bytes": least_bytes(config, ModelSpec("m", "s", context_tokens=512, dtype="bfloat16"), "cuda:0"),
    }


def texts_of(driver: Any, folder: pathlib.Path) -> dict[str, Any]:
    driver.load(folder)
    random = np.random.default_rng(11)
    prompts = {number: random.integers(3, 160, size).tolist() for number, size in enumerate((1, 5, 40, 100))}
    for number, prompt in prompts.items():
        driver.generate(number, prompt, NUM_TOKENS, top_logprobs=3)
    driver.run()
    assert not driver.failures()
    likeliest: dict[int, list[float]] = {number: [] for number in prompts}
    for row in driver.rows:
        if row.logprobs is not None:
            likeliest[row.sequence] += np.frombuffer(row.logprobs.top, np.float32).round(5).tolist()
    return {
        str(number): {"ids": driver.outputs()[number], "top": [round(x, 5) for x in likeliest[number]]}
        for number in prompts
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_names_and_bytes_are_as_kept(name: str, golden: dict[str, Any], tmp_path: pathlib.Path) -> None:
    found = json.loads(json.dumps(sizes_of(write_model(tmp_path / name, name))))
    assert found == golden[name]["sizes"]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_texts_are_as_kept(
    name: str, golden: dict[str, Any], executor: str, harness: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    found = texts_of(harness(), write_model(tmp_path / name, name))
    for number, expected in golden[name]["texts"].items():
        assert found[number]["ids"] == expected["ids"]
        np.testing.assert_allclose(found[number]["top"], expected["top"], atol=2e-3)


if __name__ == "__main__":
    import sys
    import tempfile

    sys.path += [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parents[2] / "support")]
    from conftest import EngineHarness

    with tempfile.TemporaryDirectory() as scratch:
        kept = {}
        for each in CONFIGS:
            made = write_model(pathlib.Path(scratch) / each, each)
            kept[each] = {"sizes": sizes_of(made), "texts": texts_of(EngineHarness(), made)}
    FILE.write_text(json.dumps(kept, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n")
