"""The pictures of docs/images: a small fleet under load, with a chat. ``make dashboard-pictures`` takes them."""

import contextlib
import os
import pathlib
import threading
from collections.abc import Iterator

import fleet
import httpx
import pytest
from browser import Page
from fleet import REAL, Gateway
from page_actions import act, load, open_row, row, send_chat

ROOT = pathlib.Path(__file__).parents[3]
PICTURES = ROOT / "docs/images"
LARGE, PINNED, LOADING = "Qwen3-32B", "Llama-3.3-70B", "Gemma-3-27B"
TRAFFIC = (
    (REAL, "Tell me about the sea."),
    (LARGE, "prompt=1843 tokens=70 pause=0.02"),
    (LARGE, "prompt=412 tokens=45 pause=0.03"),
    (PINNED, "prompt=2207 tokens=60 pause=0.04"),
    (PINNED, "prompt=655 tokens=20 pause=0.02"),
)
"""Models, and the requests that one client each repeats."""
WARM_UP_S = 60.0
MAX_PICTURE_BYTES = 300_000

pytestmark = [
    pytest.mark.dashboard,
    pytest.mark.skipif(not os.environ.get("DASHBOARD_PICTURES"), reason="DASHBOARD_PICTURES=1 takes the pictures"),
]


@pytest.fixture
def shown(tmp_path: pathlib.Path, smollm2_gguf: pathlib.Path) -> Iterator[Gateway]:
    """A gateway before a fleet with nothing in it that only tests have."""
    with fleet.neurons(tmp_path, scripted=False) as nodes:
        gateway = Gateway(tmp_path / "gateway", nodes, fleet.catalogue(tmp_path, smollm2_gguf))
        with gateway.running():
            yield gateway


@contextlib.contextmanager
def traffic(gateway: Gateway) -> Iterator[threading.Event]:
    """Clients that send requests; the event ends them."""
    stop = threading.Event()

    def send(model: str, text: str) -> None:
        body = {"model": model, "stream": True, "max_tokens": 80, "messages": [{"role": "user", "content": text}]}
        while not stop.wait(0.4):
            with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, timeout=60) as reply:
                for _ in reply.iter_bytes():
                    pass

    threads = [threading.Thread(target=send, args=each) for each in TRAFFIC]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def set_value(page: Page, name: str, value: float) -> None:
    page.run(f"document.getElementById('{name}').value = {value}")


def test_pictures(page: Page, shown: Gateway) -> None:
    page.go(shown.link)
    page.until("document.getElementById('chat-model').length", what="the models are listed")
    for model in (REAL, LARGE, PINNED):
        load(page, model)
    authorization = {"authorization": f"Bearer {shown.link.partition('=')[2]}"}
    pinned = httpx.post(f"{shown.url}/admin/models/pin", json={"model": PINNED}, headers=authorization)
    pinned.raise_for_status()
    with traffic(shown) as stop:
        chat(page)
        stop.wait(WARM_UP_S)
        take_all(page)
    for file in PICTURES.glob("dashboard-*.png"):
        assert file.stat().st_size < MAX_PICTURE_BYTES, file


def chat(page: Page) -> None:
    set_value(page, "chat-limit", 60)
    set_value(page, "chat-temperature", 0)
    send_chat(page, REAL, "Name the capital of France.")
    send_chat(page, LARGE, "Is 2027 a prime number?")
    page.run("document.getElementById('chat-example').click()")
    send_chat(page, LARGE, "What is the weather in Paris?")


def take_all(page: Page) -> None:
    page.size(1440, 900)
    open_row(page, PINNED)
    act(page, row(LOADING), "Load")
    page.until("[...document.querySelectorAll('.pill')].some((p) => /loading [3-6]\\d/.test(p.textContent))", 30)
    # Paths of a temporary folder.
    page.run("document.activeElement.blur(); document.querySelectorAll('.source').forEach((e) => e.remove())")
    take(page, "light", "light", "scrollTo(0, 0)")
    take(page, "dark", "dark", "document.getElementById('nodes').scrollIntoView()")
    page.size(390, 844, 1.5, mobile=True)
    page.until(f"document.querySelector('{row(LOADING)} .pill').textContent === 'ready'")
    take(page, "narrow", "light", "scrollTo(0, 0)")
    page.size(1440, 900)


def take(page: Page, name: str, scheme: str, place: str) -> None:
    page.prefer(scheme)
    page.run(f"document.getElementById('toasts').replaceChildren(); {place}")
    page.run("new Promise((resolve) => setTimeout(resolve, 400))")
    page.picture(PICTURES / f"dashboard-{name}.png")
