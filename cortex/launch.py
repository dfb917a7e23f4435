"""``cortex launch AGENT``: start a coding agent that uses a gateway's model, or print how to.

It picks the model, has :mod:`cortex.agents` make the settings, writes their files below the user's state directory and
replaces this process by the agent's. Words after ``--`` are the agent's own.
"""

import argparse
import os
import pathlib
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn, TypeVar
from urllib.parse import quote

import msgspec

from cortex import gateway_client, report
from cortex.agents import AGENTS, Setup, Target
from cortex.gateway_client import GatewayError
from cortex.settings import ConfigError, state_folder

NO_KEY = "none"
"""Key that is sent where there is none: most agents do not start without one, and a gateway without keys takes any."""
SHORT_CONTEXT_TOKENS = 16_384
"""Context below which an agent's own prompt and tools leave little room."""


T = TypeVar("T")


class ListedPricing(msgspec.Struct, frozen=True):
    """Prices of a token in US dollars, as text."""

    prompt: str = "0"
    completion: str = "0"


class ListedModel(msgspec.Struct, frozen=True):
    """A model as a gateway lists it, as far as it matters here."""

    id: str
    state: str = ""
    alias_of: str | None = None
    context_length: int | None = None
    capabilities: tuple[str, ...] = ()
    pricing: ListedPricing | None = None

    @property
    def chats(self) -> bool:
        """Whether it chats; of a model that no node has loaded this is not known."""
        return not self.capabilities or "chat" in self.capabilities


class ModelListing(msgspec.Struct, frozen=True):
    """A gateway's list of models."""

    data: tuple[ListedModel, ...]


class LaunchError(Exception):
    """The agent cannot be started; the message says what to do."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to a parser."""
    command = commands.add_parser(
        "launch", help="start a coding agent that uses the gateway", usage="%(prog)s [options] AGENT [-- ARGUMENT ...]"
    )
    command.add_argument("agent", metavar="AGENT", help=f"{', '.join(AGENTS)}")
    command.add_argument("--model", help="a model or an alias (default: the one that is loaded, or the only one)")
    command.add_argument("--small-model", metavar="MODEL", help="model of its side requests (default: the same)")
    command.add_argument("--print", action="store_true", dest="prints", help="print a script that starts it")
    gateway_client.add_options(command)
    command.set_defaults(run=main)


def split_words(arguments: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
    """Return the command's own words, and the agent's after ``--``, which argparse would take for its own."""
    if list(arguments[:1]) != ["launch"] or "--" not in arguments:
        return arguments, ()
    at = arguments.index("--")
    return arguments[:at], tuple(arguments[at + 1 :])


def main(options: argparse.Namespace) -> int:
    """Start the agent, or print how to; ``options.words`` are for it.

    Raises:
        LaunchError: it is not known, not installed, or there is no model for it.
        GatewayError: no gateway answers, or it refuses.
        ConfigError: the configuration is wrong.
    """
    agent = AGENTS.get(options.agent)
    if agent is None:
        raise LaunchError(f"{options.agent!r} is no agent that cortex knows: {', '.join(AGENTS)}")
    program = shutil.which(agent.program)
    if program is None and not options.prints:
        raise LaunchError(f"{agent.program} is not installed, or not in $PATH: {agent.install}")
    target = _target(options)
    base = state_folder(os.environ)
    if base is None:
        raise ConfigError("$HOME", "", "is not set: there is no folder for the agent's settings")
    folder = base / "launch" / options.agent
    setup = agent.setup(target, folder)
    environment = dict(setup.environment)
    if options.ca_file:
        environment[agent.ca_variable] = str(pathlib.Path(options.ca_file).absolute())
    words = [agent.program, *setup.arguments, *options.words]
    if program is None or options.prints:
        sys.stdout.write(script(words, environment, setup, folder))
        return 0
    _write(setup, folder)
    return _replace(program, words, environment)


def script(words: Sequence[str], environment: dict[str, str], setup: Setup, folder: pathlib.Path) -> str:
    """Return a shell script that does what the command would."""
    lines = ["umask 077"] if setup.files else []
    for name, content in setup.files.items():
        path = folder / name
        lines += [
            f"mkdir -p {shlex.quote(str(path.parent))}",
            f"cat > {shlex.quote(str(path))} <<'END'\n{content}END",
        ]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*lines, shlex.join(words)]) + "\n"


