"""Forward pass of all architectures, top to bottom.

Tensors and kernels, no requests: the batch tells which rows form a sequence. Projections of the same input are one
matrix (q, k and v; gate and up), joined while the checkpoint is read.
"""

import dataclasses
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import torch

from neuron.models import quantization
from neuron.models.config import ModelConfig
from neuron.models.matrix_reader import MatrixReader, some_rows
from neuron.models.rope import inverse_frequencies
from neuron.models.shard import WHOLE, Shard, local_config
from neuron.triton_kernels import dispatch
from neuron.triton_kernels.batch import AttentionParameters, Batch, KeyValueCache
from neuron.triton_kernels.experts import Picks
from neuron.triton_kernels.moe_matmul import Experts
from neuron.triton_kernels.operations import Operations
from neuron.triton_kernels.quantized import Matrix, QuantizedMatrix, StackedMatrix, embedding_rows

if TYPE_CHECKING:
    from neuron.models.weights import WeightSource

SumRanks = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of a layer. Matrices are ``[out, in]``, and may be quantised."""

    input_norm: torch.Tensor
    qkv: Matrix
    """``[(H + 2 K) D, hidden]``"""
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    """``[H + K, D]``: the query norm's weights for each query head, then the key norm's for each key head."""
    output: Matrix
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: Matrix
    """``[2 I, hidden]``"""
    down: Matrix
    router: torch.Tensor | None = None
    """``[E, hidden]`` where the MLP is E experts; ``gate_up`` and ``down`` are then :data:`~.moe_matmul.Experts`."""
    attention_out_norm: torch.Tensor | None = None
    mlp_out_norm: torch.Tensor | None = None
    window_tokens: int = 0
    """Number of last tokens that a token attends to; 0: all."""


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a model, on one device in one dtype. ``head`` is ``embedding`` where they are tied."""

    embedding: torch.Tensor | QuantizedMatrix
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Matrix
    inverse_frequencies: torch.Tensor
    """``[D / 2]`` float32"""
    window_inverse_frequencies: torch.Tensor | None = None
    """Inverse frequencies of layers with a window."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations and cache."""
        return self.norm.dtype


