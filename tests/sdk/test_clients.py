"""The clients that people use, headless: each completes a turn with a tool of its own against cortex -> neuron.

``make test-clients`` installs them into ``build/clients`` and runs this; what is not there is skipped with its reason.
The model is a script: it calls the agent's own tool for commands, or writes the file where an agent has no tools.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import daemons
import pytest

from cortex.agents import AGENTS

pytestmark = [pytest.mark.clients, pytest.mark.timeout(180)]

CLIENTS = pathlib.Path(os.environ.get("CLIENTS", pathlib.Path(__file__).parents[2] / "build" / "clients"))
NODE_MODULES = CLIENTS / "node_modules"
HERE = pathlib.Path(__file__).parent
COMMAND = "run echo scripted > made.txt"


def installed(*parts: str) -> str:
    program = CLIENTS.joinpath(*parts)
    if not program.exists():
        pytest.skip(f"{parts[-1]} is not installed in {CLIENTS}: run make test-clients")
    return str(program)


Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Run:
    """Run a program in an empty folder with an empty home; return what it printed."""
    folder, home = tmp_path / "work", tmp_path / "home"
    folder.mkdir()
    home.mkdir()

    def run(*command: str, **environment: str) -> str:
        # Nothing of this machine's own accounts or settings.
        inherited = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        # The node that npm has brought, where it has: many require a newer one than hosts have.
        programs = (NODE_MODULES / "node" / "bin", NODE_MODULES / ".bin", CLIENTS / "aider" / "bin")
        inherited["PATH"] = ":".join([*map(str, programs), inherited["PATH"]])
        done = subprocess.run(
            command,
            cwd=folder,
            env={**inherited, "HOME": str(home), "NO_COLOR": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


def made(folder: pathlib.Path) -> str:
    """Return what the agent's tool has written."""
    return (folder / "work" / "made.txt").read_text().strip()


def events_of(printed: str) -> list[Any]:
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def messages_of_codex(printed: str) -> list[str]:
    items = [event.get("item", {}) for event in events_of(printed)]
    return [item["text"] for item in items if item.get("type") == "agent_message"]


@dataclass(frozen=True)
class Turn:
    """A headless turn of an agent: its words, and its answer in what it prints; ``None``: it prints none."""

    words: Sequence[str]
    answer: Callable[[str], str] | None
    environment: Mapping[str, str] = field(default_factory=dict)
    program: Sequence[str] = ()


