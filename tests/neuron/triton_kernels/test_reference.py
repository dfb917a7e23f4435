"""The eager operations against the plainest formula, on irregular shapes."""

import math

import numpy as np
import pytest
import torch

from neuron.triton_kernels.activation import gated_activation
from neuron.triton_kernels.attention import attention_parts, paged_attention
from neuron.triton_kernels.batch import AttentionParameters, Batch, PagedCache
from neuron.triton_kernels.operations import EAGER
from neuron.triton_kernels.rope import rope_and_cache

PAGE = 4


def test_rms_norm() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 33), torch.rand(33)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(EAGER.rms_norm(x, weight, 1e-5), expected)


def test_gated_activation() -> None:
    x = torch.randn(5, 22)
    expected = x[:, :11] / (1 + (-x[:, :11]).exp()) * x[:, 11:]
    torch.testing.assert_close(gated_activation.eager(x, "silu"), expected)


@pytest.mark.parametrize("normalised", [False, True])
def test_rope_rotates_and_writes_to_slots(normalised: bool) -> None:
    torch.manual_seed(1)
    num_heads, num_kv_heads, head_dim, tokens = 6, 2, 8, 5
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    positions = torch.tensor([0, 1, 2, 77, 1000], dtype=torch.int32)
    slot_mapping = torch.tensor([4, 5, 6, 19, 11])
    frequencies = torch.tensor([1.0, 0.3, 0.05, 0.002])
    weight = torch.rand(num_heads + num_kv_heads, head_dim) if normalised else None
    keys, values = torch.zeros(6, PAGE, num_kv_heads, head_dim), torch.zeros(6, PAGE, num_kv_heads, head_dim)
    rotary = EAGER.rotary_table(positions, torch.cat((frequencies, torch.ones(4))), torch.float32)
    parameters = AttentionParameters(0.0, qk_norm=weight, eps=1e-6)
    q = rope_and_cache.eager(qkv, rotary, PagedCache(keys, values), slot_mapping, parameters)

    heads = qkv.view(tokens, -1, head_dim)
    for token in range(tokens):
        rotated = []
        for head in range(num_heads + num_kv_heads):
            x = heads[token, head]
            if weight is not None:
                x = x / (x.pow(2).mean() + 1e-6).sqrt() * weight[head]
            y = torch.empty(head_dim)
            for i in range(4):
                angle = float(positions[token]) * float(frequencies[i])
                y[i] = x[i] * math.cos(angle) - x[i + 4] * math.sin(angle)
                y[i + 4] = x[i + 4] * math.cos(angle) + x[i] * math.sin(angle)
            rotated.append(y)
        page, offset = divmod(int(slot_mapping[token]), PAGE)
        torch.testing.assert_close(q[token], torch.stack(rotated[:num_heads]), atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(keys[page, offset], torch.stack(rotated[num_heads:]), atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(values[page, offset], heads[token, num_heads + num_kv_heads :])
    written = torch.zeros(24, dtype=torch.bool).index_fill_(0, slot_mapping, True)
    assert not keys.view(24, -1)[~written].any()


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(
    "rows",
    [
        [(1, 1)],
        [(1, 30), (1, 17), (1, 16), (1, 3), (1, 1)],
        [(9, 9)],
        [(5, 21), (13, 13), (1, 1)],
        [(1, 40), (1, 9), (1, 2), (7, 7), (6, 33), (1, 50), (4, 4)],
    ],
    ids=str,
)
def test_paged_attention(rows: list[tuple[int, int]], num_heads: int, num_kv_heads: int) -> None:
    """``rows`` are (query tokens, context tokens) of each sequence; pages are scattered, others hold junk."""
    torch.manual_seed(2)
    head_dim = 8
    random = np.random.default_rng(2)
    pages_of = [-(-context // PAGE) for _, context in rows]
    order = random.permutation(np.arange(1, sum(pages_of) + 1)).astype(np.int32)
    table = np.zeros((len(rows), max(pages_of)), np.int32)
    for index, end in enumerate(np.cumsum(pages_of)):
        table[index, : pages_of[index]] = order[end - pages_of[index] : end]
    keys, values = torch.randn(2, sum(pages_of) + 1, PAGE, num_kv_heads, head_dim) * 3
    keys[0] = values[0] = 0
    cu_seqlens = np.cumsum([0, *(query for query, _ in rows)]).astype(np.int32)
    context_lens = np.array([context for _, context in rows], np.int32)
    q = torch.randn(int(cu_seqlens[-1]), num_heads, head_dim)
    parts = attention_parts(cu_seqlens, table, context_lens, PAGE, torch.device("cpu"))
    empty = torch.empty(0)
    batch = Batch(
        empty, empty, torch.from_numpy(cu_seqlens), torch.from_numpy(table), torch.from_numpy(context_lens), parts
    )
    found = paged_attention(q, PagedCache(keys, values), batch, AttentionParameters(0.25)).view(q.shape)

    for index, (query, context) in enumerate(rows):
        k = keys[table[index]].reshape(-1, num_kv_heads, head_dim)[:context]
        v = values[table[index]].reshape(-1, num_kv_heads, head_dim)[:context]
        for token in range(query):
            seen = context - query + token + 1
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                row = cu_seqlens[index] + token
                weights = (k[:seen, kv_head] @ q[row, head] * 0.25).softmax(-1)
                torch.testing.assert_close(found[row, head], weights @ v[:seen, kv_head], atol=1e-5, rtol=1e-5)
    assert sum(part.stop - part.start for part in parts) == len(q)


def test_decodes_of_similar_length_share_a_call() -> None:
    lengths = np.array([100, 90, 51, 49, 30, 25, 5], np.int32)
    table = np.zeros((7, 25), np.int32)
    parts = attention_parts(np.arange(8, dtype=np.int32), table, lengths, PAGE, torch.device("cpu"))
    assert [(part.start, part.stop, part.num_tokens) for part in parts] == [(0, 3, 100), (3, 6, 49), (6, 7, 5)]
    assert [part.mask is not None for part in parts] == [True, True, False]
