"""The container files, as far as no engine is needed: what they copy is there, and they run what the units run."""

import http.server
import json
import pathlib
import re
import shlex
import ssl
import subprocess
import sys
import threading
import tomllib

import pytest
import trustme

from cortex.config import GatewaySettings
from neuron.config import DaemonSettings

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "packaging" / "container").glob("*.Containerfile"))
WORDS = {
    "FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "CMD",
}  # fmt: skip


def read(path: pathlib.Path) -> list[tuple[str, str]]:
    """Return the instructions and what they are given."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def settings(path: pathlib.Path) -> dict[str, str]:
    words = [word for name, value in read(path) if name == "ENV" for word in shlex.split(value)]
    return dict(word.split("=", 1) for word in words)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_copied_files_exist_and_suffice_to_build(path: pathlib.Path) -> None:
    instructions = read(path)
    assert {name for name, _ in instructions} <= WORDS
    copied = {
        source.rstrip("/").removeprefix("./")
        for name, value in instructions
        if name == "COPY" and not value.startswith("--from=build ")
        for source in value.split()[:-1]
    }
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", "meson.build", "meson.options", project["readme"], *project["license-files"]}
    needed |= set(re.findall(r"^subdir\('(.+)'\)", (ROOT / "meson.build").read_text(), re.MULTILINE))
    for build in (
        ROOT / "meson.build",
        *(ROOT / "cortex").rglob("meson.build"),
        *(ROOT / "neuron").rglob("meson.build"),
    ):
        for outside in re.findall(r"'(\.\./[^']+)'", build.read_text()):
            needed.add(str((build.parent / outside).resolve().relative_to(ROOT)))
    assert {file for file in needed if not any(file == own or file.startswith(own + "/") for own in copied)} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_daemon_runs_without_rights_at_the_documented_port(path: pathlib.Path) -> None:
    instructions = dict(read(path))
    name = {"cortex": "cortex", "helexa-neuron": "neuron"}[path.stem]
    assert instructions["USER"] == name
    unit = (ROOT / "packaging" / "systemd" / f"{path.stem}.service").read_text()
    command = re.search(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    assert command is not None
    assert instructions["CMD"] == str(command[1].split()).replace("'", '"')
    port = {"cortex": GatewaySettings().listen, "neuron": DaemonSettings().listen}[name].rpartition(":")[2]
    assert port in instructions["EXPOSE"].split()
    assert f"127.0.0.1:{port}/health" in instructions["HEALTHCHECK"]
    ours = settings(path)
    assert ours[f"{name.upper()}_{'GATEWAY' if name == 'cortex' else 'DAEMON'}__LISTEN"] == f"0.0.0.0:{port}"
    # As under systemd: the state folders.
    kept = dict(
        word.split("=", 1) for line in re.findall(r"^Environment=(.+)$", unit, re.MULTILINE) for word in line.split()
    )
    assert kept.items() <= ours.items()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_installed_packages_are_locked(path: pathlib.Path) -> None:
    default = re.search(r"^ARG EXTRA=(\w+)", path.read_text(), re.MULTILINE)
    asked = re.findall(r"-r (packaging/lock/\S+)", path.read_text())
    assert len(asked) == 2
    for lock in asked:
        assert (ROOT / lock.replace("${EXTRA}", default[1] if default else "")).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_health_check_uses_tls_too(path: pathlib.Path) -> None:
    """It asked in the clear alone, and called a daemon with a certificate unhealthy."""
    check = dict(read(path))["HEALTHCHECK"]
    _, flag, code = json.loads(check[check.index("[") :])
    assert flag == "-c"
    port = "31313" if path.stem == "cortex" else "13131"
    certificate = trustme.CA().issue_cert("127.0.0.1")

    class Health(http.server.BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            self.send_response(self.status if self.path == "/health" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    for is_tls in (False, True):
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
            if is_tls:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                certificate.configure_cert(context)
                server.socket = context.wrap_socket(server.socket, server_side=True)
            serving = threading.Thread(target=server.serve_forever)
            serving.start()
            try:
                for Health.status, expected in ((200, 0), (503, 1)):
                    command = [sys.executable, "-c", code.replace(port, str(server.server_port))]
                    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
                    assert done.returncode == expected, (is_tls, Health.status, done.stderr)
            finally:
                server.shutdown()
                serving.join()
