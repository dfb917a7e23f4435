"""The progress of a load on standard error while its command waits: a line a change; on a terminal one that changes."""

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import orjson

from cortex import report
from cortex.gateway_client import LOOK_TIMEOUT_S, GatewayError, ask
from cortex.settings import ConfigError

INTERVAL_S = 1.0
"""Interval between two requests for the progress."""
ERASE_LINE = "\r\x1b[K"


@contextlib.contextmanager
def watched(options: argparse.Namespace, model: str) -> Iterator[None]:
    """Show the progress of the load of a model, by its id, during the block."""
    watcher = _Watcher(options, model)
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()


class _Watcher(threading.Thread):
    """A thread that asks for the progress. It ignores failed requests: the command itself reports them."""

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        super().__init__(daemon=True)
        self._options, self._model = options, model
        self._ended = threading.Event()
        self._last_line = ""
        self._is_terminal = sys.stderr.isatty()

    def run(self) -> None:
        """Request the progress once a second."""
        self._print(f"loading {self._model}")
        while not self._ended.wait(INTERVAL_S):
            with contextlib.suppress(GatewayError, ConfigError, ValueError, KeyError, TypeError):
                self._look(orjson.loads(ask(self._options, "GET", "/admin/fleet")))

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self.join(LOOK_TIMEOUT_S)
        if self._is_terminal and self._last_line:
            sys.stderr.write(ERASE_LINE)
            sys.stderr.flush()

    def _look(self, fleet: dict[str, Any]) -> None:
        for node in fleet["nodes"]:
            for model in node["models"]:
                if model["id"] == self._model and (model["state"] == "loading" or model.get("download_bytes")):
                    what = "loading" if model["state"] == "loading" else "downloading"
                    self._print(f"{what} {model['id']} on {node['name']}: {report.progress_of(model)}")

    def _print(self, line: str) -> None:
        if line == self._last_line or self._ended.is_set():
            return
        self._last_line, line = line, report.plain(line)
        sys.stderr.write(f"{ERASE_LINE}{line}" if self._is_terminal else f"{line}\n")
        sys.stderr.flush()
