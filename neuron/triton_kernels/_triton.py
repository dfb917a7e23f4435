"""Declaration of Triton kernels without Triton, which is imported when a kernel first runs or is compiled.

A CPU's worker imports every operation for its eager reference and runs no kernel; Triton would cost it 0.1 s and
71 MiB. A module of kernels takes ``tl``, ``triton`` and ``cuda`` from here, and is written as with Triton's own.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class constexpr:
    """Constant to the compiler: annotation of a kernel's parameter, or value of a module for its kernels."""

    value: int | float


class Kernel:
    """Kernel, or a function that kernels call; Triton's JIT gets it at its first use."""

    def __init__(self, function: Any, do_not_specialize: Sequence[str]) -> None:
        self.fn = function
        self.do_not_specialize = do_not_specialize
        """Parameters whose values make no variant."""
        parameters = inspect.signature(function).parameters
        self.arg_names = tuple(parameters)
        self.constants = frozenset(name for name, one in parameters.items() if one.annotation is constexpr)
        """Parameters that are constants to the compiler."""

    @functools.cached_property
    def jitted(self) -> Any:
        """The ``triton.JITFunction``, or its interpreted twin.

        It is made of a copy of the function, whose globals are what they stand for.
        """
        import triton
        import triton.language
        import triton.language.extra.cuda

        scope = self.fn.__globals__ | {"triton": triton, "tl": triton.language, "cuda": triton.language.extra.cuda}
        for name in self.fn.__code__.co_names:
            match scope.get(name):
                case Kernel() as callee:
                    scope[name] = callee.jitted
                case constexpr(value):
                    scope[name] = triton.language.constexpr(value)
        copy = types.FunctionType(self.fn.__code__, scope)
        copy.__annotations__ = self.fn.__annotations__
        return triton.jit(do_not_specialize=list(self.do_not_specialize))(copy)


def jit(function: Any = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
    """Declare a kernel; the values of the parameters named vary from step to step, and make no variant."""
    if function is None:
        return functools.partial(jit, do_not_specialize=do_not_specialize)
    return Kernel(function, do_not_specialize)


triton: Any = types.SimpleNamespace(jit=jit)
tl: Any = types.SimpleNamespace(constexpr=constexpr)
"""``triton.language``; its other members only occur within kernels, which only Triton reads."""
cuda: Any = None
"""``triton.language.extra.cuda``"""
