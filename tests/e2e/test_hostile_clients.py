"""Three real neurons behind a gateway, and a client that sends what ends processes: no other client notices.

``HOSTILE_REQUESTS`` is the number of changed schemas, template arguments and long texts that are sent (10,000).
"""

import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import daemons
import httpx
import pytest
import watch_health

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]

NUM_REQUESTS = int(os.environ.get("HOSTILE_REQUESTS", "10000"))
HEALTH_LIMIT_S = 0.5
SENDERS = 8
QUERY_OF_DEATH = {"enum": [-9223372036854775808]}
NUMBERS = [0, -1, 2**31, 2**63 - 1, -(2**63), -(2**63) + 1, 10**18, 1e308, 0.001, 999983]
PATTERNS = ["^a{100}$", "(a|b)*c", "[", "(?=a)", "\\p{L}{20}", ".*x.{9}"]
HEAVY_PATTERNS = ["^a{1000}$", "^(a{999}){999}$", "\\p{L}{200}"]
"""Patterns that take a process to its limit: one in fifty, since each takes seconds of a core."""
UNITS = ["1", "a", " ", "\n", "😀", "a b ", "\u0301"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: pathlib.Path) -> Iterator[list[daemons.Daemon]]:
    with contextlib.ExitStack() as stack:
        folders = [tmp_path_factory.mktemp(f"node{index}") for index in range(3)]
        yield [stack.enter_context(daemons.neuron(folder, smollm2_gguf)) for folder in folders]


def schema(chance: random.Random, depth: int = 3) -> dict[str, Any]:
    """Return a random schema."""
    if not depth:
        return chance.choice([{}, {"type": "string"}, {"$ref": "#"}, QUERY_OF_DEATH, {"type": "integer"}])
    inner = schema(chance, depth - 1)
    return chance.choice(
        [
            {"enum": [chance.choice(NUMBERS), "a"]},
            {"const": chance.choice(NUMBERS)},
            {"type": "integer", chance.choice(["minimum", "maximum", "multipleOf"]): chance.choice(NUMBERS)},
            {"type": "string", "pattern": chance.choice(HEAVY_PATTERNS if chance.random() < 0.02 else PATTERNS)},
            {"type": "string", chance.choice(["minLength", "maxLength"]): chance.choice(NUMBERS)},
            {"type": "object", "properties": {"a": inner, "b": schema(chance, depth - 1)}, "required": ["a"]},
            {"type": "array", "items": inner, "minItems": chance.choice(NUMBERS)},
            {chance.choice(["anyOf", "allOf", "oneOf"]): [inner, schema(chance, depth - 1)]},
            {"$ref": "#/$defs/a", "$defs": {"a": inner}},
        ]
    )


def hostile(chance: random.Random) -> dict[str, Any]:
    """Return the body of a hostile chat."""
    body: dict[str, Any] = {
        "model": daemons.MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
        "temperature": 0,
    }
    kind = chance.randrange(20)
    if kind < 13:
        asked = {"name": "n", "schema": {**schema(chance), "title": str(chance.random())}}
        return body | {"response_format": {"type": "json_schema", "json_schema": asked}}
    if kind < 16:
        deep: Any = 1
        for _ in range(chance.choice([2, 200])):
            deep = {"a": deep} if chance.random() < 0.5 else [deep]
        names = ["messages", "tools", "x", "", "add_generation_prompt", "bos_token", "enable_thinking"]
        return body | {"chat_template_kwargs": {chance.choice(names): deep}}
    if kind < 19:
        call = {"name": "f", "arguments": chance.choice(["[" * 3000, '{"a": "\\ud800"}', "{", "9" * 5000, "null"])}
        answer = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": call}]}
        return body | {"messages": [*body["messages"], answer, {"role": "tool", "tool_call_id": "c", "content": "y"}]}
    length = 1_000_000 if chance.random() < 0.1 else 50_000
    return body | {"messages": [{"role": "user", "content": chance.choice(UNITS) * length}]}


def test_hostile_requests_end_no_daemon_and_fail_no_other(nodes: list[daemons.Daemon], tmp_path: pathlib.Path) -> None:
    pids = [node.process.pid for node in nodes] + [worker.pid for node in nodes for worker in node.workers()]
    over = threading.Event()
    failures: list[str] = []
    chats = [0]

    def chat(url: str, number: int) -> None:
        """Chat as any client does."""
        body = {
            "model": daemons.MODEL,
            "messages": [{"role": "user", "content": f"Say {number}."}],
            "max_tokens": 4,
            "temperature": 0,
        }
        with httpx.Client(timeout=120) as client:
            while not over.wait(0.5):
                reply = client.post(f"{url}/v1/chat/completions", json=body)
                chats[0] += 1
                if reply.status_code != 200:
                    failures.append(f"{reply.status_code} {reply.text[:300]}")

    with daemons.cortex(tmp_path, *nodes) as gateway:
        statuses: dict[int, int] = {}

        def send(seed: int) -> None:
            chance = random.Random(seed)
            body = hostile(chance)
            if seed == 0:
                asked = {"name": "n", "schema": QUERY_OF_DEATH}
                body["response_format"] = {"type": "json_schema", "json_schema": asked}
            with httpx.Client(timeout=120) as client:
                reply = client.post(
                    f"{gateway.url}/v1/chat/completions",
                    content=json.dumps(body),
                    headers={"content-type": "application/json"},
                )
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            if reply.status_code >= 500:
                failures.append(f"seed {seed}: {reply.status_code} {reply.text[:300]}")

        others = [threading.Thread(target=chat, args=(node.url, at)) for at, node in enumerate([*nodes, gateway])]
        for other in others:
            other.start()
        began = time.monotonic()
        watcher = subprocess.Popen(
            [sys.executable, watch_health.__file__, *(node.url for node in nodes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            with ThreadPoolExecutor(SENDERS) as senders:
                list(senders.map(send, range(NUM_REQUESTS)))
        finally:
            over.set()
            for other in others:
                other.join()
            slowest, num_asked, *unhealthy = watcher.communicate(timeout=60)[0].split("\n")
    took_s = time.monotonic() - began
    print(
        f"\n{NUM_REQUESTS} requests in {took_s:.0f} s: {statuses}; slowest of {num_asked} /health {slowest} s, "
        f"{chats[0]} chats of others"
    )
    assert not failures, failures[:5]
    assert unhealthy == [""]
    assert pids == [node.process.pid for node in nodes] + [worker.pid for node in nodes for worker in node.workers()]
    assert all(node.process.poll() is None for node in nodes)
    assert float(slowest) < HEALTH_LIMIT_S
