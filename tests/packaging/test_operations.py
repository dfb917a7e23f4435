"""Manuals, completions, units, alert rules and the table of errors agree with the code."""

import asyncio
import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import httpx
import pytest
from daemons import free_port, tool
from fake_node import FakeNode
from gateway_rig import rig

from cortex.access.rate_limiter import Reason
from cortex.config import GatewaySettings
from cortex.wire import VERSION
from cortex.wire.errors import ApiError
from cortex.wire.node import Device, DeviceKind, ModelState, ModelStatus, WorkerHealth, WorkerState
from neuron import metrics
from neuron.config import DaemonSettings

ROOT = pathlib.Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
UNITS = sorted((PACKAGING / "systemd").iterdir())


def run(*command: str, cwd: pathlib.Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_manuals_and_completions_match_the_commands() -> None:
    spec = importlib.util.spec_from_file_location("command_line", PACKAGING / "command_line.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["command_line"] = module
    spec.loader.exec_module(module)
    for path, text in module.documents().items():
        assert (PACKAGING / path).read_text() == text, f"{path} is old: python packaging/command_line.py"


@pytest.fixture(scope="module")
def served() -> dict[str, str]:
    """Every metric that a daemon serves and its type, but those of the process."""
    statuses = (ModelStatus("m", ModelState.READY),)
    device = Device("cpu:0", DeviceKind.CPU, "a CPU", 2, 1)
    rendered = metrics.render(statuses, (WorkerHealth("cpu:0", WorkerState.READY, 0),), (device,)).decode()
    found = dict(re.findall(r"^# TYPE (\w+) (\w+)$", rendered + asyncio.run(_scraped()), re.MULTILINE))
    ours = {name: kind for name, kind in found.items() if name.startswith(("cortex_", "neuron_"))}
    return {name: kind for name, kind in ours.items() if not name.endswith("_created")}


@pytest.mark.parametrize("path", ["prometheus/helexa.rules.yml", "grafana/helexa.json"])
def test_prometheus_queries_use_existing_metrics(path: str, served: dict[str, str]) -> None:
    named = set(re.findall(r"\b(?:cortex|neuron)_[a-z_]+\b(?=[{\[),\s]|$)", (PACKAGING / path).read_text()))
    assert len(named) > 12
    for name in named:
        assert {name, *(name.removesuffix(suffix) for suffix in ("_bucket", "_sum", "_count"))} & set(served), name


def test_panels_have_distinct_ids_and_query_the_chosen_data_source() -> None:
    board = json.loads((PACKAGING / "grafana" / "helexa.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    charts = [panel for panel in panels if panel["type"] != "row"]
    assert charts
    for panel in charts:
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24, panel["title"]


def test_every_metric_is_explained(served: dict[str, str]) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    explained = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE))
    assert explained == served


async def _scraped() -> str:
    async with rig(FakeNode().ready("m")) as gateway, httpx.AsyncClient() as client:
        port = free_port()
        stop = gateway.gateway.metrics.serve("127.0.0.1", port)
        try:
            return (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        finally:
            stop()


def test_a_release_has_one_version() -> None:
    """A tag is compared with the first of these alone."""
    patterns = {
        "pyproject.toml": r'^version = "(.+)"$',
        "meson.build": r"^  version: '(.+)',$",
        "cortex/wire/__init__.py": r'^VERSION = "(.+)"$',
        "packaging/rpm/cortex.spec": r"^Version: +(.+)$",
        "packaging/rpm/helexa-neuron.spec": r"^Version: +(.+)$",
    }
    found = {path: re.findall(pattern, (ROOT / path).read_text(), re.MULTILINE) for path, pattern in patterns.items()}
    assert set(map(tuple, found.values())) == {(VERSION,)}, found
    for spec in (PACKAGING / "rpm").glob("*.spec"):
        newest = re.search(r"^%changelog\n\* .+ - (.+)-\d+$", spec.read_text(), re.MULTILINE)
        assert newest is not None
        assert newest[1] == VERSION, spec.name


def test_every_code_of_an_error_is_explained() -> None:
    for path in [*(ROOT / "cortex").rglob("*.py"), *(ROOT / "neuron").rglob("*.py")]:
        if '\n    code = "' in path.read_text() and "triton_kernels" not in path.parts:  # an error's class
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))

    def below(kind: type[ApiError]) -> set[str]:
        return {kind.code}.union(*(below(narrower) for narrower in kind.__subclasses__()))

    # Codes of this project's own classes; those that a test defines are not operators' business.
    page = (ROOT / "docs" / "errors.md").read_text()
    explained = set(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE))
    codes = {
        code
        for kind in _classes(ApiError)
        if kind.__module__.startswith(("cortex.", "neuron."))
        for code in {kind.code}
    }
    codes |= set(Reason)  # one class, whose instances name the limit
    assert codes - explained == set(), "docs/errors.md does not explain these"
    assert explained - below(ApiError) - set(Reason) == set(), "docs/errors.md explains what there is not"
    advice = re.findall(r"^\| `[a-z_]+` \|.*\| (.+) \|$", page, re.MULTILINE)
    assert len(advice) == len(set(advice)) == len(explained), "each code has advice of its own"


