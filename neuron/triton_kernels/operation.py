"""Declaration of an operation: its eager reference, its launcher, and the inputs on which both are checked.

    @Operation
    def rms_norm(x, weight, eps): ...           # formula, shapes, eager torch

    @rms_norm.launcher
    def _launch(x, weight, eps): ...            # the same by kernels

    @rms_norm.cases()
    def _cases(check, make): check(make(3, 77), make(77), 1e-5)

Both forms change the same arguments in place. An operation belongs to :data:`REGISTRY` once its module is imported.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Final, Generic, ParamSpec, Protocol, TypeVar, overload

import torch

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

HALF_TYPES: Final = (torch.bfloat16, torch.float16)
ALL_TYPES: Final = (*HALF_TYPES, torch.float32)

REGISTRY: Final[list["Operation[..., object]"]] = []
"""Every operation, in order of declaration."""


class Bound(Protocol):
    """Object that operations are attributes of."""

    by_kernels: bool
    """Whether operations are done by kernels, not eager torch."""


@dataclasses.dataclass(frozen=True, slots=True)
class Make:
    """Maker of inputs: ``make(3, 77)`` is a random tensor, or on ``meta`` one of that shape."""

    dtype: torch.dtype
    device: torch.device

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        """Return normal random numbers; ``dtype`` is that of activations unless given."""
        return (torch.randn(shape, device=self.device) * scale).to(dtype or self.dtype)

    def integers(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros(shape, dtype=dtype, device=self.device)


Run = Callable[..., object]
"""Call of an operation."""
Inputs = Callable[Concatenate[Run, Make, ...], None]


@dataclasses.dataclass(frozen=True, slots=True)
class InputSet:
    """Inputs of an operation, one set for each of ``kinds`` and dtypes."""

    function: Inputs
    """Call of its first argument with each input, made by its second; further ones are a kind."""
    kinds: Sequence[tuple[Any, ...]]
    dtypes: Sequence[torch.dtype]


class Operation(Generic[P, R]):
    """Operation of a step, declared by its eager ``reference``, which documents shapes and results."""

    def __init__(self, reference: Callable[P, R]) -> None:
        self.name = getattr(reference, "__name__", "").replace("_", " ")
        self.__doc__ = reference.__doc__
        self.eager = reference
        self.triton = reference
        """Launcher of its kernels; the reference, unless it has any."""
        self.numeric: list[InputSet] = []
        """Small irregular inputs, on which the kernels' numbers are checked."""
        self.real: list[InputSet] = []
        """Inputs of real models' shapes, for which the kernels' machine code is checked."""
        REGISTRY.append(self)

    def launcher(self, function: Callable[P, R]) -> Callable[P, R]:
        """Register the launcher of its kernels."""
        self.triton = function
        return function

    def cases(self, *kinds: object, dtypes: Sequence[torch.dtype] = ALL_TYPES) -> Callable[[Inputs], Inputs]:
        """Register numeric inputs: ``function(check, make, kind)`` calls ``check`` with each."""
        return lambda function: _append(self.numeric, InputSet(function, [(kind,) for kind in kinds] or [()], dtypes))

    def launches(self, *, dtypes: Sequence[torch.dtype] = HALF_TYPES) -> Callable[[Inputs], Inputs]:
        """Register inputs of real shapes: ``function(launch, make)`` calls ``launch`` with each."""
        return lambda function: _append(self.real, InputSet(function, [()], dtypes))

    @overload
    def __get__(self, instance: None, owner: type) -> "Operation[P, R]": ...
    @overload
    def __get__(self, instance: Bound, owner: type) -> Callable[P, R]: ...
    def __get__(self, instance: Bound | None, owner: type) -> "Operation[P, R] | Callable[P, R]":
        """Return the form that ``instance`` is bound to."""
        if instance is None:
            return self
        return self.triton if instance.by_kernels else self.eager


def _append(where: list[InputSet], inputs: InputSet) -> Inputs:
    where.append(inputs)
    return inputs.function
