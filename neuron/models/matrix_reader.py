"""Reading of a checkpoint's tensors onto a device in the device's form, whole or one rank's part.

:mod:`neuron.models.quantization` decides the form. Tensors are allocated at their final size and filled in runs of
rows, so the peak is the weights and one run: a run's blocks or floats are copied unchanged, and converted or rounded on
the device. On ``meta`` nothing is read: the same code lists shapes and forms.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, cast

import torch

from neuron.models import quantization
from neuron.models.config import ModelConfig
from neuron.models.gguf import BLOCKS
from neuron.models.shard import Shard
from neuron.models.transfer import Transfer, from_file
from neuron.triton_kernels import quantized
from neuron.triton_kernels.quantized import BLOCK, SUPER_BLOCK, Matrix, Quantization, QuantizedMatrix, StackedMatrix

if TYPE_CHECKING:
    from neuron.models.weights import WeightSource

RUN_ELEMENTS: Final = 1 << 23
"""Number of elements converted at a time: some 50 MiB of temporary arrays."""


class MatrixReader:
    """Reader of the tensors of ``source``; floats in ``dtype``, matrices in the form for ``quant``."""

    def __init__(
        self, source: "WeightSource", dtype: torch.dtype, device: torch.device, quant: str, shard: Shard
    ) -> None:
        self.shapes = source.config.tensor_shapes()
        """Shapes of the whole model's tensors, by safetensors name."""
        self._source = source
        self._config: ModelConfig = source.config
        self._dtype = dtype
        self._device = device
        self._quant = quant
        self._shard = shard
        self._transfer = Transfer(device)

    def vector(self, *names: str) -> torch.Tensor:
        """Return the concatenation of vectors, this rank's part of each."""
        return self._floats([(name, self._rows(name), slice(0, 0)) for name in names])

    def plain(self, *names: str) -> torch.Tensor:
        """Return the concatenated rows of matrices, this rank's part of each, in the dtype."""
        return self._floats([(name, self._rows(name), self._columns(name)) for name in names])

    def table(self, name: str) -> torch.Tensor | QuantizedMatrix:
        """Return one matrix."""
        return cast(torch.Tensor | QuantizedMatrix, self.matrix(name))

    def matrix(self, *names: str) -> Matrix:
        """Return the concatenated rows of matrices, this rank's part of each: stacked where their forms differ."""
        parts: list[torch.Tensor | QuantizedMatrix] = []
        for form, group in itertools.groupby(names, self._form):
            alike = list(group)
            parts.append(self.plain(*alike) if form is None else self._quantized(form, alike))
        return parts[0] if len(parts) == 1 else StackedMatrix(tuple(parts))

    def _rows(self, name: str) -> slice:
        return self._shard.rows(self._config, name, self.shapes[name][0])

    def _columns(self, name: str) -> slice:
        return self._shard.columns(self._config, name, self.shapes[name][1])

    def _form(self, name: str) -> str | None:
        return quantization.form_of(self._config, name, self._quant, self._columns(name))

    def _floats(self, parts: list[tuple[str, slice, slice]]) -> torch.Tensor:
        num_rows = sum(rows.stop - rows.start for _, rows, _ in parts)
        columns = parts[0][2]
        width = columns.stop - columns.start
        shape = (num_rows, width) if width else (num_rows,)
        fused = torch.empty(shape, dtype=self._dtype, device=self._device)
        start = 0
        for name, rows, columns in parts:
            stop = start + rows.stop - rows.start
            self._read(name, fused[start:stop], rows.start, columns.start)
            start = stop
        return fused

    def _read(self, name: str, destination: torch.Tensor, first_row: int, first_column: int) -> None:
        if self._device.type != "meta":
            self._source.read_into(
                name, destination, transfer=self._transfer, first_row=first_row, first_column=first_column
            )

    def _quantized(self, form: str, names: list[str]) -> QuantizedMatrix:
        columns = self._columns(names[0])
        width = columns.stop - columns.start
        num_rows = sum(rows.stop - rows.start for rows in map(self._rows, names))
        matrix = empty(form, num_rows, width, self._device)
        if self._device.type == "meta":
            return matrix
        start = 0
        for name in names:
            rows = self._rows(name)
            runs = self._rounded if form in quantization.ROUNDED else self._stored
            for run in runs(form, name, rows, columns):
                stop = start + run.shape[0]
                for source, destination in zip(run.arrays(), matrix.arrays(), strict=True):
                    destination[start:stop].copy_(source)
                start = stop
        return matrix

    def _stored(self, form: str, name: str, rows: slice, columns: slice) -> Iterator[QuantizedMatrix]:
        """Yield runs of rows in the layout of the device."""
        stored = self._source.read_stored(name)
        if stored is None:
            raise TypeError(f"{name} is not stored as {form}")
        num_rows, num_columns = self.shapes[name]
        block, block_bytes = BLOCKS[stored.kind]
        step = max(1, RUN_ELEMENTS // num_columns)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            blocks = stored.rows(num_rows, self._config.head_dim, start, stop).reshape(stop - start, -1, block_bytes)
            chosen = blocks[:, columns.start // block : columns.stop // block].reshape(-1, block_bytes)
            here = from_file(chosen)
            there = torch.empty_like(here, device=self._device)
            self._transfer.copy(here, there)
            yield quantized.from_gguf(form, there, stop - start)

    def _rounded(self, form: str, name: str, rows: slice, columns: slice) -> Iterator[QuantizedMatrix]:
        """Yield runs of rows, rounded."""
        width = columns.stop - columns.start
        step = max(1, RUN_ELEMENTS // width)
        for start in range(rows.start, rows.stop, step):
            piece = torch.empty((min(step, rows.stop - start), width), dtype=self._dtype, device=self._device)
            self._read(name, piece, start, columns.start)
            match form:
                case "int8":
                    yield quantized.quantize_int8(piece)
                case "fp8":
                    yield quantized.quantize_fp8(piece)
                case _:
                    yield quantized.quantize_int4(piece, quantization.int4_group(width))


def empty(form: str, num_rows: int, num_columns: int, device: torch.device) -> QuantizedMatrix:
    """Return an uninitialised matrix in ``form``, as of :func:`from_gguf` and the roundings."""

    def array(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((num_rows, columns), dtype=dtype, device=device)

    f16, f32, i8 = torch.float16, torch.float32, torch.int8
    groups, supers = num_columns // BLOCK, num_columns // SUPER_BLOCK
    int8, int4 = Quantization.INT8, Quantization.INT4
    if form in ("int4", "Q4_0", "Q4_1", "Q4_K"):
        quants = array(num_columns // 2, torch.uint8)
    else:
        quants = array(num_columns, torch.float8_e4m3fn if form == "fp8" else i8)
    match form:
        case "int8":
            return QuantizedMatrix(int8, 0, quants, array(1, f32))
        case "fp8":
            return QuantizedMatrix(Quantization.FP8, 0, quants, array(1, f32))
        case "int4":
            group = quantization.int4_group(num_columns)
            scales, minima = array(num_columns // group, f16), array(num_columns // group, f16)
            return QuantizedMatrix(int4, group, quants, scales, minima)
        case "Q8_0":
            return QuantizedMatrix(int8, BLOCK, quants, array(groups, f16))
        case "Q4_0":
            return QuantizedMatrix(int4, BLOCK, quants, array(groups, f16))
        case "Q4_1":
            return QuantizedMatrix(int4, BLOCK, quants, array(groups, f16), array(groups, f16))
        case "Q4_K" | "Q5_K":
            scales, minima = array(groups, i8), array(groups, i8)
            outer = array(supers, f16), array(supers, f16)
            return QuantizedMatrix(int4 if form == "Q4_K" else int8, BLOCK, quants, scales, minima, *outer)
        case "Q6_K":
            return QuantizedMatrix(int8, BLOCK // 2, quants, array(2 * groups, i8), super_scales=array(supers, f16))
        case _:
            raise ValueError(f"{form} is no form of a matrix on a device")


def some_rows(matrix: torch.Tensor | QuantizedMatrix, rows: slice) -> torch.Tensor | QuantizedMatrix:
    """Return a view of a run of rows."""
    return matrix[rows] if isinstance(matrix, torch.Tensor) else matrix.map(lambda array: array[rows])
