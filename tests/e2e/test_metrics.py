"""Metrics of both daemons while a model is loaded, used and unloaded."""

import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor

import daemons
import fleet
import httpx
from prometheus_client.parser import text_string_to_metric_families
from scripted_model import describe

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
MODEL = "slow"


def scrape(url: str) -> Series:
    """Return every series, once each: a parser of text does not mind two, a server of metrics does."""
    with httpx.Client(timeout=10) as client:
        reply = client.get(url)
    assert reply.status_code == 200
    samples = [found for family in text_string_to_metric_families(reply.text) for found in family.samples]
    series = {(found.name, tuple(sorted(found.labels.items()))): found.value for found in samples}
    assert len(series) == len(samples), "a series is there twice"
    names = [line.split()[2] for line in reply.text.splitlines() if line.startswith("# TYPE ")]
    assert len(names) == len(set(names)), "a family is there twice"
    return series


def states(series: Series, name: str) -> list[str]:
    rows = [dict(labels) for (found, labels), value in series.items() if found == name and value]
    return [row["state"] for row in rows if row["model"] == MODEL]


def mentions(series: Series) -> set[str]:
    return {name for name, labels in series if dict(labels).get("model") == MODEL}


def test_metrics_parse_before_during_and_after_a_load_and_an_unload(tmp_path: pathlib.Path) -> None:
    with fleet.neurons(tmp_path, {"gpu-1": {"cuda:0": 48}}) as nodes:
        source = describe(tmp_path, MODEL, 10, 1.5)
        models = f'[[models]]\nid = "{MODEL}"\nsource = "{source}"\ndevices = ["cuda:0"]\n'
        gateway = fleet.Gateway(tmp_path / "gateway", {"gpu-1": nodes["gpu-1"]}, models)
        gateway.start()
        urls = {
            "cortex_model_state": f"http://127.0.0.1:{gateway.metrics_port}/metrics",
            "neuron_model_state": f"{nodes['gpu-1']}/metrics",
        }
        seen: dict[str, list[list[str]]] = {name: [] for name in urls}
        ended = threading.Event()

        def watch(name: str) -> None:
            while not ended.is_set():
                seen[name].append(states(scrape(urls[name]), name))

        def act(what: str) -> None:
            with gateway.client() as client:
                assert client.post(f"{gateway.url}/admin/models/{what}", json={"model": MODEL}).status_code == 200

        try:
            assert mentions(scrape(urls["neuron_model_state"])) == set()
            with ThreadPoolExecutor() as pool:
                watching = [pool.submit(watch, name) for name in urls]
                try:
                    act("load")
                    with gateway.client() as client:
                        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
                        assert client.post(f"{gateway.url}/v1/chat/completions", json=body).status_code == 200
                    busy = scrape(urls["neuron_model_state"])
                    assert "neuron_request_duration_seconds_bucket" in mentions(busy)
                    assert states(busy, "neuron_model_state") == ["ready"]
                    act("unload")
                finally:
                    ended.set()
                for one in watching:
                    one.result()
            for name, during in seen.items():
                assert all(len(found) <= 1 for found in during), "one state at a time"
                assert ["loading"] in during, name
                assert ["ready"] in during, name
            # Its use is gone with it; that it could be loaded may be reported.
            assert mentions(scrape(urls["neuron_model_state"])) <= {"neuron_model_state"}
            daemons.until(
                lambda: "ready" not in states(scrape(urls["cortex_model_state"]), "cortex_model_state"),
                what="the gateway has seen it go",
            )
        finally:
            gateway.stop()
