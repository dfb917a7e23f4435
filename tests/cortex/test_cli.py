"""The commands, as a user types them."""

import io
import pathlib
import re
import subprocess
import sys

import pytest
from daemons import free_port
from rich.console import Console

from cortex import report

PROGRAM = str(pathlib.Path(sys.executable).with_name("cortex"))


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "cortex.toml").write_text('[[neurons]]\nname = "a"\nendpoint = "http://127.0.0.1:1"\n')
    (tmp_path / "models.toml").write_text('[[models]]\nid = "m"\nsource = "/w"\n')
    return tmp_path


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"cortex \d+\.\d+\.\d+\S*( \([0-9a-f]{12}\))?\n", done.stdout)


def test_a_configuration_can_be_checked_without_serving(folder: pathlib.Path) -> None:
    done = run("serve", "--config", str(folder / "cortex.toml"), "--check", HOME=str(folder))
    assert (done.returncode, done.stdout) == (0, f"{folder}/cortex.toml: ok, 1 nodes, 1 models\n")


def test_a_demo_without_a_neuron_says_what_is_missing(tmp_path: pathlib.Path) -> None:
    """As of a package that has the gateway alone."""
    code = f"import sys; sys.executable = '{tmp_path}/python3'; from cortex import cli; sys.exit(cli.main(['demo']))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"demo: {tmp_path}/neuron is not there" in done.stdout


@pytest.mark.parametrize("columns", ["20", "40", "200"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_what_is_no_terminal_gets_unbroken_lines(columns: str, locale: str) -> None:
    """Programs read them; a width that some shell has exported is nothing to those."""
    name = "a-very-long-name-of-a-node." * 4
    fleet = {"nodes": [{"name": name, "endpoint": f"http://{'h' * 150}:1", "up": False, "fault": "why " * 60}]}
    code = f"from cortex import report; report.print_fleet({fleet!r})"
    environment = {
        "PATH": "/usr/bin:/bin",
        "COLUMNS": columns,
        "LC_ALL": locale,
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, timeout=30, check=True, env=environment
    )
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    assert any(name in line and "h" * 150 in line for line in lines)
    assert any("why " * 59 in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--config", "none.toml"], {}, "none.toml: cannot be read: No such file or directory"),
        (["--config", "{}/cortex.toml", "--listen", "nowhere"], {}, "gateway.listen: 'nowhere' is not host:port"),
        (["--config", "{}/cortex.toml", "--workers", "0"], {}, "gateway.workers"),
        (["--config", "{}/cortex.toml"], {"CORTEX_GATEWAY__LISSTEN": "x"}, "CORTEX_GATEWAY__LISSTEN: gateway.lissten"),
        (["--config", "{}/bad.toml"], {}, "bad.toml: gateway.lissten: unknown key"),
        (["--config", "{}/lost.toml"], {}, "gone.toml: cannot be read"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_status_2(
    folder: pathlib.Path, arguments: list[str], environment: dict[str, str], says: str
) -> None:
    (folder / "bad.toml").write_text("[gateway]\nlissten = 'x'\n")
    (folder / "lost.toml").write_text("[gateway]\nmodels = 'gone.toml'\n" + (folder / "cortex.toml").read_text())
    done = run("serve", *(argument.format(folder) for argument in arguments), **environment)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.startswith("cortex: ")
    assert done.stderr.count("\n") == 1


def test_a_gateway_that_is_not_there_is_status_1() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for command in ("status", "models"):
        done = run(command, "--url", url)
        assert done.returncode == 1
        assert done.stderr.startswith(f"cortex: no gateway answers at {url}: ")
        assert done.stderr.count("\n") == 1


def test_what_is_not_an_address_is_status_2() -> None:
    assert run("status", "--url", "localhost:1").returncode == 2
    assert run("status", "--bogus").returncode == 2
    assert run().returncode == 2


def test_reports_fit_a_terminal() -> None:
    gib = 1024**3
    device = {"id": "cuda:0", "name": "NVIDIA GeForce RTX 5090", "worker": "ready", "memory_free_bytes": 20 * gib}
    model = {"id": "Qwen/Qwen3-Coder-30B-A3B-Instruct-FP8", "state": "loading", "progress": 0.5}
    node = {
        "name": "a-rather-long-host-name",
        "endpoint": "http://a-rather-long-host-name.example.net:13131",
        "up": True,
        "state": "ready",
        "version": "0.1.0",
        "devices": [device | {"memory_total_bytes": 32 * gib}],
        "models": [model | {"context_tokens": 131072, "weights_bytes": 30 * gib, "running": 12, "waiting": 3}],
    }
    down = {"name": "b", "up": False, "fault": "b cannot be reached at b:13131: Connection refused.", "endpoint": "x"}
    console = Console(width=80, record=True, file=io.StringIO())
    report.print_fleet({"nodes": [node, down]}, console)
    report.print_models({"data": [{"id": "m", "state": "ready", "nodes": [{"name": "a", "state": "ready"}]}]}, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for expected in ("GeForce RTX", "131072", "30.0", "20.0", "32.0", "loading 50%", "down", "Connection refused"):
        assert expected in text, text
