"""``out = x w^T + bias`` with ``w`` ``[N, K]`` quantised, dequantised in registers on its way to the multiplier.

Formats and their layout: :mod:`neuron.formats`. ``x`` is ``[M, K]``, M from 1 up; K is a multiple of
the group. A ``residual`` is added to in place instead of a result stored. A mixture of experts is the same with rows
gathered by their routing and the weights of their expert (see :mod:`neuron.triton_kernels.moe_matmul`).

For one row a group is multiplied before it is scaled, ``sum_k w x = scale sum_k q x + minimum sum_k x``: one
multiplication by a scale for 32 elements instead of 32. For more rows quants become the activations' dtype, scaled, and
go through the matrix units; scales of a row wait for the epilogue. For large M tiles grow, and the extra work of
dequantising (once for each BLOCK_M rows) stays under the time of the products.

Quants of less than a byte lie in planes: the lowest bits of a unit's bytes are its first elements, the next bits the
ones that follow, and each plane is multiplied by its own run of activations. Codes of a table are looked up in
registers, in two words of eight bytes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import torch
from torch.nn import functional

from neuron.formats import BLOCK, SUPER_BLOCK, Quantization
from neuron.formats.format import Layout
from neuron.formats.matrix import QuantizedMatrix
from neuron.formats.registry import FORMATS, ROUNDED_FORMATS, STORED_FORMATS
from neuron.formats.rounded import quantize_int4
from neuron.formats.scheme import Scheme
from neuron.formats.schemes import EXAMPLES
from neuron.triton_kernels._triton import cuda, tl, triton
from neuron.triton_kernels.launch import Target, Tiles, cdiv, launch, target_of
from neuron.triton_kernels.moe_routing import Routing
from neuron.triton_kernels.operation import HALF_TYPES, Make, Operation, Run
from neuron.triton_kernels.prefill_attention import find_block

FP8_CAPABILITY: Final = 89
"""Least compute capability that converts float8."""
GEMV_ELEMENTS: Final = 2048
"""Most elements of a row in a tile of one row of activations, which is of 1024 bytes at most."""
_ENCODINGS: Final = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}


@Operation
def quantized_matmul(
    x: torch.Tensor,
    weight: QuantizedMatrix,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x w^T + bias`` ``[M, N]`` of ``x`` ``[M, K]``, contiguous in its last dimension.

    ``residual`` ``[M, N]``, contiguous, is added to in place, and returned.
    """
    out = functional.linear(x.float(), weight.dequantize(), None if bias is None else bias.float())
    return out.to(x.dtype) if residual is None else residual.add_(out)


@triton.jit
def _e4m3(stored):
    """Return the float32 of bytes of float8 e4m3: sign, a zero and the rest are the float16 2^-8 of it. None is NaN."""
    bits = ((stored.to(tl.int16) << 8) >> 1) & ~0x4000
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256