def load_decoder(
    source: "WeightSource",
    dtype: torch.dtype,
    device: torch.device,
    *,
    quant: str = quantization.NONE,
    shard: Shard = WHOLE,
) -> Generator[float, None, DecoderWeights]:
    """Read a checkpoint, or one rank's part; yield the share done after each layer, return the weights."""
    config = source.config
    local = local_config(config, shard)
    reader = MatrixReader(source, dtype, device, quant, shard)
    expected = reader.shapes
    embedding = reader.table("model.embed_tokens.weight")
    layers = []
    for number in range(config.num_layers):
        yield (number + 1) / (config.num_layers + 2)
        prefix = f"model.layers.{number}."
        attention = prefix + "self_attn."
        qk_norm = None
        if config.architecture.qk_norm:
            query, key = reader.vector(attention + "q_norm.weight"), reader.vector(attention + "k_norm.weight")
            qk_norm = torch.cat((query.expand(local.num_heads, -1), key.expand(local.num_kv_heads, -1)))
        mlps = [f"{prefix}mlp.experts.{i}." for i in range(config.num_experts)] or [prefix + "mlp."]
        gate_up = reader.matrix(*(f"{mlp}{which}_proj.weight" for mlp in mlps for which in ("gate", "up")))
        down = reader.matrix(*(mlp + "down_proj.weight" for mlp in mlps))
        if config.num_experts:
            gate_up, down = (
                matrix.view(config.num_experts, -1, matrix.shape[-1]) if isinstance(matrix, torch.Tensor) else matrix
                for matrix in (gate_up, down)
            )
        sandwich = config.architecture.sandwich_norms
        biases = [attention + which + "_proj.bias" for which in "qkvo"]
        layers.append(
            LayerWeights(
                input_norm=reader.vector(prefix + "input_layernorm.weight"),
                qkv=reader.matrix(*(f"{attention}{which}_proj.weight" for which in "qkv")),
                qkv_bias=reader.vector(*biases[:3]) if biases[0] in expected else None,
                qk_norm=qk_norm,
                output=reader.matrix(attention + "o_proj.weight"),
                # Ranks' partial products are summed: the bias is in one of them.
                output_bias=reader.vector(biases[3]) if biases[3] in expected and not shard.rank else None,
                post_norm=reader.vector(
                    prefix + f"{'pre_feedforward' if sandwich else 'post_attention'}_layernorm.weight"
                ),
                gate_up=gate_up,
                down=down,
                router=reader.plain(prefix + "mlp.gate.weight") if config.num_experts else None,
                attention_out_norm=reader.vector(prefix + "post_attention_layernorm.weight") if sandwich else None,
                mlp_out_norm=reader.vector(prefix + "post_feedforward_layernorm.weight") if sandwich else None,
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
        norm=reader.vector("model.norm.weight"),
        head=some_rows(embedding, shard.vocabulary(config))
        if config.tie_embeddings
        else reader.matrix("lm_head.weight"),
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
    operations: Operations | None = None,
    sum_ranks: SumRanks | None = None,
) -> torch.Tensor:
    """Return the normalised hidden state ``[T, hidden]`` of ``token_ids`` ``[T]``, and write their keys and values.

    The caches are ``[layers, pages, page_size, K, D]``. ``operations`` are the device's own unless given. Where several
    ranks hold the model, ``config`` is that of the rank's own part, and ``sum_ranks`` returns the sum of a tensor over
    the ranks, in place or not.
    """
    eps = config.rms_norm_eps
    scale = config.attention_scale or config.head_dim**-0.5
    kind = config.architecture
    activation = "silu" if kind.activation == "silu" else "gelu"
    residual = embedding_rows(token_ids, weights.embedding, weights.dtype)
    kernels = dispatch.operations_for(residual.device, residual.dtype) if operations is None else operations
    if kind.scales_embedding:
        # Rounded to the dtype first, as these models were trained.
        residual *= torch.tensor(config.hidden_size**0.5, dtype=residual.dtype)
    rotary = window_rotary = kernels.rotary_table(batch.positions, weights.inverse_frequencies, residual.dtype)
    if weights.window_inverse_frequencies is not None:
        window_rotary = kernels.rotary_table(batch.positions, weights.window_inverse_frequencies, residual.dtype)
    for number, layer in enumerate(weights.layers):
        cache = KeyValueCache(key_cache[number], value_cache[number])
        parameters = AttentionParameters(scale, layer.window_tokens, qk_norm=layer.qk_norm, eps=eps)
        angles = window_rotary if layer.window_tokens else rotary
        qkv = kernels.normed_linear(residual, (layer.input_norm, eps), layer.qkv, layer.qkv_bias)
        x = kernels.attention(qkv, angles, cache, batch, parameters)
        _add(kernels, x, layer.output, layer.output_bias, layer.attention_out_norm, eps, residual, sum_ranks)
        if layer.router is None:
            x = kernels.normed_mlp_in(residual, (layer.post_norm, eps), layer.gate_up, activation)
            _add(kernels, x, layer.down, None, layer.mlp_out_norm, eps, residual, sum_ranks)
        else:
            x = kernels.rms_norm(residual, layer.post_norm, eps)
            picks = Picks(config.num_experts_per_token, config.normalises_experts)
            added = residual if sum_ranks is None else torch.zeros_like(residual)
            kernels.add_experts(x, layer.router, _experts(layer.gate_up), _experts(layer.down), picks, added)
            if sum_ranks is not None:
                residual.add_(sum_ranks(added))
    return kernels.rms_norm(residual, weights.norm, eps)


def _add(
    kernels: Operations,
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None,
    out_norm: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor,
    sum_ranks: SumRanks | None,
) -> None:
    """Add ``x weight^T + bias``, summed over the ranks and normalised where the model does so, to ``residual``."""
    if out_norm is None and sum_ranks is None:
        kernels.add_linear(x, weight, bias, residual)
        return
    x = kernels.linear(x, weight, bias)
    if sum_ranks is not None:
        x = sum_ranks(x)
    if out_norm is None:
        residual.add_(x)
    else:
        residual.add_(kernels.rms_norm(x, out_norm, eps))


def _experts(matrix: Matrix) -> Experts:
    if isinstance(matrix, StackedMatrix):
        raise TypeError("experts of one layer are in one form")
    return matrix


def logits(
    weights: DecoderWeights, hidden: torch.Tensor, operations: Operations | None = None, cap: float = 0.0
) -> torch.Tensor:
    """Return the logits ``[R, V]`` in float32 of the rows ``hidden`` ``[R, hidden]``, within ``cap`` unless it is 0.

    On a rank, the logits of its run of the vocabulary.
    """
    kernels = dispatch.operations_for(hidden.device, hidden.dtype) if operations is None else operations
    found = kernels.linear(hidden, weights.head).float()
    return found.div_(cap).tanh_().mul_(cap) if cap else found
