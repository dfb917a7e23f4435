"""The tensors of a file by the names of the model's, whether the file has them one by one or several as one.

GGUF has one tensor for the gates of all experts of a layer, as a stack. Safetensors may have one for queries, keys and
values, or for gate and up, of one MLP or of all experts: its rows, or the rows of its matrices, are those of the
model's tensors one after another, so that each of these is a run of the file's bytes.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

from neuron.layers.parameters import Matrix, tensors_of
from neuron.models.errors import CorruptWeightsError
from neuron.models.fields import MAX_EXPERTS
from neuron.models.gguf import TensorInfo
from neuron.models.model import ModelConfig
from neuron.models.safetensors import TensorEntry

Stored = TypeVar("Stored", TensorInfo, TensorEntry)


def by_tensor(
    config: ModelConfig, stored: Mapping[str, Stored], where: object, *, gguf: bool = False
) -> dict[str, Stored]:
    """Return the tensors ``stored`` in a file by the safetensors names of the model's, and others by their own.

    Raises :class:`CorruptWeightsError`, with the place ``where``, for one that holds other rows than the model has.
    """
    left, found = dict(stored), dict[str, Stored]()
    for parameter in (each for parameters in config.parameters() for each in parameters.values()):
        own = {tensor.name: tensor.gguf if gguf else tensor.name for tensor in tensors_of(parameter)}
        if isinstance(parameter, Matrix) and parameter.fused and not all(name in stored for name in own.values()):
            name = parameter.fused.gguf if gguf else parameter.fused.name
            if name in left:
                found |= _runs(left.pop(name), parameter, where)
        for tensor in tensors_of(parameter):
            if own[tensor.name] in left:
                found[tensor.name] = _as_matrix(left.pop(own[tensor.name]), tensor.shape)
    return {**left, **found}


def _as_matrix(stored: Stored, shape: tuple[int, ...]) -> Stored:
    """Return ``stored``; as a matrix of one row, which GGUF has as a vector, where ``shape`` is one."""
    return dataclasses.replace(stored, shape=shape) if (1, *stored.shape) == shape else stored


def _runs(whole: Stored, matrix: Matrix, where: object) -> dict[str, Stored]:
    """Return the parts of ``whole`` that are the tensors of ``matrix``."""
    num_rows, columns = sum(tensor.shape[0] for tensor in matrix.tensors), matrix.tensors[0].shape[1]
    stack, *rest = whole.shape
    is_transposed = (
        matrix.fused is not None and matrix.fused.transposed and len(rest) == 2 and rest[0] == columns
        and stack * rest[1] == num_rows
    )  # fmt: skip
    if not is_transposed and (whole.shape[-1] != columns or math.prod(whole.shape[:-1]) != num_rows):
        raise CorruptWeightsError(
            where,
            f"{whole.name} has shape {list(whole.shape)}, the configuration says {num_rows} rows of {columns}",
        )
    found, first, row_bytes = dict[str, Stored](), 0, whole.nbytes // num_rows
    for tensor in matrix.tensors:
        rows = tensor.shape[0]
        run = dataclasses.replace(
            whole, shape=tensor.shape, offset=whole.offset + first * row_bytes, nbytes=rows * row_bytes
        )
        if is_transposed and isinstance(run, TensorEntry):
            run = _columns(run, whole.offset, first, rest[1])
        found[tensor.name] = run
        first += rows
    return found


def _columns(rows: TensorEntry, start: int, first: int, width: int) -> TensorEntry:
    """Return ``rows`` of a stack that begins at ``start``, where each of its matrices is transposed.

    They are columns of a matrix of ``width`` columns; ``first`` counts over the stack.
    """
    num_rows, columns = rows.shape
    item_bytes = rows.nbytes // (num_rows * columns)
    place = first // width * width * columns + first % width
    nbytes = ((columns - 1) * width + num_rows) * item_bytes
    return dataclasses.replace(rows, offset=start + place * item_bytes, nbytes=nbytes, strides=(1, width))


def unstacked(tensors: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors of a GGUF file by name, each layer's experts one by one, as ``ffn_up_exps.7``."""
    return {part.name: part for tensor in tensors for part in _experts(tensor)}


def _experts(tensor: TensorInfo) -> list[TensorInfo]:
    stem = tensor.name.removesuffix(".weight")
    if (
        not stem.endswith("_exps")
        or stem.endswith("_gate_up_exps")
        or len(tensor.shape) != 3
        or tensor.shape[0] > MAX_EXPERTS
    ):
        return [tensor]
    count, *shape = tensor.shape
    nbytes = tensor.nbytes // count
    return [
        dataclasses.replace(
            tensor, name=f"{stem}.{i}", shape=tuple(shape), offset=tensor.offset + i * nbytes, nbytes=nbytes
        )
        for i in range(count)
    ]
