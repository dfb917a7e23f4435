"""A real Prometheus scrapes a real fleet: every query of the Grafana dashboard and every alert has data to go by."""

import contextlib
import hashlib
import json
import pathlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import daemons
import fleet as fleets
import httpx
import pytest
from scripted_model import describe

PACKAGING = pathlib.Path(__file__).parents[2] / "packaging"
RULES = PACKAGING / "prometheus" / "helexa.rules.yml"
KEYS = {"root": "admin = true", "slow": "requests_per_minute = 1"}
# What Grafana puts in for its variables, with all of everything chosen.
VARIABLES = {"$__rate_interval": "1m", "$__range": "5m", "$model": ".*", "$node": ".*", "$neuron": ".*"}
THRESHOLD = re.compile(r"\s*(==|>=|>|<)\s*[\d.]+\s*$")


def _dashboard_queries() -> dict[str, str]:
    """Every query of the dashboard, those of its variables included, as Grafana would send it; and where it is."""
    board = json.loads((PACKAGING / "grafana" / "helexa.json").read_text())
    found: dict[str, str] = {}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert asked is not None
            found[f"variable {variable['name']}"] = f"count by ({asked[2]}) ({asked[1]})"
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    for panel in panels:
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            assert "$" not in query, query
            found[f"panel {panel['id']} {panel['title']} {target['refId']}"] = query
    return found


def _alerts(prometheus: "Prometheus") -> dict[str, str]:
    """Return the expression of each alert without its threshold, which must have a value at any time."""
    found: dict[str, str] = {}
    for group in prometheus.ask("rules")["groups"]:
        for rule in group["rules"]:
            assert not rule.get("lastError"), rule
            measure, count = THRESHOLD.subn("", rule["query"])
            assert count == 1, rule["query"]
            # A worker's state is a condition too: one in these is not to be had by asking. (promtool's tests have it.)
            found[f"alert {rule['name']}"] = measure.replace('{state=~"poisoned|stopped"}', "")
    return found


