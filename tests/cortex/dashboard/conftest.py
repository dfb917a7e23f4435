"""Fixtures: one fleet and one browser for all tests of the page."""

import pathlib
from collections.abc import Iterator

import browser
import daemons
import fleet
import httpx
import pytest

WIDE = (1440, 900)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("dashboard")


@pytest.fixture(scope="session")
def page(folder: pathlib.Path) -> Iterator[browser.Page]:
    with browser.page(folder) as found:
        found.size(*WIDE)
        yield found


@pytest.fixture(scope="session")
def nodes(page: browser.Page, folder: pathlib.Path) -> Iterator[dict[str, str]]:
    with fleet.neurons(folder) as found:
        # Asked before that, its model would be loaded on another node, which plays no scenarios.
        daemons.until(lambda: has_workers(found["scripted"]), what="the scripted node's worker is ready")
        yield found


def has_workers(url: str) -> bool:
    workers = httpx.get(f"{url}/health").json()["workers"]
    return bool(workers) and all(worker["state"] == "ready" for worker in workers)


@pytest.fixture(scope="session")
def models(folder: pathlib.Path, smollm2_gguf: pathlib.Path) -> str:
    return fleet.catalogue(folder, smollm2_gguf)


@pytest.fixture(scope="session")
def gateway(folder: pathlib.Path, nodes: dict[str, str], models: str) -> Iterator[fleet.Gateway]:
    found = fleet.Gateway(folder / "gateway", nodes, models)
    with found.running():
        yield found


@pytest.fixture
def opened(page: browser.Page, gateway: fleet.Gateway) -> Iterator[browser.Page]:
    """The page, open and live; a test fails if the page logs an error or a warning."""
    page.complaints.clear()
    page.requests.clear()
    page.go("about:blank")  # the link differs from an open page by its fragment only, which loads nothing
    page.go(gateway.link)
    page.until("document.getElementById('link')?.dataset.state === 'live'", what="the feed is live")
    page.until("document.getElementById('chat-model').length", what="the models are listed")
    yield page
    assert not page.complaints
    foreign = [url for url in page.requests if not url.startswith(gateway.url + "/")]
    assert not foreign, "the page asked another host"
