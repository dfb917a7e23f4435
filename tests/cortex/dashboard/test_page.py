"""The page in a real browser, in front of real daemons: two on the CPU, one that plays scripts, some with fake GPUs.

Run by ``make test-dashboard``.
"""

import itertools
import json
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import daemons
import httpx
import pytest
from browser import Page
from fleet import REAL, Gateway, polled
from page_actions import act, card, confirm, load, open_row, placed, row, send_chat
from scripted_model import describe

from cortex.access.keys import new_key

pytestmark = pytest.mark.dashboard

ROOT = pathlib.Path(__file__).parents[3]
AXE = ROOT / "build/dashboard/node_modules/axe-core/axe.min.js"
SLOW = "Qwen3-32B"


def state_on(url: str, model: str) -> dict[str, Any]:
    listed = httpx.get(f"{url}/models").json()["models"]
    return next((status for status in listed if status["id"] == model), {"state": "available"})


RECORD_TEXTS = """(selector) => {
  window.texts = [];
  const look = () => {
    const text = document.querySelector(selector)?.textContent ?? "";
    if (text !== window.texts.at(-1)) window.texts.push(text);
  };
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
  look();
}"""


def watch_text(page: Page, selector: str) -> Callable[[], list[str]]:
    """Record every text that an element has from now on."""
    page.run(f"({RECORD_TEXTS})({json.dumps(selector)})")
    return lambda: list(page.run("window.texts"))


def set_value(page: Page, element: str, value: str) -> None:
    page.run(f"document.getElementById({json.dumps(element)}).value = {json.dumps(value)}")


def reload(page: Page) -> None:
    """Load the page anew, and wait until it is live; the one before is live until it is gone."""
    page.run("window.isOld = true; location.reload()")
    page.until("!window.isOld && document.getElementById('link')?.dataset.state === 'live'", what="it is live again")


# ------------------------------------------------------------------ actions of an administrator


def test_a_load_is_seen_to_progress_and_finish(opened: Page, nodes: dict[str, str]) -> None:
    noted = watch_text(opened, f"{row(SLOW)} .pill")
    load(opened, SLOW)
    seen = noted()
    steps = [int(found[1]) for text in seen if (found := re.fullmatch(r"loading (\d+) %", text))]
    assert seen[0] == "available"
    assert seen[-1] == "ready"
    assert len(steps) >= 3, seen
    assert steps == sorted(steps)
    assert opened.run(f"document.querySelector('{row(SLOW)} .meter').hidden")
    # And a real one, from a real file, on a real CPU.
    load(opened, REAL)
    assert state_on(nodes["cpu-1"], REAL)["state"] == "ready"
    assert "cpu-1" in opened.text(f"{row(REAL)} td:nth-child(3)")
    opened.until("[...document.querySelectorAll('.toast')].some((t) => t.textContent.includes('is ready'))")


def test_a_model_is_loaded_on_a_second_node_pinned_and_unloaded(opened: Page, nodes: dict[str, str]) -> None:
    load(opened, REAL)
    open_row(opened, REAL)
    opened.until(f"[...document.querySelectorAll('{row(REAL)} + tr.detail option')].some((o) => o.value === 'cpu-2')")
    opened.run(f"document.querySelector('{row(REAL)} + tr.detail select').value = 'cpu-2'")
    act(opened, f"{row(REAL)} + tr.detail .more", "Load there")
    pill = f"document.querySelector('{placed(REAL, 'cpu-2')} .pill')?.textContent"
    opened.until(f"{pill} === 'ready'", 60)

    act(opened, placed(REAL, "cpu-2"), "Pin")
    opened.until(f"document.querySelector('{row(REAL)}').textContent.includes('cpu-2 pinned')")
    assert state_on(nodes["cpu-2"], REAL)["pinned"]
    act(opened, placed(REAL, "cpu-2"), "Unpin")
    opened.until(f"!document.querySelector('{row(REAL)}').textContent.includes('pinned')")
    assert not state_on(nodes["cpu-2"], REAL)["pinned"]

    act(opened, placed(REAL, "cpu-2"), "Unload")
    opened.until("document.getElementById('ask').open")
    opened.press("Escape")
    assert state_on(nodes["cpu-2"], REAL)["state"] == "ready", "Escape is no"
    act(opened, placed(REAL, "cpu-2"), "Unload")
    confirm(opened)
    opened.until(f"!document.querySelector('{placed(REAL, 'cpu-2')}')", 40)
    assert state_on(nodes["cpu-2"], REAL)["state"] == "available"
    assert state_on(nodes["cpu-1"], REAL)["state"] == "ready"