def test_every_code_that_is_written_down_anywhere_is_explained() -> None:
    """Not only those of classes: a code that is set on an instance reaches a client too."""
    explained = set(re.findall(r"^\| `([a-z_]+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE))
    pattern = re.compile(r"""(?:\.code = |ErrorInfo\(\s*\d{3},\s*|\bcode=)["']([a-z_]{4,})["']""")
    for path in [*(ROOT / "cortex").rglob("*.py"), *(ROOT / "neuron").rglob("*.py"), *(ROOT / "cortex").rglob("*.pyx")]:
        for code in pattern.findall(path.read_text()):
            assert code in explained, f"{path.relative_to(ROOT)}: {code}"


def _classes(kind: type[ApiError]) -> set[type[ApiError]]:
    return {kind}.union(*(_classes(narrower) for narrower in kind.__subclasses__()))


def test_units_give_a_daemon_longer_to_end_than_it_takes() -> None:
    gateway, daemon = GatewaySettings(), DaemonSettings()
    needed_s = {
        "cortex.service": gateway.drain_timeout_s,
        "helexa-neuron.service": daemon.drain_timeout_s + daemon.stop_timeout_s,
    }
    for name, seconds in needed_s.items():
        found = re.search(r"^TimeoutStopSec=(\d+)s$", (PACKAGING / "systemd" / name).read_text(), re.MULTILINE)
        assert found is not None
        assert int(found[1]) > seconds + 5, name


def test_settings_are_for_their_service_alone_to_read() -> None:
    """Keys and secrets stand in them."""
    for name, user in (("cortex", "cortex"), ("helexa-neuron", "neuron")):
        rules = (PACKAGING / "tmpfiles.d" / f"{name}.conf").read_text()
        assert re.search(rf"^z /etc/{user}/\*\.toml 0640 root {user} ", rules, re.MULTILINE)
        listed = re.findall(r"^%config.*$", (PACKAGING / "rpm" / f"{name}.spec").read_text(), re.MULTILINE)
        ours = [line for line in listed if line.endswith(".toml")]
        assert ours
        assert all(f"%attr(0640, root, {user})" in line for line in ours), ours


def test_addresses_and_open_ports_agree() -> None:
    gateway, daemon = GatewaySettings(), DaemonSettings()
    for name, address, port in (
        ("cortex", gateway.listen, 31313),
        ("cortex-metrics", gateway.metrics_listen, 31314),
        ("helexa-neuron", daemon.listen, 13131),
    ):
        assert address.endswith(f":{port}")
        assert f'port="{port}"' in (PACKAGING / "firewalld" / f"{name}.xml").read_text()


# ------------------------------------------------------------------ with the tools that make test-ops installs


@pytest.mark.ops
def test_rules_and_their_unit_tests_hold() -> None:
    folder = PACKAGING / "prometheus"
    run(tool("promtool"), "check", "rules", "helexa.rules.yml", cwd=folder)
    run(tool("promtool"), "check", "config", "--syntax-only", "prometheus.yml", cwd=folder)
    run(tool("promtool"), "test", "rules", "helexa.rules.test.yml", cwd=folder)


@pytest.mark.ops
@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.suffix == ".service"], ids=lambda unit: unit.name)
def test_units_are_sandboxed(unit: pathlib.Path) -> None:
    shown = run(tool("systemd-analyze"), "security", "--offline=true", unit.name, cwd=unit.parent)
    found = re.search(r"exposure level for \S+: ([\d.]+)", shown)
    assert found is not None
    assert float(found[1]) <= 3.0


@pytest.mark.ops
def test_units_are_valid(tmp_path: pathlib.Path) -> None:
    bin_folder = pathlib.Path(sys.executable).parent
    for unit in UNITS:
        text = re.sub(r"^ExecStart=(\w+)", rf"ExecStart={bin_folder}/\1", unit.read_text(), flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text)
    assert run(tool("systemd-analyze"), "verify", "--man=no", *(f"./{unit.name}" for unit in UNITS), cwd=tmp_path) == ""


@pytest.mark.ops
def test_manuals_are_clean() -> None:
    manuals = map(str, sorted((PACKAGING / "man").glob("*.1")))
    assert run(tool("mandoc"), "-Tlint", "-W", "warning", *manuals) == ""


@pytest.mark.ops
@pytest.mark.parametrize(("shell", "pattern"), [("bash", "*.bash"), ("zsh", "_*"), ("fish", "*.fish")])
def test_completions_parse(shell: str, pattern: str) -> None:
    paths = sorted((PACKAGING / "completions").glob(pattern))
    assert len(paths) == 2
    for path in paths:
        run(tool(shell), "-n", str(path))


@pytest.mark.ops
def test_specs_are_quiet() -> None:
    specs = map(str, sorted((PACKAGING / "rpm").glob("*.spec")))
    assert "0 errors" in run(tool("rpmlint"), "-c", str(PACKAGING / "rpm" / "rpmlint.toml"), *specs)
