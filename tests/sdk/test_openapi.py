"""``/openapi.json`` of both daemons: it lists what is served, and schemathesis finds nothing that contradicts it."""

import asyncio
import contextlib
import re
from typing import Any
from unittest.mock import Mock

import daemons
import httpx
import orjson
import pytest
import schemathesis
from gateway_rig import rig
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from cortex import api_description as cortex_description
from neuron import api_description as neuron_description
from neuron.api import Api

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
EXAMPLES = 8
"""Examples of each operation."""

LASTING = re.compile(r"/admin/.*|/models/(load|unload|pin)|/drain")
"""Operations with lasting effects, such as a first key, which closes a gateway; they get servers of their own."""


def described(module: Any) -> dict[str, set[str]]:
    paths: dict[str, Any] = orjson.loads(module.description())["paths"]
    return {path: {method.upper() for method in methods} for path, methods in paths.items()}


def test_it_lists_what_the_gateway_serves() -> None:
    async def served() -> dict[str, set[str]]:
        async with rig() as gateway:
            inner = gateway.gateway
            found = {path: set(methods) for path, methods in inner._paths.items()}
            return found | {pattern.pattern: set(methods) for pattern, methods in inner._patterns}

    documented = {re.sub(r"\{\w+\}", "[^/]+", path): methods for path, methods in described(cortex_description).items()}
    for models in ("/v1/models", "/admin/models"):
        documented[f"{models}/.+"] = documented.pop(f"{models}/[^/]+")  # a model's name may have slashes
    assert documented == asyncio.run(served())


def test_it_lists_what_a_neuron_serves() -> None:
    documented = described(neuron_description)
    for path in ("/models/{model}/endpoint", "/v1/models/{model}"):
        assert documented.pop(path) == {"GET"}
    routes: Any = Api(Mock())._routes
    assert documented == {path: set(methods) for path, methods in routes.items()}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/completions"])
def test_bodies_are_described_field_by_field(path: str) -> None:
    document = orjson.loads(cortex_description.description())
    name = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    body = document["components"]["schemas"][name.rsplit("/", 1)[1]]
    assert {"model", "stream", "temperature"} <= body["properties"].keys()
    assert "model" in body["required"]


@pytest.fixture(scope="session")
def own_node(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with daemons.scripted_neuron(tmp_path_factory.mktemp("own_neuron")) as found:
        yield found


@pytest.fixture(scope="session")
def own_gateway(tmp_path_factory: pytest.TempPathFactory, own_node: daemons.Daemon) -> Any:
    folder = tmp_path_factory.mktemp("own_gateway")
    with daemons.cortex(folder, own_node, models=daemons.SCRIPTED_CATALOGUE, model="m") as found:
        yield found


DAEMONS: dict[str, Any] = {"gateway": cortex_description, "node": neuron_description}
OPERATIONS = [(name, one.method, one.path) for name, module in DAEMONS.items() for one in module.OPERATIONS]


@pytest.mark.parametrize(("daemon", "method", "path"), OPERATIONS)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
def test_nothing_contradicts_it(
    request: pytest.FixtureRequest, daemon: str, method: str, path: str, mode: GenerationMode
) -> None:
    server = request.getfixturevalue(f"own_{daemon}" if LASTING.fullmatch(path) else daemon)
    operation = described_by(httpx.get(f"{server.url}/openapi.json").json(), server)[path][method]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "m"
        response = case.call(timeout=20)
        if response.status_code != 503:  # what a body may ask to be loaded need not be there
            case.validate_response(response, checks=CHECKS)

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong where nothing is asked
        ask()


def described_by(document: Any, server: daemons.Daemon) -> Any:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    if token := server.token():
        schema.config.update(headers={"authorization": f"Bearer {token}"})
    return schema


def test_the_check_sees_a_wrong_description(gateway: daemons.Daemon) -> None:
    document = httpx.get(f"{gateway.url}/openapi.json").json()
    content = document["paths"]["/version"]["get"]["responses"]["200"]["content"]
    content["application/json"]["schema"] = {"type": "object", "required": ["absent"]}
    case = described_by(document, gateway)["/version"]["GET"].Case()
    with pytest.raises(BaseExceptionGroup, match="failure"):
        case.call_and_validate(checks=[response_schema_conformance])
