"""The pool: many calls, from many threads, with more threads than cores."""

import pathlib
import threading
import time

import numpy as np
import pytest

from neuron.cpu_kernels import native
from neuron.models.packed import Format


@pytest.mark.parametrize("num_threads", [1, 2, 3, 9])
def test_every_share_is_done_once_from_any_caller(num_threads: int) -> None:
    pool = native.Pool(num_threads)
    assert pool.num_threads == num_threads
    values = np.random.default_rng(0).standard_normal((100, 5)).astype(np.float32)
    expected = np.zeros(native.packed_bytes(Format.W32, 100, 5), np.uint8)
    native.pack(native.Pool(1), values.view(np.uint8).reshape(-1), 0, 100, 5, expected, Format.W32)
    wrong = []

    def call() -> None:
        for _ in range(50):
            packed = np.zeros_like(expected)
            native.pack(pool, values.view(np.uint8).reshape(-1), 0, 100, 5, packed, Format.W32)
            if not np.array_equal(packed, expected):
                wrong.append(packed)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_go_with_their_pool() -> None:
    before = own_threads()
    for _ in range(20):
        pool = native.Pool(4)
        started = own_threads() - before
        assert len(started) == 3
        del pool
        deadline = time.monotonic() + 5  # one that has been waited for is listed for a moment more
        while own_threads() & started:
            assert time.monotonic() < deadline


def test_idle_threads_take_no_time() -> None:
    """Workers spin for 50 us after a call, and sleep until the next."""
    pool = native.Pool(4)
    values = np.zeros((64, 32), np.float32)
    packed = np.zeros(native.packed_bytes(Format.W32, 64, 32), np.uint8)
    for _ in range(20):
        native.pack(pool, values.view(np.uint8).reshape(-1), 0, 64, 32, packed, Format.W32)
    time.sleep(0.05)
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.25, "three threads that spun would have taken half a second and more"


def own_threads() -> set[str]:
    """Return this process's threads by number. Those that other tests have left behind may end at any time."""
    return {path.name for path in pathlib.Path("/proc/self/task").iterdir()}


def test_no_threads_are_refused() -> None:
    with pytest.raises(ValueError):
        native.Pool(0)
