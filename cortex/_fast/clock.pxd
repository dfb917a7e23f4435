"""Clock reads, for the modules that need the time for each request or SSE event."""

from posix.time cimport clock_gettime, timespec


cdef inline double seconds_of(int clock) noexcept nogil:
    """Return the seconds of one of the system's clocks."""
    cdef timespec time
    clock_gettime(clock, &time)
    return time.tv_sec + time.tv_nsec * 1e-9
