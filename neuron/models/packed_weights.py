"""Packing of a checkpoint for the CPU kernels: from the mapped file, matrix by matrix, on all threads.

Kinds that can be packed from their own blocks are not dequantised; others pass through float32 one matrix at a time.
"""

import itertools
import mmap
from collections.abc import Generator
from typing import Any, Final

import numpy as np
import torch

from neuron.cpu_kernels import native
from neuron.formats.scheme import Scheme
from neuron.layers.layer import Weights
from neuron.layers.parameters import Constant, Matrix, Parameters, Tensor, Vector
from neuron.models import packed
from neuron.models.gguf import TensorKind
from neuron.models.model import ModelConfig
from neuron.models.packed import Format, PackedWeights
from neuron.models.weights import PackedBytes, WeightSource

Floats = np.ndarray[Any, np.dtype[np.float32]]

HUGE_PAGE_BYTES: Final = 2 << 20


def huge_pages(num_bytes: int) -> PackedBytes:
    """Return zeroed memory on huge pages where the system has them, aligned to them, freed with the array.

    A pass over 97 MB of weights touches 23,600 small pages or 47 huge ones.
    """
    # Private: shared pages, the default, are never huge.
    mapped = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapped.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without transparent huge pages
            pass
    array = np.frombuffer(mapped, np.uint8)
    start = -array.ctypes.data % HUGE_PAGE_BYTES
    return array[start : start + num_bytes]


class _Packer:
    """Packer that fills one region from its start."""

    def __init__(self, source: WeightSource, dtype: str, pool: native.Pool) -> None:
        self.source = source
        self.config = source.config
        self.dtype = dtype
        self.pool = pool
        self.region = huge_pages(packed.weights_bytes(self.config, dtype))
        self._used = 0
        self._constants: dict[Constant, Floats] = {}

    def pack(self, parameters: Parameters) -> Weights:
        """Return the packed parameters of a layer."""
        return {name: self._packed(parameter) for name, parameter in parameters.items()}

    def _packed(self, parameter: Vector | Matrix | Constant) -> Floats | tuple[native.Matrix, ...]:
        match parameter:
            case Vector():
                repeats = parameter.repeats or (1,) * len(parameter.tensors)
                return self._floats(
                    [
                        each
                        for tensor, n in zip(parameter.tensors, repeats, strict=True)
                        for each in [self._read(tensor)] * n
                    ]
                )
            case Matrix():
                formats = packed.formats(parameter, self.config.tensor_kinds, self.dtype)
                if parameter.gated:
                    return (self._alternating(parameter.tensors, formats[0]),)
                biases = [self._floats([self._read(bias)]) for bias in parameter.biases]
                each = itertools.zip_longest(parameter.tensors, formats, biases)
                return tuple(self._matrix(*matrix) for matrix in each)
            case Constant():
                if parameter not in self._constants:
                    self._constants[parameter] = self._floats([np.array(parameter.values, np.float32)])
                return self._constants[parameter]

    def _take(self, num_bytes: int) -> PackedBytes:
        start = self._used
        self._used += num_bytes
        if self._used > len(self.region):
            raise RuntimeError(f"the plan counted {len(self.region)} bytes of weights, {self._used} are needed")
        return self.region[start : self._used]

    def _read(self, tensor: Tensor) -> Floats:
        values = torch.empty(tensor.shape, dtype=torch.float32)
        self.source.read_into(tensor.name, values)
        found: Floats = values.numpy()
        return found

    def _floats(self, parts: list[Floats]) -> Floats:
        """Return a copy of vectors in the region, concatenated and padded with zeros."""
        values = np.concatenate(parts)
        kept = self._take(4 * packed.padded(len(values))).view(np.float32)
        kept[: len(values)] = values
        return kept

    def _matrix(self, tensor: Tensor, format: Format, bias: Floats | None) -> native.Matrix:
        rows, columns = tensor.shape
        to = self._take(native.packed_bytes(format, rows, columns))
        self._pack(tensor, to, format)
        return native.Matrix(to, format, rows, columns, bias)

    def _alternating(self, tensors: tuple[Tensor, ...], format: Format) -> native.Matrix:
        """Pack two matrices of one shape with alternating blocks."""
        rows, columns = tensors[0].shape
        to = self._take(2 * native.packed_bytes(format, rows, columns))
        for first, tensor in enumerate(tensors):
            self._pack(tensor, to, format, first_block=first, block_step=2)
        return native.Matrix(to, format, 2 * packed.padded(rows), columns)

    def _pack(
        self, tensor: Tensor, to: PackedBytes, format: Format, *, first_block: int = 0, block_step: int = 1
    ) -> None:
        rows, columns = tensor.shape
        # A scheme's scales are rounded for GGUF's blocks, which is for the formats of integers alone.
        rounds = isinstance(self.config.tensor_kinds.get(tensor.name), Scheme)
        stored = None if rounds and format >= Format.W16 else self.source.read_stored(tensor.name)
        if stored is not None and native.can_pack(stored.kind, format):
            kind, values = stored.kind, stored.rows(rows, 0, rows).reshape(-1)
        else:
            kind, values = TensorKind.F32, self._read(tensor).reshape(-1).view(np.uint8)
        native.pack(
            self.pool,
            values,
            kind,
            rows,
            columns,
            to,
            format,
            first_block=first_block,
            block_step=block_step,
        )


def load_packed(source: WeightSource, dtype: str, pool: native.Pool) -> Generator[float, None, PackedWeights]:
    """Read a checkpoint into one region; yield the share done before each layer, return the weights."""
    config = source.config
    packer = _Packer(source, dtype, pool)
    loaded = []
    for number, parameters in enumerate(config.parameters()):
        yield (number + 1) / (len(config.layers) + 3)
        loaded.append(packer.pack(parameters))
    return packed.by_layer(loaded, packer.region)


def embedding_scale(config: ModelConfig, dtype: str) -> float:
    """Return the factor of embeddings: rounded to the dtype, as these models were trained."""
    return float(torch.tensor(config.embedding.scale, dtype=getattr(torch, dtype)))
