"""Seeded faults, which a sanitizer build must report before its silence counts."""

from libc.stdlib cimport free, malloc

cdef long shared


def overrun():
    """Write the byte behind a block."""
    cdef char *block = <char *>malloc(16)
    cdef int past = 16
    block[past] = 1
    free(block)


def overflow(int number):
    """Add to a number until it no longer fits."""
    return number + 2147483647


def race(long times):
    """Count without a lock; to be called on two threads at once."""
    global shared
    cdef long i
    with nogil:
        for i in range(times):
            shared += 1
    return shared
