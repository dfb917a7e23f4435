"""A dialect is its folder and its line in the list: one that only tests have is served like any other."""

import asyncio
import dataclasses
import pathlib
from typing import Any

import orjson
import pytest
from asgi_client import Reply, ask
from fake_node import FakeNode, Line, Received, chat_only
from gateway_rig import rig
from lines_dialect.spec import LINES
from scripted_model import ScriptedHarness

from cortex import api_description, config
from cortex.dashboard import assets
from cortex.dialects import registry
from cortex.settings import ConfigError
from cortex.wire.node import LoadRequest
from neuron import api_description as neuron_description
from neuron.api import Api
from neuron.config import Config, DaemonSettings
from neuron.service import Service

BODY = {"model": "m", "text": "Hi"}


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the dialect on the list."""
    monkeypatch.setattr(registry, "DIALECTS", (*registry.DIALECTS, LINES))


def ask_neuron(path: str, body: Any, method: str = "POST") -> Reply:
    async def run() -> Reply:
        service = Service(Config(daemon=DaemonSettings(name="node", devices="cpu")), {"torch": ScriptedHarness()})
        await service.load(LoadRequest("m", "/"))
        return await ask(Api(service), method, path, body)

    return asyncio.run(run())


def test_a_neuron_serves_it_whole_and_streamed() -> None:
    assert ask_neuron(LINES.path, BODY).json() == {
        "model": "m", "lines": ["Hel", "lo"], "usage": {"prompt_tokens": 5, "completion_tokens": 2},
    }  # fmt: skip
    streamed = ask_neuron(LINES.path, BODY | {"stream": True}).body
    assert streamed.startswith(b'data: {"text":"Hel"}\n\ndata: {"text":"lo"}\n\n')
    assert streamed.endswith(b"data: [DONE]\n\n")
    refused = ask_neuron(LINES.path, BODY | {"text": 3})
    assert (refused.status, refused.json()["error"]["param"]) == (400, "text")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_gateway_forwards_it(stream: bool) -> None:
    whole = orjson.dumps({"model": "m", "lines": ["Hi"], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
    sse_events = b'data: {"text":"Hi"}\n\ndata: {"usage":{"prompt_tokens":3},"end":"stop"}\n\ndata: [DONE]\n\n'

    async def answer(received: Received, line: Line) -> None:
        if stream:
            await line.start_stream()
            await line.chunk(sse_events)
            await line.end()
        else:
            await line.reply(200, whole)

    node = FakeNode(dialects=(LINES.name,), script=answer).ready("m")
    async with rig(node) as gateway:
        call = await gateway.call("POST", LINES.path, {**BODY, "stream": stream, "txet": 1}).end()
    assert call.body == (sse_events if stream else whole)
    assert call.headers["x-cortex-ignored"] == "txet"
    assert [received.path for received in node.requests] == [LINES.path]
    assert gateway.metric("cortex_requests_total", status="200", model="m", node="a", dialect=LINES.name) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_node_that_speaks_chat_alone_serves_it(stream: bool) -> None:
    node = chat_only()
    async with rig(node) as gateway:
        call = await gateway.call("POST", LINES.path, {**BODY, "stream": stream}).end()
    assert [received.path for received in node.requests] == ["/v1/chat/completions"]
    if stream:
        assert b'data: {"text":"' in call.body
        assert call.body.endswith(b"data: [DONE]\n\n")
    else:
        assert "".join(call.json()["lines"]).startswith("Hel")


def test_its_module_is_one_of_the_dashboards(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.js"
    page.write_text("export const dialect = {};\n")
    monkeypatch.setattr(registry, "DIALECTS", (*registry.DIALECTS, dataclasses.replace(LINES, page=page)))
    served = assets.read()
    assert served["/dashboard/test-lines.js"].body == page.read_bytes()
    assert b'import { dialect as dialect3 } from "./test-lines.js";' in served["/dashboard/dialects.js"].body


def test_its_name_is_listed(tmp_path: pathlib.Path) -> None:
    assert LINES.name in ask_neuron("/discovery", b"", "GET").json()["dialects"]
    for document in (api_description.description(), neuron_description.description()):
        operation = orjson.loads(document)["paths"][LINES.path]["post"]
        assert operation["summary"] == LINES.summary
        assert "LinesBody" in orjson.dumps(operation["requestBody"]).decode()
    node = '[[neurons]]\nname = "a"\nendpoint = "http://127.0.0.1:1"\ntype = "openai"\ndialects = ["%s"]\n'
    (tmp_path / "cortex.toml").write_text(node % LINES.name)
    assert config.load(tmp_path / "cortex.toml", {}).neurons[0].dialects == (LINES.name,)
    (tmp_path / "cortex.toml").write_text(node % "test-none")
    with pytest.raises(ConfigError, match=LINES.name):
        config.load(tmp_path / "cortex.toml", {})
