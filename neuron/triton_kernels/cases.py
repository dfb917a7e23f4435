"""Cases that kernels are checked on: small irregular shapes for their numbers, real ones for their machine code.

A numeric case runs a launcher and its reference on the same random inputs, outputs poisoned with NaN where they are
written in place, and returns both results. :func:`launch_everything` makes the launches of real models' shapes on
``meta`` tensors, for :func:`neuron.triton_kernels.launch.recording`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import torch

from neuron.triton_kernels import (
    activation,
    decode_attention,
    matmul,
    moe_matmul,
    moe_routing,
    norm,
    prefill_attention,
    quantized,
    quantized_matmul,
    reference,
    rope,
    rotary,
    sampling_cases,
    skinny_matmul,
)
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.launch import Target
from neuron.triton_kernels.random_batch import PAGE, random_batch
from neuron.triton_kernels.routing import Routing, route

HALF_TYPES: Final = (torch.bfloat16, torch.float16)
ALL_TYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE: Final = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}
"""Tolerance, relative to the largest expected magnitude: bfloat16 has 8 bits, and the interpreter truncates."""

Results = list[tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Comparison of a kernel with its reference."""

    name: str
    dtype: torch.dtype
    run: Callable[[torch.device], Results]

    def error(self, device: torch.device) -> float:
        """Return the largest difference over all results, as a share of the largest magnitude expected."""
        worst = 0.0
        for found, expected in self.run(device):
            found, expected = found.double().cpu(), expected.double().cpu()
            if found.shape != expected.shape:
                raise ValueError(f"{self.name}: {list(found.shape)} instead of {list(expected.shape)}")
            same = (found == expected) | (found.isnan() & expected.isnan())
            difference = torch.where(
                same, 0.0, (found - expected).abs() / expected.nan_to_num().abs().max().clamp(1e-6)
            )
            worst = max(worst, float(difference.nan_to_num(torch.inf).max()))
        return worst

    @property
    def tolerance(self) -> float:
        """Return the largest error that rounding explains."""
        return TOLERANCE[self.dtype]


def numeric_cases() -> Iterator[Case]:
    """Yield every case; the whole takes a few minutes in the interpreter."""
    for dtype in ALL_TYPES:
        yield from _pointwise_cases(dtype)
        yield from _attention_cases(dtype)
        yield from _matmul_cases(dtype)
    for dtype in HALF_TYPES:
        yield from _quantized_cases(dtype)
        yield from _moe_cases(dtype)
    yield Case("sampling", torch.float32, sampling_cases.sampling_results)
    yield Case("decode step", torch.float32, sampling_cases.decode_step_results)


def _random(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype)


def _pointwise_cases(dtype: torch.dtype) -> Iterator[Case]:
    def norms(device: torch.device) -> Results:
        results: Results = []
        for rows, hidden in ((1, 48), (3, 77), (5, 576)):
            x = _random(rows, 2 * hidden, dtype=dtype, device=device)[:, :hidden]
            residual = _random(rows, hidden, dtype=dtype, device=device)
            weight = _random(hidden, dtype=dtype, device=device)
            results.append((norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)))
            twin = residual.clone()
            found = norm.add_rms_norm(x, residual, weight, 1e-5)
            results += [(found, reference.add_rms_norm(x, twin, weight, 1e-5)), (residual, twin)]
        return results

    def gates(device: torch.device) -> Results:
        results: Results = []
        for rows, width in ((1, 11), (4, 1025)):
            x = _random(rows, 2 * width, dtype=dtype, device=device)
            results.append((activation.silu_and_mul(x), reference.silu_and_mul(x.float())))
            results.append((activation.gelu_and_mul(x), reference.gelu_and_mul(x.float())))
        return results

    def ropes(device: torch.device) -> Results:
        results: Results = []
        for num_heads, num_kv_heads, head_dim, normed in ((9, 3, 64, False), (6, 2, 12, True), (4, 4, 80, True)):
            tokens = 3
            qkv = _random(tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)
            weight = _random(num_heads + num_kv_heads, head_dim, dtype=dtype, device=device) if normed else None
            slot_mapping = torch.tensor([33, 16, 47], device=device)
            rotary = _rotary(torch.tensor([0, 7, 1000]), head_dim, dtype, device)
            caches = torch.zeros(2, 3, PAGE, num_kv_heads, head_dim, dtype=dtype, device=device)
            twins = caches.clone()
            found = rope.rope_and_cache(qkv, weight, 1e-6, rotary, slot_mapping, caches[0], caches[1])
            expected = reference.rope_and_cache(qkv, weight, 1e-6, rotary, slot_mapping, twins[0], twins[1])
            results += [(found, expected), (caches, twins)]
        return results

    def angles(device: torch.device) -> Results:
        results: Results = []
        for half in (6, 64):
            positions = torch.tensor([0, 1, 7, 1000, 40959, 131071, 1048575], dtype=torch.int32, device=device)
            frequencies = 10000.0 ** (-torch.arange(half, device=device) / half)
            found = rotary.rotary_table(positions, frequencies, dtype)
            results += zip(found, reference.rotary_table(positions, frequencies, dtype), strict=True)
        return results

    yield Case("rotary", dtype, angles)
    yield Case("norm", dtype, norms)
    yield Case("activation", dtype, gates)
    yield Case("rope", dtype, ropes)


