"""Untrusted model files, and the properties that must hold for any content.

A reader of them returns, or raises one of the errors of models with a 4xx status, in bounded time and memory. Used by
the tests of hostile files and by the fuzz targets.
"""

import json
import math
import pathlib
import random
import struct
import tempfile
from typing import Any

from cortex.wire.errors import ApiError, ErrorInfo
from cortex.wire.node import ModelSpec
from neuron.models.config import read_config
from neuron.models.fields import JsonFields
from neuron.models.gguf import TensorKind
from neuron.models.model import ModelConfig
from neuron.models.registry import FAMILIES
from neuron.models.sizing import least_bytes

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}  # fmt: skip
"""Smallest model, with every field of a Llama configuration that is read."""

GEMMA: dict[str, Any] = {
    **CONFIG,
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 16,
    "layer_types": ["sliding_attention"],
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 1e4,
    "final_logit_softcapping": 30.0,
    "rope_scaling": None,
}
EXPERTS: dict[str, Any] = {
    **CONFIG,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "rope_scaling": None,
}
GLM: dict[str, Any] = {
    **CONFIG,
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 1,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
}
PHI: dict[str, Any] = {
    **CONFIG,
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "sliding_window": 16,
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 1.0,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 3.0]},
}
MINISTRAL: dict[str, Any] = {
    **CONFIG,
    "model_type": "ministral3",
    "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1
    },
    "architectures": ["Ministral3ForCausalLM"],
    "sliding_window": None,
}  # fmt: skip
WRAPPED: dict[str, Any] = {
    "model_type": "mistral3",
    "architectures": ["Mistral3ForConditionalGeneration"],
    "text_config": MINISTRAL,
}
QWEN_MOE: dict[str, Any] = {
    **EXPERTS,
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 8,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
SMOLLM: dict[str, Any] = {
    **CONFIG,
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "no_rope_layers": [1],
    "rope_scaling": None,
}
HYBRID: dict[str, Any] = {
    **QWEN_MOE,
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
    "attn_output_gate": True,
    "output_gate_type": "swish",
}
SOUND: tuple[dict[str, Any], ...] = (CONFIG, GEMMA, EXPERTS, GLM, PHI, MINISTRAL, WRAPPED, QWEN_MOE, SMOLLM, HYBRID)
"""A configuration of each family that reads keys of its own."""
GENERATION: dict[str, Any] = {
    "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "eos_token_id": 2
}  # fmt: skip

QUANTISED: dict[str, Any] = {
    **CONFIG,
    "quantization_config": {
        "quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": True,
        "checkpoint_format": "gptq", "weight_block_size": [128, 128], "config_groups": {"a": {"weights": {}}},
    },
}  # fmt: skip

HOSTILE: tuple[str, ...] = (
    "null",
    "true",
    "0",
    "-1",
    "-0.0",
    "1e-320",
    "1e308",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    str(1 << 31),
    str(1 << 63),
    str(10**9),
    str(10**30),
    "9" * 4000,
    "9" * 5000,
    '""',
    '"\\ud800"',
    '"\\u0000"',
    '"512"',
    '"' + "x" * 100_000 + '"',
    "[]",
    "{}",
    "[[]]",
    '{"a":1}',
    "[null]",
    "[" + "7," * 200_000 + "7]",
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '["full_attention"]',
    '{"rope_type":"llama3"}',
    '{"rope_type":"linear","factor":1e-300}',
    '{"full_attention":3}',
    '{"rope_type":"yarn","factor":1e308}',
    '{"rope_type":"yarn","factor":2,"beta_fast":1e-300,"original_max_position_embeddings":1}',
    '{"rope_type":"yarn","factor":null,"original_max_position_embeddings":1,"mscale":1e9,"mscale_all_dim":1e-9}',
    '{"rope_type":"dynamic","factor":10000}',
    '{"rope_type":"longrope","short_factor":[1,"a"],"long_factor":[]}',
    '{"rope_type":"longrope","short_factor":[1,1],"long_factor":[1e-300,1e300]}',
    '{"rope_theta":[],"partial_rotary_factor":1e-9}',
    '{"model_type":"mistral"}',
    "[0,1,2,true]",
)
"""Values, as JSON, that any field of a configuration may have."""

NUMBERS: tuple[int, ...] = (0, 1, 2, 7, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 1 << 60, (1 << 64) - 1)
"""Values for a count, a length, an offset or a dimension in a binary header."""


def with_field(config: dict[str, Any], name: str, value: str) -> bytes:
    """Return a ``config.json`` whose field ``name`` is the JSON ``value``, valid or not."""
    fields = [f'"{key}":{json.dumps(other)}' for key, other in config.items() if key != name]
    return ("{" + ",".join([*fields, f'"{name}":{value}']) + "}").encode()


def string(text: bytes) -> bytes:
    """Return a string in GGUF's encoding."""
    return struct.pack("<Q", len(text)) + text


GGUF_VALUES: tuple[tuple[bytes, bytes], ...] = (
    (b"general.architecture", struct.pack("<I", 8) + string(b"llama")),
    (b"general.alignment", struct.pack("<II", 4, 32)),
    (b"llama.embedding_length", struct.pack("<II", 4, 8)),
    (b"llama.block_count", struct.pack("<II", 4, 1)),
    (b"llama.attention.head_count", struct.pack("<II", 4, 2)),
    (b"llama.attention.head_count_kv", struct.pack("<II", 4, 1)),
    (b"llama.attention.key_length", struct.pack("<II", 4, 4)),
    (b"llama.feed_forward_length", struct.pack("<II", 4, 8)),
    (b"llama.context_length", struct.pack("<II", 4, 64)),
    (b"llama.rope.freq_base", struct.pack("<If", 6, 1e4)),
    (b"llama.rope.scaling.type", struct.pack("<I", 8) + string(b"linear")),
    (b"llama.rope.scaling.factor", struct.pack("<If", 6, 2.0)),
    (b"tokenizer.ggml.eos_token_id", struct.pack("<II", 4, 2)),
    (b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, 2) + string(b"a") + string(b"b")),
    (b"general.sampling.temp", struct.pack("<If", 6, 0.5)),
)


