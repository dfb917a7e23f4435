"""Choice of the matrices that stay quantised on a device, of their form, and the bytes of all weights.

Pure decisions on sizes: the daemon's preflight and the worker's load call the same functions. Layouts are in
:mod:`neuron.formats`; the CPU kernels have their own formats (:mod:`.packed`).

``quant`` of a spec is ``auto`` (matrices that the file quantises stay so on a GPU), ``none`` (all in the model's
dtype), or ``int8``, ``int4``, ``fp8`` (a file of floats is rounded while it is loaded). Embedding and head are not
rounded: together they are a tenth of an 8B model, and the head's errors are those of the answer.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from neuron.formats.format import Layout, RoundedFormat, StoredFormat
from neuron.formats.registry import ROUNDED_FORMATS, STORED_FORMATS
from neuron.formats.scheme import Scheme
from neuron.layers.parameters import Constant, Matrix, Tensor, Vector
from neuron.layers.shard import WHOLE, Shard
from neuron.models.errors import UnsupportedQuantizationError
from neuron.models.model import DTYPE_BYTES, ModelConfig, StoredKind

NONE: Final = "none"
STORED: Final = "stored"
"""Result of ``auto`` where the file's own blocks are kept."""
KNOWN: Final = ("auto", NONE, *ROUNDED_FORMATS)


class Form(NamedTuple):
    """Form of a tensor on the device: its layout, and the format that it is read or rounded from."""

    format: StoredFormat | RoundedFormat | Scheme
    layout: Layout


def resolve(config: ModelConfig, quant: str, dtype: str, device: str, *, cpu_kernels: bool = True) -> str:
    """Return NONE, STORED or one of ROUNDED_FORMATS for the ``quant`` of a spec.

    Raises :class:`UnsupportedQuantizationError` for an unknown quantisation, or one that this file or device cannot
    have.
    """
    if quant not in KNOWN:
        raise UnsupportedQuantizationError(f"quant is {quant!r}; it can be {', '.join(KNOWN)}", param="quant")
    kinds = config.tensor_kinds.values()
    kept = any(isinstance(kind, Scheme) or kind.name in STORED_FORMATS for kind in kinds)
    on_cpu = device.startswith("cpu")
    if quant == "auto":
        return STORED if kept and not on_cpu and dtype != "float32" else NONE
    if quant == NONE:
        return NONE
    if any(isinstance(kind, Scheme) or kind.block > 1 for kind in kinds):
        raise UnsupportedQuantizationError(
            f"quant is {quant!r}, but the file is quantised already; load it with quant = 'auto'", param="quant"
        )
    if on_cpu and cpu_kernels:
        raise UnsupportedQuantizationError(
            f"quant is {quant!r}, which is for GPUs; a CPU runs a file in the form it is stored in", param="quant"
        )
    return quant


def forms(matrix: Matrix, kinds: Mapping[str, StoredKind], quant: str) -> tuple[Form | None, ...]:
    """Return the form on the device of each tensor of a matrix, ``None`` for the model's dtype.

    ``kinds`` are how a file stores its tensors, by safetensors name. Experts are in one form, their columns in order.
    """

    def form_of(tensor: Tensor) -> Form | None:
        kind, columns = kinds.get(tensor.name), tensor.columns
        if quant != STORED:
            format: StoredFormat | RoundedFormat | None = ROUNDED_FORMATS[quant] if matrix.rounded else None
        elif isinstance(kind, Scheme):
            is_scattered = (matrix.num_experts and kind.ordered) or len(columns) > 1
            layout = None if is_scattered else kind.layout(columns[0])
            return None if layout is None else Form(kind, layout)
        else:
            format = None if kind is None else STORED_FORMATS.get(kind.name)
        if format is None:
            return None
        unit = format.unit(tensor.num_columns)
        is_cut = any(run.start % unit or run.stop % unit for run in columns)
        return None if is_cut else Form(format, format.layout(tensor.num_columns))

    if quant == NONE or not matrix.quantised:
        return (None,) * len(matrix.tensors)
    found = tuple(form_of(tensor) for tensor in matrix.tensors)
    return (None,) * len(found) if matrix.num_experts and len(set(found)) > 1 else found


def weights_bytes(config: ModelConfig, dtype: str, quant: str, shard: Shard = WHOLE) -> int:
    """Return the bytes of all weights on the device, exactly as the load allocates them."""
    num_floats = num_bytes = 0
    constants = set[Constant]()
    for parameter in (each for parameters in config.parameters(shard) for each in parameters.values()):
        match parameter:
            case Vector(float32=True):
                num_bytes += 4 * parameter.num_elements
            case Vector():
                num_floats += parameter.num_elements
            case Matrix():
                num_floats += sum(bias.num_rows for bias in parameter.biases)
                for form, tensor in zip(forms(parameter, config.tensor_kinds, quant), parameter.tensors, strict=True):
                    rows, columns = tensor.num_rows, tensor.num_columns
                    if form is None:
                        num_floats += rows * columns
                    else:
                        num_bytes += form.layout.nbytes(rows, columns)
            case Constant():
                constants.add(parameter)
    num_bytes += sum(4 * len(constant.values) for constant in constants)
    return num_floats * DTYPE_BYTES[dtype] + num_bytes


def largest_matrix_elements(config: ModelConfig) -> int:
    """Return the elements of the largest matrix: eager torch makes float32 of a quantised one on each use."""
    return max(tensor.num_elements for tensor in config.tensors().values())