@dataclass
class Prometheus:
    """A running server."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        reply = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10)
        assert reply.status_code == 200, (parameters, reply.text)
        return reply.json()["data"]

    def has_data(self, query: str) -> bool:
        """Whether the query gives a number, and not only NaN (which a quantile of nothing is)."""
        return any(sample["value"][1] != "NaN" for sample in self.ask("query", query=query)["result"])


@contextlib.contextmanager
def _prometheus(program: str, folder: pathlib.Path, targets: dict[str, list[str]]) -> Iterator[Prometheus]:
    """The configuration that is shipped, with other addresses and a shorter interval."""
    text = (PACKAGING / "prometheus" / "prometheus.yml").read_text()
    text, count = re.subn(r"scrape_interval: \S+", "scrape_interval: 500ms\n  evaluation_interval: 1s", text)
    assert count == 1
    for job, where in targets.items():
        text, count = re.subn(
            rf"(job_name: {job}\n(?:.*\n)*?\s+- targets: )\[.*\]", rf"\g<1>{json.dumps(where)}", text, count=1
        )
        assert count == 1, job
    (folder / "prometheus.yml").write_text(text)
    (folder / RULES.name).write_text(RULES.read_text())
    port = daemons.free_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    found = Prometheus(f"http://127.0.0.1:{port}")

    def ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{found.url}/-/ready").status_code == 200
        return False

    try:
        daemons.until(ready, 30, "Prometheus is ready")
        yield found
    finally:
        process.terminate()
        process.wait(20)


class Clients:
    """Clients that cause answers, cold loads, refusals and failures."""

    def __init__(self, gateway: fleets.Gateway, http: httpx.Client) -> None:
        self._url = gateway.url
        self._nodes = gateway.nodes
        self._http = http

    def post(self, url: str, key: str, **body: object) -> int:
        return self._http.post(url, json=body, headers={"authorization": f"Bearer {key}"}).status_code

    def chat(self, model: str, key: str = "root", **more: object) -> int:
        messages = [{"role": "user", "content": "Say hello to everyone here."}]
        url = f"{self._url}/v1/chat/completions"
        return self.post(url, key, model=model, messages=messages, max_tokens=8, **more)

    def act(self, path: str, **body: object) -> int:
        return self.post(f"{self._url}/admin/{path}", "root", **body)

    def everything(self) -> None:
        """Have each event that the metrics count happen once."""
        assert self.chat(fleets.REAL, stream=True) == 200
        assert self.chat("pretended", stream=True) == 200
        # Seldom at once: an answer that had to wait for a load has its head, with 200, before its error.
        assert self.chat("broken") in {200, 422}
        assert self.act("models/load", model="broken") == 422
        assert self.chat("made-up") == 404
        assert self.chat("pretended", "nobody's") == 401
        assert self.post(f"{self._nodes['cpu-1']}/nowhere", "root") == 404
        assert {self.chat("pretended", "slow"), self.chat("pretended", "slow")} <= {200, 429}
        # Behind the gateway's back, so that a request finds out.
        assert self.post(f"{self._nodes['gpu-1']}/models/unload", "root", id="pretended") == 200
        assert self.chat("pretended") == 200
        for node in self._nodes:
            assert self.act("nodes/drain", node=node) == 200
        assert self.chat("pretended") == 503
        for node in self._nodes:
            assert self.act("nodes/drain", node=node, draining=False) == 200


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: pathlib.Path) -> Iterator[fleets.Gateway]:
    folder = tmp_path_factory.mktemp("scraped")
    with fleets.neurons(folder, {"gpu-1": {"cuda:0": 48}}) as nodes:
        models = f'[[models]]\nid = "{fleets.REAL}"\nsource = "{smollm2_gguf}"\npreferred_nodes = ["cpu-1"]\n'
        for name, fails in (("pretended", ""), ("broken", "it is broken")):
            source = describe(folder, name, 10, 0.2, fails=fails)
            models += f'[[models]]\nid = "{name}"\nsource = "{source}"\ndevices = ["cuda:0"]\n'
        keys = "".join(
            f'[[keys]]\nname = "{key}"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n{more}\nmodels = ["*"]\n'
            for key, more in KEYS.items()
        )
        gateway = fleets.Gateway(folder / "gateway", nodes, models, keys, fleets.polled(1.0))
        with gateway.running():
            yield gateway


def _until_all(prometheus: Prometheus, queries: dict[str, str], happen: Callable[[], None]) -> None:
    missing = dict(queries)
    deadline = time.monotonic() + 90
    while missing:
        assert time.monotonic() < deadline, f"no data for {json.dumps(missing, indent=1)}"
        happen()
        missing = {name: query for name, query in missing.items() if not prometheus.has_data(query)}


@pytest.mark.ops
def test_every_query_of_the_dashboard_and_of_the_alerts_returns_data(
    fleet: fleets.Gateway, tmp_path: pathlib.Path
) -> None:
    program = daemons.tool("prometheus")
    neurons = [url.removeprefix("http://") for url in fleet.nodes.values()]
    where = {"cortex": [f"127.0.0.1:{fleet.metrics_port}"], "neuron": neurons}
    with _prometheus(program, tmp_path, where) as found, httpx.Client(timeout=60) as http:
        clients = Clients(fleet, http)
        queries = _dashboard_queries()
        daemons.until(lambda: found.ask("rules")["groups"], 20, "the rules are read")
        alerts = _alerts(found)
        assert len(queries) > 40
        assert len(alerts) >= 14
        _until_all(found, queries | alerts, clients.everything)
        targets = found.ask("targets")["activeTargets"]
        assert {target["labels"]["job"] for target in targets} == {"cortex", "neuron"}
        assert [target["lastError"] for target in targets if target["health"] != "up"] == []
        # A query that cannot fail shows nothing: one for a metric that is not there has none.
        assert not found.has_data("sum(rate(cortex_nothing_total[1m]))")
