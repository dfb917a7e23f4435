"""Memory that was needed for a while, given back to the system: free blocks at no heap's end stay with a process.

What readers that stall have queued up is the most of it. Granian's own allocator gives back by itself, in ten seconds.
"""

import asyncio
import ctypes
import os
import pathlib

INTERVAL_S = 5.0
GROWTH_BYTES = 16 * 1024 * 1024
"""Above the least that this process has had lately; below that there is little to be had."""

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


async def give_back_now_and_then() -> None:
    """Give back what is free, every now and then, where the C library can (glibc's does)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return
    least_bytes = resident_bytes()
    while True:
        await asyncio.sleep(INTERVAL_S)
        if resident_bytes() > least_bytes + GROWTH_BYTES:
            await asyncio.to_thread(trim, 0)  # milliseconds, for hundreds of megabytes
        least_bytes = min(least_bytes, resident_bytes())


def resident_bytes() -> int:
    """Return what of this process is in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