def _rotary(
    positions: torch.Tensor, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    return reference.rotary_table(positions.to(device), frequencies.to(device), dtype)


ATTENTION_SHAPES: Final = ((9, 3, 64), (4, 4, 80), (5, 1, 96), (4, 2, 128), (2, 1, 256))
ATTENTION_EXTRAS: Final = ((0, 0.0), (37, 0.0), (0, 5.0), (9, 20.0))


def _attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    def prefill(device: torch.device, heads: tuple[int, int, int], window: int, cap: float) -> Results:
        num_heads, num_kv_heads, head_dim = heads
        lengths = [(1, 50), (1, 3), (5, 5), (70, 91), (1, 17), (33, 140)]
        batch, num_pages = random_batch(lengths, device)
        caches = _random(2, num_pages, PAGE, num_kv_heads, head_dim, dtype=dtype, device=device)
        q = _random(sum(query for query, _ in lengths), num_heads, head_dim, dtype=dtype, device=device, scale=2)
        found = torch.full_like(q, torch.nan)
        scale = head_dim**-0.5
        for first in (2, 0):
            prefill_attention.prefill_attention(
                q, caches[0], caches[1], batch, scale, found, first_sequence=first, window=window, soft_cap=cap
            )
            if first and not found[:2].isnan().all():
                raise ValueError("rows before the first sequence were written")
        expected = reference.windowed_attention(q, caches[0], caches[1], batch, scale, window=window, soft_cap=cap)
        return [(found, expected)]

    def decode(device: torch.device, heads: tuple[int, int, int], window: int, cap: float) -> Results:
        num_heads, num_kv_heads, head_dim = heads
        scale = head_dim**-0.5
        results: Results = []
        for contexts in ([1], [300, 129, 128, 17, 1], [600]):
            batch, num_pages = random_batch([(1, context) for context in contexts], device)
            caches = _random(2, num_pages, PAGE, num_kv_heads, head_dim, dtype=dtype, device=device)
            q = _random(len(contexts), num_heads, head_dim, dtype=dtype, device=device, scale=2)
            found = torch.full_like(q, torch.nan)
            decode_attention.decode_attention(
                q, caches[0], caches[1], batch, scale, found, num_sequences=len(contexts), window=window, soft_cap=cap
            )
            expected = reference.windowed_attention(q, caches[0], caches[1], batch, scale, window=window, soft_cap=cap)
            results.append((found, expected))

            qkv = _random(len(contexts), (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)
            weight = _random(num_heads + num_kv_heads, head_dim, dtype=dtype, device=device) if window else None
            rotary = _rotary(batch.positions, head_dim, dtype, device)
            caches.view(2, -1, num_kv_heads, head_dim)[:, batch.slot_mapping] = torch.nan
            twins = caches.clone()
            fused = decode_attention.rope_decode_attention(
                qkv, weight, 1e-6, rotary, caches[0], caches[1], batch, scale, window=window, soft_cap=cap
            )
            plain = reference.rope_decode_attention(
                qkv, weight, 1e-6, rotary, twins[0], twins[1], batch, scale, window=window, soft_cap=cap
            )
            results += [(fused, plain), (caches, twins)]
        return results

    for heads in ATTENTION_SHAPES:
        for window, cap in ATTENTION_EXTRAS if heads[2] == 64 else ATTENTION_EXTRAS[-1:]:
            name = f"H{heads[0]} K{heads[1]} D{heads[2]} window {window} cap {cap:g}"
            yield Case(f"prefill {name}", dtype, lambda d, h=heads, w=window, c=cap: prefill(d, h, w, c))  # type: ignore[misc]
            yield Case(f"decode {name}", dtype, lambda d, h=heads, w=window, c=cap: decode(d, h, w, c))  # type: ignore[misc]


def _matmul_cases(dtype: torch.dtype) -> Iterator[Case]:
    def plain(device: torch.device) -> Results:
        results: Results = []
        for rows, depth, width in ((1, 16, 16), (70, 144, 200), (300, 80, 272), (65, 77, 131)):
            x = _random(rows, depth, dtype=dtype, device=device)
            weight = _random(width, depth, dtype=dtype, device=device, scale=depth**-0.5)
            bias = _random(width, dtype=dtype, device=device) if rows == 70 else None
            expected = reference.matmul(x.float(), weight.float(), None if bias is None else bias.float())
            results.append((matmul.matmul(x, weight, bias), expected))
        return results

    def skinny(device: torch.device) -> Results:
        results: Results = []
        for rows, depth, width in ((1, 2064, 40), (1, 77, 9), (3, 1040, 48), (16, 130, 33), (40, 512, 70)):
            x = _random(rows, depth, dtype=dtype, device=device)
            gain = _random(depth, dtype=dtype, device=device)
            weight = _random(2 * width, depth, dtype=dtype, device=device, scale=depth**-0.5)
            bias = _random(2 * width, dtype=dtype, device=device)
            residual = _random(rows, 2 * width, dtype=dtype, device=device)
            wide = residual.float()
            normed = dtype != torch.float16 or rows == 1
            norm_of = (gain, 1e-5) if normed else None
            wide_norm = (gain.float(), 1e-5) if normed else None
            results.append(
                (
                    skinny_matmul.skinny_matmul(x, weight, bias, norm=norm_of),
                    reference.skinny_matmul(x.float(), weight.float(), bias.float(), norm=wide_norm),
                )
            )
            for function in ("silu", "gelu"):
                results.append(
                    (
                        skinny_matmul.skinny_matmul(x, weight, norm=norm_of, activation=function),
                        reference.skinny_matmul(x.float(), weight.float(), norm=wide_norm, activation=function),
                    )
                )
            skinny_matmul.skinny_matmul(x, weight, residual=residual)
            results.append((residual, reference.skinny_matmul(x.float(), weight.float(), residual=wide)))
        return results

    yield Case("matmul", dtype, plain)
    yield Case("skinny matmul", dtype, skinny)


GGUF_BYTES: Final = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
"""Bytes of a block of 32 elements, or of 256 for the K kinds."""


def quantized_forms(weight: torch.Tensor) -> dict[str, quantized.QuantizedMatrix]:
    """Return ``weight`` ``[N, K]`` in every form that rounds, and other weights in GGUF's; K is a multiple of 256."""
    rows, columns = weight.shape
    forms = {
        "int8": quantized.quantize_int8(weight),
        "int4 g32": quantized.quantize_int4(weight, 32),
        "int4 g128": quantized.quantize_int4(weight, 128),
        "fp8": quantized.quantize_fp8(weight),
    }
    generator = np.random.default_rng(3)
    for kind, block_bytes in GGUF_BYTES.items():
        num_blocks = rows * columns // (256 if kind.endswith("K") else 32)
        blocks = generator.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
        scales = generator.uniform(0.01, 0.1, (num_blocks, 2)) / (32 if kind.endswith("K") else 1)
        halves = scales.astype(np.float16).view(np.uint8)
        if kind == "Q6_K":
            blocks[:, -2:] = halves[:, :2]
        else:
            blocks[:, :4] = halves
        forms[kind] = quantized.from_gguf(kind, torch.from_numpy(blocks), rows)
    return forms


def _quantized_cases(dtype: torch.dtype) -> Iterator[Case]:
    def run(device: torch.device, name: str) -> Results:
        results: Results = []
        for rows, depth, width in ((1, 512, 20), (5, 768, 70), (40, 256, 33), (130, 512, 140)):
            weight = quantized_forms(torch.randn(width, depth) * depth**-0.5)[name].map(lambda t: t.to(device))
            x = _random(rows, depth, dtype=dtype, device=device)
            bias = _random(width, dtype=dtype, device=device)
            found = quantized_matmul.quantized_matmul(x, weight, bias)
            results.append((found, reference.quantized_matmul(x.float(), weight, bias.float())))
            residual = _random(rows, width, dtype=dtype, device=device, scale=depth**0.5)
            expected = reference.quantized_matmul(x.float(), weight, residual=residual.float())
            results.append((quantized_matmul.quantized_matmul(x, weight, residual=residual), expected))
        return results

    def experts(device: torch.device, name: str) -> Results:
        tokens, count, choices, depth, width = 37, 5, 3, 256, 40
        weight = quantized_forms(torch.randn(count * width, depth) * depth**-0.5)[name].map(lambda t: t.to(device))
        x = _random(tokens, depth, dtype=dtype, device=device)
        routing = route(torch.randn(tokens, count, device=device), choices)
        return [
            (
                quantized_matmul.quantized_moe_matmul(x, weight, routing, weighted=weighted),
                reference.moe_matmul(x.float(), weight, routing, weighted=weighted),
            )
            for weighted in (False, True)
        ]

    def stacked(device: torch.device) -> Results:
        forms = quantized_forms(torch.randn(48, 256) / 16)
        stack = quantized.StackedMatrix(tuple(forms[k].map(lambda t: t.to(device)) for k in ("Q4_K", "Q6_K")))
        bias = _random(96, dtype=dtype, device=device)
        xs = [_random(rows, 256, dtype=dtype, device=device) for rows in (1, 9)]
        return [
            (quantized_matmul.quantized_matmul(x, stack, bias), reference.linear(x.float(), stack, bias.float()))
            for x in xs
        ]

    for name in quantized_forms(torch.zeros(1, 256)):
        yield Case(f"quantized {name}", dtype, lambda d, n=name: run(d, n))  # type: ignore[misc]
    for name in ("int8", "fp8", "int4 g128", "Q8_0", "Q4_K", "Q6_K"):
        yield Case(f"quantized experts {name}", dtype, lambda d, n=name: experts(d, n))  # type: ignore[misc]
    yield Case("quantized stack", dtype, stacked)


def _moe_cases(dtype: torch.dtype) -> Iterator[Case]:
    def run(device: torch.device) -> Results:
        results: Results = []
        for tokens, experts, choices, depth, width in ((1, 4, 2, 48, 40), (37, 6, 3, 80, 72), (90, 3, 2, 64, 130)):
            x = _random(tokens, depth, dtype=dtype, device=device)
            first = _random(experts, width, depth, dtype=dtype, device=device, scale=depth**-0.5)
            second = _random(experts, depth, width, dtype=dtype, device=device, scale=width**-0.5)
            routing = route(torch.randn(tokens, experts, device=device), choices)
            wide = reference.moe_matmul(x.float(), first.float(), routing)
            results.append((moe_matmul.moe_matmul(x, first, routing), wide))
            inner = wide.to(dtype)
            found = moe_matmul.moe_matmul(inner, second, routing, weighted=True)
            results.append((found, reference.moe_matmul(inner.float(), second.float(), routing, weighted=True)))
        return results

    def routes(device: torch.device) -> Results:
        results: Results = []
        for tokens, experts, choices, normalise in (
            (1, 128, 8, True),
            (7, 5, 3, False),
            (16, 16, 1, True),
            (61, 20, 9, True),
        ):
            # No two are equally likely: torch chooses among such arbitrarily.
            ranks = torch.stack([torch.randperm(experts, device=device) for _ in range(tokens)])
            scores = (ranks / 16).to(dtype)
            found = moe_routing.route(scores, choices, normalise=normalise)
            wanted = route(scores, choices, normalise=normalise)
            results += [(found.weights, wanted.weights), (found.starts, wanted.starts), (found.order, wanted.order)]
            parts = _random(tokens * choices, 77, dtype=dtype, device=device)
            residual = _random(tokens, 77, dtype=dtype, device=device)
            twin = residual.clone()
            moe_routing.add_choices(parts, choices, residual)
            reference.add_choices(parts, choices, twin)
            results.append((residual, twin))
        return results

    yield Case("moe matmul", dtype, run)
    yield Case("moe routing", dtype, routes)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_everything(target: Target) -> None:
    """Make a launch of every kernel and tile choice at real models' shapes, inside ``recording(target)``.

    In bfloat16; in float16, whose machine code differs only in the names of formats, one launch of each kernel.
    """
    i32, i64, f32 = torch.int32, torch.int64, torch.float32
    for dtype in HALF_TYPES:
        norm.rms_norm(_meta(9, 4096, dtype=dtype), _meta(4096, dtype=dtype), 1e-5)
        norm.add_rms_norm(_meta(9, 8192, dtype=dtype), _meta(9, 8192, dtype=dtype), _meta(8192, dtype=dtype), 1e-5)
        activation.silu_and_mul(_meta(9, 24576, dtype=dtype))
        activation.gelu_and_mul(_meta(9, 24576, dtype=dtype))
        for num_heads, num_kv_heads, head_dim in ((9, 3, 64), (32, 32, 80), (32, 32, 96), (32, 8, 128), (8, 4, 256)):
            if dtype == torch.float16 and head_dim != 128:
                continue
            batch = Batch(
                positions=_meta(64, dtype=i32),
                slot_mapping=_meta(64, dtype=i64),
                cu_seqlens=_meta(65, dtype=i32),
                page_table=_meta(64, 128, dtype=i32),
                context_lens=_meta(64, dtype=i32),
            )
            qkv = _meta(64, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
            q = _meta(64, num_heads, head_dim, dtype=dtype)
            caches = [_meta(99, PAGE, num_kv_heads, head_dim, dtype=dtype) for _ in range(2)]
            angles = _meta(64, 1, head_dim, dtype=dtype), _meta(64, 1, head_dim // 2, dtype=dtype)
            gain = _meta(num_heads + num_kv_heads, head_dim, dtype=dtype)
            rope.rope_and_cache(qkv, gain, 1e-6, angles, batch.slot_mapping, caches[0], caches[1])
            for window, cap in ((0, 0.0), (4096, 50.0)) if head_dim in (128, 256) else ((0, 0.0),):
                prefill_attention.prefill_attention(q, caches[0], caches[1], batch, 0.1, q, window=window, soft_cap=cap)
                decode_attention.decode_attention(
                    q, caches[0], caches[1], batch, 0.1, q, num_sequences=64, window=window, soft_cap=cap
                )
                decode_attention.rope_decode_attention(
                    qkv, gain, 1e-6, angles, caches[0], caches[1], batch, 0.1, window=window, soft_cap=cap
                )
        for rows in (200, 4096):
            matmul.matmul(_meta(rows, 4096, dtype=dtype), _meta(6144, 4096, dtype=dtype))
            matmul.matmul(_meta(rows, 77, dtype=dtype), _meta(131, 77, dtype=dtype), _meta(131, dtype=dtype))
        # The plain form is also what Hopper runs where only the output's rows are not whole.
        matmul.matmul(_meta(4096, 4096, dtype=dtype), _meta(49155, 4096, dtype=dtype))
        for rows in (1, 16, 64) if dtype == torch.bfloat16 else (16,):
            x = _meta(rows, 4096, dtype=dtype)
            norm_of = (_meta(4096, dtype=dtype), 1e-6) if dtype == torch.bfloat16 or rows == 1 else None
            skinny_matmul.skinny_matmul(x, _meta(6144, 4096, dtype=dtype), _meta(6144, dtype=dtype), norm=norm_of)
            skinny_matmul.skinny_matmul(x, _meta(24576, 4096, dtype=dtype), norm=norm_of, activation="silu")
            skinny_matmul.skinny_matmul(x, _meta(4096, 4096, dtype=dtype), residual=_meta(rows, 4096, dtype=dtype))
        for rows in (1, 16, 64, 2048) if dtype == torch.bfloat16 else (16,):
            for weight in _meta_quantized(4096, 4096, target):
                x = _meta(rows, 4096, dtype=dtype)
                quantized_matmul.quantized_matmul(x, weight)
                quantized_matmul.quantized_matmul(x, weight, residual=_meta(rows, 4096, dtype=dtype))
        for tokens in (1, 128, 1024, 4096) if dtype == torch.bfloat16 else (128,):
            routing = Routing(_meta(tokens * 8, dtype=i32), _meta(129, dtype=i32), _meta(tokens * 8, dtype=f32), 8)
            moe_matmul.moe_matmul(_meta(tokens, 2048, dtype=dtype), _meta(128, 1536, 2048, dtype=dtype), routing)
            inner, down = _meta(tokens * 8, 768, dtype=dtype), _meta(128, 2048, 768, dtype=dtype)
            moe_matmul.moe_matmul(inner, down, routing, weighted=True)
            moe_routing.add_choices(inner, 8, _meta(tokens, 768, dtype=dtype))
            for weight in _meta_quantized(128 * 2048, 768, target) if tokens in (1, 1024) else ():
                quantized_matmul.quantized_moe_matmul(inner, weight, routing, weighted=True)
        for tokens in (1, 8, 64):
            moe_routing.route(_meta(tokens, 128, dtype=dtype), 8)
        for half in (32, 64, 128):
            rotary.rotary_table(_meta(64, dtype=i32), _meta(half, dtype=f32), dtype)
    sampling_cases.launch_all(_meta)


def _meta_quantized(rows: int, columns: int, target: Target) -> Iterator[quantized.QuantizedMatrix]:
    """Yield a matrix in each form that a model can have on a GPU, and groups of 32 beside those of 128."""
    f16, f32, i8 = torch.float16, torch.float32, torch.int8
    kinds = quantized.Quantization
    bytes_, nibbles = _meta(rows, columns, dtype=i8), _meta(rows, columns // 2, dtype=torch.uint8)
    per_row = _meta(rows, 1, dtype=f32)
    yield quantized.QuantizedMatrix(kinds.INT8, 0, bytes_, per_row)
    if target.capability >= 89:
        yield quantized.QuantizedMatrix(kinds.FP8, 0, _meta(rows, columns, dtype=torch.float8_e4m3fn), per_row)
    scales = _meta(rows, columns // 32, dtype=f16)
    yield quantized.QuantizedMatrix(kinds.INT8, 32, bytes_, scales)
    yield quantized.QuantizedMatrix(kinds.INT4, 32, nibbles, scales)
    yield quantized.QuantizedMatrix(kinds.INT4, 32, nibbles, scales, scales)
    fewer = _meta(rows, columns // 128, dtype=f16)
    yield quantized.QuantizedMatrix(kinds.INT4, 128, nibbles, fewer, fewer)
    inner, outer = _meta(rows, columns // 32, dtype=i8), _meta(rows, columns // 256, dtype=f16)
    yield quantized.QuantizedMatrix(kinds.INT4, 32, nibbles, inner, inner, outer, outer)
    yield quantized.QuantizedMatrix(kinds.INT8, 32, bytes_, inner, inner, outer, outer)
    finest = _meta(rows, columns // 16, dtype=i8)
    yield quantized.QuantizedMatrix(kinds.INT8, 16, bytes_, finest, super_scales=outer)
