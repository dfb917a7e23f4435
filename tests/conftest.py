"""What all tests share: the small real model."""

import os
import pathlib

import pytest


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """The file of SmolLM2-135M-Instruct (Q4_1): the one that ``CORTEX_TEST_MODEL`` names, or skip."""
    named = os.environ.get("CORTEX_TEST_MODEL")
    if not named:
        pytest.skip("CORTEX_TEST_MODEL does not name SmolLM2-135M-Instruct.Q4_1.gguf")
    return pathlib.Path(named)
