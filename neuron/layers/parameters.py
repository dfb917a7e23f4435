"""Parameters of a layer, as declared: the tensors that a checkpoint has for them, and the part that a rank holds.

A layer declares each tensor once. The check of shapes, the count of parameters, all sizes, GGUF's names, the load onto
a GPU or for the CPU kernels, and a rank's part follow from the declaration. No torch here: a daemon plans with it.
"""

import dataclasses
import math
from typing import NamedTuple

from neuron.layers.shard import Runs, count


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """Tensor of a checkpoint. A layer gives its names without the prefix of the block (``model.layers.3.``)."""

    name: str
    """Name in safetensors."""
    gguf: str
    """Name in GGUF, which has one tensor for a layer's experts: its matrix for expert 7 is ``ffn_up_exps.7``."""
    shape: tuple[int, ...]
    rows: Runs = ()
    """Rows of this rank; unless given all."""
    columns: Runs = ()
    """Columns of this rank, of a matrix; unless given all."""
    order: tuple[int, ...] = ()
    """Row in safetensors of each row of a head, where these have another order; all heads have the same one."""
    gguf_order: tuple[int, ...] = ()
    """The same in GGUF."""
    less_one: bool = False
    """Whether safetensors store it less one."""
    log_of_negative: bool = False
    """Whether safetensors store the logarithm of its negative."""

    def __post_init__(self) -> None:
        """Take all rows and columns, unless a part is given."""
        if not self.rows:
            object.__setattr__(self, "rows", (range(self.shape[0]),))
        if not self.columns and len(self.shape) > 1:
            object.__setattr__(self, "columns", (range(self.shape[1]),))

    def within(self, prefix: str, gguf_prefix: str) -> "Tensor":
        """Return the tensor with its full names."""
        # Not dataclasses.replace, which takes twice as long: a mixture of experts has 20,000 tensors.
        where = prefix + self.name, gguf_prefix + self.gguf, self.shape, self.rows, self.columns
        return Tensor(*where, self.order, self.gguf_order, self.less_one, self.log_of_negative)

    @property
    def num_elements(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def num_rows(self) -> int:
        """Number of this rank's rows."""
        return count(self.rows)

    @property
    def num_columns(self) -> int:
        """Number of this rank's columns; 0 of a vector."""
        return count(self.columns)


@dataclasses.dataclass(frozen=True, slots=True)
class Vector:
    """Vector of the model's dtype: ``tensors`` concatenated, each repeated as in ``repeats``, then ``[repeats, D]``."""

    tensors: tuple[Tensor, ...]
    repeats: tuple[int, ...] = ()
    float32: bool = False
    """Whether it is float32 in a model of any dtype."""

    @property
    def num_elements(self) -> int:
        """Number of this rank's elements."""
        repeats = self.repeats or (1,) * len(self.tensors)
        return sum(times * tensor.num_rows for tensor, times in zip(self.tensors, repeats, strict=True))


class Fused(NamedTuple):
    """Names of the one tensor that a file may have for all tensors of a matrix: their rows, one after another."""

    name: str
    """Name in safetensors; of a stack of matrices for experts."""
    gguf: str
    transposed: bool = False
    """Whether safetensors may have the matrices of a stack as ``[in, out]``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
    """Matrix ``[out, in]``, maybe with a bias: the rows of ``tensors`` concatenated. It may be quantised."""

    tensors: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] = ()
    """Bias of each tensor, or none."""
    fused: Fused | None = None
    num_experts: int = 0
    """Number of experts in it, all in one form; 0: it is an ordinary matrix."""
    gated: bool = False
    """Whether its tensors are gate and up in turn: the CPU kernels alternate their rows, so they have one form."""
    quantised: bool = True
    """Whether it may stay in the quantised form of a file."""
    rounded: bool = True
    """Whether a load may round it to fewer bits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """Vector of float32 that comes from the configuration; equal ones are held once."""

    values: tuple[float, ...]


Parameter = Vector | Matrix | Constant
Parameters = dict[str, Parameter]
"""Parameters of a layer, by the name under which ``forward`` finds the loaded ones."""


def tensors_of(parameter: Parameter) -> tuple[Tensor, ...]:
    """Return the tensors that a checkpoint has for ``parameter``."""
    match parameter:
        case Vector():
            return parameter.tensors
        case Matrix():
            return (*parameter.tensors, *parameter.biases)
        case Constant():
            return ()


def within(parameter: Parameter, prefix: str, gguf_prefix: str) -> Parameter:
    """Return ``parameter`` with full names of its tensors."""
    if isinstance(parameter, Constant):
        return parameter
    tensors = tuple(tensor.within(prefix, gguf_prefix) for tensor in parameter.tensors)
    if isinstance(parameter, Vector):
        return dataclasses.replace(parameter, tensors=tensors)
    biases = tuple(tensor.within(prefix, gguf_prefix) for tensor in parameter.biases)
    fused = parameter.fused
    if fused is not None:
        fused = Fused(prefix + fused.name, gguf_prefix + fused.gguf, fused.transposed)
    return dataclasses.replace(parameter, tensors=tensors, biases=biases, fused=fused)
