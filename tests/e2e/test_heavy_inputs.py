"""Inputs that take seconds or gigabytes where work is not counted: others must not notice them.

While a client streams from the real model, each of these goes through the gateway or straight to the neuron. It must be
answered in bounded time, the stream must have no gap of more than half a second, and the daemons may take at most
500 MB more than when they are idle, which they give back.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import daemons
import gguf
import httpx
import numpy as np
import psutil
import pytest

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]

MAX_GAP_S = 0.5
MAX_BEYOND_IDLE_BYTES = 500_000_000
ANSWER_S = 90.0
GIVEN_BACK_S = 20.0
KEPT_BYTES = 150_000_000
"""Growth allowed for caches."""

MB = 1_000_000
TEXT = {
    "digits": "0123456789" * (8 * MB // 10),
    "one letter": "a" * (8 * MB),
    "spaces": " " * (8 * MB),
    "emoji": "\U0001f600" * (2 * MB),
    "line ends": "\n" * (8 * MB),
    "words": "the quick brown fox " * (8 * MB // 20),
}


def tool(number: int, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"t{number}", "parameters": {"type": "object", **parameters}}}


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def call(number: int, name: str = "f", arguments: str = "{}") -> dict[str, Any]:
    return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def calls_and_results(count: int, names: int) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call(i, f"t{i % names}") for i in range(count)]}
    ]
    return [*history, *({"role": "tool", "tool_call_id": f"c{i}", "content": "x"} for i in range(count)), *user("and?")]


CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
REQUESTS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "4 MB of empty conversation items": ("/v1/conversations", lambda: {"items": [{}] * 1_300_000}),
    "30,000 function calls": (
        RESPONSES,
        lambda: {
            "input": [
                item
                for i in range(30_000)
                for item in (
                    {"type": "function_call", "call_id": f"c{i}", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": f"c{i}", "output": "x"},
                )
            ]
        },
    ),
    "3,000 tools and 5,000 calls": (
        CHAT,
        lambda: {"tools": [tool(i) for i in range(3_000)], "messages": calls_and_results(5_000, 3_000)},
    ),
    "30,000 calls in one message": (CHAT, lambda: {"messages": calls_and_results(30_000, 3)}),
    "8 MB of a call's arguments": (
        CHAT,
        lambda: {
            "messages": [
                *user("go"),
                {"role": "assistant", "tool_calls": [call(1, arguments=json.dumps({"a": TEXT["digits"]}))]},
                {"role": "tool", "tool_call_id": "c1", "content": "done"},
            ]
        },
    ),
    "8 MB of reasoning": (
        CHAT,
        lambda: {"messages": [{"role": "assistant", "content": "a", "reasoning_content": TEXT["words"]}, *user("b")]},
    ),
    "3,000 brackets in a call's arguments": (
        CHAT,
        lambda: {
            "messages": [
                *user("go"),
                {"role": "assistant", "tool_calls": [call(1, arguments="[" * 3_000)]},
                {"role": "tool", "tool_call_id": "c1", "content": "done"},
            ]
        },
    ),
    "4 MB of a tool's schema": (
        CHAT,
        lambda: {
            "messages": user("hi"),
            "tools": [tool(0, properties={f"p{i}": {"type": "string"} for i in range(120_000)})],
            "tool_choice": "required",
        },
    ),
    "a schema of 100,000 choices": (
        CHAT,
        lambda: {
            "messages": user("hi"),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"enum": [f"v{i}" for i in range(100_000)]}},
            },
        },
    ),
    "a repeat of repeats": (
        CHAT,
        lambda: {
            "messages": user("hi"),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"type": "string", "pattern": "^((a{1,900}){1,900}){1,900}$"}},
            },
        },
    ),
    "1,000,000 one-word messages": (CHAT, lambda: {"messages": user("a") * 600_000}),
    "1,000,000 parts": (
        CHAT,
        lambda: {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 600_000}]},
    ),
    **{
        f"{kind}: chat": (CHAT, lambda text=text: {"messages": user(text)})  # type: ignore[misc]
        for kind, text in TEXT.items()
    },
    **{
        f"{kind}: messages": (MESSAGES, lambda text=text: {"messages": user(text), "max_tokens": 5})  # type: ignore[misc]
        for kind, text in TEXT.items()
    },
    "digits: responses": (RESPONSES, lambda: {"input": TEXT["digits"]}),
    "digits: completions": ("/v1/completions", lambda: {"prompt": TEXT["digits"]}),
    "digits: embeddings": ("/v1/embeddings", lambda: {"input": TEXT["digits"]}),
    "digits: count_tokens": ("/v1/messages/count_tokens", lambda: {"messages": user(TEXT["digits"])}),
    "one letter: count_tokens": ("/v1/messages/count_tokens", lambda: {"messages": user(TEXT["one letter"])}),
    "digits: compact": ("/v1/responses/compact", lambda: {"input": TEXT["digits"], "max_output_tokens": 5}),
    "digits: input_tokens": ("/v1/responses/input_tokens", lambda: {"input": TEXT["digits"]}),
    "990,000 token ids": ("/v1/completions", lambda: {"prompt": [500] * 990_000}),
    "a scored prompt": (
        "/v1/completions",
        lambda: {"prompt": list(range(1_000, 1_600)), "echo": True, "logprobs": 20, "max_tokens": 0},
    ),
    "8 scored prompts": (
        "/v1/completions",
        lambda: {"prompt": [list(range(1_000, 1_060))] * 8, "echo": True, "logprobs": 20, "max_tokens": 0},
    ),
    "100,000 inputs to embed": ("/v1/embeddings", lambda: {"input": ["a"] * 100_000}),
}


@dataclass
class Bystander:
    """Gaps in the stream of another client meanwhile, and the memory of the daemons."""

    processes: list[psutil.Process]
    seen: list[tuple[str, float, str]] = field(default_factory=list)
    peak_bytes: int = 0
    measured: dict[str, str] = field(default_factory=dict)

    def size_bytes(self) -> int:
        size = 0
        for root in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [root, *root.children(recursive=True)]:
                    memory = process.memory_info()
                    size += memory.rss - memory.shared
        return size

    def read(self, output: Any) -> None:
        for line in output:
            kind, at, text = line.decode().split(" ", 2)
            self.seen.append((kind, float(at), text.strip()))

    def sample(self, until: threading.Event) -> None:
        while not until.wait(0.05):
            self.peak_bytes = max(self.peak_bytes, self.size_bytes())

    def worst_gap_s(self, since: float, until: float) -> float:
        """Return the longest silence within a stream; between two streams there is none."""
        worst, before = 0.0, None
        for kind, at, _ in list(self.seen):
            if kind in "bd!":
                before = None
            if kind in "be":
                if before is not None and at >= since and before <= until:
                    worst = max(worst, at - before)
                before = at if kind == "e" else None
        return worst


@pytest.fixture(scope="module")
def bystander(node: daemons.Daemon, gateway: daemons.Daemon) -> Iterator[Bystander]:
    found = Bystander([psutil.Process(node.process.pid), psutil.Process(gateway.process.pid)])
    script = pathlib.Path(daemons.__file__).with_name("stream_watch.py")
    command = [sys.executable, str(script), gateway.url, daemons.MODEL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    is_over = threading.Event()
    threads = [
        threading.Thread(target=found.read, args=(process.stdout,)),
        threading.Thread(target=found.sample, args=(is_over,)),
    ]
    for thread in threads:
        thread.start()
    try:
        daemons.until(lambda: sum(kind == "e" for kind, *_ in found.seen) > 200, 60, "the stream runs")
        yield found
    finally:
        process.terminate()
        process.wait()
        is_over.set()
        for thread in threads:
            thread.join()
        assert process.stdout is not None
        process.stdout.close()
        for what, figures in found.measured.items():
            print(f"{what:45} {figures}")


def quiet(bystander: Bystander, what: str, act: Callable[[], str]) -> None:
    """Do something, and hold the daemons to what others may notice of it."""
    idle_bytes = bystander.size_bytes()
    bystander.peak_bytes = idle_bytes
    began = time.monotonic()
    outcome = act()
    ended = time.monotonic()
    daemons.until(lambda: bystander.seen[-1][1] > ended + 0.1, 10, "the stream goes on")
    beyond_bytes = bystander.peak_bytes - idle_bytes
    gap_s = bystander.worst_gap_s(began, ended)
    given_back = time.monotonic()
    while bystander.size_bytes() > idle_bytes + KEPT_BYTES and time.monotonic() < given_back + GIVEN_BACK_S:
        time.sleep(0.1)
    kept_bytes = max(0, bystander.size_bytes() - idle_bytes)
    figures = (
        f"{outcome}: {ended - began:.2f} s, gap {gap_s:.3f} s, {beyond_bytes / MB:.0f} MB, kept {kept_bytes / MB:.0f}"
    )
    bystander.measured[what] = figures
    assert gap_s <= MAX_GAP_S, figures
    assert beyond_bytes <= MAX_BEYOND_IDLE_BYTES, figures
    assert kept_bytes <= KEPT_BYTES, figures
    failures = [text for kind, at, text in bystander.seen if kind == "!" and at >= began]
    assert not failures, failures


@pytest.mark.parametrize("what", REQUESTS)
def test_a_heavy_request_delays_no_other(gateway: daemons.Daemon, bystander: Bystander, what: str) -> None:
    path, make = REQUESTS[what]
    few = {CHAT: "max_tokens", RESPONSES: "max_output_tokens"}
    asked = {"model": daemons.MODEL, **make(), **({few[path]: 5} if path in few else {})}
    body = json.dumps(asked).encode()

    def act() -> str:
        reply = httpx.post(
            gateway.url + path, content=body, headers={"content-type": "application/json"}, timeout=ANSWER_S
        )
        assert reply.status_code < 500, reply.text[:500]
        if reply.status_code >= 400:
            assert reply.json()["error"]["message"]
            assert len(reply.content) < 10_000
        return str(reply.status_code)

    quiet(bystander, what, act)


# --- model files that an operator was given -----------------------------------------------------------------------

TEMPLATES = {
    "a template that spins": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a template of gigabytes": "{% set a = 'aaaaaaaaaaaaaaaa' * 100000000 %}{{ a ~ a ~ a }}",
    "a template that calls itself": "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "a template that doubles": "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
}


def test_hostile_templates(
    node: daemons.Daemon, bystander: Bystander, tmp_path: pathlib.Path, smollm2_gguf: pathlib.Path
) -> None:
    """Each loads or is refused as a load, and then fails its own requests only."""
    for number, (what, template) in enumerate(TEMPLATES.items()):
        path = tmp_path / f"{number}.gguf"
        _with_template(smollm2_gguf, path, template)
        name = f"hostile-{number}"

        def act(name: str = name, path: pathlib.Path = path) -> str:
            spec = {"id": name, "source": str(path), "context_tokens": 512}
            loaded = httpx.post(node.url + "/models/load", json=spec, timeout=ANSWER_S)
            assert loaded.status_code in {200, 422}, loaded.text
            if loaded.status_code != 200:
                return f"load {loaded.status_code}"
            body = {"model": name, "messages": user("hi"), "max_tokens": 5}
            reply = httpx.post(node.url + CHAT, json=body, timeout=ANSWER_S)
            assert 400 <= reply.status_code < 500, reply.text
            assert httpx.post(node.url + "/models/unload", json={"id": name}, timeout=60).status_code == 200
            return f"load 200, chat {reply.status_code}"

        quiet_of_weights(bystander, what, act)


def test_a_piece_of_300_kb(node: daemons.Daemon, bystander: Bystander, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "piece.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
        "context_length": 64,
        "vocab_size": 4,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "a", "aa", "a" * 300_000])
    writer.add_token_scores([0.0, -1.0, -2.0, -3.0])
    writer.add_token_types([2, 1, 1, 1])
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def act() -> str:
        spec = {"id": "piece", "source": str(path)}
        reply = httpx.post(node.url + "/models/load", json=spec, timeout=ANSWER_S)
        assert reply.status_code == 422, reply.text
        return str(reply.status_code)

    quiet(bystander, "a SentencePiece piece of 300 kB", act)


def test_ten_ids_of_900_kb(node: daemons.Daemon, gateway: daemons.Daemon, bystander: Bystander) -> None:
    def act() -> str:
        for number in range(10):
            spec = {"id": str(number) * 900_000, "source": "/nowhere"}
            reply = httpx.post(node.url + "/models/load", json=spec, timeout=ANSWER_S)
            assert 400 <= reply.status_code < 500, reply.text[:500]
            assert len(reply.content) < 10_000
        listed = httpx.get(node.url + "/models", timeout=5)
        assert len(listed.content) < 100_000
        return "refused"

    quiet(bystander, "ten ids of 900 kB", act)
    assert (gateway.get("/health") or {})["nodes_up"] == 1


def quiet_of_weights(bystander: Bystander, what: str, act: Callable[[], str]) -> None:
    """As :func:`quiet`, with a second model's weights, which come and go."""
    global MAX_BEYOND_IDLE_BYTES
    before, MAX_BEYOND_IDLE_BYTES = MAX_BEYOND_IDLE_BYTES, MAX_BEYOND_IDLE_BYTES + 500 * MB
    try:
        quiet(bystander, what, act)
    finally:
        MAX_BEYOND_IDLE_BYTES = before


def _with_template(source: pathlib.Path, target: pathlib.Path, template: str) -> None:
    """Copy a GGUF file with another chat template."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in {"general.architecture", "tokenizer.chat_template"}:
            continue
        kind = entry.types[0]
        sub = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), kind, sub)
    writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