@triton.jit
def _numbers(quants, plane, BITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Return the quants of a plane as float32; LOW and HIGH are the words of a table. Bytes are float8 e4m3."""
    if BITS == 8:
        found = _e4m3(quants) if quants.dtype == tl.uint8 else quants.to(tl.float32)
    else:
        codes = (quants >> (BITS * plane)) & ((1 << BITS) - 1)
        if LOW is None:
            found = codes.to(tl.float32)
        else:
            word = tl.where(codes < 8, tl.full([], LOW, tl.int64), tl.full([], HIGH, tl.int64))
            found = (word >> ((codes & 7).to(tl.int64) * 8)).to(tl.int8).to(tl.float32)
    return found


@triton.jit
def _group_scales(
    scales, supers, row, block, inside, K,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SCALES: tl.constexpr, SUPER: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Return the float32 scale of each block of UNIT elements: ``[rows, blocks]``."""
    at = row[:, None] * (K // GROUP) + (block // (GROUP // UNIT))[None, :]
    stored = tl.load(scales + at, mask=inside, other=0)
    if SCALES == "e8m0":
        # The exponent of a float32; 0 is 2^-127, a subnormal.
        found = tl.where(stored == 0, 0x400000, stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif SCALES == "e4m3":
        found = _e4m3(stored)
    else:
        found = stored.to(tl.float32)
    if SUPER > 0:
        super_at = row[:, None] * (K // SUPER) + (block // (SUPER // UNIT))[None, :]
        found *= tl.load(supers + super_at, mask=inside, other=0.0).to(tl.float32)
    if STEP != 1:
        found *= STEP
    return found


@triton.jit
def _group_zeros(zeros, row, block, inside, K, GROUP: tl.constexpr, UNIT: tl.constexpr):
    """Return the float32 zero point of each block of UNIT elements: ``[rows, blocks]``."""
    at = row[:, None] * (K // GROUP) + (block // (GROUP // UNIT))[None, :]
    return tl.load(zeros + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _quantized_gemv_kernel(
    x, quants, scales, minima, super_scales, super_minima, zeros, bias, residual, out, N, K,
    BITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CENTER: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SCALES: tl.constexpr, SUPER: tl.constexpr, STEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # A tile is [BLOCK_N rows, BLOCKS blocks, bytes of a block]: a thread holds whole runs of 16 bytes.
    bytes_: tl.constexpr = UNIT * BITS // 8
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, bytes_)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    num_blocks = K // UNIT
    row = n.to(tl.int64)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        mask = (n < N)[:, None] & inside[None, :]
        at = (row[:, None] * num_blocks + block[None, :])[:, :, None] * bytes_ + lane[None, None, :]
        q = tl.load(quants + at, mask=mask[:, :, None], other=0.0, eviction_policy="evict_first")
        x_at = x + block[:, None] * UNIT + lane[None, :]
        products = tl.zeros([BLOCK_N, BLOCKS, bytes_], tl.float32)
        values = tl.zeros([BLOCKS, bytes_], tl.float32)
        for plane in tl.static_range(8 // BITS):
            value = tl.load(x_at + plane * bytes_, mask=inside[:, None], other=0.0).to(tl.float32)
            products += _numbers(q, plane, BITS, LOW, HIGH) * value[None, :, :]
            values += value
        part = tl.sum(products, 2)
        if GROUP > 0:
            scale = _group_scales(scales, super_scales, row, block, mask, K, GROUP, UNIT, SCALES, SUPER, STEP)
            if minima is not None:
                least = _group_scales(minima, super_minima, row, block, mask, K, GROUP, UNIT, SCALES, SUPER, STEP)
                part = part * scale + tl.sum(values, 1)[None, :] * least
            elif zeros is not None:
                zero = _group_zeros(zeros, row, block, mask, K, GROUP, UNIT)
                part = (part - zero * tl.sum(values, 1)[None, :]) * scale
            elif CENTER > 0:
                part = (part - CENTER * tl.sum(values, 1)[None, :]) * scale
            else:
                part = part * scale
        sums += part
    result = tl.sum(sums, 1)
    if GROUP == 0:
        result *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)
    if super_scales is not None:
        if SUPER == 0:
            result *= tl.load(super_scales + n, mask=n < N, other=0.0)
    if bias is not None:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if residual is not None:
        result += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def _quantized_matmul_kernel(
    x, quants, scales, minima, super_scales, super_minima, zeros, bias, residual, out, order, starts, weights,
    M, N, K, x_stride, out_stride,
    BITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CENTER: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SCALES: tl.constexpr, SUPER: tl.constexpr, STEP: tl.constexpr,
    EXPERTS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    bytes_: tl.constexpr = UNIT * BITS // 8
    columns: tl.constexpr = BLOCKS * bytes_
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)
    if EXPERTS > 0:
        none, all_ = tl.full([], 0, tl.int32), tl.full([], EXPERTS, tl.int32)
        expert, own = find_block(starts, none, all_, tl.program_id(0), BLOCK_M)
        first = tl.load(starts + expert)
        length = tl.load(starts + expert + 1) - first
        if own * BLOCK_M >= length:
            return
        m = own * BLOCK_M + tl.arange(0, BLOCK_M)
        out_row = tl.load(order + first + tl.minimum(m, length - 1)).to(tl.int64)
        x_row = x + (out_row // SHARED)[:, None] * x_stride
        row += expert.to(tl.int64) * N
        inside_rows = m < length
    else:
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        out_row = tl.minimum(m, M - 1).to(tl.int64)
        x_row = x + out_row[:, None] * x_stride
        inside_rows = m < M
    c = tl.arange(0, columns)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    num_blocks = K // UNIT
    for start in tl.range(0, num_blocks, BLOCKS, num_stages=STAGES):
        inside = (start + c // bytes_ < num_blocks)[None, :]
        k = start * UNIT + c // bytes_ * UNIT + c % bytes_
        at = row[:, None] * (num_blocks * bytes_) + start * bytes_ + c[None, :]
        q = tl.load(quants + at, mask=inside, other=0.0)
        if GROUP > 0:
            block = start + tl.arange(0, BLOCKS)
            there = (block < num_blocks)[None, :]
            scale = _group_scales(scales, super_scales, row, block, there, K, GROUP, UNIT, SCALES, SUPER, STEP)
            scale = scale[:, :, None]
            if minima is not None:
                least = _group_scales(minima, super_minima, row, block, there, K, GROUP, UNIT, SCALES, SUPER, STEP)
                least = least[:, :, None]
            elif zeros is not None:
                least = -_group_zeros(zeros, row, block, there, K, GROUP, UNIT)[:, :, None] * scale
            elif CENTER > 0:
                least = -CENTER * scale
            q = tl.reshape(q, [BLOCK_N, BLOCKS, bytes_])
        for plane in tl.static_range(8 // BITS):
            value = tl.load(x_row + k[None, :] + plane * bytes_, mask=inside, other=0.0)
            # By way of float32, exact for every format: the interpreter has no other way from int8 to bfloat16.
            wide = _numbers(q, plane, BITS, LOW, HIGH)
            if GROUP > 0:
                wide *= scale
                if minima is not None or zeros is not None or CENTER > 0:
                    wide += least
                wide = tl.reshape(wide, [BLOCK_N, columns])
            sums = tl.dot(value, tl.trans(wide.to(x.dtype.element_ty)), sums)
    if GROUP == 0:
        sums *= tl.load(scales + row).to(tl.float32)[None, :]
    if super_scales is not None:
        if SUPER == 0:
            sums *= tl.load(super_scales + row)[None, :]
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if weights is not None:
        sums *= tl.load(weights + out_row)[:, None]
    mask = inside_rows[:, None] & (n < N)[None, :]
    out_at = out_row[:, None] * out_stride + n[None, :]
    if residual is not None:
        sums += tl.load(residual + out_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + out_at, sums.to(out.dtype.element_ty), mask=mask)


class _Form(NamedTuple):
    """Constants of the kernels for a layout."""

    BITS: int
    LOW: int | None
    """Word of a table's codes 0 to 7."""
    HIGH: int | None
    CENTER: int
    """Quant that stands for zero; 0 where quants are signed, or groups have minima or zero points."""
    GROUP: int
    UNIT: int
    SCALES: str
    """Encoding of scales in bytes that Triton, or some GPU, has no type for; "": a number."""
    SUPER: int
    """Elements that share a scale of scales; 0: a row, or there are none."""
    STEP: float
    AS_BYTES: bool
    """Whether float8 is converted by its bits."""


def _form_of(weight: QuantizedMatrix, target: Target) -> tuple[QuantizedMatrix, _Form]:
    """Return a matrix as kernels load it, and its form: float8 as bytes where the GPU cannot convert it."""
    kind, table = weight.quantization, weight.quantization.table
    encoding, supers = _ENCODINGS.get(weight.scales.dtype, ""), weight.super_scales
    form = _Form(
        BITS=kind.bits,
        LOW=table.words[0] if table else None,
        HIGH=table.words[1] if table else None,
        CENTER=8 if kind is Quantization.INT4 and weight.minima is None and weight.zeros is None else 0,
        GROUP=weight.group,
        UNIT=weight.unit,
        SCALES=encoding,
        SUPER=SUPER_BLOCK if supers is not None and supers.dtype == torch.float16 else 0,
        STEP=table.step if table else 1.0,
        AS_BYTES=kind is Quantization.FP8 and target.capability < FP8_CAPABILITY,
    )
    if form.AS_BYTES:
        weight = dataclasses.replace(weight, quants=weight.quants.view(torch.uint8))
    return dataclasses.replace(weight, scales=weight.scales.view(torch.uint8)) if encoding else weight, form


def quantized_tiles(num_rows: int, form: _Form, target: Target) -> Tiles:
    """Return the tiles of so many rows.

    Weights take many registers while they are unpacked, if they are bulky: less than a byte each, with scales of
    scales, or converted by their bits; and more if they are looked up. A size below the fastest spilled with one of the
    supported compilers (``make check-kernels``).
    """
    bulky = form.BITS < 8 or form.SUPER > 0 or form.AS_BYTES
    looked_up = form.LOW is not None and target.capability < 90
    if num_rows <= 16:
        if target.capability == 100:
            return Tiles(16, 32 if bulky else 64, 64, 4, 3)
        if target.capability == 120:
            return Tiles(16, 32 if form.SUPER else 64, 64, 4, 3)
        return Tiles(16, 64, 64 if looked_up else 128, 4, 3)
    if num_rows <= 64:
        is_wide = looked_up or (form.SUPER > 0 and target.capability == 100)
        return Tiles(64, 64, 64 if bulky or target.capability == 120 else 128, 8 if is_wide else 4, 3)
    return Tiles(128, 128, 64, 8, 3) if target.capability in (90, 100) else Tiles(64, 128, 64, 8, 2)


@quantized_matmul.launcher
def _launch(
    x: torch.Tensor,
    weight: QuantizedMatrix,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty((len(x), weight.shape[0]), dtype=x.dtype, device=x.device) if residual is None else residual
    launch_product(x, weight, out, bias=bias, residual=residual)
    return out


def launch_product(
    x: torch.Tensor,
    weight: QuantizedMatrix,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    routing: Routing | None = None,
    weighted: bool = False,
) -> None:
    """Write the product into ``out`` ``[M, N]``, which may be columns of a matrix and may be ``residual``.

    With ``routing`` ``weight`` is ``[E N, K]`` and the rows are as :func:`~.moe_matmul.moe_matmul` has them.
    """
    num_rows, width = out.shape
    depth = x.shape[1]
    if depth % BLOCK:
        raise ValueError(f"a quantised matmul wants a multiple of {BLOCK} columns, not {depth}")
    target = target_of(x.device)
    weight, form = _form_of(weight, target)
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    if num_rows == 1 and routing is None:
        block_n = 8
        launch(
            _quantized_gemv_kernel,
            (cdiv(width, block_n),),
            weight,
            form,
            x=x, bias=bias, residual=residual, out=out, N=width, K=depth, BLOCK_N=block_n,
            BLOCKS=min(8192 // form.BITS, GEMV_ELEMENTS) // form.UNIT,
        )  # fmt: skip
        return
    experts, shared, rows_per_tile = 0, 1, num_rows
    if routing is not None:
        experts = routing.starts.shape[0] - 1
        shared = num_rows // len(x)
        rows_per_tile = cdiv(num_rows, experts)
    tiles = quantized_tiles(rows_per_tile, form, target)
    num_blocks = num_rows // tiles.BLOCK_M + experts if experts else cdiv(num_rows, tiles.BLOCK_M)
    launch(
        _quantized_matmul_kernel,
        (num_blocks, cdiv(width, tiles.BLOCK_N)),
        weight,
        form,
        tiles,
        x=x, bias=bias, residual=residual, out=out, order=routing.order if routing else None,
        starts=routing.starts if routing else None, weights=routing.weights if routing and weighted else None,
        M=num_rows, N=width, K=depth, x_stride=x.stride(0), out_stride=out.stride(0),
        EXPERTS=experts, SHARED=shared, BLOCKS=tiles.BLOCK_K // form.UNIT,
    )  # fmt: skip


def _layout(make: Callable[[int], Scheme], columns: int) -> Layout:
    layout = make(columns).layout(range(columns))
    assert layout is not None
    return layout


def _random(layout_of: Callable[[int], Layout]) -> Callable[[torch.Tensor], QuantizedMatrix]:
    """Return a function that makes a random matrix of the layout for its columns, of the shape of its argument."""

    def make(weight: torch.Tensor) -> QuantizedMatrix:
        rows, columns = weight.shape
        matrix = layout_of(columns).empty(rows, columns, weight.device)
        if matrix.order is not None:
            matrix.order.copy_(torch.randperm(columns))

        def filled(array: torch.Tensor) -> torch.Tensor:
            if array.itemsize > 1:
                return array.uniform_(0.01, 0.1)
            least, most = _BYTES_OF_SCALES.get(array.dtype, (0, 64))
            if array is matrix.quants:
                least, most = 0, 127 if matrix.quantization is Quantization.FP8 else 256
            return torch.randint(least, most, array.shape, dtype=torch.uint8).to(array.device).view(array.dtype)

        return matrix.map(filled)

    return make


_BYTES_OF_SCALES: Final = {torch.float8_e8m0fnu: (118, 124), torch.float8_e4m3fn: (0, 96)}
"""Range of random scales in bytes: zero and subnormal ones are among the latter."""
FORMS: Final[dict[str, Callable[[torch.Tensor], QuantizedMatrix]]] = {
    **{name: format.quantize for name, format in ROUNDED_FORMATS.items()},
    "int4 g32": lambda weight: quantize_int4(weight, 32),
    **{name: _random(format.layout) for name, format in STORED_FORMATS.items()},
    **{name: _random(functools.partial(_layout, make)) for name, make in EXAMPLES.items()},
    "in order": _random(lambda _: Layout(Quantization.INT4, BLOCK, "float16", has_zeros=True, has_order=True)),
}
"""Every form, made of a matrix ``[N, K]`` with K a multiple of 256; stored ones are random."""


@quantized_matmul.cases(*FORMS, dtypes=HALF_TYPES)
def _cases(check: Run, make: Make, form: str) -> None:
    for rows, depth, width in ((1, 512, 20), (5, 768, 70), (40, 256, 33), (70, 256, 140)):
        weight = FORMS[form](make(width, depth, dtype=torch.float32, scale=depth**-0.5))
        x = make(rows, depth)
        check(x, weight, make(width))
        check(x, weight, residual=make(rows, width, scale=depth**0.5))


def shapes_of_forms(make: Make, rows: int, columns: int) -> Iterator[QuantizedMatrix]:
    """Yield a matrix in each form that a model can have on a GPU."""
    for layout in (
        *(format.layout(columns) for format in FORMATS.values()),
        *(_layout(scheme, columns) for scheme in EXAMPLES.values()),
    ):
        yield layout.empty(rows, columns, make.device)


@quantized_matmul.launches()
def _launches(run: Run, make: Make) -> None:
    for rows in (1, 16, 64, 2048) if make.dtype == torch.bfloat16 else (16,):
        for weight in shapes_of_forms(make, 4096, 4096):
            run(make(rows, 4096), weight)
            run(make(rows, 4096), weight, residual=make(rows, 4096))
