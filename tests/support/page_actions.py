"""Actions of a user on the dashboard's page."""

import json

from browser import Page


def row(model: str) -> str:
    return f'tr.model[data-model="{model}"]'


def placed(model: str, node: str) -> str:
    return f'{row(model)} + tr.detail tr[data-node="{node}"]'


def card(node: str) -> str:
    return f'.card[data-node="{node}"]'


def act(page: Page, scope: str, label: str) -> None:
    """Press the button with a label."""
    page.until(f"!!document.querySelector({json.dumps(scope)})", what=scope)
    page.run(
        f"[...document.querySelectorAll({json.dumps(scope + ' button')})]"
        f".forEach((b) => b.toggleAttribute('data-wanted', b.textContent === {json.dumps(label)} && !b.hidden))"
    )
    page.click(f"{scope} button[data-wanted]")


def open_row(page: Page, model: str) -> None:
    if page.run(f"document.querySelector('{row(model)} button.name').ariaExpanded") != "true":
        page.click(f"{row(model)} button.name")


def confirm(page: Page) -> None:
    """Confirm the dialog with the keyboard."""
    page.until("document.getElementById('ask').open")
    page.press("Tab")
    page.until("document.activeElement.id === 'ask-yes'")
    page.press("Enter")
    page.until("!document.getElementById('ask').open")


def load(page: Page, model: str, timeout_s: float = 60) -> None:
    page.until(f"!!document.querySelector('{row(model)}')")
    if page.text(f"{row(model)} .pill") != "ready":
        act(page, row(model), "Load")
        page.until(
            f"document.querySelector('{row(model)} .pill').textContent === 'ready'", timeout_s, f"{model} is ready"
        )


def send_chat(page: Page, model: str, words: str, dialect: int = 0) -> str:
    """Send a chat message and return the answer."""
    page.run(f"document.getElementById('chat-dialect').value = {dialect}")
    page.run(f"document.getElementById('chat-model').value = {json.dumps(model)}")
    page.click("#chat-text")
    page.type(words)
    page.press("Enter")
    page.until("[...document.querySelectorAll('.message.assistant')].at(-1)?.dataset.done", 60, "the answer has ended")
    found = page.run("(() => { const t = [...document.querySelectorAll('.message.assistant')].at(-1);"
                     "return t.dataset.done === 'yes' ? t.innerText : 'failed: ' + t.innerText; })()")  # fmt: skip
    return str(found)
