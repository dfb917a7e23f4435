"""Coding agents, and the settings by which each uses a gateway: one row of ``AGENTS`` and a function an agent.

Settings are arguments, environment variables and files in a folder of the gateway's, never the user's own
configuration: an agent reads that beside them where it can. A secret goes into the environment or a file, since other
users see arguments. Neither processes nor HTTP here.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cortex.gateway_client import KEY_VARIABLE

USUAL_OUTPUT_TOKENS = 8192
"""Output limit for agents that require one with the length of the context."""


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway and its models, as an agent uses them."""

    url: str
    """Address of the gateway, without ``/v1``."""
    key: str
    model: str
    small_model: str
    """Model of side requests, such as titles."""
    context_tokens: int = 0
    """Length of the model's context; 0: not known."""
    input_price: float = 0.0
    """Price of a million tokens of prompts, in US dollars."""
    output_price: float = 0.0
    """Price of a million tokens of answers."""
    sees: bool = False
    """Whether the model reads images."""
    reasons: bool = False
    """Whether the model answers with its reasoning apart."""

    @property
    def openai_url(self) -> str:
        """Base URL of the OpenAI dialects."""
        return f"{self.url}/v1"

    @property
    def output_tokens(self) -> int:
        """Longest answer that leaves most of the context to the conversation."""
        return (
            min(USUAL_OUTPUT_TOKENS, max(self.context_tokens // 4, 1)) if self.context_tokens else USUAL_OUTPUT_TOKENS
        )


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of one start of an agent; ``files`` are named within the folder."""

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent: its program, how to install it, and its settings for a target and a folder."""

    program: str
    install: str
    setup: Callable[[Target, pathlib.Path], Setup]
    ca_variable: str = "NODE_EXTRA_CA_CERTS"
    """Environment variable with the path of further CA certificates."""


def claude(target: Target, folder: pathlib.Path) -> Setup:
    """Return Claude Code's settings: a file that wins over the user's own, which may name another gateway."""
    families = {f"ANTHROPIC_DEFAULT_{family}_MODEL": target.model for family in ("FABLE", "OPUS", "SONNET")}
    environment = families | {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        "ANTHROPIC_API_KEY": "",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": target.small_model,
        "CLAUDE_CODE_SUBAGENT_MODEL": target.model,
        # Its first system block changes with each conversation, and with it the beginning of every prompt.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(target.output_tokens),
    }
    if target.context_tokens:
        environment |= {"CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(target.context_tokens)}
    path = folder / "settings.json"
    return Setup(("--settings", str(path), "--model", target.model), files={path.name: _json({"env": environment})})


def codex(target: Target, folder: pathlib.Path) -> Setup:
    """Return Codex's settings, as overrides of its configuration; their values are TOML."""
    provider = {"name": "cortex", "base_url": target.openai_url, "wire_api": "responses", "env_key": KEY_VARIABLE}
    inline = ", ".join([*(f"{name} = {json.dumps(value)}" for name, value in provider.items())])
    values = {
        "model": json.dumps(target.model),
        "model_provider": '"cortex"',
        "model_providers.cortex": f"{{ {inline}, supports_websockets = true }}",
    }
    if target.context_tokens:
        values["model_context_window"] = str(target.context_tokens)
    arguments = [word for name, value in values.items() for word in ("-c", f"{name}={value}")]
    return Setup(tuple(arguments), {KEY_VARIABLE: target.key})


def opencode(target: Target, folder: pathlib.Path) -> Setup:
    """Return opencode's settings: a configuration in the environment, laid over the user's and the project's."""
    model: dict[str, Any] = {
        "name": target.model,
        "attachment": target.sees,
        "reasoning": target.reasons,
        "tool_call": True,
        "modalities": {"input": _modalities(target), "output": ["text"]},
        "cost": {"input": target.input_price, "output": target.output_price},
    }
    if target.context_tokens:
        model["limit"] = {"context": target.context_tokens, "output": target.output_tokens}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "cortex",
        "options": {"baseURL": target.openai_url, "apiKey": f"{{env:{KEY_VARIABLE}}}"},
        "models": {target.model: model} | ({target.small_model: {}} if target.small_model != target.model else {}),
    }
    settings = {
        "provider": {"cortex": provider},
        "model": f"cortex/{target.model}",
        "small_model": f"cortex/{target.small_model}",
    }
    return Setup(environment={KEY_VARIABLE: target.key, "OPENCODE_CONFIG_CONTENT": json.dumps(settings)})


def aider(target: Target, folder: pathlib.Path) -> Setup:
    """Return aider's settings; a file has the sizes, which it would look up for known models."""
    name = f"openai/{target.model}"
    arguments = [
        "--model",
        name,
        "--weak-model",
        f"openai/{target.small_model}",
        "--openai-api-base",
        target.openai_url,
    ]
    environment, files = {"OPENAI_API_KEY": target.key}, {}
    if target.context_tokens:
        sizes = {"max_input_tokens": target.context_tokens, "max_output_tokens": target.output_tokens}
        costs = {"input_cost_per_token": target.input_price / 1e6, "output_cost_per_token": target.output_price / 1e6}
        row = {**sizes, **costs, "litellm_provider": "openai", "mode": "chat", "supports_vision": target.sees}
        files["models.json"] = _json({name: row})
        arguments += ["--model-metadata-file", str(folder / "models.json")]
    return Setup((*arguments, "--no-show-model-warnings"), environment, files)


def cline(target: Target, folder: pathlib.Path) -> Setup:
    """Return Cline's settings: a data directory of its own, the only way to name an address."""
    provider = "openai-compatible"
    row: dict[str, Any] = {"provider": provider, "apiKey": target.key, "model": target.model}
    row |= {"baseUrl": target.openai_url, "maxTokens": target.output_tokens}
    if target.context_tokens:
        row["contextWindow"] = target.context_tokens
    providers = {provider: {"settings": row, "updatedAt": "1970-01-01T00:00:00.000Z", "tokenSource": "manual"}}
    content = {"version": 1, "lastUsedProvider": provider, "modes": {}, "providers": providers}
    return Setup(
        ("--data-dir", str(folder), "-P", provider, "-m", target.model),
        files={"settings/providers.json": _json(content)},
    )


def pi(target: Target, folder: pathlib.Path) -> Setup:
    """Return pi's settings: an extension that adds a provider."""
    model = {
        "id": target.model,
        "name": target.model,
        "reasoning": target.reasons,
        "input": _modalities(target),
        "cost": {"input": target.input_price, "output": target.output_price, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": target.context_tokens or 128_000,  # its own default
        "maxTokens": target.output_tokens,
    }
    provider = {"baseUrl": target.openai_url, "api": "openai-completions", "apiKey": KEY_VARIABLE, "models": [model]}
    path = folder / "cortex.js"
    extension = f'export default (pi) => pi.registerProvider("cortex", {_json(provider).strip()});\n'
    arguments = ("--extension", str(path), "--provider", "cortex", "--model", target.model)
    return Setup(arguments, {KEY_VARIABLE: target.key}, {path.name: extension})


def qwen(target: Target, folder: pathlib.Path) -> Setup:
    """Return Qwen Code's settings; defaults below the user's own have the length of the context."""
    environment = {"OPENAI_API_KEY": target.key, "OPENAI_BASE_URL": target.openai_url, "OPENAI_MODEL": target.model}
    files = {}
    if target.context_tokens:
        sizes = {"contextWindowSize": target.context_tokens}
        files["defaults.json"] = _json({"model": {"generationConfig": sizes}})
        environment |= {"QWEN_CODE_SYSTEM_DEFAULTS_PATH": str(folder / "defaults.json")}
    return Setup(("--auth-type", "openai", "--model", target.model), environment, files)


def continue_cli(target: Target, folder: pathlib.Path) -> Setup:
    """Return the settings of Continue's ``cn``: a configuration of its own, in JSON, which YAML includes."""
    model: dict[str, Any] = {
        "name": target.model,
        "provider": "openai",
        "model": target.model,
        "apiBase": target.openai_url,
        "apiKey": target.key,
        "roles": ["chat", "edit", "apply"],
        "capabilities": ["tool_use", *(["image_input"] if target.sees else [])],
    }
    if target.context_tokens:
        sizes = {"contextLength": target.context_tokens, "maxTokens": target.output_tokens}
        model["defaultCompletionOptions"] = sizes
    path = folder / "config.yaml"
    content = {"name": "cortex", "version": "0.0.1", "schema": "v1", "models": [model]}
    return Setup(("--config", str(path)), files={path.name: _json(content)})


AGENTS: Mapping[str, Agent] = {
    "claude": Agent("claude", "npm install -g @anthropic-ai/claude-code", claude),
    "codex": Agent("codex", "npm install -g @openai/codex", codex, "CODEX_CA_CERTIFICATE"),
    "opencode": Agent("opencode", "npm install -g opencode-ai", opencode),
    "aider": Agent("aider", "pipx install aider-chat", aider, "SSL_CERT_FILE"),
    "cline": Agent("cline", "npm install -g cline", cline),
    "continue": Agent("cn", "npm install -g @continuedev/cli", continue_cli),
    "pi": Agent("pi", "npm install -g @mariozechner/pi-coding-agent", pi),
    "qwen": Agent("qwen", "npm install -g @qwen-code/qwen-code", qwen),
}


def _modalities(target: Target) -> list[str]:
    return ["text", "image"] if target.sees else ["text"]


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
