"""A chat in the terminal: questions of one or several lines, answers as they come, and commands that begin with ``/``.

It reads lines and writes text; models and answers come from :mod:`cortex.chat_client`. Ctrl-C stops an answer, and
what has come of it stays in the conversation; Ctrl-D ends the chat.
"""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Final, TextIO

from cortex.chat_client import SETTINGS, Answer, Conversation, parse_setting
from cortex.gateway_client import GatewayError
from cortex.settings import ConfigError

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
PROMPT, MORE = ">>> ", "... "
FENCE: Final = '"""'
"""Mark before the first and after the last line of a question of several lines."""
MAX_HISTORY_LINES: Final = 1000
HELP: Final = f"""\
  {FENCE}          begins and ends a question of several lines; a \\ at the end of a line does for one
  /system TEXT   sets the system prompt; without a text, removes it
  /model NAME    changes to another model, and loads it if need be; without a name, tells the present one
  /set NAME VALUE   sets a parameter; without a value, takes it back; alone, lists those that are set
                 ({", ".join(SETTINGS)})
  /clear         begins a new conversation
  /help          prints this
  Ctrl-C stops an answer; Ctrl-D or /bye ends the chat."""


class Chat:
    """A chat with the person at a terminal."""

    def __init__(
        self,
        conversation: Conversation,
        prepare: Callable[[str], str],
        read_line: Callable[[str], str] = input,
        out: TextIO | None = None,
    ) -> None:
        """``prepare`` makes a model ready and returns its id."""
        self._conversation = conversation
        self._prepare = prepare
        self._read_line = read_line
        self._out = sys.stdout if out is None else out

    def run(self) -> None:
        """Read questions and print answers until the end of the input."""
        self._print(f"{self._conversation.model} (/help, Ctrl-D ends)")
        while True:
            try:
                question = self._read_question()
            except EOFError:
                self._print("")
                return
            except KeyboardInterrupt:  # takes back the line
                self._print("")
                continue
            if question == "/bye":
                return
            try:
                if question.startswith("/"):
                    self._command(question)
                elif question:
                    self._answer(question)
            except GatewayError as error:
                self._print(printable(error.reason))
            except (ConfigError, ValueError) as error:
                self._print(printable(str(error)))
            except KeyboardInterrupt:  # of a load: it goes on in its node
                self._print("")

    def _read_question(self) -> str:
        line = self._read_line(PROMPT)
        if line.lstrip().startswith(FENCE):
            return self._read_fenced(line.lstrip().removeprefix(FENCE))
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = self._read_line(MORE)
        return "\n".join([*lines, line]).strip()

    def _read_fenced(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(FENCE):
            lines.append(line)
            line = self._read_line(MORE)
        return "\n".join([*lines, line.rstrip().removesuffix(FENCE)]).strip()

    def _answer(self, question: str) -> None:
        answer = Answer()
        try:
            print_answer(self._conversation.ask(question, answer), self._out)
        except KeyboardInterrupt:
            self._print(f"{DIM}(stopped){PLAIN}")
            return
        self._print(f"{DIM}{answer.summary()}{_reason(answer)}{PLAIN}\n")

    def _command(self, line: str) -> None:
        """Carry out a command. Raises :class:`ValueError` for one that is none."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/help":
                self._print(HELP)
            case "/system":
                self._conversation.system = rest
            case "/clear":
                self._conversation.messages.clear()
            case "/model":
                if rest:
                    self._conversation.change(self._prepare(rest))
                self._print(self._conversation.model)
            case "/set":
                self._set(rest)
            case _:
                raise ValueError(f"there is no command {command}; /help has those there are")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        settings = self._conversation.settings
        if value.strip():
            settings[name] = parse_setting(name, value.strip())
        elif name in settings:
            del settings[name]
        elif name:
            raise ValueError(f"{name} is not set")
        for name, value_set in settings.items():
            self._print(f"  {name} = {value_set}")

    def _print(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def print_answer(pieces: Generator[tuple[str, str]], out: TextIO) -> None:
    """Print the pieces of an answer as they come: reasoning dimmed, and only on a terminal. Ends with a line end."""
    before, shows_reasoning = "", out.isatty()
    with contextlib.closing(pieces):
        try:
            for kind, piece in pieces:
                if kind == "reasoning" and not shows_reasoning:
                    continue
                if kind != before and shows_reasoning:
                    out.write(f"{DIM}" if kind == "reasoning" else f"{PLAIN}\n\n" if before else "")
                before = kind
                out.write(printable(piece))
                out.flush()
        finally:
            if before:
                out.write(f"{PLAIN}\n" if before == "reasoning" else "\n")
                out.flush()


def printable(text: str) -> str:
    """Return a model's text without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def _reason(answer: Answer) -> str:
    return ", cut off: it has as many tokens as it may" if answer.finish_reason == "length" else ""


@contextlib.contextmanager
def history(path: pathlib.Path | None) -> Iterator[None]:
    """Keep the lines of the block's input in a file, with readline's keys, where there is readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    if path is not None:
        with contextlib.suppress(OSError):
            readline.read_history_file(path)
    try:
        yield
    finally:
        if path is not None:
            readline.set_history_length(MAX_HISTORY_LINES)
            with contextlib.suppress(OSError):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.touch(0o600)
                readline.write_history_file(path)