def _target(options: argparse.Namespace) -> Target:
    """Return the gateway and the model that the agent will use, and tell the user."""
    key = gateway_client.key_of(options) or NO_KEY
    model = _choose(options, key) if options.model is None else _find(options, options.model, key)
    small = model if options.small_model is None else _find(options, options.small_model, key)
    url = gateway_client.url_of_gateway(options).rstrip("/")
    prices = model.pricing or ListedPricing()
    target = Target(
        url,
        key,
        model.id,
        small.id,
        context_tokens=model.context_length or 0,
        input_price=_of_million(prices.prompt),
        output_price=_of_million(prices.completion),
        sees="vision" in model.capabilities,
        reasons="reasoning" in model.capabilities,
    )
    later = "" if model.state == "ready" else "; it is loaded when the first request comes"
    context = f", a context of {target.context_tokens} tokens" if target.context_tokens else ""
    _tell(f"{options.agent} uses {target.model} at {url}{context}{later}")
    if 0 < target.context_tokens < SHORT_CONTEXT_TOKENS:
        _tell(f"that is short for an agent: {SHORT_CONTEXT_TOKENS} and more are usual (context_tokens of the model)")
    return target


def _choose(options: argparse.Namespace, key: str) -> ListedModel:
    """Return the model that is loaded, or the only one."""
    models = [model for model in _listed(options, key) if not model.alias_of and model.chats]
    ready = [model for model in models if model.state == "ready"]
    if not models:
        raise LaunchError("the gateway offers no model that chats: `cortex run MODEL` adds one, or models.toml")
    best = ready or models
    if len(best) > 1:
        names = report.plain(", ".join(model.id for model in best))
        raise LaunchError(f"the gateway has several models{' loaded' if ready else ''}: {names}; name one with --model")
    return best[0]


def _find(options: argparse.Namespace, name: str, key: str) -> ListedModel:
    """Return a model by its id or alias."""
    try:
        return _ask(options, f"/v1/models/{quote(name, safe='')}", key, ListedModel)
    except GatewayError as error:
        if error.status != 404:
            raise
    names = report.plain(", ".join(model.id for model in _listed(options, key))) or "none"
    raise LaunchError(f"the gateway has no model {name!r}; it has: {names}")


def _listed(options: argparse.Namespace, key: str) -> tuple[ListedModel, ...]:
    return _ask(options, "/v1/models", key, ModelListing).data


def _ask(options: argparse.Namespace, path: str, key: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(gateway_client.ask(options, "GET", path, key=key), type=kind)
    except msgspec.MsgspecError:
        raise GatewayError(gateway_client.STRANGER) from None
    except GatewayError as error:
        if error.status != 401:
            raise
        where = f"--key-file or ${gateway_client.KEY_VARIABLE}"
        raise GatewayError(f"the gateway needs a key, or another one: give it by {where} ({error})", 401) from None


def _of_million(price: str) -> float:
    """Return the price of a million tokens, given that of one."""
    with gateway_client.of_gateway():
        return round(float(price) * 1e6, 9)


def _write(setup: Setup, folder: pathlib.Path) -> None:
    """Write the settings' files, which may hold the key, for the user alone."""
    try:
        for name, content in setup.files.items():
            path = folder / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            draft.touch(mode=0o600)
            draft.write_text(content)
            draft.replace(path)
    except OSError as error:
        raise LaunchError(f"the agent's settings cannot be written to {folder}: {error.strerror or error}") from None


def _replace(program: str, words: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """Become the agent: the terminal, its signals and the exit status are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, list(words), {**os.environ, **environment})
    except OSError as error:
        raise LaunchError(f"{program} does not start: {error.strerror or error}") from None


def _tell(line: str) -> None:
    sys.stderr.write(f"cortex: {report.plain(line)}\n")
