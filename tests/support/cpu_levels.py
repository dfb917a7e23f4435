"""Dispatch levels of the CPU kernels whose float32 differs."""

from neuron.cpu_kernels import native

FLOAT32_LEVELS = tuple(level for level in native.levels() if not level.endswith("_bf16"))
"""Levels for float32 weights: a level with bfloat16 products computes them as the one below it."""
