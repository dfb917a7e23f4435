"""Return of freed memory to the system: free blocks inside a heap otherwise stay with the process.

Most of it was queued for stalled clients. Granian's own allocator returns its memory within ten seconds.
"""

import asyncio
import ctypes
import os
import pathlib

INTERVAL_S = 5.0
GROWTH_BYTES = 16 * 1024 * 1024
"""Growth above the process's recent minimum from which trimming is worth its cost."""

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


async def give_back_now_and_then() -> None:
    """Return free memory periodically, where the C library can (glibc's does)."""
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
    """Return the resident memory of this process."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