def test_a_node_is_drained_and_opened(opened: Page, nodes: dict[str, str]) -> None:
    act(opened, card("gpu-3"), "Drain")
    confirm(opened)
    opened.until(f"document.querySelector('{card('gpu-3')} .pill').textContent === 'draining'")
    assert httpx.get(f"{nodes['gpu-3']}/health").json()["state"] == "draining"
    opened.click("input[value=trouble] + span")
    opened.until("[...document.querySelectorAll('.card:not([hidden])')].map((c) => c.dataset.node).join() === 'gpu-3'")
    opened.click("#nodes input[value=all] + span")
    act(opened, card("gpu-3"), "Open")
    opened.until(f"document.querySelector('{card('gpu-3')} .pill').textContent === 'ready'")


def test_a_configuration_that_is_not_in_force_is_shown(opened: Page, gateway: Gateway, models: str) -> None:
    file = gateway.log.parent / "models.toml"
    file.write_text(models + "nonsense = 1\n")
    opened.until("document.getElementById('notice').textContent.includes('nonsense')")
    check_axe(opened)
    file.write_text(models)
    opened.until("document.getElementById('notice').hidden")


def test_a_nodes_refusal_is_shown(opened: Page) -> None:
    opened.run("import('/dashboard/acts.js').then((acts) => acts.load(document.createElement('button'), 'nobody', ''))")
    opened.until("document.querySelector('.toast.bad')?.textContent.includes('nobody')")
    # The browser itself logs a 404 that a script asked for.
    assert all("404" in complaint for complaint in opened.complaints)
    opened.complaints.clear()


def test_a_model_is_added_by_its_source_loaded_and_removed(opened: Page, folder: pathlib.Path) -> None:
    name = "Qwen3-4B.json"
    path = describe(folder, "Qwen3-4B", 9, 2.0)
    opened.click("#models-add")
    opened.until("document.querySelectorAll('#add-known option').length > 5", what="the known names")
    check_axe(opened)
    for wrong, why in (("smollm2-136m", "did you mean smollm2-135m"), (REAL, "in the catalogue already")):
        set_value(opened, "add-name", "")
        opened.click("#add-name")
        opened.type(wrong)
        opened.press("Enter")
        opened.until(f"document.getElementById('add-result').textContent.includes({json.dumps(why)})", what=why)
    assert opened.text("#add-yes") == "Load"
    assert all("404" in complaint for complaint in opened.complaints)
    opened.complaints.clear()
    set_value(opened, "add-name", "")
    opened.click("#add-name")
    opened.type(str(path))
    assert opened.text("#add-yes") == "Look"
    opened.press("Enter")
    opened.until("document.getElementById('add-yes').textContent === 'Add and load'", what="it fits")
    assert re.search(rf"{name} on gpu-\d \(cuda:\d\): .* of memory on each device", opened.text("#add-result"))
    assert opened.run("document.querySelectorAll('#add-passed li').length") >= 1, "nodes that cannot load it"
    noted = watch_text(opened, f"{row(name)} .pill")
    opened.press("Enter")
    opened.until("!document.getElementById('add-dialog').open")
    opened.until(f"document.querySelector('{row(name)} .pill')?.textContent === 'ready'", 30, "it is loaded")
    assert any(text.startswith("loading ") for text in noted())
    assert f"{name}:1" in send_chat(opened, name, "tokens=2")
    open_row(opened, name)
    act(opened, f"{row(name)} + tr.detail", "Remove")
    confirm(opened)
    opened.until(f"!document.querySelector('{row(name)}')", 30, "it is gone")
    open_row(opened, REAL)
    assert opened.run(f"[...document.querySelectorAll('{row(REAL)} + tr.detail button')].at(-1).hidden"), "not added"


# ------------------------------------------------------------------ chat


def test_a_real_answer_is_streamed(opened: Page) -> None:
    load(opened, REAL)
    opened.run("document.getElementById('chat-limit').value = 40")
    noted = watch_text(opened, ".message.assistant .text")
    answer = send_chat(opened, REAL, "Name three colours, please.")
    grown = [text for text in noted() if text]
    assert len(grown) > 3, "it came in pieces"
    assert all(after.startswith(before) for before, after in itertools.pairwise(grown))
    assert re.search(r"first token [\d.]+ m?s · [\d.]+ tokens/s · \d+ in", answer), answer
    # A second message has the first before it.
    assert "failed" not in send_chat(opened, REAL, "And three more.")
    assert opened.run("document.querySelectorAll('.message').length") == 4
    opened.until("document.querySelectorAll('#requests-rows tr').length >= 2")
    assert REAL in opened.text("#requests-rows tr")
    assert "colours" not in opened.text("#requests")
    opened.until("document.querySelector('#overview .value').textContent !== '0'", what="tokens are counted")


