"""Metrics and log lines of known traffic."""

import asyncio
import json
import logging
import time

import httpx
import msgspec
import pytest
from answers import CHAT_STREAM
from daemons import free_port
from fake_node import FakeNode, Line, Received, error
from gateway_rig import rig, until
from prometheus_client.parser import text_string_to_metric_families

from cortex.access.keys import KeyRing
from cortex.config import ModelProfile
from cortex.logs import JsonFormatter, LogFormat, TextFormatter
from cortex.wire.node import ModelState
from neuron import metrics as neuron_metrics

LABELS = {"model": "m", "node": "a", "dialect": "openai-chat"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_tokens_are_counted_whatever_the_dialect(stream: bool, path: str) -> None:
    async with rig(FakeNode().ready("m")) as gateway:
        for _ in range(3):
            await gateway.call("POST", path, {"model": "m", "stream": stream}).end()
        dialect = "openai-chat" if path == "/v1/chat/completions" else "openai-responses"
        labels = LABELS | {"dialect": dialect}
        assert gateway.metric("cortex_requests_total", **labels, status="200") == 3
        assert gateway.metric("cortex_prompt_tokens_total", **labels) == 21
        assert gateway.metric("cortex_completion_tokens_total", **labels) == 6
        assert gateway.metric("cortex_cached_tokens_total", **labels) == 9
        assert gateway.metric("cortex_request_duration_seconds_count", **labels) == 3
        assert gateway.metric("cortex_time_to_first_token_seconds_count", **labels) == (3 if stream else 0)
        assert gateway.metric("cortex_tokens_per_second_count", **labels) == (3 if stream else 0)


async def test_first_token_is_not_first_byte_and_duration_is_to_the_end() -> None:
    pauses = [0.15, 0.2, 0.1]  # until the head, from heartbeat and role to the first token, from there to the end

    async def script(received: Received, line: Line) -> None:
        await asyncio.sleep(pauses[0])
        await line.start_stream()
        await line.chunk(b": keep-alive\n\n" + CHAT_STREAM[0])
        await asyncio.sleep(pauses[1])
        await line.chunk(CHAT_STREAM[1])
        await asyncio.sleep(pauses[2])
        for sse_event in CHAT_STREAM[2:]:
            await line.chunk(sse_event)
        await line.end()

    async with rig(FakeNode(script=script).ready("m")) as gateway:
        started = time.perf_counter()
        await gateway.chat(stream=True).end()
        elapsed = time.perf_counter() - started
        first = gateway.metric("cortex_time_to_first_token_seconds_sum", **LABELS)
        total = gateway.metric("cortex_request_duration_seconds_sum", **LABELS)
        early = 0.005  # a loop's timers are as exact as its clock, and may go off a moment before their time
        assert sum(pauses[:2]) - early <= first <= elapsed - pauses[2] + early
        assert sum(pauses) - early <= total <= elapsed
        speed = gateway.metric("cortex_tokens_per_second_sum", **LABELS)
        assert speed == pytest.approx(1 / (total - first), rel=0.05), "one more token after the first"


async def test_names_that_clients_make_up_are_never_labels() -> None:
    async with rig(FakeNode().ready("m"), aliases={"al": "m"}) as gateway:
        for i in range(50):
            assert (await gateway.chat(model=f"made-up-{i}").end()).status == 404
        await gateway.chat(model="al").end()
        models = {
            sample.labels["model"]
            for family in gateway.gateway.metrics.registry.collect()
            for sample in family.samples
            if "model" in sample.labels
        }
        assert models == {"", "m"}
        labels = {"model": "", "node": "", "dialect": "openai-chat", "status": "404"}
        assert gateway.metric("cortex_requests_total", **labels) == 50


async def test_a_models_gauges_go_with_the_model_and_come_from_its_nodes() -> None:
    neuron = FakeNode("a").ready("m", "n")
    async with rig(neuron) as gateway:
        port = free_port()
        stop = gateway.gateway.metrics.serve("127.0.0.1", port)
        try:

            async def scrape() -> dict[str, list[dict[str, str]]]:
                async with httpx.AsyncClient() as client:
                    text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
                return {
                    sample.name: [other.labels for other in family.samples if other.value]
                    for family in text_string_to_metric_families(text)
                    for sample in family.samples
                }

            seen = await scrape()
            assert seen["cortex_nodes_up"] == [{}]
            assert {row["model"] for row in seen["cortex_model_state"]} == {"m", "n"}
            del neuron.models["n"]
            neuron.models["m"] = msgspec.structs.replace(neuron.models["m"], state=ModelState.DRAINING)
            await until(lambda: "n" not in gateway.gateway.fleet.state.known)
            seen = await scrape()
            assert seen["cortex_model_state"] == [{"node": "a", "model": "m", "state": "draining"}]
        finally:
            stop()
        assert port


async def test_distributions_are_histograms_with_their_own_buckets() -> None:
    """Summaries of several workers and nodes cannot be added up, nor can quantiles of them be asked for later."""
    async with rig(FakeNode().ready("m")) as gateway:
        await gateway.chat(stream=True).end()
        kinds: dict[str, set[str]] = {}
        for registry in (gateway.gateway.metrics.registry, neuron_metrics.REGISTRY):
            for family in registry.collect():
                kinds.setdefault(family.type, set()).add(family.name)
        assert "summary" not in kinds
        assert {"cortex_time_to_first_token_seconds", "cortex_request_duration_seconds", "cortex_tokens_per_second",
                "neuron_time_to_first_token_seconds", "neuron_request_duration_seconds",
                "neuron_output_tokens_per_second"} <= kinds["histogram"]  # fmt: skip
        bounds = {
            float(sample.labels["le"])
            for family in gateway.gateway.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "cortex_time_to_first_token_seconds_bucket"
        }
        assert min(bounds) <= 0.05, "a model on a GPU"
        assert sorted(bounds)[-2] >= 60, "one that is loaded first"


async def test_the_second_to_bind_the_port_gets_an_error() -> None:
    async with rig(FakeNode()) as gateway:
        port = free_port()
        stop = gateway.gateway.metrics.serve("127.0.0.1", port)
        with pytest.raises(OSError, match="in use"):
            gateway.gateway.metrics.serve("127.0.0.1", port)
        stop()


async def test_one_line_for_each_finished_request(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("cortex").propagate = True
    secret = "the prompt is nobody's business"
    messages = [{"role": "user", "content": secret}]
    with caplog.at_level("INFO", "cortex.request"):
        neuron = FakeNode().ready("m")
        async with rig(neuron, models=(ModelProfile(id="m", source="/w"),)) as gateway:
            await gateway.chat(stream=True, messages=messages).end()
            await gateway.chat(messages=messages).end()
            neuron.script = error(400, "context_length_exceeded")
            await gateway.chat(stream=True, messages=messages).end()
            neuron.script = lambda received, line: asyncio.sleep(60)
            call = gateway.chat(stream=True)
            await until(lambda: gateway.in_flight)
            call.leave()
            await call.end()
    lines = [record for record in caplog.records if record.name == "cortex.request"]
    fields = [record.fields for record in lines]  # type: ignore[attr-defined]
    assert [(row["status"], row["finish"], row["stream"]) for row in fields] == [
        (200, "stop", True),
        (200, "stop", False),
        (400, "context_length_exceeded", True),
        (499, "disconnected", True),
    ]
    assert fields[0]["tokens_in"] == 7
    assert fields[0]["tokens_cached"] == 3
    assert 0 < fields[0]["ttft_s"] <= fields[0]["total_s"]
    assert fields[0]["node"] == "a"
    for record in lines:
        text = TextFormatter().format(record)
        document = json.loads(JsonFormatter().format(record))
        assert document["id"].startswith("req_")
        assert f"id={document['id']} dialect=openai-chat model=m" in text
        assert secret not in text + str(document)
        assert "\n" not in text


def test_text_lines_quote_special_characters() -> None:
    record = logging.LogRecord("cortex", logging.INFO, "", 0, "request", (), None)
    record.fields = {"id": 'a b="c"', "model": "", "x": 1.23456}
    assert TextFormatter().format(record).endswith('request id="a b=\\"c\\"" model="" x=1.235')
    assert LogFormat.JSON.value == "json"


async def test_counters_of_a_node_and_a_model_that_are_gone_leave_the_scrape_and_come_back() -> None:
    first, second = FakeNode("a").ready("m"), FakeNode("b").ready("n")
    async with rig(first, second) as gateway:
        assert (await gateway.chat(model="m").end()).status == 200
        assert (await gateway.chat(model="n").end()).status == 200
        await gateway.call("GET", "/v1/nothing").end()
        port = free_port()
        stop = gateway.gateway.metrics.serve("127.0.0.1", port)
        before = gateway.gateway.settings
        try:

            async def labels() -> set[tuple[str, str]]:
                async with httpx.AsyncClient() as client:
                    text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
                samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
                rows = [(s.name, *sorted(s.labels.items())) for s in samples]
                assert len(rows) == len(set(rows))
                assert ("cortex_rejected_requests_total", ("status", "404")) in rows
                found = {(s.labels["node"], s.labels["model"]) for s in samples if {"node", "model"} <= s.labels.keys()}
                return found | {(s.labels["node"], "") for s in samples if s.labels.keys() == {"node"}}

            everything = {("a", "m"), ("b", "n"), ("a", ""), ("b", "")}
            assert await labels() == everything
            settings = msgspec.structs.replace(before, neurons=before.neurons[:1])
            gateway.gateway.reconfigure(settings, gateway.gateway.offered, KeyRing())
            assert await labels() == {("a", "m"), ("a", "")}
            gateway.gateway.reconfigure(before, gateway.gateway.offered, KeyRing())
            await until(lambda: "n" in gateway.gateway.fleet.state.known)
            assert await labels() == everything
        finally:
            stop()
