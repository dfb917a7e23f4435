"""A headless Chromium, driven over its own protocol: real clicks and keys, and its console messages and requests.

Debian's package is enough; nothing is downloaded.
"""

import base64
import contextlib
import itertools
import json
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowDown": 40, " ": 32}


class PageError(AssertionError):
    """A script failed in the page, or the browser refused."""


class Page:
    """Tab. ``complaints`` are its errors and warnings, ``requests`` the addresses of its requests."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.received_bytes = 0
        """Bytes of bodies, as they arrived."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> Any:
        """Send one command and return its result."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=60))
            if message.get("id") == number:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._record(message)

    def _record(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if params["type"] in {"error", "warning", "assert"}:
                self.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in {"error", "warning"}:
                self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Network.dataReceived":
                self.received_bytes += params["dataLength"]

    def go(self, url: str) -> None:
        """Open an address."""
        self.command("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Return the value of an expression, which may be a promise."""
        params = self.command("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in params:
            details = params["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description") or details["text"])
        return params["result"].get("value")

    def until(self, script: str, timeout_s: float = 20, what: str = "") -> Any:
        """Wait until an expression is true, and return it."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(PageError):
                if found := self.run(script):
                    return found
            assert time.monotonic() < deadline, (
                f"not within {timeout_s} s: {what or script}\n{self.text('body')[:3000]}"
            )
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Return what is written in an element, as it is shown."""
        found = self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        return str(found)

    def click(self, selector: str) -> None:
        """Click in the middle of an element, which must be there, shown, and not covered."""
        quoted = json.dumps(selector)
        box = self.until(
            f"(() => {{ const e = document.querySelector({quoted}); if (!e || e.hidden) return null;"
            "e.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect(); const x = b.x + b.width / 2, y = b.y + b.height / 2;"
            "return b.width && e.contains(document.elementFromPoint(x, y)) ? {x, y} : null; })()",
            what=f"{selector} can be clicked",
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **box)

    def type(self, words: str) -> None:
        """Write into what has the focus."""
        self.command("Input.insertText", text=words)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key: a name of ``KEYS``, or a character."""
        written = "\r" if key == "Enter" else key if len(key) == 1 else None
        code = KEYS.get(key) or ord(key.upper())
        event: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.command("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": written} if written else {}))
        self.command("Input.dispatchKeyEvent", type="keyUp", **event)

    def size(self, width: int, height: int, scale: float = 1, *, mobile: bool = False) -> None:
        """Give the window a size."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def prefer(self, scheme: str) -> None:
        """Have the system prefer a light or a dark scheme."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: pathlib.Path) -> None:
        """Write what is seen now as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def page(folder: pathlib.Path) -> Iterator[Page]:
    """Run a browser with one empty tab; skip where there is none."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(PROGRAMS)}")
    profile = folder / "profile"
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        port = _port(profile / "DevToolsActivePort", process, folder / "browser.log")
        tabs = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(
            address, max_size=None, max_queue=None, compression=None, open_timeout=30, ping_interval=None
        ) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(file: pathlib.Path, process: "subprocess.Popen[bytes]", log: pathlib.Path) -> int:
    deadline = time.monotonic() + 60
    while True:
        if file.exists() and len(lines := file.read_text().splitlines()) == 2:
            return int(lines[0])
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, "the browser did not come up"
        time.sleep(0.05)
