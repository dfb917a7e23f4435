"""Memory is returned after a peak, and a process that did not grow is not trimmed."""

import asyncio
import contextlib
import ctypes

import pytest

from cortex import memory

MIB = 1024 * 1024

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library gives back by itself or not at all"
)


async def test_free_blocks_between_others_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "INTERVAL_S", 0.05)
    giving = asyncio.ensure_future(memory.give_back_now_and_then())
    await asyncio.sleep(0)
    blocks = [bytes(3000) for _ in range(40_000)]
    high_bytes = memory.resident_bytes()
    kept = blocks[:: len(blocks) // 20]  # some of them everywhere
    del blocks
    for _ in range(200):
        if memory.resident_bytes() < high_bytes - 60 * MIB:
            break
        await asyncio.sleep(0.02)
    assert memory.resident_bytes() < high_bytes - 60 * MIB
    assert len(kept) == 20
    giving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await giving


async def test_a_process_that_did_not_grow_is_not_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Libc:
        def __init__(self, name: None) -> None:
            self.malloc_trim = calls.append

    sizes = iter(size * MIB for size in (100, 100, 100, 117, 90, 90, 90, 107, 107))
    monkeypatch.setattr(memory, "INTERVAL_S", 0)
    monkeypatch.setattr(memory.ctypes, "CDLL", Libc)
    monkeypatch.setattr(memory, "resident_bytes", lambda: next(sizes))
    with pytest.raises((StopIteration, RuntimeError)):
        await memory.give_back_now_and_then()
    assert calls == [0, 0]
