"""Check after every test here that it leaves no descriptor, no child process and no buffer."""

import gc
import pathlib
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = open_descriptors(), psutil.Process().children(), channel.live_blocks()
    yield
    gc.collect()
    assert (open_descriptors(), psutil.Process().children(), channel.live_blocks()) == before
