"""Fixtures: a gateway and a neuron, both real, with a scripted model."""

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


@pytest.fixture(scope="session")
def chat_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemons.Daemon]:
    """A node of the chat dialect alone."""
    folder = tmp_path_factory.mktemp("chat_neuron")
    with daemons.scripted_neuron(folder, "openai-chat", "openai-completions") as found:
        yield found


@pytest.fixture(scope="session")
def translating(tmp_path_factory: pytest.TempPathFactory, chat_node: daemons.Daemon) -> Iterator[daemons.Daemon]:
    """A gateway in front of it."""
    folder = tmp_path_factory.mktemp("translating")
    with daemons.cortex(folder, chat_node, models=daemons.SCRIPTED_CATALOGUE, model="m") as found:
        yield found


@pytest.fixture(params=["gateway", "node", "translating"])
def server(request: pytest.FixtureRequest) -> daemons.Daemon:
    """The gateway, the neuron by itself, and a gateway that translates."""
    found: daemons.Daemon = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def serving(request: pytest.FixtureRequest, server: daemons.Daemon) -> daemons.Daemon:
    """The node that answers in the end."""
    is_translated = request.node.callspec.params["server"] == "translating"
    found: daemons.Daemon = request.getfixturevalue("chat_node" if is_translated else "node")
    return found


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of its own."""
    with daemons.valkey(tmp_path_factory.mktemp("valkey")) as address:
        yield address
