"""``cortex capture`` in front of a running gateway."""

import json
import subprocess
from collections.abc import Iterator

import daemons
import httpx
import pytest

from cortex import cli


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("capture")
    with (
        daemons.scripted_neuron(folder) as neuron,
        daemons.cortex(folder, neuron, model=daemons.SCRIPTED_MODEL) as found,
    ):
        yield found.url


def run(url: str, capfd: pytest.CaptureFixture[str], *words: str, expected: int = 0) -> str:
    assert cli.main(["capture", *words, "--url", url]) == expected
    told = capfd.readouterr()
    return told.out if expected == 0 else told.err


def test_a_key_is_captured_printed_and_replayed(gateway: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "nothing is captured" in run(gateway, capfd)
    assert run(gateway, capfd, "begin", "", "--minutes", "1", "--size", "1").startswith("everybody: captured until ")
    body = {"model": "m", "messages": [{"role": "user", "content": "tokens it's"}]}
    httpx.post(f"{gateway}/v1/chat/completions", json=body).raise_for_status()
    daemons.until(lambda: "req_" in run(gateway, capfd))
    id = next(word for word in run(gateway, capfd).split() if word.startswith("req_"))
    shown = json.loads(run(gateway, capfd, "show", id))
    assert (json.loads(shown["body"]), shown["record"]["node"]) == (body, "n0")
    curl = run(gateway, capfd, "curl", id)
    done = subprocess.run(["/bin/sh", "-c", curl], capture_output=True, text=True, timeout=60, check=True)
    for answer in (done.stdout, run(gateway, capfd, "replay", id), run(gateway, capfd, "replay", id, "--model", "m")):
        assert json.loads(answer)["choices"][0]["message"]["content"] == "tokens it's"
    assert "no-such-model" in run(gateway, capfd, "replay", id, "--model", "no-such-model", expected=1)
    assert "ended: by local" in run(gateway, capfd, "end")
    assert "nothing is captured" in run(gateway, capfd, "rm")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["show"], "needs the id of a request"),
        (["begin"], "needs the name of a key"),
        (["end", "x"], "takes no name"),
    ],
)
def test_a_wrong_command_is_a_line(words: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert told in run("http://127.0.0.1:1", capfd, *words, expected=2)


def test_what_is_not_there_is_a_line(gateway: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "'req_x' is not captured" in run(gateway, capfd, "show", "req_x", expected=1)
    assert "There is no key 'nobody'" in run(gateway, capfd, "begin", "nobody", expected=1)
