"""Float8 e4m3 or int8 with scales: ``w = q s``, one s for a tensor, a row, a group of a row, or a block of 128 by 128.

``weight`` is ``[N, K]``. Its scale is ``weight_scale_inv`` of DeepSeek's and Qwen's ``fp8``, which multiplies in spite
of its name, or ``weight_scale`` of compressed-tensors and ModelOpt: a number, ``[N]``, ``[N, 1]``, ``[N, K / group]``
or ``[N / 128, K / 128]``, both rounded up. Float8 e8m0 scales are exponents of two. On the device a row has scales of
its own: those of blocks take 3 % of the weight's bytes.
"""

import dataclasses
from typing import Final

from neuron.formats import Quantization
from neuron.formats.format import Array
from neuron.formats.scheme import SCALE_DTYPES, Piece, Pieces, Scheme, Settings, Take, Unpacked, touched

QUANTS: Final = {"F8_E4M3": Quantization.FP8, "I8": Quantization.INT8}
EXPONENTS: Final = ("F8_E8M0", "U8")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scaled(Scheme):
    """Scheme of a tensor of quants and one of scales."""

    suffix: str
    """End of the name of the scales."""
    group_rows: int
    """Rows that share a scale; 0: the tensor has one."""

    @property
    def extent(self) -> str:
        """See :class:`~neuron.formats.scheme.Scheme`."""
        if self.group_rows > 1:
            return f"in blocks of {self.group_rows} x {self.group}"
        if not self.group_rows:
            return "by tensor"
        return f"in groups of {self.group}" if self.group < self.columns else "by row"

    def unpack(self, take: Take, rows: range, columns: range) -> Unpacked:
        """See :class:`~neuron.formats.scheme.Scheme`."""
        import torch

        quants = take("weight", slice(rows.start, rows.stop), slice(columns.start, columns.stop))
        stored = take(self.suffix)
        whole = power_of_two(stored) if stored.dtype == torch.uint8 else stored
        grid = whole.reshape(1, 1) if not self.group_rows else whole.view(len(whole), -1)
        grid = grid[:, touched(columns, self.group)]
        each = torch.arange(rows.start, rows.stop, device=grid.device)
        return Unpacked(quants, grid[each // self.group_rows if self.group_rows else each * 0])


def power_of_two(exponents: Array) -> Array:
    """Return the float32 numbers of float8 e8m0, given as uint8."""
    import torch

    return torch.ldexp(torch.ones((), device=exponents.device), exponents.int() - 127)


def recognise(pieces: Pieces, rows: int, columns: int, settings: Settings) -> Scheme | None:
    """Return the scheme of a weight ``[rows, columns]``; None if it is another. Raises ``ValueError``."""
    weight = pieces.get("weight")
    if weight is None or weight.dtype not in QUANTS:
        return None
    suffix = next((name for name in ("weight_scale_inv", "weight_scale") if name in pieces), None)
    if suffix is None or weight.shape != (rows, columns):
        raise ValueError(f"{weight.dtype} of {list(weight.shape)} has no scale, or is not {[rows, columns]}")
    group_rows, group = _groups(pieces[suffix], rows, columns, settings)
    dtype = pieces[suffix].dtype
    scales = "float32" if dtype in EXPONENTS else SCALE_DTYPES.get(dtype)
    if scales is None:
        raise ValueError(f"scales in {dtype}")
    if more := pieces.keys() - {"weight", suffix}:
        raise ValueError(f"unknown tensors beside it: {', '.join(sorted(more))}"[:200])
    return Scaled(
        columns=columns,
        quantization=QUANTS[weight.dtype],
        group=group,
        scales=scales,
        suffix=suffix,
        group_rows=group_rows,
    )


def _groups(scale: Piece, rows: int, columns: int, settings: Settings) -> tuple[int, int]:
    """Return the rows and the columns that share a scale."""
    match scale.shape:
        case () | (1,) | (1, 1):
            return 0, columns
        case (count,) | (count, 1) if count == rows:
            return 1, columns
        case (count, groups) if count == rows and groups and columns % groups == 0:
            return 1, columns // groups
        case shape if shape == tuple(
            -(-size // unit) for size, unit in zip((rows, columns), settings.block, strict=True)
        ):
            return settings.block
    raise ValueError(f"scales of {list(scale.shape)} fit no groups of {[rows, columns]}")
