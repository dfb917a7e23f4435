"""An engine with a small model loaded, for the tests of steps, loads and errors."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from neuron.device import jobs


@pytest.fixture
def driver(executor: str, harness: Callable[..., Any], tiny_llama: pathlib.Path) -> Any:
    found = harness()
    answer = found.load(tiny_llama)
    assert isinstance(answer, jobs.Done), answer
    return found
