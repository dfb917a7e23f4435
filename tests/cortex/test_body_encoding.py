"""Compressed bodies: read as though they were plain, never beyond the bound, and refused with what would be taken."""

import gzip
import tracemalloc
import zlib
from typing import Any

import orjson
import pytest
from asgi_client import ask
from fake_node import FakeNode
from gateway_rig import CHAT, rig
from scripted_model import ScriptedHarness

from cortex.body_encoding import inflate
from cortex.wire.errors import BodyTooLargeError, InvalidRequestError
from cortex.wire.node import LoadRequest
from neuron.api import Api
from neuron.config import Config, DaemonSettings
from neuron.service import Service

PLAIN = orjson.dumps(CHAT)
RAW = zlib.compressobj(wbits=-15)
ENCODED = {
    "gzip": gzip.compress(PLAIN),
    "x-gzip": gzip.compress(PLAIN[:9]) + gzip.compress(PLAIN[9:]),
    "deflate": zlib.compress(PLAIN),
    "GZIP ": gzip.compress(PLAIN),
    "Deflate": RAW.compress(PLAIN) + RAW.flush(),
    "identity": PLAIN,
}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": "m", "prompt": "a"}),
    ("/v1/messages", {**CHAT, "max_tokens": 5}),
    ("/v1/messages/count_tokens", CHAT),
    ("/v1/responses", {"model": "m", "input": "a", "store": False}),
]


@pytest.mark.parametrize("encoding", ENCODED)
async def test_a_compressed_body_is_read(encoding: str) -> None:
    neuron = FakeNode("a").ready("m")
    async with rig(neuron) as gateway:
        for _ in range(2):
            headers = {"content-encoding": encoding}
            call = await gateway.call("POST", "/v1/chat/completions", ENCODED[encoding], headers).end()
            assert call.status == 200
    for received in neuron.requests:
        assert received.body == PLAIN
        assert "content-encoding" not in received.headers


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_dialect_takes_them(path: str, body: dict[str, Any], stream: bool) -> None:
    async with rig(FakeNode("a").ready("m")) as gateway:
        sent = gzip.compress(orjson.dumps({**body, "stream": stream}))
        call = await gateway.call("POST", path, sent, {"content-encoding": "gzip"}).end()
        assert call.status == 200


@pytest.mark.parametrize("encoding", ["zstd", "br", "gzip, gzip", "x" * 500, "é"])
async def test_any_other_encoding_is_refused_with_the_supported_ones(encoding: str) -> None:
    neuron = FakeNode("a").ready("m")
    async with rig(neuron) as gateway:
        call = await gateway.call("POST", "/v1/chat/completions", PLAIN, {"content-encoding": encoding}).end()
        assert (call.status, orjson.loads(call.body)["error"]["code"]) == (415, "unsupported_encoding")
        assert call.headers["accept-encoding"] == "gzip, deflate"
        assert not neuron.requests


@pytest.mark.parametrize("sent", [PLAIN, b"", gzip.compress(PLAIN)[:-9], gzip.compress(PLAIN) + b"more"])
async def test_a_body_that_does_not_match_its_header_is_refused(sent: bytes) -> None:
    async with rig(FakeNode("a").ready("m")) as gateway:
        call = await gateway.call("POST", "/v1/chat/completions", sent, {"content-encoding": "gzip"}).end()
        assert call.status == 400


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_bomb_is_cut_at_the_bound_of_a_body(encoding: str) -> None:
    zeros = b"0" * (64 << 20)
    bomb = gzip.compress(zeros) if encoding == "gzip" else zlib.compress(zeros)
    del zeros
    async with rig(FakeNode("a").ready("m"), max_body_bytes=1 << 20) as gateway:
        tracemalloc.start()
        try:
            call = await gateway.call("POST", "/v1/chat/completions", bomb, {"content-encoding": encoding}).end()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert call.status == 413
        assert peak < 8 << 20


def test_members_are_bounded_too() -> None:
    with pytest.raises(InvalidRequestError):
        inflate(gzip.compress(b"") * 1000, "gzip", 100)
    with pytest.raises(BodyTooLargeError):
        inflate(gzip.compress(b"x" * 60) * 2, "gzip", 100)
    assert inflate(gzip.compress(b"x" * 50) * 2, "gzip", 100) == b"x" * 100


async def test_a_neuron_reads_them_by_itself() -> None:
    service = Service(Config(daemon=DaemonSettings(name="node", devices="cpu")), {"torch": ScriptedHarness()})
    await service.load(LoadRequest("m", "/"))
    api = Api(service)
    for encoding, status in (("gzip", 200), ("zstd", 415)):
        reply = await ask(api, "POST", "/v1/chat/completions", ENCODED["gzip"], headers={"content-encoding": encoding})
        assert reply.status == status
