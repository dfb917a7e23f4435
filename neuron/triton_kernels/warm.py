"""Preloading of compiled kernels into this process, and a ban on compiling afterwards.

Triton's launcher compiles a kernel that is not in its memory, in the middle of a step if need be. Here its memory is
filled while a model loads, with the kernels of :mod:`neuron.triton_kernels.compile`, and a launch that still misses is
an error: it would stall every stream for a second.
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from neuron.triton_kernels.compile import Compiled, cache_key
from neuron.triton_kernels.launch import Variant


class CompileAfterReadyError(RuntimeError):
    """A kernel was about to be compiled while models were being served."""

    code = "kernel_compile_after_ready"

    def __init__(self, kernel: str) -> None:
        super().__init__(
            f"{kernel} would be compiled now, after the model was marked ready; the set of variants compiled at load "
            "lacks it"
        )


class DriverTooOldError(RuntimeError):
    """The NVIDIA driver cannot load the compiler's cubins."""

    code = "driver_too_old"

    def __init__(self, driver_version: tuple[int, int], cuda_version: str) -> None:
        has = ".".join(map(str, driver_version))
        super().__init__(
            f"the NVIDIA driver supports CUDA {has}, and the kernels are made by CUDA {cuda_version}; install a driver "
            f"for CUDA {cuda_version.partition('.')[0]}.0 or later, or set triton_kernels = false in neuron.toml"
        )


class _Array:
    """Placeholder of a tensor without memory, with the type and alignment that the compiler reads."""

    def __init__(self, kind: str, aligned: bool) -> None:
        self.dtype = kind.removeprefix("*")
        self._address = 0 if aligned else 1

    def data_ptr(self) -> int:
        """Return an address with the alignment, and no memory behind it."""
        return self._address


def warm(variant: Variant, compiled: Compiled, driver_version: tuple[int, int] = (99, 0)) -> None:
    """Load a kernel into this process and onto the current device, so that its first launch costs as any other.

    Raises :class:`DriverTooOldError`.
    """
    if driver_version[0] < int(compiled.cuda_version.partition(".")[0]):
        raise DriverTooOldError(driver_version, compiled.cuda_version)
    arguments: dict[str, Any] = dict(variant.constants)
    for parameter in variant.parameters:
        if parameter.kind.startswith("*"):
            arguments[parameter.name] = _Array(parameter.kind, parameter.aligned)
        elif parameter.kind == "fp32":
            arguments[parameter.name] = 0.5
        else:
            arguments[parameter.name] = (16 if parameter.aligned else 17) << (32 if parameter.kind == "i64" else 0)
    with _compiles_to(variant.function(), compiled, cache_key(variant, compiled.capability)) as function:
        kernel = function.warmup(grid=(1,), **arguments, **variant.options())
    # Else the first launch, in a step, builds the launcher, by gcc if need be, and loads the module.
    kernel.run  # noqa: B018 (a property that does so)


@contextlib.contextmanager
def _compiles_to(function: Any, compiled: Compiled, key: str) -> Iterator[Any]:
    """Have ``function`` take ``compiled`` as its compiler's result."""
    function.device_caches[driver.active.get_current_device()]  # has it look up its compiler, once
    theirs = function.compile

    def ours(source: Any, **_: object) -> Any:
        # Read by the constructor; nothing refers to the files afterwards.
        with tempfile.TemporaryDirectory() as folder:
            name = compiled.metadata["name"][:150]
            files = {kind: pathlib.Path(folder) / f"{name}.{kind}" for kind in ("json", "cubin")}
            files["json"].write_text(json.dumps(compiled.metadata))
            files["cubin"].write_bytes(compiled.cubin)
            return CompiledKernel(source, {file.name: str(file) for file in files.values()}, key)

    function.compile = ours
    try:
        yield function
    finally:
        function.compile = theirs


def forbid_compiling() -> None:
    """Make compiling a kernel an error from now on, except inside :func:`allowing_compiles`."""
    knobs.runtime.jit_cache_hook = _refuse


@contextlib.contextmanager
def allowing_compiles() -> Iterator[None]:
    """Allow compiling for a while: another model is being loaded."""
    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, None
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


def _refuse(**what: Any) -> bool:
    """Refuse to compile; Triton's hook for a launch that finds no binary in memory."""
    raise CompileAfterReadyError(str(what.get("repr") or what.get("key")).partition("[")[0])
