"""Declaration of a storage format. The bytes of a row, an empty matrix, and the kernels' cases follow from it."""

import dataclasses
from typing import TYPE_CHECKING, Final

from neuron.formats import BLOCK, SUPER_BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from neuron.formats.matrix import QuantizedMatrix

BYTES: Final = {"int8": 1, "float16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Layout of :class:`~neuron.formats.matrix.QuantizedMatrix`."""

    quants: str
    """Storage of a quant: ``int8``, ``int4`` or ``fp8``."""
    group: int
    """Elements of a row that share a scale; 0: all of them."""
    scales: str
    """Dtype of the scales."""
    has_minima: bool = False
    has_supers: bool = False
    """Whether scales, and minima, have scales of their own."""

    @property
    def unit(self) -> int:
        """Divisor of the columns."""
        return SUPER_BLOCK if self.has_supers else BLOCK

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row."""
        groups = columns // self.group if self.group else 1
        per_scale = groups * BYTES[self.scales] + (columns // SUPER_BLOCK * 2 if self.has_supers else 0)
        return columns // (2 if self.quants == "int4" else 1) + per_scale * (2 if self.has_minima else 1)

    def empty(self, rows: int, columns: int, device: "torch.device") -> "QuantizedMatrix":
        """Return an uninitialised matrix."""
        import torch

        from neuron.formats.matrix import Quantization, QuantizedMatrix

        def array(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((rows, width), dtype=dtype, device=device)

        def pair(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
            return array(width, dtype), array(width, dtype) if self.has_minima else None

        kind = Quantization(self.quants)
        dtypes = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
        quants = array(columns // (2 if kind is Quantization.INT4 else 1), dtypes[self.quants])
        scales = pair(columns // self.group if self.group else 1, getattr(torch, self.scales))
        supers = pair(columns // SUPER_BLOCK, torch.float16) if self.has_supers else (None, None)
        return QuantizedMatrix(kind, self.group, quants, *scales, *supers)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredFormat:
    """Format of a file's blocks, which a load repacks on the device."""

    name: str
    """GGUF's name of the kind."""
    block: int
    """Elements of a block in the file."""
    block_bytes: int
    device_layout: Layout
    read: "Callable[[torch.Tensor, int], QuantizedMatrix]"
    """Function of blocks ``[num_blocks, block_bytes]`` uint8 and a number of rows, which returns the matrix.

    It works on the blocks' device: a host takes ten seconds and more for an 8B model."""

    def layout(self, columns: int) -> Layout:
        """Return its layout on the device for rows of ``columns``."""
        return self.device_layout


@dataclasses.dataclass(frozen=True, slots=True)
class RoundedFormat:
    """Format that a load rounds floats to."""

    name: str
    """Name in a spec's ``quant``."""
    layout: "Callable[[int], Layout]"
    """Function of the columns of a row, which returns its layout."""
    quantize: "Callable[[torch.Tensor], QuantizedMatrix]"
    """Function of a matrix ``[N, K]``, which returns it rounded."""


Format = StoredFormat | RoundedFormat


def rows_of(values: "torch.Tensor", num_rows: int) -> "torch.Tensor":
    """Return the bytes of a matrix's rows contiguous, as kernels read them, also where a row is one block."""
    return values.reshape(num_rows, -1).contiguous()


def halves_of(values: "torch.Tensor", num_rows: int) -> "torch.Tensor":
    """Return pairs of bytes as float16, in rows."""
    import torch

    return values.contiguous().view(torch.float16).view(num_rows, -1)
