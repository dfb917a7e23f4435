"""Gated activations: ``f(gate) * up`` of the fused projection.

``gate_up`` ``[T, 2 I]`` holds the gate in its first half and ``up`` in its second; the result is ``[T, I]``. ``f`` is
SiLU (SwiGLU) or the tanh form of GELU (GeGLU), both of arXiv:2002.05202. Computed in float32.
"""

import torch
from torch.nn import functional

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.launch import cdiv, launch
from neuron.triton_kernels.operation import Make, Operation, Run


@Operation
def gated_activation(gate_up: torch.Tensor, function: str) -> torch.Tensor:
    """Return ``f(gate) * up`` ``[T, I]`` of ``[T, 2 I]``; ``function`` is ``"silu"`` or ``"gelu"``."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated = functional.silu(gate) if function == "silu" else functional.gelu(gate, approximate="tanh")
    return activated.mul_(up)


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """Return SiLU or tanh-GELU of float32 ``gate``; both are ``gate * sigmoid(something)``."""
    if ACTIVATION == "silu":
        argument = gate
    else:
        # tanh(a) = 2 sigmoid(2 a) - 1, so gelu(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
        argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-argument))


@triton.jit
def _gated_kernel(gate_up, out, stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    value = activate(gate, ACTIVATION) * up
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=inside)


@gated_activation.launcher
def _launch(gate_up: torch.Tensor, function: str) -> torch.Tensor:
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    launch(
        _gated_kernel,
        (num_rows, cdiv(width, 1024)),
        gate_up=gate_up, out=out, stride=gate_up.stride(0), width=width, ACTIVATION=function, BLOCK=1024,
    )  # fmt: skip
    return out


@gated_activation.cases()
def _cases(check: Run, make: Make) -> None:
    for rows, width in ((1, 11), (4, 1025)):
        for function in ("silu", "gelu"):
            check(make(rows, 2 * width), function)


@gated_activation.launches()
def _launches(run: Run, make: Make) -> None:
    for function in ("silu", "gelu"):
        run(make(9, 24576), function)
