"""Cosine and sine of a step's positions, for the rotary embedding: one kernel where torch has seven.

``angle = position * inverse_frequency`` in float32, as models are trained; cosine and sine are multiplied by the pair's
factor, which some scalings of long contexts have. The angle is reduced to a fraction of a turn in float64, which is
exact to what float32 holds for any position, and then to an eighth of a turn around a quarter, where two polynomials do
(Cephes, ``sinf.c``). Triton's own ``cos`` includes the reduction of huge angles, with arrays in
local memory.
"""

import torch

from neuron.triton_kernels._triton import tl, triton
from neuron.triton_kernels.launch import launch, power_of_two
from neuron.triton_kernels.operation import Make, Operation, Run

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosine ``[T, 1, D]`` and sine ``[T, 1, D / 2]`` of each token's position."""

_QUARTERS = tl.constexpr(0.6366197723675814)  # of a turn, in one radian
_RADIANS = tl.constexpr(1.5707963267948966)


@Operation
def rotary_table(positions: torch.Tensor, rope: torch.Tensor, dtype: torch.dtype) -> Rotary:
    """Return cosine and sine of ``positions`` ``[T]`` int32.

    ``rope`` is ``[D]`` float32: inverse frequencies of the D/2 pairs of a head, and behind these the pairs' factors.
    """
    inverse_frequencies, factors = rope.chunk(2)
    angles = positions.to(torch.float32).unsqueeze(1) * inverse_frequencies
    cos = (angles.cos() * factors).to(dtype)
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), (angles.sin() * factors).to(dtype).unsqueeze(1)


@triton.jit
def sine_and_cosine(angle):
    """Return sine and cosine of float32 ``angle``, to about 1e-7."""
    quarters = angle.to(tl.float64) * _QUARTERS
    whole = tl.floor(quarters + 0.5)
    x = ((quarters - whole) * _RADIANS).to(tl.float32)
    quadrant = whole.to(tl.int64) & 3
    z = x * x
    sine = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    swapped = (quadrant & 1) == 1
    s = tl.where(swapped, cosine, sine)
    c = tl.where(swapped, sine, cosine)
    return tl.where(quadrant >= 2, -s, s), tl.where((quadrant == 1) | (quadrant == 2), -c, c)


@triton.jit
def _rotary_kernel(positions, rope, cos, sin, HALF: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(rope + i, mask=inside, other=0.0)
    factor = tl.load(rope + HALF + i, mask=inside, other=0.0)
    s, c = sine_and_cosine(angle)
    rounded = (c * factor).to(cos.dtype.element_ty)
    tl.store(cos + token * (2 * HALF) + i, rounded, mask=inside)
    tl.store(cos + token * (2 * HALF) + HALF + i, rounded, mask=inside)
    tl.store(sin + token * HALF + i, (s * factor).to(sin.dtype.element_ty), mask=inside)


@rotary_table.launcher
def _launch(positions: torch.Tensor, rope: torch.Tensor, dtype: torch.dtype) -> Rotary:
    num_tokens, half = len(positions), len(rope) // 2
    cos = torch.empty((num_tokens, 1, 2 * half), dtype=dtype, device=positions.device)
    sin = torch.empty((num_tokens, 1, half), dtype=dtype, device=positions.device)
    launch(
        _rotary_kernel,
        (num_tokens,),
        positions=positions, rope=rope, cos=cos, sin=sin, HALF=half,
        BLOCK=power_of_two(half), num_warps=1,
    )  # fmt: skip
    return cos, sin


def table_of(half: int, device: torch.device) -> torch.Tensor:
    """Return a table as of a checkpoint, for heads of ``2 * half``; the last pair is not rotated."""
    pairs = torch.arange(half, device=device)
    frequencies = torch.where(pairs < half - 1, 10000.0 ** (-pairs / half), 0.0)
    return torch.cat((frequencies, torch.where(pairs < half - 1, 1.25, 1.0)))


@rotary_table.cases()
def _cases(check: Run, make: Make) -> None:
    for half in (6, 64):
        positions = torch.tensor([0, 1, 7, 1000, 40959, 131071, 1048575], dtype=torch.int32, device=make.device)
        check(positions, table_of(half, make.device), make.dtype)


@rotary_table.launches()
def _launches(run: Run, make: Make) -> None:
    for half in (32, 64, 128):
        run(make.integers(64), make(2 * half, dtype=torch.float32), make.dtype)