@pytest.mark.parametrize("dialect", [0, 1, 2])
def test_reasoning_and_calls_are_shown_in_every_dialect(opened: Page, dialect: int) -> None:
    opened.run("document.getElementById('chat-clear').click()")
    answer = send_chat(opened, "m", "think hard", dialect)
    assert 'So: "yes" ☃' in answer
    assert "Reasoning" in answer
    assert opened.run("[...document.querySelectorAll('.reasoning')].at(-1).textContent") == "I wonder.\n"
    offer_tools(opened)
    opened.run("document.getElementById('chat-clear').click()")
    answer = send_chat(opened, "m", "call it", dialect)
    assert "Looking." in answer
    assert "Calls weather" in answer
    assert json.loads(opened.text(".call pre")) == {"city": "Paris"}
    assert opened.run("document.activeElement.className") == "result"
    opened.type("19 degrees")
    opened.press("Enter")
    opened.until("document.querySelectorAll('.step').length === 2", what="a second step")
    assert answers(opened)[-1] == "It says 19 degrees"
    assert opened.text(".call pre.result") == "19 degrees"
    assert opened.run("document.activeElement.id") == "chat-text", "on to the next message"
    # The next message has the call and its result before it.
    assert "turns" in send_chat(opened, "m", "turns", dialect)
    wanted = "user:call it|assistant:Looking.|tool:19 degrees|assistant:It says 19 degrees|user:turns"
    assert answers(opened)[-1] == wanted
    offer_tools(opened, None)
    opened.run("document.getElementById('chat-clear').click()")


def offer_tools(page: Page, tools: list[dict[str, Any]] | None = [{}]) -> None:  # noqa: B006 - never changed
    """Fill in the field of the tools: the example, these, or none."""
    page.run("document.getElementById('chat-more').open = true")
    if tools == [{}]:
        page.click("#chat-example")
    else:
        set_value(page, "chat-tools", json.dumps(tools) if tools else "")
        page.run("document.getElementById('chat-tools').dispatchEvent(new Event('input', {bubbles: true}))")
    page.run("document.getElementById('chat-more').open = false")


@pytest.mark.parametrize("dialect", [0, 1, 2])
def test_parallel_calls_get_their_results_in_each_column(opened: Page, dialect: int) -> None:
    names = ("weather", "time")
    offer_tools(opened, [{"name": name, "parameters": {"properties": {"city": {"type": "string"}}}} for name in names])
    assert opened.run("document.getElementById('chat-tools-told').textContent") == "weather(city), time(city)"
    assert opened.text("#chat-set") == "tools"
    set_value(opened, "chat-other", "m")
    send_chat(opened, "m", "parallel", dialect)
    opened.until("document.querySelectorAll('.call').length === 4", what="two calls in two columns")
    assert opened.run("[...document.querySelectorAll('.call label')].map((l) => l.textContent).join()") == (
        "Result of weather,Result of time,Result of weather,Result of time"
    )
    check_axe(opened)
    opened.click(".call textarea")
    opened.type("sunny")
    opened.press("Enter")  # on to the second field
    opened.type("noon")
    opened.press("Enter")
    opened.until("document.querySelectorAll('.step').length === 3", what="the first column goes on")
    assert answers(opened) == ["", "It says noon", ""]
    # The other column's calls have no results: its history has none of them.
    assert "turns" in send_chat(opened, "m", "turns", dialect)
    sent = "user:parallel|assistant:|tool:sunny|tool:noon|assistant:It says noon|user:turns"
    assert answers(opened)[-2:] == [sent, "user:turns"]
    # Made again, the calls come with the results that they had.
    opened.run("document.getElementById('chat-clear').click()")
    set_value(opened, "chat-other", "")
    send_chat(opened, "m", "call it", dialect)
    opened.click(".call textarea")
    opened.type("windy")
    opened.click(".calls > button")
    opened.until("document.querySelectorAll('.step').length === 2")
    answers(opened)
    opened.click("#chat-again")
    opened.until("document.querySelector('.call textarea')?.value === 'windy'")
    offer_tools(opened, None)


@pytest.mark.parametrize("dialect", [0, 1, 2])
def test_the_use_of_tools_is_asked_for(opened: Page, dialect: int) -> None:
    offer_tools(opened)
    set_value(opened, "chat-choice", "required")
    assert "Calls weather" in send_chat(opened, "m", "forced", dialect)
    set_value(opened, "chat-choice", "")
    offer_tools(opened, None)


def test_the_playground_takes_the_whole_page(opened: Page) -> None:
    opened.run("document.activeElement.blur()")
    opened.press("p")
    assert opened.run("document.getElementById('fleet').offsetParent === null")
    assert opened.run("document.getElementById('chat-expand').ariaPressed") == "true"
    try:
        for width in (1440, 820, 390):
            opened.size(width, 844)
            assert opened.run("document.documentElement.scrollWidth") <= width
            check_axe(opened)
            send_chat(opened, "m", "think hard")
            assert opened.run("document.getElementById('talk').clientHeight") > 200
    finally:
        opened.size(1440, 900)
    opened.click("#chat-expand")
    assert opened.run("document.getElementById('fleet').offsetParent !== null")


def test_tools_and_schemas_are_checked_as_they_are_written(opened: Page) -> None:
    opened.run("document.getElementById('chat-more').open = true")
    opened.click("#chat-tools")
    opened.type('[{"description": "nameless"}]')
    assert opened.text("#chat-tools-told") == "A tool has no name."
    assert opened.run("document.getElementById('chat-tools').ariaInvalid") == "true"
    check_axe(opened)
    offer_tools(opened, None)
    assert opened.run("document.getElementById('chat-tools').ariaInvalid") is None


