"""Other servers as nodes, and what differs from node to node: secrets, timeouts, TLS."""

import asyncio
import pathlib
import shutil
import ssl
import subprocess
from typing import Any

import orjson
import pytest
from answers import CHAT_STREAM
from fake_node import FakeNode, Line, Received, answer
from gateway_rig import rig as make_rig
from gateway_rig import until

from cortex.config import ModelProfile, NodeSettings, NodeTimeouts, NodeType
from cortex.dialects.renamed import RenamedStream, rename


class Server(FakeNode):
    """Server of OpenAI's dialects, and nothing of ours."""

    def __init__(self, *models: str) -> None:
        super().__init__("other")
        self.listed = models
        self.script = self._answer

    async def _answer(self, received: Received, line: Line) -> None:
        if received.path == "/v1/models":
            self.requests.remove(received)
            data = [{"id": name, "object": "model"} for name in self.listed]
            await line.reply(200, orjson.dumps({"object": "list", "data": data}))
        else:
            await answer(received, line)


async def test_models_of_another_server_are_offered_and_served(tmp_path: pathlib.Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-there\n")
    server = Server("x", "y")
    async with (
        server.serving(),
        make_rig(nodes=(NodeSettings("other", server.url, NodeType.OPENAI, str(key)),)) as gateway,
    ):
        listed = (await gateway.call("GET", "/v1/models").end()).json()["data"]
        assert {(model["id"], model["state"]) for model in listed} == {("x", "ready"), ("y", "ready")}
        headers = {"authorization": "Bearer sk-here", "x-cortex-principal": "me"}
        call = await gateway.call("POST", "/v1/chat/completions", {"model": "x", "messages": []}, headers).end()
        assert call.status == 200
    (received,) = server.requests
    assert received.headers["authorization"] == "Bearer sk-there"
    assert not [name for name in received.headers if name.startswith("x-cortex")]


async def test_its_models_may_have_other_names_here() -> None:
    server = Server("vendor/big-70b", "vendor/hidden")
    node = NodeSettings("other", server.url, NodeType.OPENAI, models={"big": "vendor/big-70b", "none": "vendor/gone"})
    async with server.serving():
        node = NodeSettings("other", server.url, NodeType.OPENAI, models=node.models)
        async with make_rig(nodes=(node,)) as gateway:
            listed = (await gateway.call("GET", "/v1/models").end()).json()["data"]
            assert [model["id"] for model in listed] == ["big"]
            body = {"model": "big", "messages": [], "stream": True}
            assert (await gateway.call("POST", "/v1/chat/completions", body).end()).status == 200
            answer = await gateway.call("POST", "/v1/responses", {"model": "big", "input": "x"}).end()
            assert (answer.status, answer.json()["model"]) == (200, "big"), "by way of a chat"
    assert [orjson.loads(received.body)["model"] for received in server.requests] == ["vendor/big-70b"] * 2


async def test_nothing_is_ever_loaded_on_it() -> None:
    server, neuron = Server("x"), FakeNode("a")
    async with server.serving(), neuron.serving():
        nodes = NodeSettings("a", neuron.url), NodeSettings("other", server.url, NodeType.OPENAI)
        async with make_rig(nodes=nodes, models=(ModelProfile(id="m", source="/w"),)) as gateway:
            assert (await gateway.chat().end()).status == 200
    assert len(neuron.loads) == 1
    assert not server.loads
    assert not server.requests


async def test_a_node_has_timeouts_of_its_own() -> None:
    slow, quick = FakeNode("slow").ready("m"), FakeNode("quick").ready("n")

    async def mute(received: Received, line: Line) -> None:
        await line.left.wait()

    slow.script = quick.script = mute
    async with slow.serving(), quick.serving():
        nodes = (
            NodeSettings("slow", slow.url, timeouts=NodeTimeouts(answer_s=0.3)),
            NodeSettings("quick", quick.url, timeouts=NodeTimeouts(answer_s=0.1)),
        )
        async with make_rig(nodes=nodes) as gateway:
            first, second = gateway.chat(), gateway.chat(model="n")
            await second.end()
            assert not first.task.done()
            assert "0.1 s" in second.json()["error"]["message"]
            assert "0.3 s" in (await first.end()).json()["error"]["message"]


async def test_heartbeats_report_the_progress_of_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from cortex import event_stream
    from cortex.wire.node import ModelSpec, ModelState, ModelStatus

    monkeypatch.setattr(event_stream, "HOLD_HEADERS_S", 0.05)
    monkeypatch.setattr(event_stream, "HEARTBEAT_INTERVAL_S", 0.02)
    neuron, go = FakeNode(), asyncio.Event()

    async def load(spec: ModelSpec) -> ModelStatus:
        neuron.models["m"] = ModelStatus("m", ModelState.LOADING, source="/w", progress=0.42)
        await go.wait()
        return neuron.ready("m").models["m"]

    neuron.load = load
    async with make_rig(neuron, models=(ModelProfile(id="m", source="/w"),)) as gateway:
        chat, messages = gateway.chat(stream=True), gateway.call("POST", "/v1/messages", {"model": "m", "stream": True})
        await chat.until(lambda call: b": loading m 42%\n\n" in call.body)
        assert chat.status == 200
        await messages.until(lambda call: b"event: ping" in call.body)
        go.set()
        await asyncio.gather(chat.end(), messages.end())
        assert b"loading" not in messages.body
        assert chat.body.endswith(b"\n\n")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """A certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    found = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=node", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-out", str(found[0]), "-keyout", str(found[1])),
        ],
        check=True,
        capture_output=True,
    )
    return found


async def test_a_node_behind_tls(certificate: tuple[pathlib.Path, pathlib.Path]) -> None:
    neuron = FakeNode().ready("m")
    neuron.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    neuron.tls.load_cert_chain(*certificate)
    async with neuron.serving():
        url = neuron.url.replace("http:", "https:")
        async with make_rig(nodes=(NodeSettings("a", url, ca_file=str(certificate[0])),)) as gateway:
            assert (await gateway.chat().end()).status == 200
            assert (await gateway.chat(stream=True).end()).data()
        async with make_rig(nodes=(NodeSettings("a", url),)) as gateway:
            await until(lambda: gateway.gateway.fleet.state.nodes["a"].fault)
            assert "certificate" in str(gateway.gateway.fleet.state.nodes["a"].fault).lower()


ALL = ("openai-chat", "openai-completions", "openai-responses", "anthropic-messages")
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/responses", {"input": "Hi", "store": False}),
    ("/v1/responses", {"input": "Hi", "store": True}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["big", "alias"])
async def test_its_answers_have_the_name_that_was_asked_for(
    path: str, body: dict[str, Any], stream: bool, name: str
) -> None:
    server = Server("m")
    async with server.serving():
        node = NodeSettings("other", server.url, NodeType.OPENAI, models={"big": "m"}, dialects=ALL)
        async with make_rig(nodes=(node,), aliases={"alias": "big"}) as gateway:
            call = await gateway.call("POST", path, {"model": name, "stream": stream, **body}).end()
            assert call.status == 200
            assert f'"model":"{name}"'.encode() in call.body
            assert b'"model":"m"' not in call.body
            assert not stream or call.data().count(b"Hel") >= 1
    assert orjson.loads(server.requests[0].body)["model"] == "m"


def test_every_byte_but_the_name_is_kept() -> None:
    text = b'{ "a" : 1.50, "model" : "there", "n": 123456789012345678901234567890, "t": "\\u00e9 \\"model\\"" }'
    assert rename(text, 'x"y') == text.replace(b'"there"', b'"x\\"y"')
    inner = b'{"type":"response.created","response":{"model":"there","n":1.50,"e":"\\u00e9"},"x":1e5}'
    assert rename(inner, "here") == inner.replace(b"there", b"here")
    for other in (b"[DONE]", b'{"model"', b'{"x":{"model":"there"}}', b'{"response":[{"model":"a"}]}', b'\xff"model"'):
        assert rename(other, "here") == other


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_stream_is_renamed_however_it_is_cut(step: int) -> None:
    whole = b"".join(CHAT_STREAM[:-1])
    stream = RenamedStream("here")
    sse_events = b"".join(stream.sse_events(whole[at : at + step]) for at in range(0, len(whole), step)) + stream.end()
    assert sse_events == whole.replace(b'"model":"m"', b'"model":"here"')
