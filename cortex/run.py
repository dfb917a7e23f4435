"""``cortex run MODEL [PROMPT]``: choose where a model fits, load it there, and chat with it or print one answer.

The answer goes to standard output, all else to standard error. Where no gateway runs and none is configured, both
daemons are started on this machine for the time of the command.
"""

import argparse
import contextlib
import os
import stat
import sys
import time

import orjson

from cortex import config, gateway_client, preparation
from cortex.chat import DIM, PLAIN, Chat, history, print_answer
from cortex.chat_client import Answer, Conversation, parse_setting
from cortex.gateway_client import GatewayError
from cortex.settings import ConfigError, state_folder

EXIT_INTERRUPTED = 130
HISTORY = "chat_history"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to a parser."""
    run = commands.add_parser("run", help="chat with a model, choosing and loading it if need be")
    gateway_client.add_options(run)
    preparation.add_arguments(run)
    run.add_argument("prompt", nargs="*", help="print one answer to this; standard input is added to it")
    run.set_defaults(rest="prompt")
    run.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter, e.g. temperature=0.2"
    )
    run.add_argument(
        "--text", action="store_true", help="continue the prompt as a text, also with a model that can chat"
    )
    run.add_argument("--json", action="store_true", help="print the answer with its figures as JSON")
    run.add_argument("--no-start", action="store_true", help="start no daemons where none run")
    run.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    settings = dict(_setting(text) for text in options.set)
    question = _question(options.prompt)
    if options.json and question is None:
        raise ConfigError("--json", "", "is for one answer: give a prompt, or pipe one in")
    with gateway_client.reasons_alone(), contextlib.ExitStack() as stack:
        start_if_needed(options, stack)
        conversation = Conversation(
            options, preparation.prepare(options, options.model), options.system, is_text=options.text
        )
        conversation.settings = settings
        if question is not None:
            return _answer_once(conversation, question, as_json=options.json)
        folder = state_folder(os.environ)
        with history(None if folder is None else folder / HISTORY):
            Chat(conversation, lambda name: preparation.prepare(_of_other_model(options), name)).run()
    return 0


def _of_other_model(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options of a load without what they say about the first model."""
    return argparse.Namespace(**{**vars(options), "context": 0, "id": "", "node": ""})


def _setting(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        return name, parse_setting(name, value)
    except ValueError as error:
        raise ConfigError("--set", "", str(error)) from None


def _question(words: list[str]) -> str | None:
    """Return the prompt with what is piped in; ``None`` for a chat."""
    parts = [" ".join(words)] if words else []
    if _is_piped():
        parts.append(sys.stdin.buffer.read().decode(errors="replace").strip())
        if not any(parts):
            raise ConfigError("standard input", "", "is empty, and there is no prompt: type one after the model")
    return "\n\n".join(part for part in parts if part) or None


def _is_piped() -> bool:
    """Return whether standard input is a pipe or a file: others may never end."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _answer_once(conversation: Conversation, question: str, *, as_json: bool) -> int:
    answer = Answer()
    pieces = conversation.ask(question, answer)
    try:
        if as_json:
            for _ in pieces:
                pass
        else:
            print_answer(pieces, sys.stdout)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if as_json:
        sys.stdout.buffer.write(orjson.dumps(_report(conversation.model, answer)) + b"\n")
    elif sys.stderr.isatty():
        sys.stderr.write(f"{DIM}{answer.summary()}{PLAIN}\n")
    return 0


def _report(model: str, answer: Answer) -> dict[str, object]:
    return {
        "model": model,
        "content": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "usage": answer.usage,
        "ttft_s": round(answer.ttft_s, 4),
        "tokens_per_s": round(answer.tokens_per_s, 2),
    }


def start_if_needed(options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Start both daemons until ``stack`` closes, and set ``options.url``, where no gateway runs and none is configured.

    Raises:
        GatewayError: there is none, and it is not for this command to start one.
    """
    try:
        gateway_client.ask(options, "GET", "/health")
    except GatewayError as error:
        is_configured = options.url or options.config or config.find(os.environ) is not None
        if error.status or is_configured or options.no_start:
            raise
        url = gateway_client.url_of_gateway(options)
        if not _agrees(f"No gateway answers at {url}. Start one here, with a neuron, while this command runs?"):
            raise
    else:
        return
    from cortex.local_daemons import local_daemons

    folder = state_folder(os.environ)
    if folder is None:
        raise GatewayError(
            "$HOME is not set: there is no place for the files of daemons; start `neuron` and `cortex serve`"
        )
    preparation.say("starting a neuron and a gateway on this machine")
    began = time.monotonic()
    options.url = stack.enter_context(local_daemons(folder, uses_neuron=True)).url
    preparation.say(
        f"started in {time.monotonic() - began:.0f} s at {options.url}. They end with this command; to keep them, run "
        "`neuron` and `cortex serve`, or install them as services (docs/operating.md)."
    )


def _agrees(question: str) -> bool:
    """Return whether the person at the terminal agrees; a script is not asked."""
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        return True
    sys.stderr.write(f"{question} [Y/n] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"", "y", "yes"}