def test_a_model_that_is_not_loaded_is_loaded_for_an_answer(opened: Page) -> None:
    assert opened.text(f"{row('Gemma-3-27B')} .pill") == "available"
    opened.run("document.getElementById('chat-clear').click()")
    noted = watch_text(opened, ".message.assistant .cost")
    assert "Gemma-3-27B:2" in send_chat(opened, "Gemma-3-27B", "tokens=3")
    assert any(text.startswith("Loading the model, ") for text in noted())


def test_an_answer_can_be_stopped_and_an_error_is_shown(opened: Page) -> None:
    load(opened, SLOW)
    opened.run(f"document.getElementById('chat-model').value = {json.dumps(SLOW)}")
    opened.click("#chat-text")
    opened.type("tokens=500 pause=0.05")
    opened.press("Enter")
    opened.until("document.querySelector('.message.assistant .text')?.textContent.length > 20")
    opened.press("Escape")
    opened.until("document.querySelector('.message.assistant').dataset.done")
    assert "stopped" in opened.text(".message.assistant")
    opened.run("document.getElementById('chat-tools').value = '{'")
    opened.click("#chat-text")
    opened.type("Hi")
    opened.press("Enter")
    opened.until("document.querySelector('.toast.bad')?.textContent.includes('not JSON')")


def answers(page: Page) -> list[str]:
    page.until("[...document.querySelectorAll('.message.assistant')].every((answer) => answer.dataset.done)", 60)
    return list(page.run("[...document.querySelectorAll('.message.assistant .text')].map((text) => text.textContent)"))


def test_two_models_answer_side_by_side_and_each_has_its_own_history(opened: Page) -> None:
    load(opened, SLOW)
    set_value(opened, "chat-other", SLOW)
    send_chat(opened, "m", "tokens=2")
    assert answers(opened) == ["Hello", f"{SLOW}:0 {SLOW}:1 "]
    left, right = opened.run(
        "[...document.querySelectorAll('.message.assistant')].map((answer) => answer.getBoundingClientRect().top)"
    )
    assert left == right
    set_value(opened, "chat-other", "")
    send_chat(opened, "m", "turns of it")
    assert answers(opened)[-1] == "user:tokens=2|assistant:Hello|user:turns of it"
    assert opened.run("[...document.querySelectorAll('.assistant h3')].map((h) => h.textContent)") == ["m", SLOW, "m"]


def test_an_answer_and_a_request_have_their_cost(opened: Page) -> None:
    load(opened, SLOW)
    assert "100 in, 20 out · $0.00018 · stop" in send_chat(opened, SLOW, "prompt=100 tokens=20")
    opened.until("document.querySelector('#requests-rows tr')?.textContent.includes('$0.00018')")
    assert "$" not in send_chat(opened, "m", "hi"), "a model without prices"


def test_an_answer_is_made_again_with_changed_settings(opened: Page) -> None:
    send_chat(opened, "m", "tokens first")
    send_chat(opened, "m", "turns second")
    wanted = "user:tokens first|assistant:tokens first|user:turns second"
    assert answers(opened) == ["tokens first", wanted]
    set_value(opened, "chat-system", "Be brief.")
    opened.click("#chat-again")
    opened.until("[...document.querySelectorAll('.assistant .text')].at(-1).textContent.startsWith('system')")
    assert answers(opened) == ["tokens first", f"system:Be brief.|{wanted}"]
    send_chat(opened, "m", "fail now")
    assert "failed" in send_chat(opened, "m", "fail now")
    set_value(opened, "chat-system", "")
    assert send_chat(opened, "m", "turns last").startswith("m\nuser:tokens first"), "without those that failed"


