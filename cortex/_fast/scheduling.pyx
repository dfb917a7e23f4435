"""Time slices of threads, which Linux lets a thread choose since 6.12.

Python has no call for it. The kernel's structure is declared here: older headers lack it, newer ones clash with libc's.
"""

import contextlib
import pathlib

from libc.errno cimport errno

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    struct scheduling { /* version 0 of sched_setattr(2)'s, which every kernel takes */
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime_ns, deadline_ns, period_ns;
    };

    static long scheduling_get(int thread, struct scheduling *found)
    {
        memset(found, 0, sizeof *found);
        return syscall(SYS_sched_getattr, thread, found, (unsigned)sizeof *found, 0u);
    }

    static long scheduling_set(int thread, struct scheduling *wanted)
    {
        wanted->size = sizeof *wanted;
        return syscall(SYS_sched_setattr, thread, wanted, 0u);
    }
    """
    struct scheduling:
        unsigned int policy
        unsigned long long flags
        unsigned long long runtime_ns
    long scheduling_get(int thread, scheduling* found)
    long scheduling_set(int thread, scheduling* wanted)

DEF SCHED_OTHER = 0
DEF SCHED_FLAG_RESET_ON_FORK = 1


def set_slice(int thread, long long slice_ns, bint inherited=True):
    """Let a thread run for ``slice_ns`` at a time, at least 0.1 ms and at most 100; by an older kernel nothing changes.

    Its priority stays. A thread with another policy than the usual one keeps what it has. ``inherited``: the threads
    and processes that it begins later have the slice as well. Raises ``OSError``.
    """
    cdef scheduling found
    if scheduling_get(thread, &found) < 0:
        raise OSError(errno, "sched_getattr")
    if found.policy != SCHED_OTHER:
        return
    found.runtime_ns = slice_ns
    if not inherited:
        found.flags |= SCHED_FLAG_RESET_ON_FORK
    if scheduling_set(thread, &found) < 0:
        raise OSError(errno, "sched_setattr")


def slice_of(int thread):
    """Return how many nanoseconds a thread runs at a time; 0 where the kernel does not tell. Raises ``OSError``."""
    cdef scheduling found
    if scheduling_get(thread, &found) < 0:
        raise OSError(errno, "sched_getattr")
    return found.runtime_ns


def set_slices(long long slice_ns):
    """:func:`set_slice` for each thread of this process. Threads that begin later have it from who begins them.

    Where it is forbidden, as sandboxes do, things stay as they are.
    """
    for thread in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            set_slice(int(thread.name), slice_ns)
