"""RMS normalisation: ``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv:1910.07467).

In float32. One program holds one row in registers, so each element is read once and written once.
"""

import torch
from torch.nn import functional

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.launch import launch, power_of_two
from neuron.triton_kernels.operation import Make, Operation, Run

Norm = tuple[torch.Tensor, float]
"""Weight ``[hidden]`` and epsilon."""


@Operation
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x`` ``[T, hidden]`` normalised."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


@triton.jit(do_not_specialize=["eps"])
def _rms_norm_kernel(x, weight, out, x_stride, hidden, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / hidden + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + columns, (value * scale * gain).to(out.dtype.element_ty), mask=inside)


@rms_norm.launcher
def _launch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    num_rows, hidden = x.shape
    out = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    block = power_of_two(hidden)
    launch(
        _rms_norm_kernel,
        (num_rows,),
        x=x, weight=weight, out=out, x_stride=x.stride(0), hidden=hidden, eps=eps, BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return out


@rms_norm.cases()
def _cases(check: Run, make: Make) -> None:
    for rows, hidden in ((1, 48), (3, 77), (5, 576)):
        check(make(rows, 2 * hidden)[:, :hidden], make(hidden), 1e-5)


@rms_norm.launches()
def _launches(run: Run, make: Make) -> None:
    for hidden in (4096, 8192):
        run(make(9, hidden), make(hidden), 1e-5)
