"""What every test of this folder must leave behind: no descriptor, no child process, no buffer."""

import gc
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from neuron.device import channel


def open_descriptors() -> dict[str, str]:
    found = {}
    for entry in pathlib.Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:  # the one that listed the folder
            continue
    return found


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Poll ``condition`` until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        os.sched_yield()


@pytest.fixture(name="wait_for")
def wait_for_fixture() -> Callable[..., None]:
    return wait_for


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = open_descriptors(), psutil.Process().children(), channel.live_blocks()
    yield
    gc.collect()
    assert (open_descriptors(), psutil.Process().children(), channel.live_blocks()) == before