@pytest.mark.parametrize("dialect", [0, 1, 2])
def test_an_answer_is_held_to_a_schema_and_its_request_is_code(
    opened: Page, dialect: int, tmp_path: pathlib.Path
) -> None:
    opened.run("document.querySelector('.chat-more').open = true")
    opened.click("#chat-schema-example")
    opened.run("document.querySelector('.chat-more').open = false")
    set_value(opened, "chat-top-p", "0.9")
    set_value(opened, "chat-system", "It's 'quoted', \\ and \"so on\".")
    assert '{"city":"Paris"}' in send_chat(opened, "m", "json please", dialect)
    opened.click("#chat-code")
    opened.until("document.getElementById('code-dialog').open")
    found = {}
    for kind in ("curl", "Python"):
        set_value(opened, "code-kind", kind)
        opened.run("document.getElementById('code-kind').dispatchEvent(new Event('change'))")
        found[kind] = str(opened.run("document.getElementById('code-text').value"))
    (tmp_path / "try.py").write_text(found["Python"])
    for command in (["/bin/sh", "-c", found["curl"]], [sys.executable, str(tmp_path / "try.py")]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout
    assert "sk-" not in "".join(found.values())
    check_axe(opened)
    opened.press("Escape")
    set_value(opened, "chat-schema", "[")
    opened.click("#chat-text")
    opened.type("Hi")
    opened.press("Enter")
    opened.until("document.querySelector('.toast.bad')?.textContent.includes('The schema is not JSON')")


# ------------------------------------------------------------------ requests and the log


def test_a_request_has_its_fields_and_its_lines_in_the_log(opened: Page) -> None:
    first = "document.querySelector('#requests-rows tr')?.title ?? ''"
    before = opened.run(first)
    send_chat(opened, "m", "hi there")
    opened.until(f"({first}) !== {json.dumps(before)}", what="the request is listed")
    opened.click("#requests-rows .link")
    opened.until("document.getElementById('request-dialog').open")
    shown = opened.text("#request-fields")
    assert "openai-chat" in shown
    assert "scripted" in shown
    check_axe(opened)
    id = opened.run("document.querySelector('#requests-rows tr').title")
    opened.until("!document.getElementById('request-log').hidden")
    opened.click("#request-log")
    assert opened.run("document.activeElement.id") == "log-filter"
    lines = "[...document.querySelectorAll('#log-rows li')].map((line) => line.textContent)"
    found = opened.run(lines)
    assert found
    assert all(id in line for line in found)
    assert "hi there" not in opened.text("#log")
    set_value(opened, "log-filter", "")
    opened.run("document.getElementById('log-filter').dispatchEvent(new Event('input'))")
    assert len(opened.run(lines)) > len(found)
    opened.click("input[name=level][value=error] + span")
    assert opened.run("[...document.querySelectorAll('#log-rows li')].every((line) => line.dataset.level === 'error')")
    opened.click("input[name=level][value=debug] + span")
    check_axe(opened)


# ------------------------------------------------------------------ keys and use


@pytest.fixture
def keyed(page: Page, folder: pathlib.Path, nodes: dict[str, str], models: str) -> Iterator[Gateway]:
    """A gateway of its own, without a key yet, and the page before it."""
    place = folder / "keyed"
    gateway = Gateway(place, nodes, models, more=f'[store]\npath = "{place}/responses.db"\n')
    with gateway.running():
        page.complaints.clear()
        page.go("about:blank")
        page.go(gateway.link)
        page.until("document.getElementById('link')?.dataset.state === 'live'", what="the feed is live")
        yield gateway
        page.go("about:blank")  # before the gateway goes
        assert not page.complaints


def test_a_key_is_made_used_and_revoked(page: Page, keyed: Gateway) -> None:
    def chat(key: str = "", model: str = "m", words: str = "hi") -> int:
        body = {"model": model, "messages": [{"role": "user", "content": words}]}
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.post(f"{keyed.url}/v1/chat/completions", json=body, headers=headers, timeout=60).status_code

    page.until("!document.getElementById('client-keys-empty').hidden")
    assert "From the first key on" in page.text("#client-keys")
    assert chat() == 200
    # Made by keyboard alone.
    page.run("document.getElementById('new-key').focus()")
    page.press("Enter")
    page.until("document.activeElement.id === 'new-key-name'")
    assert "This is the first key" in page.text("#new-key-dialog")
    page.type("alice")
    set_value(page, "new-key-expires", "30")
    page.run("document.querySelector('.new-key-more').open = true")
    set_value(page, "new-key-requests_per_minute", "60")
    check_axe(page)
    page.press("Enter")
    page.until("document.getElementById('made-key-dialog').open", what="the key is shown")
    key = str(page.run("document.getElementById('made-key').value"))
    assert key.startswith("sk-cortex-")
    check_axe(page)
    page.press("Escape")
    page.until("!document.getElementById('made-key-dialog').open")
    everything = "document.getElementById('made-key').value + document.documentElement.outerHTML"
    assert key not in page.run(f"{everything} + JSON.stringify([{{...sessionStorage}}, {{...localStorage}}])")

    assert chat() == 401, "from the first key on"
    assert chat(key) == 200
    assert chat(key, SLOW, "prompt=100 tokens=20") == 200
    seen = "document.dispatchEvent(new Event('visibilitychange'))"  # instead of the next seconds
    cells = "[...document.querySelectorAll('#client-keys-rows tr')].map((row) => row.innerText)"
    page.until(f"{seen}, {cells}.some((row) => row.includes('alice') && row.includes('just now'))", what="its last use")
    assert "2 / 60" in page.text("#client-keys-rows")
    assert "until" in page.text("#client-keys-rows")
    page.until(f"{seen}, document.getElementById('use-rows').innerText.includes('$0.00018')", what="its use")
    assert "alice" in page.text("#use-rows")
    assert "no key" in page.text("#use-rows"), "the request before the first key"
    page.click("input[name=use-by][value=model] + span")
    page.until(f"document.getElementById('use-rows').innerText.includes('{SLOW}')")
    page.click("input[name=use-by][value=day] + span")
    page.until("/^2\\d{3}-/.test(document.getElementById('use-rows').innerText)")
    assert page.run("document.querySelectorAll('#use-rows tr').length") == 1
    assert page.run("document.querySelectorAll('#use-bars .day').length") == 30
    assert page.run("[...document.querySelectorAll('#use-bars .day')].at(-1).textContent") == ""
    assert page.run("document.querySelector('#use-bars .day:last-child .in').getBoundingClientRect().height") > 5
    for width in (390, 1440):
        page.size(width, 900)
        assert page.run("document.documentElement.scrollWidth") <= width
        check_axe(page)

    page.click('button[aria-label="Revoke alice"]')
    confirm(page)
    page.until(f"!{cells}.length", what="the key is gone")
    assert "every request is refused" in page.text("#client-keys")
    assert [chat(key), chat()] == [401, 401]
    page.click("#new-key")
    page.type("a b")
    page.run("document.getElementById('new-key-name').pattern = '.*'")  # as a browser without the check
    page.press("Enter")
    page.until("document.getElementById('new-key-fault').textContent.includes('name')", what="the refusal is shown")
    page.press("Escape")
    page.complaints[:] = [each for each in page.complaints if "status of 400" not in each]  # the browser's own line


# ------------------------------------------------------------------ capture


def test_requests_are_captured_shown_and_sent_again(opened: Page, tmp_path: pathlib.Path) -> None:
    load(opened, SLOW)
    opened.until("document.getElementById('capture-key').length === 2", what="the keys")
    opened.click("#capture-begin")
    opened.until("document.getElementById('ask').open")
    assert "Prompts and answers of everybody are kept" in opened.text("#ask-text")
    check_axe(opened)
    confirm(opened)
    opened.until(
        "document.getElementById('notice').textContent.includes('are captured until')", what="the page says so"
    )
    answer = send_chat(opened, "m", "it's captured")
    assert "Hello" in answer
    opened.until("!!document.querySelector('#capture-rows .link')", what="it is listed")
    opened.click("#capture-rows .link")
    opened.until("!document.getElementById('request-captured').hidden")
    assert json.loads(opened.run("document.getElementById('request-body').textContent"))["model"] == "m"
    assert opened.text("#request-answer") == "Hello"
    assert "scripted" in opened.text("#request-fields")
    assert "data: [DONE]" in opened.run("document.getElementById('request-events').textContent")
    check_axe(opened)
    curl = opened.run("document.getElementById('request-curl').textContent")
    done = subprocess.run(["/bin/sh", "-c", curl], capture_output=True, text=True, timeout=60, check=False)
    assert "[DONE]" in done.stdout
    opened.click("#request-replay")
    opened.until("document.getElementById('request-again').textContent === 'Hello'", what="the same again")
    set_value(opened, "request-model", SLOW)
    opened.click("#request-replay")
    opened.until(f"document.getElementById('request-again').textContent.startsWith('{SLOW}:0')", what="another model")
    opened.press("Escape")
    opened.click("#capture-end")
    opened.until("document.getElementById('notice').hidden", what="nothing more is captured")
    opened.click("#capture-remove")
    opened.until("document.getElementById('capture-list').hidden && document.getElementById('capture-remove').hidden")


# ------------------------------------------------------------------ the connection


def test_a_gateway_that_goes_and_comes_back_is_followed(opened: Page, gateway: Gateway) -> None:
    opened.run("window.sameDocument = true")
    began = time.monotonic()
    stopping = threading.Thread(target=gateway.stop)
    stopping.start()
    opened.until("document.getElementById('link').dataset.state === 'lost'", what="the loss is shown")
    stopping.join()
    assert time.monotonic() - began < 12, "an open page held up the gateway"
    assert opened.run("document.getElementById('fleet').classList.contains('stale')")
    assert opened.run("document.querySelectorAll('.card').length") == 6, "what was known stays"
    gateway.start()
    opened.until("document.getElementById('link').dataset.state === 'live'", 30, "the page is live again")
    assert opened.run("window.sameDocument")
    opened.until(f"!!document.querySelector('{row(REAL)}')")
    # The browser logs each failed connection; there may be no other error.
    expected = re.compile(r"net::ERR_|status of 503 ")
    assert all(expected.search(complaint) for complaint in opened.complaints), opened.complaints
    opened.complaints.clear()


def test_a_page_that_is_left_holds_no_connection(opened: Page, gateway: Gateway) -> None:
    """Of more than the six that a browser opens to a host: it keeps a page for the way back."""
    for _ in range(7):
        opened.go("about:blank")
        opened.go(gateway.link)
        opened.until("document.getElementById('link')?.dataset.state === 'live'", what="the feed is live")


def test_a_gateway_that_falls_silent_is_noticed(opened: Page, gateway: Gateway) -> None:
    with gateway.frozen():
        opened.until("document.getElementById('link').dataset.state === 'lost'", 30, "the silence is shown")
        assert "silent" in opened.run("document.getElementById('link').title")
    opened.until("document.getElementById('link').dataset.state === 'live'", 30)


# ------------------------------------------------------------------ keyboard, narrow screens, accessibility


def test_all_of_it_by_keyboard(opened: Page) -> None:
    opened.run("document.activeElement.blur()")
    opened.press("Tab")
    assert opened.run("document.activeElement.className") == "skip"
    opened.press("Enter")
    opened.until("location.hash === '#main'")
    opened.press("/")
    assert opened.run("document.activeElement.id") == "filter"
    opened.type("gpu-2")
    opened.until("document.querySelectorAll('.card:not([hidden])').length === 1")
    opened.run("document.getElementById('filter').select()")
    opened.type("nothing is called so")
    opened.until("!document.getElementById('nodes-empty').hidden && !document.getElementById('models-empty').hidden")
    opened.run("document.getElementById('filter').value = ''")
    opened.run("document.getElementById('filter').dispatchEvent(new Event('input'))")
    opened.press("Escape")
    assert opened.run("document.activeElement === document.body")
    opened.press("?")
    opened.until("document.getElementById('help-dialog').open")
    opened.press("Escape")
    opened.until("!document.getElementById('help-dialog').open")
    opened.press("c")
    assert opened.run("document.activeElement.id") == "chat-text"
    opened.press("Escape")
    # Users of speech input, or who lean on the keyboard, can switch single keys off.
    for are_on in (False, True):
        opened.run("document.getElementById('help').click(); document.getElementById('keys-on').click()")
        opened.press("Escape")
        opened.until("!document.getElementById('help-dialog').open")
        opened.press("c")
        assert opened.run("document.activeElement.id === 'chat-text'") == are_on
        opened.run("document.activeElement.blur()")
    # Every control can be reached, and shows where it is.
    reached = set()
    for _ in range(120):
        opened.press("Tab")
        reached.add(opened.run("document.activeElement.textContent.trim() || document.activeElement.id"))
    for wanted in ("Sign out", "Drain", "Load", "gpu-1", REAL, "Send", "Clear", "Expand", "filter"):
        assert wanted in reached, (wanted, reached)


def test_the_theme_follows_the_system_until_one_is_chosen(opened: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    opened.prefer("light")
    light = opened.run(background)
    opened.prefer("dark")
    dark = opened.run(background)
    assert light != dark
    opened.click("#theme")
    assert opened.run(background) == light
    reload(opened)
    assert opened.run("document.getElementById('theme').textContent") == "Theme: light"
    assert opened.run(background) == light
    opened.click("#theme")
    assert opened.run(background) == dark
    opened.click("#theme")
    assert opened.run("document.getElementById('theme').textContent") == "Theme: system"
    opened.prefer("light")
    assert opened.run(background) == light


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 1440), ("light", 390), ("dark", 820)])
def test_nothing_overflows_and_axe_finds_no_serious_fault(opened: Page, scheme: str, width: int) -> None:
    opened.size(width, 900)
    opened.prefer(scheme)
    try:
        load(opened, REAL)
        open_row(opened, REAL)
        opened.click(f"{card('cpu-1')} button.name")
        send_chat(opened, "m", "think", 0)
        assert opened.run("document.documentElement.scrollWidth") <= width
        check_axe(opened)
        opened.run("document.getElementById('help').click()")
        check_axe(opened)
        opened.press("Escape")
    finally:
        opened.size(1440, 900)
        opened.prefer("light")


