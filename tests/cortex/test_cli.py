"""The commands, as a user types them."""

import contextlib
import http.server
import io
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import loopback
import orjson
import pytest
from daemons import free_port
from rich.console import Console

from cortex import cli, report

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


def test_a_demo_without_a_neuron_names_the_missing_modules(tmp_path: pathlib.Path) -> None:
    """As of a package that has the gateway alone."""
    code = f"import sys; sys.executable = '{tmp_path}/python3'; from cortex import cli; sys.exit(cli.main(['demo']))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"demo: {tmp_path}/neuron is not there" in done.stderr


@pytest.mark.parametrize("columns", ["20", "40", "200"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_lines_are_not_wrapped_without_a_terminal(columns: str, locale: str) -> None:
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
    ("arguments", "environment", "message"),
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
    folder: pathlib.Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    (folder / "bad.toml").write_text("[gateway]\nlissten = 'x'\n")
    (folder / "lost.toml").write_text("[gateway]\nmodels = 'gone.toml'\n" + (folder / "cortex.toml").read_text())
    done = run("serve", *(argument.format(folder) for argument in arguments), **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("cortex: ")
    assert done.stderr.count("\n") == 1


def test_a_gateway_that_is_not_there_is_status_1() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for command in ("status", "models"):
        done = run(command, "--url", url)
        assert done.returncode == 1
        assert done.stderr.startswith(f"cortex: no gateway answers at {url}: ")
        assert done.stderr.count("\n") == 1


def test_an_invalid_url_is_status_2() -> None:
    assert run("status", "--url", "localhost:1").returncode == 2
    assert run("status", "--bogus").returncode == 2
    assert run().returncode == 2


@pytest.mark.parametrize("command", [["status"], ["models"], ["dashboard"], ["drain", "a"], ["keys"]])
@pytest.mark.parametrize(
    "url", ["http://localhost:99999", "http://localhost:abc", "http://[::1", "http://localhost:0", "http://", "//h:1"]
)
def test_an_address_that_is_none_is_a_line_and_status_2(command: list[str], url: str) -> None:
    done = run(*command, "--url", url)
    assert (done.returncode, done.stderr) == (2, f"cortex: --url: {url!r} is not the address of a gateway\n")


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "1e300", "0", "x"])
def test_an_interval_that_is_none_is_status_2(seconds: str) -> None:
    for arguments in (["status", "--watch", seconds], ["unload", "m", "--drain-timeout", f"{seconds}x"]):
        done = run(*arguments, "--url", f"http://127.0.0.1:{free_port()}")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


@contextlib.contextmanager
def answering(body: bytes, status: int = 200) -> Iterator[str]:
    """Serve one answer to whatever is asked, and yield where."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with loopback.serving(Handler) as url:
        yield url


COMMANDS = [["status"], ["models"], ["keys"], ["load", "m"], ["unload", "m"], ["pin", "m"], ["forget", "m"],
            ["drain", "a"], ["reload"], ["ps"], ["rm", "m"], ["show", "m"], ["pull", "m"],
            ["run", "m", "hi"]]  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"", b"[]", b"{}", b"null", b"\xff", b'{"nodes":3,"data":3,"keys":3}', b'{"nodes":[[]],"data":[1]}'],
)
def test_another_server_is_a_line_and_status_1(body: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(body) as url:
        for command in COMMANDS:
            assert cli.main([*command, "--url", url]) == 1, command
            output = capsys.readouterr().err.removeprefix("loading m\n")
            assert output.startswith("cortex: what answers there is no gateway")
            assert output.count("\n") == 1


NAMES = ["[/x]", "[red]a", "a[link=x]", ":smile:", "a\x1b[31mb\x07", "a\nb\rc", "\u202eabc"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_of_nodes_are_no_markup_and_no_terminal_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"id": name, "state": name, "error": name, "pinned": True}
    device = {"id": name, "name": name, "worker": name}
    node = {"name": name, "endpoint": name, "version": name, "state": name, "up": True, "fault": name}
    fleet = {"nodes": [node | {"devices": [device], "models": [model]}], "degraded": [name], "config_error": name}
    offers = [{"id": name, "alias_of": name, "state": name, "capabilities": [name], "nodes": [node]}]
    keys = [{"name": name, "models": [name]}]
    answer = orjson.dumps(fleet | {"data": offers, "keys": keys})
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in name)
    with answering(answer) as url:
        for command in (["status"], ["models"], ["keys"]):
            assert cli.main([*command, "--url", url]) == 0
            out = capsys.readouterr().out
            assert shown in out
            assert out.replace("\n", "").isprintable()
    with answering(orjson.dumps({"error": {"message": name}}), 400) as url:
        assert cli.main(["status", "--url", url]) == 1
        err = capsys.readouterr().err
        assert shown in err
        assert err.removesuffix("\n").isprintable()


@pytest.mark.parametrize("name", ["a b", "😀", "", "-a", "a\n", "a" * 64, "é", "anonymous"])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_key_has_no_name_that_its_file_refuses(
    name: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["keys", "add", *more, "--", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"cortex: keys add: {name!r} ")
    assert "begins with a letter" in captured.err or "is taken" in captured.err


def test_a_keys_name_may_follow_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "add", "--admin", "--expires", "9d", "mary", "--print"]) == 0
    assert 'name = "mary"\n' in capsys.readouterr().out
    for words, problem in (
        (["add", "--print", "a", "b"], "keys add: needs the name"),
        (["list", "a"], "takes no name"),
    ):
        assert cli.main(["keys", *words]) == 2
        assert problem in capsys.readouterr().err


def test_a_load_that_downloads_shows_its_bytes() -> None:
    model = {"id": "m", "state": "loading", "progress": 0.25}
    assert report.progress_of(model) == "25%"
    download = {"downloaded_bytes": 1_200_000_000, "download_bytes": 2_400_000_000}
    assert report.progress_of(model | download) == "25% (downloaded 1.20 of 2.40 GB)"


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
