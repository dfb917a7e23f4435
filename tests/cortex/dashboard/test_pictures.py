"""The pictures of docs/images: a small fleet under load, with a chat, and a month of use.

``make dashboard-pictures`` takes them.
"""

import asyncio
import contextlib
import datetime
import os
import pathlib
import threading
import time
from collections.abc import Iterator

import fleet
import httpx
import pytest
from browser import Page
from fleet import REAL, Gateway
from page_actions import act, load, open_row, row, send_chat

from cortex.store import usage
from cortex.store.sqlite import SqliteStore
from cortex.store.usage import DAY_S, UsageRow
from cortex.usage_recorder import day_of

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
        store = tmp_path / "responses.db"
        models = fleet.catalogue(tmp_path, smollm2_gguf)
        gateway = Gateway(tmp_path / "gateway", nodes, models, more=f'[store]\npath = "{store}"\n')
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


KEYS = {
    "alice": ({"requests_per_minute": 60, "tokens_per_window": 2_000_000}, LARGE, 3.0),
    "bob": ({"max_concurrent": 4, "models": [LARGE, REAL]}, LARGE, 1.4),
    "ci": ({"priority": -1, "models": [REAL]}, REAL, 5.5),
    "research@example.com": ({"expires_at": "2027-06-30T00:00:00Z", "balance_tokens": 500_000_000}, PINNED, 2.2),
    "root": ({"admin": True}, PINNED, 0.2),
}
"""Keys, with what each was made with, the model that it uses, and its share of the use."""


async def use_of_a_month(path: pathlib.Path) -> None:
    """Add use of the last 30 days to a gateway's store: less on weekends, growing, and with a quiet day."""
    store = SqliteStore(str(path), ttl_s=60, max_bytes=1 << 20)
    now, rows = time.time(), []
    for ago in range(30):
        at = now - ago * DAY_S
        day = day_of(at)
        weekend = 0.3 if datetime.date.fromisoformat(day).weekday() > 4 else 1.0
        for number, (name, (_, model, share)) in enumerate(KEYS.items()):
            tokens = int(share * weekend * (45 - ago) * (7000 + 1900 * ((ago * 7 + number * 5) % 11)))
            cost = tokens * 1.3e-6 if model == LARGE else 0.0
            last = at - (240.0 + 1000 * number if ago == 0 else 0.0)
            rows.append(UsageRow(day, name, model, tokens // 2100, tokens, tokens // 9, tokens // 2, cost, last))
    await usage.make(store, 400).add(rows)
    await store.close()


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


def test_picture_of_keys_and_use(page: Page, shown: Gateway, tmp_path: pathlib.Path) -> None:
    authorization = {"authorization": f"Bearer {shown.link.partition('=')[2]}"}
    for name, (fields, _, _) in KEYS.items():
        made = httpx.post(f"{shown.url}/admin/keys", json={"name": name, **fields}, headers=authorization)
        made.raise_for_status()
    asyncio.run(use_of_a_month(tmp_path / "responses.db"))
    page.go("about:blank")
    page.go(shown.link)
    page.until("document.querySelectorAll('#use-rows tr').length >= 5", what="the use is shown")
    page.until("document.getElementById('chat-model').length", what="the models are listed")
    page.size(1440, 900)
    take(page, "keys", "light", "document.getElementById('client-keys').scrollIntoView()")


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
    page.run("document.getElementById('chat-expand').click(); document.querySelector('.talk').scrollTop = 1e6")
    page.run("document.querySelector('.result').value = '19 degrees, light rain'")
    take(page, "playground", "light", "scrollTo(0, 0)")


def take(page: Page, name: str, scheme: str, place: str) -> None:
    page.prefer(scheme)
    page.run(f"document.getElementById('toasts').replaceChildren(); {place}")
    page.run("new Promise((resolve) => setTimeout(resolve, 400))")
    page.picture(PICTURES / f"dashboard-{name}.png")
