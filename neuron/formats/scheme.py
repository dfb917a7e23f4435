"""Quantisation schemes of safetensors: a weight ``[N, K]`` as several tensors in place of ``X.weight``.

A scheme is a file beside this one. It recognises its tensors by their names, dtypes and shapes, so that a checkpoint
may mix schemes and leave modules as they are, whatever its lists of modules call them; and it unpacks a run of rows.
The layout on the device, the matrix in it, and the expansion to floats follow. A group of columns that a rank's part
cuts becomes several of equal scales.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from neuron.formats import BLOCK, Quantization
from neuron.formats.format import Array, Layout, packed, planes

if TYPE_CHECKING:
    from neuron.formats.matrix import QuantizedMatrix

Take = Callable[..., Array]
"""``take(suffix, *index)``: that part of a tensor of the weight, on the device that works on it."""
LEAST_GROUP: Final = 16
"""Least group that kernels read."""
SCALE_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Piece(NamedTuple):
    """Tensor in place of a part of a weight, as a file declares it."""

    dtype: str
    shape: tuple[int, ...]


Pieces = Mapping[str, Piece]
"""Tensors of a weight by the ends of their names."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a checkpoint that its tensors do not show, from its ``quantization_config``."""

    block: tuple[int, int] = (128, 128)
    """Rows and columns of a block that shares a scale."""
    symmetric: bool = False
    """Whether all zero points are the middle of the range."""
    zero_offset: int = 0
    """Number by which stored zero points are too small."""
    ordered: bool = False
    """Whether groups are of columns in any order (act-order)."""


