"""Declaration of a storage format. The bytes of a row, an empty matrix, and the kernels' cases follow from it."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from neuron.formats import BLOCK, SUPER_BLOCK, Quantization

if TYPE_CHECKING:
    import torch

    from neuron.formats.matrix import QuantizedMatrix

Array: TypeAlias = "torch.Tensor"
"""Tensor of torch, which formats import only where they work on one."""

BYTES: Final = {"int8": 1, "float8_e8m0fnu": 1, "float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a scale, by its dtype. Float8 e8m0 are powers of two."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Layout of :class:`~neuron.formats.matrix.QuantizedMatrix`."""

    quantization: Quantization
    group: int
    """Elements of a row that share a scale; 0: all of them."""
    scales: str
    """Dtype of the scales."""
    has_minima: bool = False
    supers: str = ""
    """Dtype of scales of scales and of minima: ``float16``, for 256 elements, or ``float32``, for a row; "": none."""
    has_zeros: bool = False
    """Whether each scale has a zero point, of a byte."""
    has_order: bool = False
    """Whether columns are in an order of their own."""

    @property
    def unit(self) -> int:
        """Divisor of the columns."""
        return SUPER_BLOCK if self.supers == "float16" else BLOCK

    def num_supers(self, columns: int) -> int:
        """Return the number of scales of scales of a row."""
        return {"": 0, "float16": columns // SUPER_BLOCK, "float32": 1}[self.supers]

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row."""
        groups = columns // self.group if self.group else 1
        per_scale = groups * BYTES[self.scales] + (self.num_supers(columns) * BYTES[self.supers] if self.supers else 0)
        zeros = groups if self.has_zeros else 0
        return columns // self.quantization.per_byte + per_scale * (2 if self.has_minima else 1) + zeros

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a matrix."""
        return rows * self.row_bytes(columns) + (4 * columns if self.has_order else 0)

    def empty(self, rows: int, columns: int, device: "torch.device") -> "QuantizedMatrix":
        """Return an uninitialised matrix."""
        import torch

        from neuron.formats.matrix import QUANT_DTYPES, QuantizedMatrix

        def array(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((rows, width), dtype=dtype, device=device)

        def pair(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
            return array(width, dtype), array(width, dtype) if self.has_minima else None

        kind = self.quantization
        quants = array(columns // kind.per_byte, QUANT_DTYPES.get(kind, torch.uint8))
        scales = pair(columns // self.group if self.group else 1, getattr(torch, self.scales))
        supers = pair(self.num_supers(columns), getattr(torch, self.supers)) if self.supers else (None, None)
        zeros = array(columns // self.group if self.group else 1, quants.dtype) if self.has_zeros else None
        order = torch.empty(columns, dtype=torch.int32, device=device) if self.has_order else None
        (own, minima), (super_scales, super_minima) = scales, supers
        return QuantizedMatrix(kind, self.group, quants, own, minima, super_scales, super_minima, zeros, order)


class Parts(NamedTuple):
    """Arrays of N blocks ``[N, ...]``, uint8: numbers in order, or bytes of the layout's dtype.

    Quants are whole numbers, or packed as a matrix has them.
    """

    quants: Array
    scales: Array
    minima: "Array | None" = None
    supers: "Array | None" = None
    super_minima: "Array | None" = None
    """Scales of the minima, which a file subtracts."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredFormat:
    """Format of a file's blocks, which a load repacks on the device."""

    name: str
    """GGUF's name of the kind."""
    device_layout: Layout
    unpack: Callable[[Array], Parts]
    """Function of blocks ``[num_blocks, block_bytes]`` uint8.

    It works on the blocks' device: a host takes ten seconds and more for an 8B model."""

    @property
    def block(self) -> int:
        """Elements of a block in the file."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.name]][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the file."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.name]][1]

    def read(self, blocks: Array, num_rows: int) -> "QuantizedMatrix":
        """Return the matrix of ``num_rows`` in ``blocks`` ``[num_blocks, block_bytes]`` uint8."""
        import torch

        from neuron.formats.matrix import QUANT_DTYPES, QuantizedMatrix

        def array(part: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            return None if part is None else part.reshape(num_rows, -1).contiguous().view(dtype)

        layout, parts = self.device_layout, self.unpack(blocks)
        kind, scales = layout.quantization, getattr(torch, layout.scales)
        quants = parts.quants.reshape(num_rows, -1).contiguous()
        if quants.numel() == len(blocks) * self.block and kind.per_byte > 1:
            quants = packed(quants, min(layout.group, BLOCK), kind)
        supers, super_minima = (array(part, torch.float16) for part in (parts.supers, parts.super_minima))
        if layout.supers == "float32":
            supers = torch.ones(num_rows, 1, device=blocks.device)
        own = array(parts.scales, scales)
        assert own is not None
        return QuantizedMatrix(
            kind,
            layout.group,
            quants.view(QUANT_DTYPES.get(kind, torch.uint8)),
            own,
            array(parts.minima, scales),
            supers,
            None if super_minima is None else -super_minima,
        )

    def layout(self, columns: int) -> Layout:
        """Return its layout on the device for rows of ``columns``."""
        return self.device_layout

    def unit(self, columns: int) -> int:
        """Return the divisor of the columns of rows, and of a rank's part of them."""
        return max(self.block, self.device_layout.unit)


@dataclasses.dataclass(frozen=True, slots=True)
class RoundedFormat:
    """Format that a load rounds floats to."""

    name: str
    """Name in a spec's ``quant``."""
    layout: "Callable[[int], Layout]"
    """Function of the columns of a row, which returns its layout."""
    quantize: "Callable[[torch.Tensor], QuantizedMatrix]"
    """Function of a matrix ``[N, K]``, which returns it rounded."""

    def unit(self, columns: int) -> int:
        """Return the divisor of the columns of rows, and of a rank's part of them."""
        return self.layout(columns).unit


Format = StoredFormat | RoundedFormat


def packed(codes: "torch.Tensor", unit: int, quantization: Quantization) -> "torch.Tensor":
    """Return ``codes`` ``[N, K]`` uint8 of less than a byte as a matrix has them, in units of so many elements."""
    planes = codes.reshape(len(codes), -1, quantization.per_byte, unit // quantization.per_byte)
    found = planes[:, :, 0]
    for plane in range(1, quantization.per_byte):
        found = found | planes[:, :, plane] << plane * quantization.bits
    return found.flatten(1)


def planes(octets: Array, bits: int) -> Array:
    """Return the numbers of so many ``bits`` in ``octets`` ``[..., n]``, lowest first: ``[..., 8 / bits, n]``."""
    import torch

    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=octets.device).unsqueeze(1)
    return octets.unsqueeze(-2) >> shifts & (1 << bits) - 1
