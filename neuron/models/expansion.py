"""Weights that a load holds in a wider form than the file has: where no kernel reads theirs, and what that costs."""

import collections
from collections.abc import Iterator
from typing import Final, NamedTuple

from neuron.cpu_kernels import native
from neuron.formats.scheme import Scheme
from neuron.layers.parameters import Matrix
from neuron.layers.shard import WHOLE, Shard
from neuron.models import packed, quantization
from neuron.models.model import DTYPE_BYTES, ModelConfig, StoredKind

WIDER: Final = 1.25
"""Least ratio of sizes that is reported: scales may be repeated, or padded to whole registers."""
NATIVE: Final = {
    packed.Format.W4: "int4", packed.Format.IQ4: "iq4", packed.Format.FP4: "fp4", packed.Format.W8: "int8",
    packed.Format.W16: "bfloat16", packed.Format.W32: "float32",
}  # fmt: skip


class Expansion(NamedTuple):
    """Weights of one form that are expanded to one other."""

    stored: str
    held: str
    num_weights: int
    more_bytes: int
    """Bytes on the device beyond those in the file."""

    def __str__(self) -> str:
        """Return it as a line of the log."""
        size = f"{self.more_bytes / (1 << 20):.0f} MiB more than in the file"
        return f"{self.num_weights} weights in {self.stored} are expanded to {self.held}: {size}"


def expansions(
    config: ModelConfig, dtype: str, quant: str, shard: Shard = WHOLE, *, native: bool
) -> tuple[Expansion, ...]:
    """Return the weights of a rank that are expanded by a load in ``quant``, or else ``dtype``.

    ``native``: the CPU kernels run it.
    """
    counts, sizes = collections.Counter[tuple[str, str]](), collections.Counter[tuple[str, str]]()
    for kind, elements, held, held_bytes in _weights(config, dtype, quant, shard, native):
        stored_bytes = elements * _element_bytes(kind)
        if held_bytes > WIDER * stored_bytes:
            both = kind.name, held
            counts[both] += 1
            sizes[both] += int(held_bytes - stored_bytes)
    return tuple(Expansion(*both, count, sizes[both]) for both, count in counts.items())


def _element_bytes(kind: StoredKind) -> float:
    """Return the bytes of an element in the file."""
    if isinstance(kind, Scheme):
        return kind.stored_row_bytes / kind.columns
    return kind.block_bytes / kind.block


def _weights(
    config: ModelConfig, dtype: str, quant: str, shard: Shard, is_native: bool
) -> Iterator[tuple[StoredKind, int, str, int]]:
    """Yield of each quantised weight its storage, elements on the rank, and name and bytes of its form there."""
    kinds = config.tensor_kinds
    for matrix in (each for parameters in config.parameters(shard) for each in parameters.values()):
        if not isinstance(matrix, Matrix) or not any(tensor.name in kinds for tensor in matrix.tensors):
            continue
        formats = packed.formats(matrix, kinds, dtype) if is_native else ()
        forms = () if is_native else quantization.forms(matrix, kinds, quant)
        for index, tensor in enumerate(matrix.tensors):
            kind, rows, columns = kinds.get(tensor.name), tensor.num_rows, tensor.num_columns
            if kind is None or (not isinstance(kind, Scheme) and kind.block == 1):
                continue
            if is_native:
                held, held_bytes = NATIVE[formats[index]], native.packed_bytes(formats[index], rows, columns)
            elif (form := forms[index]) is None:
                held, held_bytes = dtype, rows * columns * DTYPE_BYTES[dtype]
            else:
                held, held_bytes = form.layout.quantization.value, form.layout.nbytes(rows, columns)
            yield kind, rows * columns, held, held_bytes
