"""``cortex launch``: the model that it picks, the settings of each agent, and each error as one line.

Programs of agents are scripts that write down how they were started; the real ones are started by
``tests/sdk/test_clients.py``.
"""

import contextlib
import http.server
import json
import pathlib
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import loopback
import pytest
from daemons import free_port

from cortex.agents import AGENTS, Setup, Target

PROGRAM = str(pathlib.Path(sys.executable).with_name("cortex"))
READY = {"id": "org/m:q4", "state": "ready", "context_length": 32768, "capabilities": ["chat", "vision"]}
COLD = {"id": "cold", "state": "available", "capabilities": []}
EMBEDDER = {"id": "e", "state": "ready", "capabilities": ["embeddings"]}
ALIAS = {**READY, "id": "small", "alias_of": "org/m:q4"}
REPORT = """#!/bin/sh
{ echo "$0"; for word; do echo "$word"; done; env; } > "$HOME/started"
exit 7
"""


@contextlib.contextmanager
def serving(*models: Mapping[str, Any], key: str = "") -> Iterator[str]:
    """Serve a list of models, to those who send the key if there is one."""
    by_path = {f"/v1/models/{model['id'].replace('/', '%2F').replace(':', '%3A')}": model for model in models}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found: Any = {"data": models} if self.path == "/v1/models" else by_path.get(self.path)
            status = 200 if found else 404
            if key and self.headers["authorization"] != f"Bearer {key}":
                status, found = 401, {"error": {"message": "Wrong key."}}
            body = json.dumps(found or {"error": {"message": "No such model."}}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with loopback.serving(Handler) as url:
        yield url


class Home:
    """A user's home, with programs of agents."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()

    def install(self, name: str, content: str = REPORT) -> None:
        program = self.programs / name
        program.write_text(content)
        program.chmod(0o755)

    def run(self, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        known = {"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": str(self.folder)} | environment
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=known)

    def launch(self, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return self.run(PROGRAM, "launch", *words, **environment)

    def started(self) -> list[str]:
        """Return the words and the environment of the program that was started last."""
        return (self.folder / "started").read_text().splitlines()


@pytest.fixture
def home(tmp_path: pathlib.Path) -> Home:
    return Home(tmp_path)


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_is_started_with_settings_and_its_own_words(home: Home, name: str) -> None:
    home.install(AGENTS[name].program)
    with serving(READY, EMBEDDER, COLD, ALIAS, key="sk-1") as url:
        done = home.launch(name, "--url", url, "--", "--model", "theirs", "a b", CORTEX_KEY="sk-1")
        assert done.stderr == f"cortex: {name} uses org/m:q4 at {url}, a context of 32768 tokens\n"
        assert (done.returncode, done.stdout) == (7, "")
        words = home.started()
        printed = home.launch(name, "--url", url, "--print", "--", "--model", "theirs", "a b", CORTEX_KEY="sk-1")
    assert words[0].endswith(AGENTS[name].program)
    files = [path for path in (home.folder / ".local").rglob("*") if path.is_file()]
    told = "\n".join([*words, *(path.read_text() for path in files)])
    assert all(part in told for part in ("org/m:q4", url, "sk-1", "32768"))
    at = words.index("theirs")
    assert words[at - 1 : at + 2] == ["--model", "theirs", "a b"]
    assert "sk-1" not in "\n".join(words[: at + 2]), "other users see arguments"
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.is_relative_to(home.folder / ".local" / "state" / "cortex" / "launch" / name)
    assert {path.name for path in home.folder.iterdir()} <= {"bin", "started", ".local"}, "nothing of the user's"
    before = {path: path.read_text() for path in files}
    for path in files:
        path.unlink()
    assert home.run("/bin/sh", "-c", printed.stdout).returncode == 7
    ignored = ("CORTEX_KEY", "_=", "PWD", "SHLVL", "OLDPWD", "LC_CTYPE")
    assert {line for line in home.started() if not line.startswith(ignored)} == {
        line for line in words if not line.startswith(ignored)
    }
    assert {path: path.read_text() for path in files} == before


def test_the_model_is_the_loaded_one_or_the_only_one_or_the_named_one(home: Home) -> None:
    home.install("codex")
    with serving(READY, COLD, EMBEDDER) as url:
        assert "codex uses org/m:q4 at" in home.launch("codex", "--url", url).stderr
        for name in ("cold", "org/m:q4"):
            assert f"codex uses {name} at" in home.launch("codex", "--url", url, "--model", name).stderr
        home.launch("codex", "--url", url, "--small-model", "cold")
        assert "uses org/m:q4" in home.launch("codex", "--url", url, "--small-model", "cold").stderr
    with serving(COLD) as url:
        assert home.launch("codex", "--url", url).stderr == (
            f"cortex: codex uses cold at {url}; it is loaded when the first request comes\n"
        )
    with serving({**READY, "context_length": 4096}) as url:
        assert "that is short for an agent" in home.launch("codex", "--url", url).stderr


ERRORS = {
    "an unknown agent": (["emacs"], (READY,), "", "'emacs' is no agent that cortex knows: claude, codex, opencode"),
    "not installed": (["pi"], (READY,), "", "pi is not installed, or not in $PATH: npm install -g @mariozechner/pi"),
    "an unknown model": (["codex", "--model", "x"], (READY, COLD), "", "no model 'x'; it has: org/m:q4, cold"),
    "an unknown small model": (["codex", "--small-model", "x"], (READY,), "", "has no model 'x'; it has: org/m:q4"),
    "no model": (["codex"], (EMBEDDER,), "", "the gateway offers no model that chats: `cortex run MODEL` adds one"),
    "several": (["codex"], (COLD, {**COLD, "id": "b"}), "", "has several models: cold, b; name one with --model"),
    "several loaded": (["codex"], (READY, {**READY, "id": "b"}), "", "several models loaded: org/m:q4, b; name one"),
    "a key": (["codex"], (READY,), "sk-1", "the gateway needs a key, or another one: give it by --key-file or $CORT"),
}


@pytest.mark.parametrize("how", ERRORS)
def test_an_error_is_a_line_that_says_what_to_do(home: Home, how: str) -> None:
    words, models, key, message = ERRORS[how]
    home.install("codex")
    with serving(*models, key=key) as url:
        done = home.launch(*words, "--url", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.startswith("cortex: ")
    assert done.stderr.count("\n") == 1
    assert not (home.folder / "started").exists()


def test_a_gateway_that_is_down_and_another_server(home: Home) -> None:
    home.install("codex")
    down = f"http://127.0.0.1:{free_port()}"
    done = home.launch("codex", "--url", down)
    assert done.stderr.startswith(f"cortex: no gateway answers at {down}: ")
    assert done.stderr.endswith("`cortex serve` starts one, --url names another\n")
    with serving() as url:
        assert "offers no model" in home.launch("codex", "--url", url).stderr
    with serving({"id": "m", "state": 1, "capabilities": 1}) as url:
        done = home.launch("codex", "--url", url)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "what answers there is no gateway" in done.stderr


def test_settings_that_cannot_be_written_and_a_program_that_does_not_start(home: Home) -> None:
    home.install("claude")
    home.install("codex", "\x7fELF is no program")
    (home.folder / "file").write_text("")
    with serving(READY) as url:
        done = home.launch("claude", "--url", url, XDG_STATE_HOME=str(home.folder / "file"))
        assert "settings cannot be written to" in done.stderr
        assert "does not start" in home.launch("codex", "--url", url).stderr
        for name, status in (("claude", 2), ("codex", 2)):
            done = home.run("/usr/bin/env", "-u", "HOME", PROGRAM, "launch", name, "--url", url)
            assert done.returncode == status
            assert done.stderr.endswith("$HOME: is not set: there is no folder for the agent's settings\n")


@pytest.mark.parametrize("name", AGENTS)
def test_a_gateways_own_ca_goes_to_the_agent(home: Home, name: str) -> None:
    home.install(AGENTS[name].program)
    (home.folder / "ca.pem").write_text("")
    with serving(READY) as url:
        home.launch(name, "--url", url, "--ca-file", str(home.folder / "ca.pem"))
    assert f"{AGENTS[name].ca_variable}={home.folder}/ca.pem" in home.started()


TARGET = Target("http://h:1", "sk-1", 'm"\\', "s")


def setups(target: Target) -> Mapping[str, Setup]:
    return {name: agent.setup(target, pathlib.Path("/f")) for name, agent in AGENTS.items()}


def test_settings_of_a_model_of_unknown_size() -> None:
    for name, setup in setups(TARGET).items():
        told = repr(setup)
        assert "context_window" not in told, name
        assert "CONTEXT_TOKENS" not in told
        for path, content in setup.files.items():
            if path.endswith((".json", ".yaml")):
                json.loads(content)


def test_prices_go_to_agents_that_count_cost(home: Home) -> None:
    priced = {**READY, "pricing": {"prompt": "0.00000005", "completion": "0.0000012"}}
    with serving(priced) as url:
        for name, prices in (
            ("opencode", '"cost": {"input": 0.05, "output": 1.2}'),
            ("aider", "1.2e-06"),
            ("pi", "0.05"),
        ):
            assert prices in home.launch(name, "--url", url, "--print").stdout
    with serving({**READY, "pricing": {"prompt": "free", "completion": "0"}}) as url:
        done = home.launch("pi", "--url", url, "--print")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_values_of_codex_are_toml() -> None:
    words = setups(TARGET)["codex"].arguments
    assert words[::2] == ("-c",) * (len(words) // 2)
    found = tomllib.loads("\n".join(words[1::2]))
    assert (found["model"], found["model_provider"]) == (TARGET.model, "cortex")
    assert found["model_providers"]["cortex"]["base_url"] == "http://h:1/v1"


@pytest.mark.parametrize(("context_tokens", "expected"), [(0, 8192), (8192, 2048), (1 << 20, 8192), (1, 1)])
def test_an_answer_leaves_room_for_the_conversation(context_tokens: int, expected: int) -> None:
    assert Target("", "", "", "", context_tokens).output_tokens == expected
