"""Checks of all operations on the inputs that their files register.

A numeric case runs an operation's kernels and its eager reference, in float32, on the same inputs, and compares the
results and everything that both were given, since both may change their arguments. :func:`launch_everything` makes the
launches of real models' shapes on ``meta`` tensors, for :func:`neuron.triton_kernels.launch.recording`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import torch

from neuron.triton_kernels import operations  # noqa: F401 (declares every operation)
from neuron.triton_kernels.operation import HALF_TYPES, REGISTRY, InputSet, Make, Operation

TOLERANCE: Final = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}
"""Tolerance, relative to the largest expected magnitude: bfloat16 has 8 bits, and the interpreter truncates."""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Comparison of an operation's kernels with its reference."""

    operation: Operation[..., Any]
    inputs: InputSet
    kind: tuple[Any, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Return the names of the operation and of the kind of its inputs."""
        return " ".join([self.operation.name, *map(str, self.kind)])

    def error(self, device: torch.device) -> float:
        """Return the largest difference over all results, as a share of the largest magnitude expected."""
        worst = 0.0

        def check(*args: Any, **kwargs: Any) -> None:
            nonlocal worst
            given = args, kwargs
            twins = _twin(given)
            found = _tensors((self.operation.triton(*args, **kwargs), given))
            expected = _tensors((self.operation.eager(*twins[0], **twins[1]), twins))
            for one, other in zip(found, expected, strict=True):
                worst = max(worst, self._difference(one.double().cpu(), other.double().cpu()))

        self.inputs.function(check, Make(self.dtype, device), *self.kind)
        return worst

    def _difference(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        if found.shape != expected.shape:
            raise ValueError(f"{self.name}: {list(found.shape)} instead of {list(expected.shape)}")
        if not found.numel():
            return 0.0
        same = (found == expected) | (found.isnan() & expected.isnan())
        largest = expected.nan_to_num().abs().max().clamp(1e-6)
        return float(torch.where(same, 0.0, (found - expected).abs() / largest).nan_to_num(torch.inf).max())

    @property
    def tolerance(self) -> float:
        """Return the largest error that rounding explains."""
        return TOLERANCE[self.dtype]


def _twin(value: Any, *, widens: bool = True) -> Any:
    """Return a copy with activations and plain weights in float32; the fields of a dataclass keep their types."""
    match value:
        case torch.Tensor():
            return value.float() if widens and value.dtype in HALF_TYPES else value.clone()
        case dict():
            return {name: _twin(one, widens=widens) for name, one in value.items()}
        case tuple():
            each = [_twin(one, widens=widens) for one in value]
            return type(value)(*each) if hasattr(value, "_fields") else tuple(each)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            return dataclasses.replace(value, **{name: _twin(getattr(value, name), widens=False) for name in names})
        case _:
            return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    match value:
        case torch.Tensor():
            yield value
        case dict() | tuple():
            for one in value.values() if isinstance(value, dict) else value:
                yield from _tensors(one)
        case _ if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from _tensors(getattr(value, field.name))


def numeric_cases() -> Iterator[Case]:
    """Yield every case; the whole takes a few minutes in the interpreter."""
    for operation in REGISTRY:
        for inputs in operation.numeric:
            for dtype in inputs.dtypes:
                for kind in inputs.kinds:
                    yield Case(operation, inputs, kind, dtype)


def launch_everything() -> None:
    """Make a launch of every kernel and tile choice at real models' shapes, inside ``recording``.

    In bfloat16; in float16, whose machine code differs only in the names of formats, fewer launches of each kernel.
    """
    for operation in REGISTRY:
        for inputs in operation.real:
            for dtype in inputs.dtypes:
                inputs.function(operation.triton, Make(dtype, torch.device("meta")))