RUN_AXE = """axe.run(document, {resultTypes: ["violations"]}).then((result) => result.violations.map((found) => (
  {id: found.id, impact: found.impact, nodes: found.nodes.map((node) => `${node.html} ${node.failureSummary}`)})))"""


def check_axe(page: Page) -> None:
    if not AXE.exists():
        pytest.skip(f"axe-core is not installed: {AXE} is not there; make test-dashboard fetches it")
    page.run(AXE.read_text() + ";0")
    found = page.run(RUN_AXE)
    serious = [fault for fault in found if fault["impact"] in {"serious", "critical"}]
    assert not serious, json.dumps(serious, indent=1)[:4000]


def test_axe_sees_a_fault_that_is_put_there(opened: Page) -> None:
    opened.run("document.getElementById('main').prepend(document.createElement('button'))")
    with pytest.raises(AssertionError, match="button-name"):
        check_axe(opened)


# ------------------------------------------------------------------ keys


def test_a_guest_sees_no_fleet_and_keys_open_it(
    page: Page, folder: pathlib.Path, nodes: dict[str, str], models: str
) -> None:
    (admin, admin_hash), (user, user_hash) = new_key(), new_key()
    keys = (
        f'[[keys]]\nname = "root"\nsha256 = "{admin_hash}"\nmodels = ["*"]\nadmin = true\n'
        f'[[keys]]\nname = "alice"\nsha256 = "{user_hash}"\nmodels = ["m"]\nrequests_per_minute = 60\n'
    )
    guarded = Gateway(folder / "guarded", nodes, models, keys)
    guarded.start()

    def sign_in(key: str) -> None:
        page.click("#sign")
        page.until("document.getElementById('key-dialog').open")
        page.type(key)
        page.press("Enter")

    try:
        page.go(guarded.url + "/")
        page.until("document.getElementById('link')?.dataset.state === 'refused'")
        assert "administrators" in page.text("#locked")
        assert page.run("document.querySelectorAll('.card').length") == 0
        check_axe(page)
        sign_in(user)
        page.until("document.getElementById('chat-model').length === 1", what="alice may use one model")
        assert page.run("document.getElementById('link').dataset.state") == "refused"
        assert 'So: "yes"' in send_chat(page, "m", "think")
        page.click("#sign")  # out
        page.until("document.getElementById('sign').textContent === 'Sign in'")
        sign_in(admin)
        page.until("document.getElementById('link').dataset.state === 'live'")
        page.until("document.querySelectorAll('.card').length === 6")
        assert admin not in page.run("JSON.stringify(localStorage)")
        assert page.run("sessionStorage.length") == 1
        assert page.run("document.cookie") == ""
        page.until(
            "document.querySelector('tr[data-key=alice]')?.textContent.includes('1 / 60')", what="her one request"
        )
        assert page.text("tr[data-key=root] .also") == "administrator"
        check_axe(page)
        reload(page)  # the tab keeps the key
        page.until("document.getElementById('requests').textContent.includes('alice')")
        assert admin not in page.run("document.documentElement.outerHTML")
        assert not any(admin in url or user in url for url in page.requests)
        page.click("#sign")
        page.until("document.getElementById('link').dataset.state === 'refused'")
        assert page.run("sessionStorage.length") == 0
        left = page.run("document.documentElement.textContent")
        assert "gpu-1" not in left, "nothing of the fleet stays in the page"
        assert "alice" not in left
    finally:
        page.go("about:blank")
        guarded.stop()
        page.complaints.clear()  # a browser logs each 401


