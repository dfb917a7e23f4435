"""Which kernels a model needs on a chip, and compiling them ahead: ``make kernels``.

The forward pass itself is run on ``meta`` tensors while launches are noted, for every number of rows that could choose
other tiles, so that the list cannot disagree with what a step launches.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch

from neuron.models import decoder
from neuron.models.config import ModelConfig, read_config
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan
from neuron.triton_kernels import dispatch
from neuron.triton_kernels.batch import Batch

if TYPE_CHECKING:
    from neuron.triton_kernels.launch import Variant

CAPABILITIES: Final = (80, 89, 90, 100, 120)
STEPS: Final = (1, 2, 16, 17, 64, 65, 256, 257)
"""Tokens of a step that stand for all between them: each side of every row count that the launchers compare with."""


def variants(config: ModelConfig, plan: MemoryPlan, capability: int) -> "tuple[Variant, ...]":
    """Return every variant that serving the model under ``plan`` on a chip can launch."""
    from neuron.triton_kernels.compile import target_for
    from neuron.triton_kernels.launch import recording
    from neuron.triton_kernels.operations import TritonOperations

    dtype = getattr(torch, plan.dtype)
    if dtype == torch.float32:
        return ()
    one_layer = dataclasses.replace(config, num_layers=1)
    weights = _weights(one_layer, dtype)
    operations = TritonOperations()
    shape = (1, plan.num_pages + 1, PAGE_TOKENS, config.num_kv_heads, config.head_dim)
    keys, values = _meta(*shape, dtype=dtype), _meta(*shape, dtype=dtype)
    with recording(target_for(capability)) as recorder:
        for batch in _batches(plan):
            token_ids = _meta(len(batch.positions), dtype=torch.int32)
            hidden = decoder.forward(one_layer, weights, token_ids, batch, keys, values, operations)
            decoder.logits(weights, hidden[: len(batch.context_lens)], operations)
    return recorder.variants


def prepare(config: ModelConfig, plan: MemoryPlan, device: torch.device) -> None:
    """Compile all that the model can launch on ``device``, and forbid compiling from then on.

    Nothing to do where eager torch runs. Raises what the compiler raises.
    """
    if dispatch.operations_for(device, getattr(torch, plan.dtype)) is dispatch.EAGER:
        return
    # Only here: a host without CUDA has no use for the compiler, and may not have it.
    from neuron.triton_kernels.compile import allowing_compiles, forbid_compiling, warm
    from neuron.triton_kernels.launch import target_of

    with allowing_compiles(), torch.cuda.device(device):
        warm(variants(config, plan, target_of(device).capability))
    forbid_compiling()


def _batches(plan: MemoryPlan) -> Iterator[Batch]:
    """Yield steps of decodes alone, of a prompt alone, and of both."""
    pages = -(-plan.context_tokens // PAGE_TOKENS)
    for num_tokens in sorted({min(n, plan.step_tokens) for n in (*STEPS, plan.step_tokens)}):
        for num_decodes in dict.fromkeys((min(num_tokens, plan.max_sequences), 1, 0)):
            prompts = int(num_tokens > num_decodes)
            num_sequences = num_decodes + prompts
            if not num_sequences:
                continue
            yield Batch(
                positions=_meta(num_tokens, dtype=torch.int32),
                slots=_meta(num_tokens, dtype=torch.int64),
                cu_seqlens=_meta(num_sequences + 1, dtype=torch.int32),
                page_table=_meta(num_sequences, pages, dtype=torch.int32),
                context_lens=_meta(num_sequences, dtype=torch.int32),
                num_decodes=num_decodes,
            )


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weights(config: ModelConfig, dtype: torch.dtype) -> decoder.DecoderWeights:
    def meta(*shape: int) -> torch.Tensor:
        return _meta(*shape, dtype=dtype)

    hidden, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
    shapes = config.tensor_shapes()
    has_output_bias = "model.layers.0.self_attn.o_proj.bias" in shapes
    layer = decoder.LayerWeights(
        input_norm=meta(hidden),
        qkv=meta(heads * config.head_dim, hidden),
        qkv_bias=meta(heads * config.head_dim) if "model.layers.0.self_attn.q_proj.bias" in shapes else None,
        qk_norm=meta(heads - config.num_kv_heads, config.head_dim) if config.architecture.qk_norm else None,
        output=meta(hidden, config.num_heads * config.head_dim),
        output_bias=meta(hidden) if has_output_bias else None,
        post_norm=meta(hidden),
        gate_up=meta(2 * config.intermediate_size, hidden),
        down=meta(hidden, config.intermediate_size),
    )
    embedding = meta(config.vocab_size, hidden)
    frequencies = torch.empty(config.head_dim // 2, dtype=torch.float32, device="meta")
    return decoder.DecoderWeights(embedding, (layer,), meta(hidden), embedding, frequencies)


def any_plan(config: ModelConfig, dtype: str) -> MemoryPlan:
    """Return a plan with the limits of a large card: no variant depends on more than these."""
    return MemoryPlan(
        dtype=dtype,
        context_tokens=config.context_tokens,
        max_sequences=64,
        num_pages=4096,
        step_tokens=2048,
        mixed_step_tokens=512,
        weights_bytes=0,
        kv_cache_bytes=0,
        workspace_bytes=0,
    )


def main(arguments: list[str] | None = None) -> int:
    """Compile the kernels of the models whose ``config.json`` folders are named."""
    parser = argparse.ArgumentParser(
        description="Compile the kernels that models need, for GPUs that need not be here."
    )
    parser.add_argument("models", nargs="+", type=pathlib.Path, help="folders with a config.json, or GGUF files")
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/kernels"))
    options = parser.parse_args(arguments)
    from neuron.triton_kernels.compile import KernelCache, compile_variants

    for model in options.models:
        config = read_config(model)
        for capability in options.capability or CAPABILITIES:
            start = time.monotonic()
            wanted = variants(config, any_plan(config, options.dtype), capability)
            compile_variants(wanted, capability, KernelCache(options.out))
            print(f"{model}: {len(wanted)} kernels for sm_{capability}, {time.monotonic() - start:.0f} s")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
