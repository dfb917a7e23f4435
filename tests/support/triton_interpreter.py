"""Fix of ``tl.dot`` for bfloat16 in Triton's interpreter, which only checks kernels.

Triton 3.6 to 3.9 keep bfloat16 as raw 16-bit patterns there, and a dot multiplies the patterns. They are widened to
float32 first. :func:`mend` does nothing where a dot is right already.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Replace the interpreter's dot, once."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot
    if getattr(original, "is_mended", False):
        return

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
            return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return handle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), d, *rest)

    create_dot.is_mended = True  # type: ignore[attr-defined]
    builder.create_dot = create_dot
