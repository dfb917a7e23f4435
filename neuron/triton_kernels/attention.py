"""Attention of a step over the paged cache, from the fused projection of queries, keys and values.

A step of decodes alone is one kernel; otherwise heads are rotated and cached first, and decodes and prompts attend each
by a kernel of their own. Eager torch takes the step in parts (:func:`attention_parts`), each one call of
scaled_dot_product_attention: on a CPU a call costs 1 to 60 us at any size.
"""

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from neuron.triton_kernels.batch import AttentionParameters, AttentionPart, Batch, PagedCache
from neuron.triton_kernels.cache_codes import read
from neuron.triton_kernels.decode_attention import decode_attention, rope_decode_attention
from neuron.triton_kernels.operation import Operation
from neuron.triton_kernels.prefill_attention import attention_by_definition, prefill_attention
from neuron.triton_kernels.rope import rope_and_cache
from neuron.triton_kernels.rotary import Rotary

Int32Array = np.ndarray[Any, np.dtype[np.int32]]


@Operation
def attention(
    qkv: torch.Tensor, rotary: Rotary, cache: PagedCache, batch: Batch, parameters: AttentionParameters
) -> torch.Tensor:
    """Norm and rotate the heads of ``qkv`` ``[T, (H + 2 K) D]``, write keys and values, and attend: ``[T, H D]``."""
    q = rope_and_cache.eager(qkv, rotary, cache, batch.slot_mapping, parameters)
    return paged_attention(q, cache, batch, parameters)


@attention.launcher
def _launch(
    qkv: torch.Tensor, rotary: Rotary, cache: PagedCache, batch: Batch, parameters: AttentionParameters
) -> torch.Tensor:
    decodes, sequences = batch.num_decodes, batch.context_lens.shape[0]
    if decodes == sequences:
        return rope_decode_attention.triton(qkv, rotary, cache, batch, parameters)
    q = rope_and_cache.triton(qkv, rotary, cache, batch.slot_mapping, parameters)
    out = torch.empty_like(q)
    if decodes:
        decode_attention.triton(q, cache, batch, parameters, out, num_sequences=decodes)
    prefill_attention.triton(q, cache, batch, parameters, out, first_sequence=decodes)
    return out.view(len(q), -1)


def paged_attention(q: torch.Tensor, cache: PagedCache, batch: Batch, parameters: AttentionParameters) -> torch.Tensor:
    """Return causal attention ``[T, H D]`` of ``q`` ``[T, H, D]`` over each row's own sequence, by the batch's parts.

    Prefill and decode rows mix. Query head h reads key-value head ``h // (H / K)``. This step's keys and values must be
    in the cache already.
    """
    if parameters.soft_cap:
        return attention_by_definition(q, cache, batch, parameters).reshape(len(q), -1)
    outputs = [_attend(q[part.start : part.stop], cache, part, parameters) for part in batch.parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(q: torch.Tensor, cache: PagedCache, part: AttentionPart, parameters: AttentionParameters) -> torch.Tensor:
    num_kv_heads, head_dim = cache.keys.shape[2:]
    mask = part.window_mask if parameters.window and part.window_mask is not None else part.mask
    gathered = (part.num_sequences, -1, num_kv_heads, head_dim)
    keys, values = (
        pool.view(gathered)[:, : part.num_tokens].transpose(1, 2) for pool in read(cache, part.pages, q.dtype)
    )
    if part.decodes:
        # The queries of a key-value head attend to the same tokens, so they are the rows of one small attention: no
        # head is repeated, and it is four times as fast as matmul, softmax, matmul.
        grouped = q.view(part.num_sequences, num_kv_heads, -1, head_dim)
        out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=parameters.scale)
        return out.reshape(part.num_sequences, -1)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
        scale=parameters.scale,
    )
    return out[0].transpose(0, 1).reshape(q.shape[0], -1)


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
