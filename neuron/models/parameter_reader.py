"""Reading of a layer's parameters onto a device in the device's form, whole or one rank's part.

:mod:`neuron.models.quantization` decides the form. Tensors are allocated at their final size and filled in runs of
rows, so the peak is the weights and one run: a run's bytes are copied unchanged, and converted or rounded on the
device. On ``meta`` nothing is read: the same code lists shapes and forms.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from neuron.formats import matrix as matrices
from neuron.formats.format import RoundedFormat
from neuron.formats.matrix import QuantizedMatrix, StackedMatrix
from neuron.layers.parameters import Constant, Matrix, Parameters, Tensor, Vector
from neuron.layers.step import Linear
from neuron.models import quantization
from neuron.models.quantization import Form
from neuron.models.transfer import Transfer

if TYPE_CHECKING:
    from neuron.models.weights import WeightSource

RUN_ELEMENTS: Final = 1 << 23
"""Number of elements converted at a time: some 50 MiB of temporary arrays."""


class ParameterReader:
    """Reader of the parameters of ``source``; floats in ``dtype``, matrices in the form for ``quant``."""

    def __init__(self, source: "WeightSource", dtype: torch.dtype, device: torch.device, quant: str) -> None:
        self._source = source
        self._dtype = dtype
        self._device = device
        self._quant = quant
        self._transfer = Transfer(device)
        self._constants: dict[Constant, torch.Tensor] = {}

    def read(self, parameters: Parameters) -> dict[str, Any]:
        """Return the loaded parameters, as :data:`~neuron.layers.layer.Weights` has them."""
        return {name: self._loaded(parameter) for name, parameter in parameters.items()}

    def _loaded(self, parameter: Vector | Matrix | Constant) -> "torch.Tensor | Linear":
        match parameter:
            case Vector():
                return self._vector(parameter)
            case Matrix():
                return Linear(
                    self._matrix(parameter), self._floats(parameter.biases, self._dtype) if parameter.biases else None
                )
            case Constant():
                if parameter not in self._constants:
                    values = torch.tensor(parameter.values, dtype=torch.float32, device=self._device)
                    self._constants[parameter] = values
                return self._constants[parameter]

    def _vector(self, vector: Vector) -> torch.Tensor:
        if not vector.repeats:
            return self._floats(vector.tensors, torch.float32 if vector.float32 else self._dtype)
        parts = [
            self._floats([each], self._dtype).expand(count, -1)
            for each, count in zip(vector.tensors, vector.repeats, strict=True)
        ]
        return torch.cat(parts)

    def _matrix(self, matrix: Matrix) -> matrices.Matrix:
        """Return the concatenated rows of a matrix's tensors: stacked where forms differ, or columns have an order."""
        forms = quantization.forms(matrix, self._source.config.tensor_kinds, self._quant)
        parts: list[torch.Tensor | QuantizedMatrix] = []
        alone = [index if form is not None and form.layout.has_order else 0 for index, form in enumerate(forms)]
        for (form, _), group in itertools.groupby(
            zip(forms, alone, matrix.tensors, strict=True), lambda each: each[:2]
        ):
            tensors = [tensor for *_, tensor in group]
            parts.append(self._floats(tensors, self._dtype) if form is None else self._quantized(form, tensors))
        if len(parts) > 1:
            return StackedMatrix(tuple(parts))
        whole = parts[0]
        if matrix.num_experts and isinstance(whole, torch.Tensor):
            return whole.view(matrix.num_experts, -1, whole.shape[-1])
        return whole

    def _floats(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the concatenation of vectors, or of the rows of matrices."""
        num_rows, width = sum(tensor.num_rows for tensor in tensors), tensors[0].num_columns
        fused = torch.empty((num_rows, width) if width else (num_rows,), dtype=dtype, device=self._device)
        start = 0
        for tensor in tensors:
            for run in tensor.rows:
                stop = start + len(run)
                self._read(tensor, fused[start:stop], run.start)
                start = stop
        return fused

    def _read(self, tensor: Tensor, destination: torch.Tensor, first_row: int) -> None:
        if self._device.type != "meta":
            self._source.read_into(
                tensor.name,
                destination,
                transfer=self._transfer,
                first_row=first_row,
                columns=tensor.columns,
            )

    def _quantized(self, form: Form, tensors: Sequence[Tensor]) -> QuantizedMatrix:
        num_rows = sum(tensor.num_rows for tensor in tensors)
        matrix = form.layout.empty(num_rows, tensors[0].num_columns, self._device)
        if self._device.type == "meta":
            return matrix
        start = 0
        for tensor in tensors:
            for run in self._runs(form, tensor):
                stop = start + run.shape[0]
                for source, destination in zip(run.arrays(), matrix.arrays(), strict=True):
                    destination[start:stop].copy_(source)
                if matrix.order is not None and run.order is not None:
                    matrix.order.copy_(run.order)
                start = stop
        return matrix

    def _runs(self, form: Form, tensor: Tensor) -> Iterator[QuantizedMatrix]:
        """Yield runs of rows in the layout of the device."""
        step = max(1, RUN_ELEMENTS // tensor.num_columns)
        starts = ((rows, start) for rows in tensor.rows for start in range(rows.start, rows.stop, step))
        for rows, start in starts:
            run = range(start, min(start + step, rows.stop))
            if isinstance(form.format, RoundedFormat):
                piece = torch.empty((len(run), tensor.num_columns), dtype=self._dtype, device=self._device)
                self._read(tensor, piece, start)
                yield form.format.quantize(piece)
            else:
                yield self._source.read_quantized(tensor.name, run, tensor.columns, self._to_device)

    def _to_device(self, stored: torch.Tensor) -> torch.Tensor:
        there = torch.empty(stored.shape, dtype=stored.dtype, device=self._device)
        self._transfer.copy(stored, there)
        return there


def some_rows(matrix: torch.Tensor | QuantizedMatrix, rows: range) -> torch.Tensor | QuantizedMatrix:
    """Return a view of a run of rows."""
    run = slice(rows.start, rows.stop)
    return matrix[run] if isinstance(matrix, torch.Tensor) else matrix.map(lambda array: array[run])
