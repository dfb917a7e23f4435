"""RMS norm of each head, multiplied by a gate: ``y = x / sqrt(mean(x^2) + eps) * weight * silu(gate)``.

The norm is cast before its weight, and the product with the gate is in float32, as in Qwen3-Next's models.
"""

import torch
from torch.nn import functional

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.launch import cdiv, launch, power_of_two
from neuron.triton_kernels.operation import Make, Operation, Run


@Operation
def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``y`` ``[T, H D]`` of ``x`` and ``gate`` ``[T, H D]``, and ``weight`` ``[D]``."""
    heads = x.unflatten(-1, (-1, len(weight)))
    normed = functional.rms_norm(heads, (len(weight),), None, eps) * weight
    return (normed * functional.silu(gate.float()).view(heads.shape)).to(x.dtype).flatten(1)


@triton.jit(do_not_specialize=["eps"])
def _gated_norm_kernel(
    x, gate, weight, out, gate_stride, eps, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    inside = (head < H)[:, None] & (d < D)[None, :]
    at = head[:, None] * D + d[None, :]
    value = tl.load(x + row * (H * D) + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    normed = (value * scale[:, None]).to(out.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    z = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    result = normed.to(out.dtype.element_ty).to(tl.float32) * z / (1.0 + tl.exp(-z))
    tl.store(out + row * (H * D) + at, result.to(out.dtype.element_ty), mask=inside)


@gated_norm.launcher
def _launch(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    dim, out = len(weight), torch.empty_like(x)
    num_heads, block = x.shape[1] // dim, power_of_two(dim)
    heads = max(512 // block, 1)
    launch(
        _gated_norm_kernel,
        (len(x), cdiv(num_heads, heads)),
        x=x, gate=gate, weight=weight, out=out, gate_stride=gate.stride(0), eps=eps, H=num_heads, D=dim, BLOCK_H=heads,
        BLOCK_D=block, num_warps=2,
    )  # fmt: skip
    return out


@gated_norm.cases()
def _cases(check: Run, make: Make) -> None:
    for rows, num_heads, dim in ((1, 6, 8), (3, 5, 24), (2, 9, 128)):
        check(make(rows, num_heads * dim), make(rows, 2 * num_heads * dim)[:, num_heads * dim :], make(dim), 1e-6)


@gated_norm.launches()
def _launches(run: Run, make: Make) -> None:
    for num_heads in (16, 48):
        run(make(9, num_heads * 128), make(9, num_heads * 128), make(128), 1e-6)
