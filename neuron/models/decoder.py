"""The forward pass that all architectures share, top to bottom.

It knows tensors and kernels, not requests: which rows belong together is in the batch. Projections that read the same
input are one matrix each (q, k and v; gate and up), put together while the checkpoint is read.
"""

import dataclasses
from collections.abc import Generator

import torch
from torch.nn import functional

from neuron.models.config import ModelConfig
from neuron.models.rope import inverse_frequencies
from neuron.models.weights import WeightSource
from neuron.triton_kernels import dispatch
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.reference import rotary_table


@dataclasses.dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Matrices are ``[out, in]``."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    """``[(H + 2 K) D, hidden]``"""
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    """``[H + K, D]``: the query norm's weights for each query head, then the key norm's for each key head."""
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    """``[2 I, hidden]``"""
    down: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a model, on one device in one dtype. ``head`` is ``embedding`` where they are tied."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor
    inverse_frequencies: torch.Tensor
    """``[D / 2]`` float32"""


def load_decoder(
    source: WeightSource, dtype: torch.dtype, device: torch.device
) -> Generator[float, None, DecoderWeights]:
    """Read a checkpoint; yield the share done after each layer, return the weights."""
    config = source.config

    def read(*names: str) -> torch.Tensor:
        shapes = [expected[name] for name in names]
        fused = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=dtype, device=device)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            source.read_into(name, fused[start : start + shape[0]])
            start += shape[0]
        return fused

    expected = config.tensor_shapes()
    embedding = read("model.embed_tokens.weight")
    layers = []
    for number in range(config.num_layers):
        yield (number + 1) / (config.num_layers + 2)
        prefix = f"model.layers.{number}."
        attention = prefix + "self_attn."
        biased = attention + "q_proj.bias" in expected
        qk_norm = None
        if config.architecture.qk_norm:
            query, key = read(attention + "q_norm.weight"), read(attention + "k_norm.weight")
            qk_norm = torch.cat((query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)))
        layers.append(
            LayerWeights(
                input_norm=read(prefix + "input_layernorm.weight"),
                qkv=read(*(f"{attention}{which}_proj.weight" for which in "qkv")),
                qkv_bias=read(*(f"{attention}{which}_proj.bias" for which in "qkv")) if biased else None,
                qk_norm=qk_norm,
                output=read(attention + "o_proj.weight"),
                output_bias=read(attention + "o_proj.bias") if attention + "o_proj.bias" in expected else None,
                post_norm=read(prefix + "post_attention_layernorm.weight"),
                gate_up=read(prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"),
                down=read(prefix + "mlp.down_proj.weight"),
            )
        )
    yield (config.num_layers + 1) / (config.num_layers + 2)
    angles = inverse_frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(layers),
        norm=read("model.norm.weight"),
        head=embedding if config.tie_embeddings else read("lm_head.weight"),
        inverse_frequencies=torch.tensor(angles, dtype=torch.float32, device=device),
    )


def forward(
    config: ModelConfig,
    weights: DecoderWeights,
    token_ids: torch.Tensor,
    batch: Batch,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    operations: dispatch.Operations | None = None,
) -> torch.Tensor:
    """Return the normalised hidden state ``[T, hidden]`` of ``token_ids`` ``[T]``, and write their keys and values.

    The caches are ``[layers, pages, page_size, K, D]``. ``operations`` are the device's own unless given.
    """
    eps = config.rms_norm_eps
    scale = config.head_dim**-0.5
    residual = functional.embedding(token_ids, weights.embedding)
    kernels = dispatch.operations_for(residual.device, residual.dtype) if operations is None else operations
    rotary = rotary_table(batch.positions, weights.inverse_frequencies, residual.dtype)
    for number, layer in enumerate(weights.layers):
        keys, values = key_cache[number], value_cache[number]
        qkv = kernels.normed_linear(residual, (layer.input_norm, eps), layer.qkv, layer.qkv_bias)
        x = kernels.attention(qkv, layer.qk_norm, eps, rotary, keys, values, batch, scale)
        kernels.add_linear(x, layer.output, layer.output_bias, residual)
        x = kernels.normed_mlp_in(residual, (layer.post_norm, eps), layer.gate_up)
        kernels.add_linear(x, layer.down, None, residual)
    return kernels.rms_norm(residual, weights.norm, eps)


def logits(
    weights: DecoderWeights, hidden: torch.Tensor, operations: dispatch.Operations | None = None
) -> torch.Tensor:
    """Return the logits ``[R, V]`` in float32 of the rows ``hidden`` ``[R, hidden]``."""
    kernels = dispatch.operations_for(hidden.device, hidden.dtype) if operations is None else operations
    return kernels.linear(hidden, weights.head).float()
