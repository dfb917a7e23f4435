"""Regressions of the gateway's own work per request: routing among many nodes, and reading a node's answer."""

import asyncio
from typing import Any

import pytest
from gateway.path import Wire

from cortex._fast.http_client import Connection, Response
from cortex.config import ModelProfile, Timeouts
from cortex.fleet.router import Serve, route
from cortex.fleet.state import FleetState, Node
from cortex.upstream import Pool
from cortex.wire.node import Health, ModelState, ModelStatus, NodeState

NUM_NODES = 100
SSE_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'


def fleet(num_replicas: int) -> FleetState:
    """Return a fleet whose first ``num_replicas`` nodes serve one model."""
    status = ModelStatus("m", ModelState.READY, weights_bytes=1, kv_cache_bytes=1)
    return FleetState.of(
        Node(
            f"node-{i:03}",
            "http://x",
            up=True,
            polled=True,
            health=Health(NodeState.READY, 1.0, ()),
            models={"m": status} if i < num_replicas else {},
        )
        for i in range(NUM_NODES)
    )


@pytest.mark.parametrize("num_replicas", [1, 4, NUM_NODES])
def test_route_among_a_hundred_nodes(benchmark: Any, num_replicas: int) -> None:
    """Route one request."""
    state = fleet(num_replicas)
    in_flight = {f"node-{i:03}": 1 + i % 7 for i in range(NUM_NODES)}
    profile = ModelProfile(id="m", source="/w")
    decision = benchmark(route, state, "m", profile, in_flight)
    assert isinstance(decision, Serve)


def test_replace_one_of_a_hundred_nodes(benchmark: Any) -> None:
    """Take in the result of one poll."""
    state = fleet(NUM_NODES)
    assert benchmark(state.with_node, state.nodes["node-050"]).nodes.keys() == state.nodes.keys()


ANSWER = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"x":"' + b"x" * 492 + b'"}'
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    + (b"%x\r\n%s\r\n" % (len(SSE_EVENT), SSE_EVENT)) * 64
    + b"0\r\n\r\n"
)


@pytest.mark.parametrize("answer", [ANSWER, STREAM], ids=["answer of 500 bytes", "stream of 64 SSE events"])
def test_read_a_nodes_answer(benchmark: Any, answer: bytes) -> None:
    """Send one request and read its answer on a kept-alive connection, without a socket."""
    loop = asyncio.new_event_loop()

    async def story() -> tuple[Connection, Pool]:
        pool = Pool("a", "http://127.0.0.1:1", Timeouts(), 4)
        connection = Connection(pool, asyncio.get_running_loop())
        connection.connection_made(Wire(asyncio.get_running_loop()))
        return connection, pool

    connection, pool = loop.run_until_complete(story())
    head = pool.encode_head(b"POST", b"/v1/chat/completions", [])

    def once() -> Response:
        response = connection.ask(head, b"{}", 60, 60)
        connection.data_received(answer)
        pool._idle.clear()
        return response

    try:
        response = benchmark(once)
        body = loop.run_until_complete(response.read_all(10**6))
        assert body == (SSE_EVENT * 64 if answer is STREAM else answer[-500:])
    finally:
        loop.close()
