"""The clients that people use, headless: each completes a turn with a tool of its own against cortex -> neuron.

``make test-clients`` installs them into ``build/clients`` and runs this; what is not there is skipped with its reason.
The model is a script: it calls the agent's own tool for commands, or writes the file where an agent has no tools.
"""

import json
import os
import pathlib
import subprocess
from collections.abc import Callable

import daemons
import pytest

pytestmark = [pytest.mark.clients, pytest.mark.timeout(180)]

CLIENTS = pathlib.Path(os.environ.get("CLIENTS", pathlib.Path(__file__).parents[2] / "build" / "clients"))
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
        inherited["PATH"] = f"{CLIENTS / 'node_modules' / 'node' / 'bin'}:{inherited['PATH']}"
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


@pytest.mark.parametrize("websockets", ["true", "false"])
def test_codex(gateway: daemons.Daemon, tmp_path: pathlib.Path, run: Run, websockets: str) -> None:
    codex = installed("node_modules", ".bin", "codex")
    (tmp_path / "codex").mkdir()
    (tmp_path / "codex" / "config.toml").write_text(
        'model = "small"\nmodel_provider = "cortex"\n[model_providers.cortex]\nname = "cortex"\n'
        f'base_url = "{gateway.url}/v1"\nwire_api = "responses"\nsupports_websockets = {websockets}\n'
    )
    flags = ["--skip-git-repo-check", "--json", "--dangerously-bypass-approvals-and-sandbox"]
    printed = run(codex, "exec", *flags, COMMAND, CODEX_HOME=str(tmp_path / "codex"))
    assert made(tmp_path) == "scripted"
    events = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert events[-1]["type"] == "turn.completed"
    assert events[-1]["usage"]["output_tokens"] == 15
    texts = [event["item"]["text"] for event in events if event.get("item", {}).get("type") == "agent_message"]
    assert texts[0] == "I run it."
    assert texts[-1].startswith("It says ")
    assert ("not_generated" in gateway.log.read_text()) or websockets == "false"


OPENCODE = {"chat": "@ai-sdk/openai-compatible", "responses": "@ai-sdk/openai", "messages": "@ai-sdk/anthropic"}


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


@pytest.mark.parametrize(
    ("model", "base"), [("openai/m", "OPENAI_API_BASE"), ("anthropic/claude-local", "ANTHROPIC_API_BASE")]
)
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_aider(gateway: daemons.Daemon, tmp_path: pathlib.Path, run: Run, model: str, base: str, stream: str) -> None:
    aider = installed("aider", "bin", "aider")
    flags = ["--yes-always", "--no-check-update", "--analytics-disable", "--no-show-model-warnings", "--no-git"]
    url = gateway.url + ("/v1" if model.startswith("openai") else "")
    keys = {"OPENAI_API_KEY": "none", "ANTHROPIC_API_KEY": "none", base: url}
    run(aider, "--model", model, *flags, stream, "--edit-format", "whole", "--message", "write made.txt", **keys)
    assert made(tmp_path) == "scripted"


def test_claude_code(gateway: daemons.Daemon, tmp_path: pathlib.Path, run: Run) -> None:
    claude = installed("node_modules", ".bin", "claude")
    names = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL")
    printed = run(
        claude, "-p", COMMAND, "--allowedTools", "Bash", "--output-format", "json",
        ANTHROPIC_BASE_URL=gateway.url, ANTHROPIC_AUTH_TOKEN="none", DISABLE_AUTOUPDATER="1",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", **dict.fromkeys(names, "claude-local"),
    )  # fmt: skip
    assert made(tmp_path) == "scripted"
    found = json.loads(printed)
    result = found[-1] if isinstance(found, list) else found
    assert (result["subtype"], result["num_turns"]) == ("success", 2)
    assert result["result"].startswith("It says ")


PI = {"openai-completions": "/v1", "openai-responses": "/v1", "anthropic-messages": ""}


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


def test_qwen_code(gateway: daemons.Daemon, tmp_path: pathlib.Path, run: Run) -> None:
    qwen = installed("node_modules", ".bin", "qwen")
    keys = {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": f"{gateway.url}/v1", "OPENAI_MODEL": "m"}
    printed = run(qwen, "--auth-type", "openai", "-y", "-p", COMMAND, "--output-format", "json", **keys)
    assert made(tmp_path) == "scripted"
    result = json.loads(printed)[-1]
    assert (result["type"], result["is_error"]) == ("result", False)
    assert result["result"].startswith("It says ")


def test_continue(gateway: daemons.Daemon, tmp_path: pathlib.Path, run: Run) -> None:
    cn = installed("node_modules", ".bin", "cn")
    settings = tmp_path / "home" / "config.yaml"
    settings.write_text(
        "name: cortex\nversion: 0.0.1\nschema: v1\nmodels:\n  - name: cortex\n    provider: openai\n    model: m\n"
        f"    apiBase: {gateway.url}/v1\n    apiKey: none\n    roles: [chat]\n"
    )
    printed = run(cn, "-p", "--auto", "--config", str(settings), COMMAND, CONTINUE_TELEMETRY_ENABLED="0")
    assert made(tmp_path) == "scripted"
    assert printed.strip().startswith("It says")


def test_cline(gateway: daemons.Daemon, tmp_path: pathlib.Path, run: Run) -> None:
    cline = installed("node_modules", ".bin", "cline")
    provider = "openai-compatible"
    run(cline, "auth", provider, "-k", "none", "-m", "m", "-b", f"{gateway.url}/v1")
    printed = run(cline, "-P", provider, "-m", "m", "--json", "-t", "60", COMMAND, DO_NOT_TRACK="1")
    assert made(tmp_path) == "scripted"
    events = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert events[-1]["finishReason"] == "completed"
    assert events[-1]["text"].startswith("It says ")


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
