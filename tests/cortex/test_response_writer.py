"""The response writer counts what it sends, and loop iterations that write are spaced."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from cortex._fast import response_writer
from cortex._fast.response_writer import BYPASS_S, COALESCE_S, ResponseWriter, WriteCoalescer


async def no_wait(of: ResponseWriter) -> None:
    """Wait for nothing."""


async def test_it_is_counted_with_its_framing() -> None:
    sent: list[bytes] = []
    waits: list[ResponseWriter] = []

    def wait(of: ResponseWriter) -> Coroutine[Any, Any, None]:
        waits.append(of)
        return no_wait(of)

    loop = asyncio.get_running_loop()
    plain = ResponseWriter(sent.append, wait, 100, WriteCoalescer(loop), is_tls=False)
    assert plain.write(bytes(80)) is None
    pause = plain.write(bytes(1))
    assert pause is not None
    await pause
    assert (plain.sent_bytes, waits, sent) == (80 + 1 + 2 * 12, [plain], [bytes(80), bytes(1)])
    assert plain.written_at == pytest.approx(loop.time(), abs=0.05)
    plain.limit_bytes = 1000
    assert plain.write(bytes(1)) is None
    secret = ResponseWriter(sent.append, wait, 10**6, WriteCoalescer(loop), is_tls=True)
    secret.write(bytes(20_000))
    assert secret.sent_bytes == 20_000 + 12 + 2 * 30
    plain.close()
    with pytest.raises(TypeError):
        plain.write(b"x")


async def test_iterations_that_write_are_spaced() -> None:
    out = ResponseWriter(lambda data: None, no_wait, 10**9, WriteCoalescer(asyncio.get_running_loop()), is_tls=False)
    num_iterations = 200
    begun = time.perf_counter()
    for _ in range(num_iterations):
        for _ in range(3):
            out.write(b"x")
        await asyncio.sleep(0)
    assert time.perf_counter() - begun >= (num_iterations - 2) * COALESCE_S


async def test_writes_are_not_coalesced_while_requests_arrive() -> None:
    coalescer = WriteCoalescer(asyncio.get_running_loop())
    out = ResponseWriter(lambda data: None, no_wait, 10**9, coalescer, is_tls=False)

    async def slept_s(num_iterations: int, *, bypassing: bool) -> float:
        begun, cpu_begun = time.perf_counter(), time.thread_time()
        for _ in range(num_iterations):
            if bypassing:
                coalescer.bypass()
            out.write(b"x")
            await asyncio.sleep(0)
        return (time.perf_counter() - begun) - (time.thread_time() - cpu_begun)

    await asyncio.sleep(2 * BYPASS_S)
    held_s = await slept_s(400, bypassing=False)
    assert held_s >= 390 * COALESCE_S - 0.05
    # A busy machine may take the core away as often, so it is compared with the other and not with a clock.
    assert min([await slept_s(400, bypassing=True) for _ in range(3)]) < held_s / 2


async def test_other_threads_run_meanwhile() -> None:
    """A loop that sleeps between writes releases the interpreter's lock."""
    out = ResponseWriter(lambda data: None, no_wait, 10**9, WriteCoalescer(asyncio.get_running_loop()), is_tls=False)
    is_over, count = threading.Event(), 0

    def run() -> None:
        nonlocal count
        while not is_over.is_set():
            count += 1

    other = threading.Thread(target=run)
    other.start()
    for _ in range(200):
        out.write(b"x")
        await asyncio.sleep(0)
    is_over.set()
    other.join()
    assert count > 1000


def test_a_loop_that_is_closed_in_the_middle_of_an_iteration_harms_no_other() -> None:
    async def write() -> None:
        ResponseWriter(
            lambda data: None, no_wait, 10**9, WriteCoalescer(asyncio.get_running_loop()), is_tls=False
        ).write(b"x")

    for _ in range(3):
        asyncio.run(write())
    assert response_writer.COALESCE_S < 0.001
