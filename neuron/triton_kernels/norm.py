"""RMS normalisation, alone and after adding to the residual stream.

``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension of ``x`` ``[T, hidden]`` (arXiv:1910.07467), in
float32. With a residual: ``r <- r + x``, rounded to the model's dtype as every later layer will read it, then ``y`` of
``r``. One program holds one row in registers, so each element is read once and written once.
"""

import torch
import triton
import triton.language as tl

from neuron.triton_kernels.launch import launch, power_of_two


@triton.jit(do_not_specialize=["eps"])
def _rms_norm_kernel(x, residual, weight, out, x_stride, hidden, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row * hidden + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / hidden + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + columns, (value * scale * gain).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x`` ``[T, hidden]`` normalised."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add ``x`` to ``residual`` in place and return the sum normalised."""
    return _launch(x, residual, weight, eps)


def _launch(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    num_rows, hidden = x.shape
    out = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    block = power_of_two(hidden)
    launch(
        _rms_norm_kernel,
        (num_rows,),
        {"x": x, "residual": residual, "weight": weight, "out": out}
        | {"x_stride": x.stride(0), "hidden": hidden, "eps": eps},
        {"BLOCK": block},
        num_warps=min(max(block // 512, 1), 16),
    )
    return out
