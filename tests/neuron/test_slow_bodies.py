"""The daemon's own listener: bodies that arrive a byte at a time, or in a million pieces."""

import asyncio
import pathlib

import pytest
from daemons import scripted_neuron
from slow_client import drip, many_pieces

PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/models/load", "/drain")
NUM_CLIENTS = 100


def test_slow_bodies_are_cut_and_endless_pieces_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIPTED_BODY_TIMEOUT_S", "0.5")

    async def ask(port: int) -> None:
        slow = [drip(port, PATHS[i % len(PATHS)], chunked=i % 10 >= 5) for i in range(NUM_CLIENTS)]
        for status, body in await asyncio.gather(*slow):
            assert status == 408
            error = body["error"]
            assert (error.get("code") or error["details"]["error_code"]) == "request_timeout"
        status, body = await many_pieces(port, "/v1/chat/completions", 1_000_000)
        assert (status, body["error"]["code"]) in {(413, "request_too_large"), (408, "request_timeout")}

    with scripted_neuron(tmp_path) as node:
        asyncio.run(ask(node.port))
        assert node.get("/health")
