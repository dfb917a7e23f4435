"""Every operation of a step in eager torch: the reference of the kernels, and their replacement on other devices.

Shapes: T query tokens of B sequences, S cached tokens, H query heads, K key-value heads, D head dimension, P pages a
sequence, I intermediate size, V vocabulary. Activations are in the model's dtype. Inputs are changed only where a
docstring says so. Written for few and large calls: on a CPU a call costs 1 to 60 us at any size.
"""

import itertools
from typing import Any, assert_never

import numpy as np
import torch
from torch.nn import functional

from neuron.triton_kernels.batch import AttentionPart, Batch
from neuron.triton_kernels.quantized import Matrix, QuantizedMatrix, StackedMatrix
from neuron.triton_kernels.routing import Routing

Int32Array = np.ndarray[Any, np.dtype[np.int32]]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x / rms(x) * weight`` over the last dimension (arXiv:1910.07467)."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add ``x`` to ``residual`` in place and return the sum normalised."""
    return rms_norm(residual.add_(x), weight, eps)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` ``[T, I]`` of the fused projection ``[T, 2 I]`` (SwiGLU, arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def gelu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``gelu(gate) * up`` ``[T, I]`` of ``[T, 2 I]``, with GELU in its tanh form (arXiv:1606.08415)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh").mul_(up)


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x w^T + bias`` ``[M, N]`` of ``x`` ``[M, K]`` and ``weight`` ``[N, K]``."""
    return functional.linear(x, weight, bias)


def skinny_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``activation(norm(x) w^T + bias)``, added in place to ``residual`` if that is given."""
    if norm is not None:
        x = rms_norm(x, *norm)
    out = functional.linear(x, weight)
    if bias is not None:
        if activation is None:
            out += bias
        else:
            out[:, : len(bias)] += bias
    if activation is not None:
        out = silu_and_mul(out) if activation == "silu" else gelu_and_mul(out)
    return out if residual is None else residual.add_(out)


def quantized_matmul(
    x: torch.Tensor,
    weight: QuantizedMatrix,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x w^T + bias`` with ``weight`` dequantised to float32, added in place to ``residual`` if given."""
    out = functional.linear(x.float(), weight.dequantize(), None if bias is None else bias.float())
    return out.to(x.dtype) if residual is None else residual.add_(out)


def linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x w^T + bias`` ``[M, N]``, whatever form the weight has."""
    match weight:
        case torch.Tensor():
            return functional.linear(x, weight, bias)
        case QuantizedMatrix():
            return quantized_matmul(x, weight, bias)
        case StackedMatrix():
            out = torch.cat([linear(x, part) for part in weight.parts], dim=-1)
            return out if bias is None else out.add_(bias)
        case _:
            assert_never(weight)


def moe_matmul(
    x: torch.Tensor, weight: torch.Tensor | QuantizedMatrix, routing: Routing, *, weighted: bool = False
) -> torch.Tensor:
    """Return ``[T C, N]``, row ``token * C + choice``: each pair's row of ``x`` by its expert's ``[N, K]``.

    ``weight`` is ``[E, N, K]``, or ``[E N, K]`` quantised. One pass for each expert that a row picked.
    """
    num_pairs, num_experts = len(routing.order), len(routing.starts) - 1
    shared = num_pairs // len(x)
    width = weight.shape[1] if isinstance(weight, torch.Tensor) else weight.shape[0] // num_experts
    out = torch.empty((num_pairs, width), dtype=x.dtype, device=x.device)
    starts = routing.starts.tolist()
    for expert, (start, stop) in enumerate(itertools.pairwise(starts)):
        if start == stop:
            continue
        pairs = routing.order[start:stop].long()
        if isinstance(weight, torch.Tensor):
            own: Matrix = weight[expert]
        else:
            own = weight.map(lambda array, e=expert: array[e * width : (e + 1) * width])  # type: ignore[misc]
        product = linear(x[pairs // shared], own)
        out[pairs] = product * routing.weights[pairs, None].to(x.dtype) if weighted else product
    return out


def rotary_table(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine ``[T, 1, D]`` and sine ``[T, 1, D / 2]`` of each position; the angles are computed in float32."""
    angles = positions.to(torch.float32).unsqueeze(1) * inverse_frequencies
    cos = angles.cos().to(dtype)
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)


def add_choices(parts: torch.Tensor, choices: int, residual: torch.Tensor) -> None:
    """Add ``parts`` ``[T C, hidden]``, summed over a token's choices, to ``residual`` ``[T, hidden]`` in place."""
    total = parts.view(len(residual), choices, -1).sum(1, dtype=torch.float32)
    residual.copy_(residual.float() + total)


def rope_and_cache(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor | None,
    eps: float,
    rotary: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to their KV slots, return the queries ``[T, H, D]``.

    ``qkv`` ``[T, (H + 2 K) D]`` is the fused projection; ``qk_norm`` ``[H + K, D]`` normalises each head first where
    the model does so; the caches are ``[pages, page_size, K, D]`` and are written in place. Heads rotate by halves
    (i, i + D/2), as in arXiv:2104.09864 with its pairs reordered.
    """
    num_kv_heads, head_dim = key_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    rotated_heads = heads.shape[1] - num_kv_heads
    x = heads[:, :rotated_heads]
    if qk_norm is not None:
        x = functional.rms_norm(x, (head_dim,), None, eps).mul_(qk_norm)
    cos, sin = rotary
    half = head_dim // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
    key_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, out[:, rotated_heads - num_kv_heads :])
    value_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, heads[:, rotated_heads:])
    return out[:, : rotated_heads - num_kv_heads]


def attention_parts(
    cu_seqlens: Int32Array,
    page_table: Int32Array,
    context_lens: Int32Array,
    page_size: int,
    device: torch.device,
    window: int = 0,
) -> tuple[AttentionPart, ...]:
    """Split a step into parts, on the host, once for all layers.

    Decodes, sorted by falling length, share a call while the shortest is at least half the longest, so that padding at
    most doubles the work however mixed the lengths are: one call for 16 sequences of 256 tokens takes 290 us, 16 calls
    take 16 x 38. Each prompt's chunk is a part of its own.
    """
    query_lens = np.diff(cu_seqlens)
    num_sequences = len(query_lens)
    parts = []
    first = 0
    while first < num_sequences:
        longest = int(context_lens[first])
        start = int(cu_seqlens[first])
        num_pages = -(-longest // page_size)
        last = first + 1
        if query_lens[first] == 1:
            while last < num_sequences and query_lens[last] == 1 and longest // 2 <= context_lens[last] <= longest:
                last += 1
        pages = torch.from_numpy(page_table[first:last, :num_pages].reshape(-1)).to(device)
        mask: torch.Tensor | None = None
        if query_lens[first] == 1:
            lens = context_lens[first:last]
            if (lens != longest).any():
                seen = np.arange(longest, dtype=np.int32) < lens[:, None]
                mask = torch.from_numpy(seen).to(device)[:, None, None, :]
        elif query_lens[first] != longest:
            seen = np.arange(longest, dtype=np.int32) <= np.arange(longest - query_lens[first], longest)[:, None]
            mask = torch.from_numpy(seen).to(device)
        decodes = bool(query_lens[first] == 1)
        window_mask = None
        if 0 < window < longest:
            if decodes:
                own = context_lens[first:last, None] - 1
            else:
                own = np.arange(longest - query_lens[first], longest)[:, None]
            tokens = np.arange(longest, dtype=np.int32)
            window_mask = torch.from_numpy((tokens <= own) & (tokens > own - window)).to(device)
            window_mask = window_mask[:, None, None, :] if decodes else window_mask
        stop = int(cu_seqlens[last])
        parts.append(AttentionPart(start, stop, last - first, pages, longest, mask, decodes, window_mask))
        first = last
    return tuple(parts)


def paged_attention(
    q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: Batch, scale: float, window: int = 0
) -> torch.Tensor:
    """Return causal attention ``[T, H D]`` of ``q`` ``[T, H, D]`` over each row's own sequence in the paged cache.

    Prefill and decode rows mix. Query head h reads key-value head ``h // (H / K)``. This step's keys and values must be
    in the cache already. With a ``window``, a row attends to that many tokens, itself the last.
    """
    outputs = [_attend(q[part.start : part.stop], key_cache, value_cache, part, scale, window) for part in batch.parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(
    q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, part: AttentionPart, scale: float, window: int
) -> torch.Tensor:
    num_kv_heads, head_dim = key_cache.shape[2:]
    mask = part.window_mask if window and part.window_mask is not None else part.mask
    gathered = (part.num_sequences, -1, num_kv_heads, head_dim)
    keys = key_cache.index_select(0, part.pages).view(gathered)[:, : part.num_tokens].transpose(1, 2)
    values = value_cache.index_select(0, part.pages).view(gathered)[:, : part.num_tokens].transpose(1, 2)
    if part.decodes:
        # The queries of a key-value head attend to the same tokens, so they are the rows of one small attention: no
        # head is repeated, and it is four times as fast as matmul, softmax, matmul.
        grouped = q.view(part.num_sequences, num_kv_heads, -1, head_dim)
        out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(part.num_sequences, -1)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
        scale=scale,
    )
    return out[0].transpose(0, 1).reshape(q.shape[0], -1)


def windowed_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: Batch,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Return attention ``[T, H, D]`` as :func:`paged_attention`, with a window and a cap on the scores; 0 is off.

    In float32 and by the definition, one sequence after another: the reference of the attention kernels.
    """
    num_heads = q.shape[1]
    num_kv_heads, head_dim = key_cache.shape[2:]
    outputs = []
    starts = batch.cu_seqlens.tolist()
    for index, context in enumerate(batch.context_lens.tolist()):
        pages = batch.page_table[index].long()
        keys, values = (
            cache[pages]
            .reshape(-1, num_kv_heads, head_dim)[:context]
            .float()
            .repeat_interleave(num_heads // num_kv_heads, 1)
            for cache in (key_cache, value_cache)
        )
        queries = q[starts[index] : starts[index + 1]].float()
        scores = torch.einsum("thd,shd->hts", queries, keys) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position = torch.arange(context - len(queries), context, device=q.device)[:, None]
        cached = torch.arange(context, device=q.device)[None, :]
        seen = cached <= position
        if window:
            seen &= cached > position - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", weights, values).to(q.dtype))
    return torch.cat(outputs)


def rope_decode_attention(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor | None,
    eps: float,
    rotary: tuple[torch.Tensor, torch.Tensor],
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: Batch,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Norm, rotate, write the new keys and values, and attend: ``[B, H D]`` of ``qkv`` ``[B, (H + 2 K) D]``."""
    q = rope_and_cache(qkv, qk_norm, eps, rotary, batch.slot_mapping, key_cache, value_cache)
    out = windowed_attention(q, key_cache, value_cache, batch, scale, window=window, soft_cap=soft_cap)
    return out.reshape(len(qkv), -1)