def gguf_file(kind: TensorKind = TensorKind.F32) -> bytes:
    """Return a GGUF file of a model with one layer and all its tensors, of a kind where their rows allow it."""
    block, block_bytes = kind.block, kind.block_bytes
    wide = max(8, block)
    shapes = {
        "token_embd": (wide, 16), "output_norm": (wide,), "blk.0.attn_norm": (wide,), "blk.0.ffn_norm": (wide,),
        "blk.0.attn_q": (wide, 8), "blk.0.attn_k": (wide, 4), "blk.0.attn_v": (wide, 4),
        "blk.0.attn_output": (8, wide), "blk.0.ffn_gate": (wide, 8), "blk.0.ffn_up": (wide, 8),
        "blk.0.ffn_down": (8, wide), "rope_freqs": (2,),
    }  # fmt: skip
    values = dict(GGUF_VALUES) | {b"llama.embedding_length": struct.pack("<II", 4, wide)}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(values))
    head += b"".join(string(key) + value for key, value in values.items())
    data = b""
    for name, shape in shapes.items():
        packs = block > 1 and len(shape) == 2 and shape[0] % block == 0
        numbers = (len(shape), *shape, kind if packs else 0, len(data))
        head += string(f"{name}.weight".encode()) + struct.pack(f"<I{len(shape)}QIQ", *numbers)
        num_elements = math.prod(shape)
        data += bytes([7]) * (num_elements // block * block_bytes) if packs else struct.pack("<f", 1.0) * num_elements
        data += bytes(-len(data) % 32)
    return head + bytes(-len(head) % 32) + data


def safetensors_file(quantised: str = "") -> bytes:
    """Return the weights of the model that ``CONFIG`` describes, its projections by ``gptq``, ``awq`` or ``fp8``."""
    shapes = {
        "model.embed_tokens.weight": [16, 8], "model.norm.weight": [8],
        **{f"model.layers.0.{name}.weight": shape for name, shape in {
            "input_layernorm": [8], "post_attention_layernorm": [8], "self_attn.q_proj": [8, 8],
            "self_attn.k_proj": [4, 8], "self_attn.v_proj": [4, 8], "self_attn.o_proj": [8, 8],
            "mlp.gate_proj": [8, 8], "mlp.up_proj": [8, 8], "mlp.down_proj": [8, 8],
        }.items()},
    }  # fmt: skip
    stored: dict[str, tuple[str, list[int]]] = {}
    for name, shape in shapes.items():
        if not quantised or "_proj" not in name:
            stored[name] = "F32", shape
            continue
        rows, columns = shape
        stem, words = name.removesuffix("weight"), -(-rows // 8)
        pieces = {
            "fp8": {"weight": ("F8_E4M3", shape), "weight_scale_inv": ("F32", [1, 1])},
            "gptq": {
                "qweight": ("I32", [columns // 8, rows]), "qzeros": ("I32", [1, words]), "scales": ("F16", [1, rows]),
                "g_idx": ("I32", [columns]),
            },
            "awq": {
                "qweight": ("I32", [columns, words]), "qzeros": ("I32", [1, words]), "scales": ("F16", [1, rows]),
            },
        }[quantised]  # fmt: skip
        stored |= {stem + end: piece for end, piece in pieces.items()}
    header, data = {}, b""
    for name, (dtype, shape) in stored.items():
        # A word is 0 in indices of groups, which are of one group.
        element = {"F32": struct.pack("<f", 0.5), "F16": struct.pack("<e", 0.5), "F8_E4M3": b"\x30"}.get(
            dtype, bytes(4)
        )
        values = element * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return ``data`` with a number overwritten, bytes changed, a piece taken out or doubled, or its end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(max(1, len(changed)))
        match rng.randrange(6):
            case 0:
                changed[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
            case 1:
                changed[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
            case 2:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                del changed[at : at + rng.choice((1, 4, 8, 64))]
            case 4:
                changed[at:at] = changed[at : at + rng.choice((1, 8, 64, 300))]
            case _:
                del changed[at:]
    return bytes(changed)


def folder_config(rng: random.Random) -> dict[str, bytes]:
    """Return the files of a folder of which some fields are hostile."""
    base = rng.choice((*SOUND, QUANTISED))
    config = with_field(base, rng.choice(list(base)), rng.choice(HOSTILE))
    generation = with_field(GENERATION, rng.choice(list(GENERATION)), rng.choice(HOSTILE))
    if rng.random() < 0.3:
        config = mutated(config, rng)
    return {"config.json": config, "generation_config.json": generation}


def model_of(model_type: str, **values: Any) -> ModelConfig:
    """Return the model of a ``config.json`` with ``values``, which need not be complete."""
    usual = {"rms_norm_eps": 1e-6, "max_position_embeddings": 512, "hidden_size": 64, "intermediate_size": 96}
    return FAMILIES[model_type].build(JsonFields(pathlib.Path("config.json"), {**usual, **values}))


def check_config(path: pathlib.Path) -> ModelConfig | ErrorInfo:
    """Read a model's configuration and size it as a load would; return the error where it is refused."""
    try:
        config = read_config(path)
        assert 0 < least_bytes(config, ModelSpec("m", str(path)), "cpu:0") < 1 << 63
        assert 0 < least_bytes(config, ModelSpec("m", str(path)), "cuda:0") < 1 << 63
        assert all(0 <= token < 1 << 31 for token in config.eos_ids)
    except ApiError as error:
        return _checked(error)
    return config


def check_weights(path: pathlib.Path) -> ModelConfig | ErrorInfo:
    """Open a model's weights as a worker would, and read every tensor; return the error where they are refused."""
    import torch

    from neuron.models.parameter_reader import ParameterReader
    from neuron.models.quantization import STORED
    from neuron.models.weights import open_weights

    try:
        source = open_weights(path)
        try:
            for name, shape in source.config.tensor_shapes().items():
                source.read_into(name, torch.empty(shape))
            reader = ParameterReader(source, torch.float32, torch.device("cpu"), STORED)
            for parameters in source.config.parameters():
                reader.read(parameters)
        finally:
            source.close()
    except ApiError as error:
        return _checked(error)
    return source.config


def check_bytes(files: dict[str, bytes], folder: pathlib.Path, *, weights: bool = False) -> ModelConfig | ErrorInfo:
    """Check a model of these files, or of the one file."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        for name, data in files.items():
            (pathlib.Path(made) / name).write_bytes(data)
        path = pathlib.Path(made) / "model.gguf" if "model.gguf" in files else pathlib.Path(made)
        return check_weights(path) if weights else check_config(path)


def _checked(error: ApiError) -> ErrorInfo:
    info = error.info()
    assert 400 <= info.status < 500, info
    assert len(info.message) < 3000
    info.message.encode()
    return info
