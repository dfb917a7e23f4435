"""Native kernels for the CPU: a whole step of a model in one call without the GIL."""