class Unpacked(NamedTuple):
    """Rows of a weight, a number a quant."""

    quants: Array
    """``[n, K]`` int8, uint8 or float8; codes of a table as uint8."""
    scales: Array
    """``[n, groups]`` of the groups that the columns touch."""
    zeros: "Array | None" = None
    """Zero points, as ``scales``; None: the middle of the range."""
    order: "Array | None" = None
    """Column ``[K]`` int32 of the weight that each column here is."""
    supers: "Array | None" = None
    """Factors ``[n, 1]`` float32 of a row's scales."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scheme(abc.ABC):
    """Scheme of a weight of ``columns``, K."""

    columns: int
    quantization: Quantization
    group: int
    """Columns that share a scale; all, or more, where a row has one."""
    scales: str
    """Dtype of the scales on the device."""
    has_zeros: bool = False
    ordered: bool = False
    supers: str = ""
    """Dtype of the factor of a row's scales; "": none."""

    @property
    def name(self) -> str:
        """Name for people: ``int4 in groups of 128``."""
        return f"{self.quantization.value} {self.extent}"

    @property
    def extent(self) -> str:
        """Part of the weight that shares a scale, for people."""
        return f"in groups of {self.group}" if self.group < self.columns else "by row"

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of a row in the file, less what rows share."""
        group = 0 if self.group >= self.columns else self.group
        return Layout(self.quantization, group, self.scales, has_zeros=self.has_zeros).row_bytes(self.columns)

    @property
    def block_kind(self) -> str:
        """GGUF kind that holds the same numbers but for scales rounded to float16; "": none."""
        kinds = {
            Quantization.INT4: ("Q4_0", "Q4_1"),
            Quantization.INT8: ("Q8_0", ""),
            Quantization.FP4: ("MXFP4" if self.group == BLOCK else "", ""),
        }
        aligned = self.columns % BLOCK == 0 and (self.group % BLOCK == 0 or self.group >= self.columns)
        return kinds.get(self.quantization, ("", ""))[self.has_zeros] if aligned and not self.ordered else ""

    def layout(self, columns: range) -> Layout | None:
        """Return the layout of these columns on the device; None if kernels cannot read them packed."""
        group = math.gcd(self.group, columns.start, columns.stop)
        if self.group >= self.columns:
            group = len(columns) if self.has_zeros or self.quantization is Quantization.INT4 else 0
        if (group % BLOCK and group != LEAST_GROUP) or len(columns) % BLOCK:
            return None
        if self.ordered and len(columns) < self.columns:
            return None
        return Layout(
            self.quantization, group, self.scales, supers=self.supers, has_zeros=self.has_zeros, has_order=self.ordered
        )

    @abc.abstractmethod
    def unpack(self, take: Take, rows: range, columns: range) -> Unpacked:
        """Return a run of rows; the columns of an ``ordered`` scheme are all. Raises ``ValueError``."""

    def read(self, take: Take, rows: range, columns: range) -> "QuantizedMatrix":
        """Return a run of rows in :meth:`layout`. Raises ``ValueError`` for tensors that contradict themselves."""
        from neuron.formats.matrix import QuantizedMatrix

        layout = self.layout(columns)
        assert layout is not None
        quants, scales, zeros, order, supers = self._checked(take, rows, columns)
        if layout.quantization.bits == 4:
            quants = packed(quants, min(layout.group, BLOCK), layout.quantization)
        if layout.group not in (0, self.group):
            groups = self._groups(columns, layout.group, scales)
            scales, zeros = _chosen(scales, groups), None if zeros is None else zeros[:, groups]
        return QuantizedMatrix(
            layout.quantization, layout.group, quants, scales, super_scales=supers, zeros=zeros, order=order
        )

    def expand(self, take: Take, rows: range, columns: range) -> Array:
        """Return a run of rows in float32. Raises as :meth:`read`."""
        import torch

        table = self.quantization.table
        touched = range(self.columns) if self.ordered else columns
        quants, scales, zeros, order, supers = self._checked(take, rows, touched)
        if table is not None:
            values = torch.tensor(table.multiples, dtype=torch.float32)[quants.int()] * table.step
        else:
            values = quants.float()
        each = self._groups(touched, 1, scales)
        if zeros is not None:
            values -= zeros.float()[:, each]
        elif self.quantization is Quantization.INT4:
            values -= 8
        values *= scales.float()[:, each]
        if supers is not None:
            values *= supers
        if order is None:
            return values
        restored = torch.empty_like(values)
        restored[:, order.long()] = values
        return restored[:, columns.start : columns.stop]

    def blocks(self, take: Take, rows: range) -> Array:
        """Return a run of rows in blocks of :attr:`block_kind`: ``[n, bytes]`` uint8. Raises as :meth:`read`."""
        import torch

        matrix = self.read(take, rows, range(self.columns))
        quants = matrix.quants.view(torch.uint8).reshape(len(rows), self.columns // BLOCK, -1)
        if matrix.scales.dtype == torch.float8_e8m0fnu:
            return torch.cat((matrix.scales.view(torch.uint8).unsqueeze(-1), quants), -1).view(len(rows), -1)
        scales, zeros = (
            None if each is None else each.float().repeat_interleave(self.columns // BLOCK // each.shape[1], 1)
            for each in (matrix.scales, matrix.zeros)
        )
        assert scales is not None
        halves = [scales] if zeros is None else [scales, -zeros * scales]
        head = torch.stack([half.half() for half in halves], -1).view(torch.uint8)
        return torch.cat((head, quants), -1).view(len(rows), -1)

    def _checked(self, take: Take, rows: range, columns: range) -> Unpacked:
        found = self.unpack(take, rows, columns)
        if not all(each.float().isfinite().all() for each in (found.scales, found.supers) if each is not None):
            raise ValueError("a scale is not a number, or infinite")
        return found

    def _groups(self, columns: range, step: int, scales: Array) -> Array:
        """Return the place in ``scales`` of every ``step``-th column."""
        import torch

        each = torch.arange(columns.start, columns.stop, step, device=scales.device)
        return each // self.group - columns.start // self.group


def _chosen(values: Array, columns: Array) -> Array:
    """Return columns of an array, whose dtype may be one that torch only stores."""
    import torch

    stored = values.contiguous().view(torch.uint8) if values.itemsize == 1 else values
    return stored[:, columns].view(values.dtype)


def numbers_of(words: Array, bits: int) -> Array:
    """Return the numbers of 4 or 8 bits in int32 words ``[n, w]``, lowest bits first: uint8 ``[n, 32 w / bits]``."""
    import torch

    # A copy in any case: a transposed matrix of one column counts as contiguous, and cannot be seen as bytes.
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return octets if bits == 8 else nibbles_of(octets)


def nibbles_of(octets: Array) -> Array:
    """Return the numbers ``[n, 2 b]`` in bytes ``[n, b]``, the low four bits first."""
    return planes(octets, 4).transpose(-1, -2).flatten(-2)


def groups_of(columns: int, group: int, like: Array) -> Array:
    """Return the group of each column where groups are runs, in the dtype and on the device of ``like``."""
    import torch

    return torch.arange(columns, dtype=like.dtype, device=like.device) // group


def order_of(indices: Array, group: int) -> Array:
    """Return the columns ``[K]`` int64 by their group ``indices`` ``[K]``, which have ``group`` columns each.

    Raises ``ValueError`` if they have not.
    """
    order = indices.argsort(stable=True)
    if not indices[order].equal(groups_of(len(indices), group, indices)):
        raise ValueError(f"the groups of columns are not of {group} each")
    return order


def touched(run: range, unit: int) -> slice:
    """Return the units that a run of elements touches."""
    return slice(run.start // unit, -(-run.stop // unit))


def within(values: Array, run: range, unit: int) -> Array:
    """Return of ``values`` ``[.., elements]`` of the units that a run touches the elements of the run."""
    first = run.start % unit
    return values[..., first : first + len(run)]


def centred(levels: Array, bits: int) -> Array:
    """Return unsigned numbers as a matrix has them: of 8 bits less 128, as int8."""
    import torch

    return levels if bits == 4 else (levels ^ 128).view(torch.int8)
