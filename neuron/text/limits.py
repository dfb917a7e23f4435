"""The limits that a text process sets for itself: CPU time, memory and stack of the job in hand.

The kernel holds them, since what they are for cannot be interrupted from within: a regular expression that is being
compiled, a template that spins. Too much CPU time ends the process (``SIGPROF``), and so does too deep a stack; too
much memory is a ``MemoryError`` of Python's, or the end (``SIGABRT``). The daemon knows the job and its step.
"""

import contextlib
import ctypes
import gc
import os
import resource
import signal
from collections.abc import Iterator
from typing import Final

from neuron.text.jobs import Limits

STACK_BYTES: Final = 8 << 20
"""Stack of a text process. A process that compiles a grammar checked there needs at least as much."""
GROWN_BYTES: Final = 48 << 20
"""A process that has grown by more than this in a job gives back what it can."""

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_STATM: Final = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def prepare() -> None:
    """Bound this process's stack, and have it leave no core."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_STACK, STACK_BYTES)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


@contextlib.contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Hold what runs in the block to ``limits``, in a process of one thread."""
    allow(limits)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def allow(limits: Limits) -> None:
    """Count what the job in hand takes anew, for a step of it with limits of its own."""
    _lower(resource.RLIMIT_DATA, _statm()[1] + limits.data_bytes)
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)


def resident_bytes() -> int:
    """Return how much memory this process holds."""
    return _statm()[0]


def give_back() -> None:
    """Return freed memory to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # of glibc only
        trim(0)


def _statm() -> tuple[int, int]:
    """Return the bytes in memory and those of writable private mappings."""
    fields = os.pread(_STATM, 256, 0).split()
    return int(fields[1]) * _PAGE_BYTES, int(fields[5]) * _PAGE_BYTES


def _lower(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
