"""GPU kernels in Triton, and the eager reference of each."""
