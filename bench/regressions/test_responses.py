"""Regressions of stored responses: a request that continues a chain, and the storing of its response."""

import asyncio
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from cortex._fast.peek import peek
from cortex.responses.stored import PendingResponse, StoredResponses
from cortex.store.sqlite import SqliteStore

CHAIN = 30
TOOLS = [
    {
        "type": "function",
        "name": f"tool_{i}",
        "description": "d" * 300,
        "parameters": {"type": "object", "properties": {"path": {"type": "string", "description": "x" * 80}}},
    }
    for i in range(12)
]
"""Tools of a coding agent. With its instructions they are most of each response object."""


class Agent:
    """A coding agent, which sends the result of a tool and the id of the response before."""

    def __init__(self, store: SqliteStore) -> None:
        self.loop = asyncio.new_event_loop()
        self._owned = StoredResponses(store).of("agent")
        self._shared = {"model": "m", "instructions": "You are an agent." * 500, "tools": TOOLS}
        self._previous: str | None = None
        self.loop.run_until_complete(store.open())
        for _ in range(CHAIN):
            self._previous = self.keep(self.begin())

    def begin(self) -> PendingResponse:
        """Load the chain before a request."""
        result = [{"type": "function_call_output", "call_id": "c", "output": "line\n" * 800}]
        body = orjson.dumps({**self._shared, "input": result, "previous_response_id": self._previous, "stream": True})
        return self.loop.run_until_complete(self._owned.begin(body, peek(body)))

    def keep(self, pending: PendingResponse) -> str:
        """Store the response of a request, and return its id."""
        id = f"resp_{secrets.token_hex(24)}"
        text = [{"type": "output_text", "text": "word " * 200, "annotations": []}]
        output = [{"id": f"msg_{id[5:]}_0", "type": "message", "role": "assistant", "content": text}]
        response = {**self._shared, "id": id, "object": "response", "status": "completed", "output": output}
        self.loop.run_until_complete(self._owned.keep(pending, orjson.dumps(response)))
        return id


@pytest.fixture
def agent(tmp_path: pathlib.Path) -> Iterator[Agent]:
    """An agent with 30 stored responses."""
    store = SqliteStore(str(tmp_path / "responses.db"), ttl_s=10**6, max_bytes=10**9)
    found = Agent(store)
    yield found
    found.loop.run_until_complete(store.close())
    found.loop.close()


def test_continue_a_chain_of_thirty_responses(benchmark: Any, agent: Agent) -> None:
    """Load the chain and write the node's body."""
    pending = benchmark(agent.begin)
    assert pending.chain_length == CHAIN + 1
    assert len(orjson.loads(pending.body)["input"]) == 2 * CHAIN + 1


def test_store_a_response_after_thirty(benchmark: Any, agent: Agent) -> None:
    """Store a response that continues the chain."""
    pending = agent.begin()
    assert benchmark(agent.keep, pending)
