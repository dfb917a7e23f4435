"""One scripted neuron and one gateway in front of it: the real servers, and a model whose every word is known."""

from collections.abc import Iterator

import daemons
import pytest


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemons.Daemon]:
    with daemons.scripted_neuron(tmp_path_factory.mktemp("neuron")) as found:
        yield found


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory, node: daemons.Daemon) -> Iterator[daemons.Daemon]:
    with daemons.cortex(tmp_path_factory.mktemp("cortex"), node, models=daemons.SCRIPTED_CATALOGUE, model="m") as found:
        yield found


@pytest.fixture(params=["gateway", "node"])
def server(request: pytest.FixtureRequest) -> daemons.Daemon:
    """The gateway, then the neuron by itself."""
    found: daemons.Daemon = request.getfixturevalue(request.param)
    return found
