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
from neuron.triton_kernels import dispatch, reference
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
    router: torch.Tensor | None = None
    """``[E, hidden]`` where the MLP is E experts; ``gate_up`` and ``down`` then begin with a dimension E."""
    attention_out_norm: torch.Tensor | None = None
    mlp_out_norm: torch.Tensor | None = None
    window_tokens: int = 0
    """How many of the last tokens a token sees; 0: all."""


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a model, on one device in one dtype. ``head`` is ``embedding`` where they are tied."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor
    inverse_frequencies: torch.Tensor
    """``[D / 2]`` float32"""
    window_inverse_frequencies: torch.Tensor | None = None
    """The same in layers with a window."""


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
        mlps = [f"{prefix}mlp.experts.{i}." for i in range(config.num_experts)] or [prefix + "mlp."]
        gate_up = read(*(f"{mlp}{which}_proj.weight" for mlp in mlps for which in ("gate", "up")))
        down = read(*(mlp + "down_proj.weight" for mlp in mlps))
        if config.num_experts:
            gate_up, down = (matrix.view(config.num_experts, -1, matrix.shape[-1]) for matrix in (gate_up, down))
        sandwich = config.architecture.sandwich_norms
        layers.append(
            LayerWeights(
                input_norm=read(prefix + "input_layernorm.weight"),
                qkv=read(*(f"{attention}{which}_proj.weight" for which in "qkv")),
                qkv_bias=read(*(f"{attention}{which}_proj.bias" for which in "qkv")) if biased else None,
                qk_norm=qk_norm,
                output=read(attention + "o_proj.weight"),
                output_bias=read(attention + "o_proj.bias") if attention + "o_proj.bias" in expected else None,
                post_norm=read(prefix + f"{'pre_feedforward' if sandwich else 'post_attention'}_layernorm.weight"),
                gate_up=gate_up,
                down=down,
                router=read(prefix + "mlp.gate.weight") if config.num_experts else None,
                attention_out_norm=read(prefix + "post_attention_layernorm.weight") if sandwich else None,
                mlp_out_norm=read(prefix + "post_feedforward_layernorm.weight") if sandwich else None,
                window_tokens=config.window_tokens if number in config.windowed_layers else 0,
            )
        )
    yield (config.num_layers + 1) / (config.num_layers + 2)
    angles = inverse_frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
    window_angles = (
        inverse_frequencies(config.window_rope_theta, config.head_dim, None) if config.windowed_layers else ()
    )
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(layers),
        norm=read("model.norm.weight"),
        head=embedding if config.tie_embeddings else read("lm_head.weight"),
        inverse_frequencies=torch.tensor(angles, dtype=torch.float32, device=device),
        window_inverse_frequencies=torch.tensor(window_angles, device=device) if window_angles else None,
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
    scale = config.attention_scale or config.head_dim**-0.5
    residual = functional.embedding(token_ids, weights.embedding)
    if not config.is_plain:
        return _forward_any(config, weights, residual, batch, key_cache, value_cache, scale)
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


def _forward_any(
    config: ModelConfig,
    weights: DecoderWeights,
    residual: torch.Tensor,
    batch: Batch,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The forward pass of an architecture with windows, experts or norms behind its blocks: eager on every device."""
    eps = config.rms_norm_eps
    if config.architecture.scales_embedding:
        # Rounded to the dtype first, as these models were trained.
        residual *= torch.tensor(config.hidden_size**0.5, dtype=residual.dtype)
    rotary = window_rotary = rotary_table(batch.positions, weights.inverse_frequencies, residual.dtype)
    if weights.window_inverse_frequencies is not None:
        window_rotary = rotary_table(batch.positions, weights.window_inverse_frequencies, residual.dtype)
    x = reference.rms_norm(residual, weights.layers[0].input_norm, eps)
    for number, layer in enumerate(weights.layers):
        keys, values = key_cache[number], value_cache[number]
        if number:
            x = reference.add_rms_norm(x, residual, layer.input_norm, eps)
        qkv = functional.linear(x, layer.qkv, layer.qkv_bias)
        angles = window_rotary if layer.window_tokens else rotary
        q = reference.rope_and_cache(qkv, layer.qk_norm, eps, angles, batch.slots, keys, values)
        x = reference.paged_attention(q, keys, values, batch, scale, layer.window_tokens)
        x = functional.linear(x, layer.output, layer.output_bias)
        if layer.attention_out_norm is not None:
            x = reference.rms_norm(x, layer.attention_out_norm, eps)
        x = reference.add_rms_norm(x, residual, layer.post_norm, eps)
        x = _mlp(config, layer, x)
        if layer.mlp_out_norm is not None:
            x = reference.rms_norm(x, layer.mlp_out_norm, eps)
    return reference.add_rms_norm(x, residual, weights.norm, eps)


def _mlp(config: ModelConfig, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    """Return the MLP of ``x`` ``[T, hidden]``."""
    if layer.router is not None:
        router, k = functional.linear(x, layer.router), config.num_experts_per_token
        return reference.experts(x, router, layer.gate_up, layer.down, k, config.normalises_experts)
    gate_up = functional.linear(x, layer.gate_up)
    product = (
        reference.silu_and_mul(gate_up) if config.architecture.activation == "silu" else reference.gelu_and_mul(gate_up)
    )
    return functional.linear(product, layer.down)


def logits(
    weights: DecoderWeights, hidden: torch.Tensor, operations: dispatch.Operations | None = None, cap: float = 0.0
) -> torch.Tensor:
    """Return the logits ``[R, V]`` in float32 of the rows ``hidden`` ``[R, hidden]``, within ``cap`` unless it is 0."""
    kernels = dispatch.operations_for(hidden.device, hidden.dtype) if operations is None else operations
    found = kernels.linear(hidden, weights.head).float()
    return found.div_(cap).tanh_().mul_(cap) if cap else found