CODEX = ("exec", "--skip-git-repo-check", "--json", "--dangerously-bypass-approvals-and-sandbox")
AIDER = ("--yes-always", "--no-check-update", "--analytics-disable", "--no-git", "--edit-format", "whole")
TURNS = {
    "claude": Turn(
        ("-p", COMMAND, "--allowedTools", "Bash", "--output-format", "json"),
        lambda printed: str(json.loads(printed)["result"]),
    ),
    "codex": Turn((*CODEX, COMMAND), lambda printed: messages_of_codex(printed)[-1]),
    "codex without WebSockets": Turn(
        ("-c", "model_providers.cortex.supports_websockets=false", *CODEX, COMMAND),
        lambda printed: messages_of_codex(printed)[-1],
    ),
    "opencode": Turn(
        ("run", "--format", "json", COMMAND),
        lambda printed: [event["part"]["text"] for event in events_of(printed) if event["type"] == "text"][-1],
        {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_PERMISSION": '{"bash": "allow"}'},
    ),
    "aider": Turn((*AIDER, "--message", "write made.txt"), None, program=("aider", "bin")),
    "aider at once": Turn((*AIDER, "--no-stream", "--message", "write made.txt"), None, program=("aider", "bin")),
    "cline": Turn(
        ("--json", "-t", "60", COMMAND), lambda printed: str(events_of(printed)[-1]["text"]), {"DO_NOT_TRACK": "1"}
    ),
    "continue": Turn(("-p", "--auto", COMMAND), str.strip, {"CONTINUE_TELEMETRY_ENABLED": "0"}),
    "pi": Turn(("-p", COMMAND), str.strip, {"PI_OFFLINE": "1"}),
    "qwen": Turn(
        ("-y", "-p", COMMAND, "--output-format", "json"), lambda printed: str(json.loads(printed)[-1]["result"])
    ),
}


def test_every_agent_has_a_turn() -> None:
    assert {name.partition(" ")[0] for name in TURNS} == set(AGENTS)


@pytest.mark.parametrize("name", TURNS)
def test_a_launched_agent_completes_a_turn_with_a_tool(
    gateway: daemons.Daemon, tmp_path: pathlib.Path, run: Run, name: str
) -> None:
    turn, agent = TURNS[name], name.partition(" ")[0]
    installed(*(turn.program or ("node_modules", ".bin")), AGENTS[agent].program)
    cortex = str(pathlib.Path(sys.executable).with_name("cortex"))
    printed = run(cortex, "launch", agent, "--url", gateway.url, "--", *turn.words, **turn.environment)
    assert made(tmp_path) == "scripted"
    if turn.answer is not None:
        assert turn.answer(printed).startswith("It says")
    if agent == "codex":
        assert ("not_generated" in gateway.log.read_text()) or "without" in name


OPENCODE = {"responses": "@ai-sdk/openai", "messages": "@ai-sdk/anthropic"}


@pytest.mark.parametrize("dialect", OPENCODE)
def test_opencode(gateway: daemons.Daemon, tmp_path: pathlib.Path, run: Run, dialect: str) -> None:
    opencode = installed("node_modules", ".bin", "opencode")
    provider = {"npm": OPENCODE[dialect], "options": {"baseURL": f"{gateway.url}/v1", "apiKey": "none"}}
    settings = {
        "provider": {"cortex": provider | {"models": {"m": {}}}},
        "model": "cortex/m",
        "small_model": "cortex/m",
        "autoupdate": False,
        "share": "disabled",
        "permission": {"bash": "allow"},
    }
    (tmp_path / "work" / "opencode.json").write_text(json.dumps(settings))
    printed = run(opencode, "run", "--format", "json", COMMAND, OPENCODE_DISABLE_MODELS_FETCH="1")
    assert made(tmp_path) == "scripted"
    events = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    texts = [event["part"]["text"] for event in events if event["type"] == "text"]
    assert texts[0] == "I run it."
    assert texts[-1].startswith("It says ")


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_aider_by_messages(gateway: daemons.Daemon, tmp_path: pathlib.Path, run: Run, stream: str) -> None:
    aider = installed("aider", "bin", "aider")
    keys = {"ANTHROPIC_API_KEY": "none", "ANTHROPIC_API_BASE": gateway.url}
    flags = ("--no-show-model-warnings", *AIDER, stream)
    run(aider, "--model", "anthropic/claude-local", *flags, "--message", "write made.txt", **keys)
    assert made(tmp_path) == "scripted"


PI = {"openai-responses": "/v1", "anthropic-messages": ""}


@pytest.mark.parametrize("api", PI)
def test_pi(gateway: daemons.Daemon, tmp_path: pathlib.Path, run: Run, api: str) -> None:
    pi = installed("node_modules", ".bin", "pi")
    provider = {"baseUrl": gateway.url + PI[api], "api": api, "apiKey": "none", "models": [{"id": "m"}]}
    settings = tmp_path / "home" / ".pi" / "agent" / "models.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"providers": {"cortex": provider}}))
    printed = run(pi, "-p", "--provider", "cortex", "--model", "m", COMMAND, PI_OFFLINE="1")
    assert made(tmp_path) == "scripted"
    assert printed.strip().startswith("It says ")


@pytest.mark.parametrize("name", ["openai", "anthropic", "tool_runners", "vercel"])
def test_the_libraries_of_npm(gateway: daemons.Daemon, translating: daemons.Daemon, name: str, run: Run) -> None:
    needed = {"openai": ("openai",), "vercel": ("ai",)}
    installed("node_modules", *needed.get(name, ("@anthropic-ai", "sdk")))
    script = CLIENTS / f"{name}.mjs"
    script.write_text((HERE / "npm" / f"{name}.mjs").read_text())
    for server in (gateway, translating):
        printed = run("node", str(script), server.url)
        assert printed.splitlines()[-1].startswith("ok "), printed


@pytest.mark.parametrize("script", ["llm", "langchain", "pydantic_ai", "tool_runner"])
def test_libraries(gateway: daemons.Daemon, script: str, tmp_path: pathlib.Path, run: Run) -> None:
    # The newest SDK is not yet the one that other libraries take.
    python = installed("anthropic" if script == "tool_runner" else "python", "bin", "python")
    printed = run(python, str(HERE / "python" / f"try_{script}.py"), gateway.url, LLM_USER_PATH=str(tmp_path / "llm"))
    assert printed.splitlines()[-1] == "ok", printed