# ------------------------------------------------------------------ a hundred nodes


def test_a_hundred_nodes_stay_smooth(page: Page, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.requests.clear()
    script = str(pathlib.Path(daemons.__file__).with_name("fake_node.py"))
    with subprocess.Popen([sys.executable, script, "100"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            many = json.loads(process.stdout.readline())
            gateway = Gateway(folder / "many", many, "", settings=polled(2.0))
            gateway.start()
            try:
                figures = measure(page, gateway.link)
            finally:
                page.go("about:blank")
                gateway.stop()
        finally:
            process.terminate()
    with capsys.disabled():
        print(
            "\n100 nodes, 800 devices, 500 placements: "
            + ", ".join(f"{key} {value:.1f}" for key, value in figures.items())
        )
    assert sum(url.endswith("/v1/models") for url in page.requests) <= 2, "the feed is the only thing that goes on"
    assert figures["feed kB/s"] < 80
    assert figures["update ms (median)"] < 25
    assert figures["frames/s"] > 20
    assert figures["browser busy %"] < 60


WATCH_FRAMES = """(() => {
  window.numFrames = 0;
  window.slowest = 0;
  const next = () => { window.numFrames += 1; requestAnimationFrame(next); };
  next();
  new PerformanceObserver((list) => {
    for (const task of list.getEntries()) window.slowest = Math.max(window.slowest, task.duration);
  }).observe({type: "longtask"});
  cortexTimings.length = 0;
})()"""


def measure(page: Page, url: str, duration_s: float = 15.0) -> dict[str, float]:
    """Watch a page for a while, and return what its feed and its updates cost."""
    page.go(url)
    page.until("document.querySelectorAll('.card').length === 100", 40)
    page.command("Performance.enable")
    page.run(WATCH_FRAMES)

    def spent_s() -> tuple[float, float]:
        figures = {entry["name"]: float(entry["value"]) for entry in page.command("Performance.getMetrics")["metrics"]}
        return figures["TaskDuration"], figures["LayoutDuration"] + figures["RecalcStyleDuration"]

    begun, before = time.monotonic(), spent_s()
    page.received_bytes = 0
    while time.monotonic() - begun < duration_s:
        page.run("new Promise((resolve) => setTimeout(resolve, 200))")
    elapsed_s, after = time.monotonic() - begun, spent_s()
    timings = sorted(page.run("cortexTimings"))
    assert len(timings) >= duration_s * 0.6, "a tick a second"
    return {
        "feed kB/s": page.received_bytes / elapsed_s / 1000,
        "update ms (median)": timings[len(timings) // 2],
        "update ms (most)": timings[-1],
        "layout ms/s": 1000 * (after[1] - before[1]) / elapsed_s,
        "browser busy %": 100 * (after[0] - before[0]) / elapsed_s,
        "longest task ms": page.run("window.slowest"),
        "frames/s": page.run("window.numFrames") / elapsed_s,
    }
