"""A neuron with the real model and a gateway in front, for all end-to-end tests that leave them unchanged."""

import pathlib
from collections.abc import Iterator

import daemons
import pytest


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: pathlib.Path) -> Iterator[daemons.Daemon]:
    with daemons.neuron(tmp_path_factory.mktemp("neuron"), smollm2_gguf) as found:
        yield found


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory, node: daemons.Daemon) -> Iterator[daemons.Daemon]:
    with daemons.cortex(tmp_path_factory.mktemp("cortex"), node) as found:
        yield found
