"""Time slices: set for all threads, and left alone where another policy is in force."""

import os
import subprocess
import sys
import threading

import pytest

from cortex._fast.scheduling import set_slice, slice_of

SHORT_NS = 100_000


def has_slices() -> bool:
    """Return whether this kernel has a time slice for each thread (Linux 6.12)."""
    return slice_of(0) > 0


@pytest.mark.skipif(not has_slices(), reason="the kernel reports no slice")
def test_present_and_future_threads_of_a_process_have_the_slice() -> None:
    script = """
import os, threading
from cortex._fast.scheduling import set_slices, slice_of
goes_on, found = threading.Event(), {}
def record(name):
    found[name] = slice_of(0)
def wait():
    goes_on.wait()
    record("before")
before = threading.Thread(target=wait)
before.start()
niced = os.nice(3)
set_slices(100_000)
goes_on.set()
after = threading.Thread(target=record, args=["after"])
after.start(); before.join(); after.join()
record("main")
assert found == {"before": 100_000, "after": 100_000, "main": 100_000}, found
assert os.nice(0) == niced
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.skipif(not has_slices(), reason="the kernel reports no slice")
def test_a_slice_can_be_of_one_thread_and_none_that_it_begins() -> None:
    script = """
import os, subprocess, sys
from cortex._fast.scheduling import set_slice, slice_of
usual = slice_of(0)
assert usual != 100_000
set_slice(0, 100_000, inherited=False)
assert slice_of(0) == 100_000
look = "from cortex._fast.scheduling import slice_of; print(slice_of(0))"
assert int(subprocess.check_output([sys.executable, "-c", look])) == usual
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_thread_of_another_policy_is_left_alone() -> None:
    seen = []

    def start() -> None:
        thread = threading.get_native_id()
        os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
        before = slice_of(thread)
        set_slice(thread, SHORT_NS)
        seen.append((os.sched_getscheduler(thread), slice_of(thread) == before))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert seen == [(os.SCHED_BATCH, True)]


def test_a_thread_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ProcessLookupError):
        set_slice(2**22 + 1, SHORT_NS)
    with pytest.raises(ProcessLookupError):
        slice_of(2**22 + 1)
