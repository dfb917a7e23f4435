"""Linear layers with weights in any form, and with the norm before or the residual after them.

Up to SKINNY_ROWS rows a projection is bound by its weights' bytes and takes the norm before it and the residual after
it into the same kernel; above, the large matmul and separate kernels. A step of decodes alone takes five kernels a
layer: norm + qkv; norm, rotation, cache and attention; output + residual; norm + gate/up + activation; down + residual.
Quantised weights take eight: their products fuse the residual, not the norm or the activation.
"""

from typing import assert_never

import torch
from torch.nn import functional

from neuron.formats.matrix import Matrix, QuantizedMatrix, StackedMatrix
from neuron.triton_kernels import skinny_matmul as skinny
from neuron.triton_kernels.activation import gated_activation
from neuron.triton_kernels.matmul import matmul
from neuron.triton_kernels.norm import Norm, rms_norm
from neuron.triton_kernels.operation import HALF_TYPES, Make, Operation, Run
from neuron.triton_kernels.quantized_matmul import FORMS, launch_product, quantized_matmul
from neuron.triton_kernels.skinny_matmul import skinny_matmul


@Operation
def linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x w^T + bias`` ``[M, N]`` of ``x`` ``[M, K]`` and ``weight`` ``[N, K]``, whatever form it has."""
    match weight:
        case torch.Tensor():
            return functional.linear(x, weight, bias)
        case QuantizedMatrix():
            return quantized_matmul.eager(x, weight, bias)
        case StackedMatrix():
            out = torch.cat([linear.eager(x, part) for part in weight.parts], dim=-1)
            return out if bias is None else out.add_(bias)
        case _:
            assert_never(weight)


@linear.launcher
def _linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    match weight:
        case QuantizedMatrix():
            return quantized_matmul.triton(x, weight, bias)
        case StackedMatrix():
            out = torch.empty((len(x), weight.shape[0]), dtype=x.dtype, device=x.device)
            start = 0
            for part in weight.parts:
                columns = slice(start, start + part.shape[0])
                start = columns.stop
                own_bias = None if bias is None else bias[columns]
                if isinstance(part, QuantizedMatrix):
                    launch_product(x, part, out[:, columns], bias=own_bias)
                else:
                    out[:, columns] = linear.triton(x, part, own_bias)
            return out
        case _ if len(x) <= skinny.MAX_ROWS:
            return skinny_matmul.triton(x, weight, bias)
        case _:
            return matmul.triton(x, weight, bias)


@linear.cases("of a stack", dtypes=HALF_TYPES)
def _cases(check: Run, make: Make, _: str) -> None:
    weight = make(48, 256, dtype=torch.float32, scale=1 / 16)
    stack = StackedMatrix((FORMS["Q4_K"](weight), FORMS["Q6_K"](weight)))
    for rows in (1, 9):
        check(make(rows, 256), stack, make(96))


@Operation
def normed_linear(x: torch.Tensor, norm: Norm, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``norm(x) weight^T + bias``."""
    return linear.eager(rms_norm.eager(x, *norm), weight, bias)


@normed_linear.launcher
def _normed_linear(x: torch.Tensor, norm: Norm, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(weight, torch.Tensor) and _fuses_norm(x):
        return skinny_matmul.triton(x, weight, bias, norm=norm)
    return linear.triton(rms_norm.triton(x, *norm), weight, bias)


@Operation
def normed_mlp_in(x: torch.Tensor, norm: Norm, gate_up: Matrix, function: str) -> torch.Tensor:
    """Return ``f(gate) * up`` of ``norm(x) gate_up^T``, f being ``"silu"`` or ``"gelu"``."""
    return gated_activation.eager(linear.eager(rms_norm.eager(x, *norm), gate_up), function)


@normed_mlp_in.launcher
def _normed_mlp_in(x: torch.Tensor, norm: Norm, gate_up: Matrix, function: str) -> torch.Tensor:
    if isinstance(gate_up, torch.Tensor) and _fuses_norm(x):
        return skinny_matmul.triton(x, gate_up, norm=norm, activation=function)
    return gated_activation.triton(linear.triton(rms_norm.triton(x, *norm), gate_up), function)


@Operation
def add_linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
    """Add ``x weight^T + bias`` to ``residual`` in place."""
    residual.add_(linear.eager(x, weight, bias))


@add_linear.launcher
def _add_linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
    if isinstance(weight, QuantizedMatrix):
        quantized_matmul.triton(x, weight, bias, residual=residual)
    elif isinstance(weight, torch.Tensor) and len(x) <= skinny.MAX_ROWS:
        skinny_matmul.triton(x, weight, bias, residual=residual)
    else:
        residual.add_(linear.triton(x, weight, bias))


def _fuses_norm(x: torch.Tensor) -> bool:
    """Whether the norm can be a prologue: not for several rows of float16, which ``x g`` could overflow."""
    return len(x) == 1 or (len(x) <= skinny.MAX_ROWS and x.dtype != torch.float16)
