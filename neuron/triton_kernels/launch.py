"""Launching of kernels, and recording of launches.

Every launcher ends in :func:`launch`. On a GPU, and in Triton's interpreter, it runs the kernel. Inside
:func:`recording` it records the :class:`Variant` instead and touches no data, so tensors may be on ``meta``: a run of a
model's launchers then yields the exact set of binaries that it needs, as the same code chooses them both times.

A binary depends on the kernel, the types of its arguments, the divisibility by 16 of each pointer and of each size that
is fixed for a model, the constants, and the options. Sizes that change from step to step are
named in the kernel's ``do_not_specialize`` and never make a variant.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from neuron.triton_kernels._triton import Kernel

Constant = int | float | bool | str | None
Argument = torch.Tensor | Constant

_TYPES: Final = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

SHARED_BYTES: Final = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Largest dynamic shared memory of a block (CUDA C++ programming guide, table of compute capabilities)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """GPU that launchers choose tiles for."""

    capability: int
    """Compute capability, 10 * major + minor."""
    num_sms: int

    @property
    def has_descriptors(self) -> bool:
        """Whether tensor descriptors are hardware (TMA) and not an emulation."""
        return self.capability >= 90

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel may start before the one it depends on ends (programmatic dependent launch)."""
        return self.capability >= 90

    @property
    def big_shared_memory(self) -> bool:
        """Whether a block may have 160 KiB and more."""
        return SHARED_BYTES.get(self.capability, 0) > 160_000


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """Run-time argument of a kernel, as the compiler gets it."""

    name: str
    kind: str
    """Triton type: ``*bf16``, ``i32``, ``fp32``, ..."""
    aligned: bool
    """Whether it is always divisible by 16."""


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """Parameters of a kernel's binary, beside the compute capability and the compiler."""

    kernel: str
    """``module:function``"""
    parameters: tuple[Parameter, ...]
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int
    num_stages: int
    dependent_launch: bool
    max_registers: int | None = None
    """Bound on a thread's registers; without it the assembler chooses one by the occupancy of a multiprocessor."""

    def function(self) -> Any:
        """Return the kernel itself, a ``triton.JITFunction`` (or its interpreted twin)."""
        module, _, name = self.kernel.partition(":")
        return getattr(importlib.import_module(module), name).jitted

    def options(self) -> dict[str, Any]:
        """Return the compiler's options beside the constants."""
        return _options(self.num_warps, self.num_stages, self.dependent_launch, self.max_registers)


_recorded: contextvars.ContextVar[dict[Variant, None] | None] = contextvars.ContextVar("recorded", default=None)
_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def targeting(target: Target) -> Iterator[None]:
    """Choose tiles for ``target``, whatever the device is."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def recording(target: Target) -> Iterator[Collection[Variant]]:
    """Record the variants of launches for ``target`` instead of making them, each once, in order of first use."""
    recorded: dict[Variant, None] = {}
    token = _recorded.set(recorded)
    try:
        with targeting(target):
            yield recorded.keys()
    finally:
        _recorded.reset(token)


def target_for(capability: int) -> Target:
    """Return the usual GPU of a compute capability, to compile without one: its multiprocessors only size grids."""
    return Target(capability, {80: 108, 89: 142, 90: 132, 100: 148, 120: 188}.get(capability, 108))


def target_of(device: torch.device) -> Target:
    """Return the GPU to choose tiles for."""
    return _target.get() or _device_target(device)


@functools.cache
def _device_target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target(80, 4)  # the interpreter
    properties = torch.cuda.get_device_properties(device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


class Tiles(NamedTuple):
    """Tile of a program of a matmul, and how it is computed."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    STAGES: int


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    *structs: object,
    num_warps: int = 4,
    max_registers: int | None = None,
    **arguments: Argument,
) -> None:
    """Run ``kernel`` on ``grid``, or record its variant.

    Its parameters are ``arguments``, and fields of ``structs``, dataclasses or named tuples, by their names; a struct
    may have more. An argument that is None is a constant to the compiler. STAGES is also the compiler's default for
    loops. A kernel with a parameter PDL is launched before the one it depends on ends, where the GPU can do so.
    """
    given: dict[str, Any] = {name: value for struct in structs for name, value in _fields(struct)} | arguments
    num_warps = given.pop("num_warps", num_warps)
    if "PDL" in kernel.constants:
        device = next(value.device for value in given.values() if isinstance(value, torch.Tensor))
        given["PDL"] = target_of(device).has_dependent_launch and device.type != "cpu"
    if unknown := arguments.keys() - set(kernel.arg_names):
        raise TypeError(f"{kernel.fn.__name__} has no parameter {', '.join(sorted(unknown))}")
    given = {name: given[name] for name in kernel.arg_names}
    options = num_warps, given.get("STAGES", 1), given.get("PDL", False), max_registers
    recorded = _recorded.get()
    if recorded is not None:
        recorded.setdefault(_variant(kernel, given, options))
        return
    if 0 in grid:
        return
    import triton

    triton.set_allocator(_scratch)
    kernel.jitted[tuple(grid)](**given, **({} if triton.knobs.runtime.interpret else _options(*options)))


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Return memory for the descriptors that a kernel makes on the device: 128 bytes each, a program."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _fields(struct: Any) -> Iterator[tuple[str, Any]]:
    names = getattr(struct, "_fields", None) or [field.name for field in dataclasses.fields(struct)]
    return ((name, getattr(struct, name)) for name in names)


def _options(
    num_warps: int, num_stages: int, dependent_launch: bool, max_registers: int | None
) -> dict[str, int | bool]:
    options: dict[str, int | bool] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if dependent_launch:
        options["launch_pdl"] = True
    if max_registers is not None:
        options["maxnreg"] = max_registers
    return options


def _variant(kernel: Kernel, given: Mapping[str, Any], options: tuple[int, int, bool, int | None]) -> Variant:
    parameters: list[Parameter] = []
    constants: list[tuple[str, Constant]] = []
    for name, value in given.items():
        varies = name in kernel.do_not_specialize
        match value:
            case _ if name in kernel.constants or value is None:
                constants.append((name, value))
            case torch.Tensor():
                parameters.append(Parameter(name, _TYPES[value.dtype], value.data_ptr() % 16 == 0))
            case int():
                if value == 1 and not varies:
                    # The JIT would make it a constant; no size that is fixed for a model is 1.
                    raise ValueError(f"{kernel.fn.__name__}: {name} is 1, which would make a variant of its own")
                kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
                parameters.append(Parameter(name, kind, not varies and value % 16 == 0))
            case float():
                parameters.append(Parameter(name, "fp32", False))
    function = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
    return Variant(function, tuple(parameters), tuple(constants), *options)


def cdiv(numerator: int, denominator: int) -> int:
    """Return the quotient, rounded up."""
    return -(-numerator // denominator)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less than ``number``."""
    return 1 << (number - 1).bit_length()
