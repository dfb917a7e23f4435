"""Find the tool calls in an answer, however it is cut, and pass on their arguments as they are written.

Models write calls in forms of their own, which their chat templates show (:func:`form_of`):

- tagged: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, of Qwen, Hermes and those trained after them,
  or, of Qwen3-Coder, ``<function=...><parameter=...>`` within the tags (:mod:`neuron.text.xml_calls`). Every model is
  understood when it writes this form: it is also what a prompt without a place for tools asks for.
- Llama: ``{"name": ..., "parameters": {...}}`` where the answer begins, or after ``<|python_tag|>``.
- Mistral: ``[TOOL_CALLS]`` and a list of such objects, or a name, perhaps ``[ARGS]``, and an object.

A call begins once its name is known and its arguments have begun; they go on byte for byte as the model writes them,
and a client learns from the bytes themselves if they are not JSON in the end. What never becomes a call is text.
"""

import json
import re
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import msgspec

from cortex.wire.request import Tool
from neuron.text.call_pieces import CallArguments, CallBegins, CallEnds, Piece
from neuron.text.holdback import held_back
from neuron.text.xml_calls import FUNCTION, XmlCall

START = "<tool_call>"
END = "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS = "[TOOL_CALLS]"
ARGS = "[ARGS]"
CALL_ID = "[CALL_ID]"
MARKERS = (START, END, PYTHON_TAG, TOOL_CALLS, ARGS, CALL_ID)
"""Texts of markers that may be special tokens, which a tokenizer leaves out of its text."""

MAX_HEAD_CHARS = 512


class CallForm(Enum):
    """Form in which a model writes calls, beside the tagged form."""

    TAGGED = "tagged"
    LLAMA = "llama"
    MISTRAL = "mistral"


def form_of(template: str | None) -> CallForm:
    """Return the form that a chat template shows its model."""
    if template is None or "tools" not in template:
        return CallForm.TAGGED
    if TOOL_CALLS in template:
        return CallForm.MISTRAL
    if START not in template and (PYTHON_TAG in template or "<|start_header_id|>" in template):
        return CallForm.LLAMA
    return CallForm.TAGGED


class _WholeCall(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


_WHOLE_DECODER = msgspec.json.Decoder(_WholeCall)
_OBJECT_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])


class ToolCallParser:
    """Feed answer text in any pieces, take text and calls out in order."""

    def __init__(self, form: CallForm = CallForm.TAGGED, tools: Sequence[Tool] = ()) -> None:
        self._form = form
        self._schemas = {tool.name: tool.parameters for tool in tools}
        self._pending = ""
        self._marker = ""  # behind which a call may begin
        self._opened = ""  # what has been taken since the text before it: text again if no call begins
        self._at_start = True
        self._skips_newlines = False
        self._in_list = False
        self._object = _ObjectScanner()
        self._xml: XmlCall | None = None
        self._state: Callable[[list[Piece]], bool] = self._text

    @property
    def in_call(self) -> bool:
        """Whether the text so far ends in a call, or in what closes one."""
        if self._state == self._inside_xml:
            return self._xml is not None and self._xml.is_call
        return self._state in (self._arguments, self._after_arguments, self._between, self._close_xml)

    def feed(self, text: str) -> list[Piece]:
        """Return what has become certain; text that may begin a call is held back."""
        self._pending += text
        pieces: list[Piece] = []
        while self._state(pieces):
            pass
        return pieces

    def close(self, *, cut: bool = False) -> list[Piece]:
        """Return what was held back. With ``cut`` the model was stopped: its unfinished call stays unfinished."""
        rest, self._pending = self._pending, ""
        state, self._state = self._state, self._text
        pieces: list[Piece] = []
        if state == self._inside_xml:
            assert self._xml is not None
            self._put_xml(self._xml.close(cut=cut), pieces)
        elif state == self._arguments:
            self._put_arguments(rest, pieces)
            if not cut:
                pieces.append(CallEnds())
        elif state == self._whole and (call := _whole_call(rest)):
            pieces += call
        elif state in (self._decide, self._whole, self._mistral_name, self._mistral_open):
            pieces.append(self._opened + rest)
        elif state == self._text and rest:
            pieces.append(rest)
        return pieces

    # Each state takes what it can from the pending text and returns whether there may be more to do.

    def _text(self, pieces: list[Piece]) -> bool:
        if self._skips_newlines:
            self._pending = self._pending.lstrip("\n")
            self._skips_newlines = not self._pending
        if self._at_start and self._form is CallForm.LLAMA:
            begun = self._pending.lstrip()
            if not begun:
                return False
            if begun[0] == "{":
                self._marker, self._opened = "", self._pending[: len(self._pending) - len(begun)]
                return self._go(self._decide, begun)
        markers = [START, FUNCTION]
        if self._form is CallForm.LLAMA:
            markers.append(PYTHON_TAG)
        elif self._form is CallForm.MISTRAL:
            markers.append(TOOL_CALLS)
        at, marker = min(
            ((at, marker) for marker in markers if (at := self._pending.find(marker)) >= 0), default=(-1, "")
        )
        if at < 0:
            # Newlines before a call are the call's: hold them back with what may be its marker.
            keep = held_back(self._pending, markers)
            self._put_text(self._pending[: len(self._pending) - keep].rstrip("\n"), pieces)
            return False
        self._put_text(self._pending[:at].rstrip("\n"), pieces)
        at = self._pending.index(marker)
        self._marker, self._opened = marker, self._pending[:at]
        rest = self._pending[at:]
        if marker == FUNCTION:
            return self._open_xml(rest)
        self._opened += marker
        return self._go(self._mistral_open if marker == TOOL_CALLS else self._decide, rest[len(marker) :])

    def _put_text(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(text)
            self._at_start = False
            self._pending = self._pending[len(text) :]

    def _decide(self, pieces: list[Piece]) -> bool:
        """After a marker: is this a call?"""
        body = self._pending.lstrip()
        if self._marker == START and body[:1] == "<":
            if FUNCTION.startswith(body):
                return False
            if body.startswith(FUNCTION):
                self._opened += self._pending[: len(self._pending) - len(body)]
                return self._open_xml(body)
        try:
            head = _read_head(body)
        except _NotACall:
            pass
        else:
            if head is None:
                return False
            name, length = head
            pieces.append(CallBegins(name))
            self._object = _ObjectScanner()
            return self._go(self._arguments, body[length:])
        if self._marker == START:
            return self._go(self._whole, self._pending)
        return self._no_call(pieces)  # without a tag to end it there is nothing to wait for

    def _no_call(self, pieces: list[Piece]) -> bool:
        """Give back what was taken for a marker; what follows it may hold another one."""
        if self._opened:
            pieces.append(self._opened)
        self._at_start = False
        return self._go(self._text, self._pending)

    def _arguments(self, pieces: list[Piece]) -> bool:
        used, progress = self._object.scan(self._pending)
        arguments, rest = self._pending[:used], self._pending[used:]
        self._pending = rest
        if progress is _Progress.GOES_ON:
            self._put_arguments(arguments, pieces)
            return False
        self._put_arguments(arguments.rstrip(), pieces)
        pieces.append(CallEnds())
        if progress is _Progress.TAG:
            return self._end_call(rest[len(END) :])
        self._object = _ObjectScanner(depth=1)
        return self._go(self._after_arguments, rest)

    def _put_arguments(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(CallArguments(text))

    def _after_arguments(self, pieces: list[Piece]) -> bool:
        """Skip to the end of what the arguments stand in; nothing in there is the client's."""
        if self._marker == START:
            at = self._pending.find(END)
            if at < 0:
                self._pending = self._pending[len(self._pending) - held_back(self._pending, [END]) :]
                return False
            return self._end_call(self._pending[at + len(END) :])
        if self._marker != TOOL_CALLS or self._in_list:
            used, progress = self._object.scan(self._pending)
            self._pending = self._pending[used:]
            if progress is not _Progress.ENDED:
                return progress is _Progress.TAG and self._end_call(self._pending[len(END) :])
        return self._go(self._between, self._pending)

    def _between(self, pieces: list[Piece]) -> bool:
        """After a call without a closing tag: another one, or text."""
        body = self._pending.lstrip()
        if not body:
            return False
        self._opened = ""
        if self._in_list:
            if body[0] == ",":
                return self._go(self._decide, body[1:])
            self._in_list = False
            return self._end_call(body.removeprefix("]"))
        if self._marker != TOOL_CALLS:
            if body[0] in ";,":
                return self._go(self._between, body[1:])
            if body[0] == "{":
                return self._go(self._decide, body)
        return self._end_call(body)

    def _whole(self, pieces: list[Piece]) -> bool:
        """Within tags, in an order of its own: read when all of it is there."""
        end = self._pending.find(END)
        if end < 0:
            return False
        block = self._pending[:end]
        pieces += _whole_call(block) or [self._opened + block + END]
        return self._end_call(self._pending[end + len(END) :])

    def _mistral_open(self, pieces: list[Piece]) -> bool:
        body = self._pending.lstrip()
        if not body:
            return False
        self._in_list = body[0] == "["
        if not self._in_list:
            return self._go(self._mistral_name, self._pending)
        self._opened += self._pending[: len(self._pending) - len(body) + 1]
        return self._go(self._decide, body[1:])

    def _mistral_name(self, pieces: list[Piece]) -> bool:
        before, brace, _ = self._pending.partition("{")
        name = before.partition(ARGS)[0].partition(CALL_ID)[0].strip()
        if (brace and name) and "\n" not in name:
            pieces.append(CallBegins(name))
            self._object = _ObjectScanner()
            return self._go(self._arguments, self._pending[len(before) :])
        if brace or "\n" in before.strip() or len(before) > MAX_HEAD_CHARS:
            return self._no_call(pieces)
        return False

    def _open_xml(self, body: str) -> bool:
        self._xml = XmlCall(self._schemas)
        return self._go(self._inside_xml, body)

    def _inside_xml(self, pieces: list[Piece]) -> bool:
        assert self._xml is not None
        rest, self._pending = self._pending, ""
        self._put_xml(self._xml.feed(rest), pieces)
        if not self._xml.ended:
            return False
        return self._go(self._close_xml, self._xml.rest)

    def _close_xml(self, pieces: list[Piece]) -> bool:
        body = self._pending.lstrip()
        if self._marker == START and END.startswith(body):
            return body == END and self._end_call("")
        return self._end_call(body.removeprefix(END) if self._marker == START else body)

    def _put_xml(self, inner: Sequence[Piece], pieces: list[Piece]) -> None:
        pieces += [self._opened + piece if isinstance(piece, str) else piece for piece in inner]

    def _go(self, state: Callable[[list[Piece]], bool], pending: str) -> bool:
        self._state, self._pending = state, pending
        return True

    def _end_call(self, pending: str) -> bool:
        self._skips_newlines = True
        self._at_start = False
        return self._go(self._text, pending)


class _NotACall(Exception):
    """The text is not the beginning of a call after all."""


def _read_head(text: str) -> tuple[str, int] | None:
    """Return the name of the call whose arguments begin in ``text``, and where; ``None`` while that may still come.

    Raises:
        _NotACall: it cannot come any more.
    """
    name, at, step, steps = "", 0, 0, _HEAD
    while step < len(steps):
        found = _TOKEN.match(text, at)
        if found is None:
            rest = text[at:].lstrip()
            if len(text) <= MAX_HEAD_CHARS and any(word.startswith(rest) for word in steps[step] or (rest,)):
                return None
            raise _NotACall
        token, at = found[1], found.end()
        if step == 1 and token == '"type"':
            steps = _TYPED_HEAD
        if token not in (steps[step] or (token,)):
            raise _NotACall
        if steps[step] is None:
            try:
                name = str(json.loads(token))
            except ValueError:
                raise _NotACall from None
        step += 1
    if not (rest := text[at:].lstrip()):
        return None
    if rest[0] != "{" or not name:
        raise _NotACall
    return name, len(text) - len(rest)


_TOKEN = re.compile(r'\s*([{:,]|"(?:[^"\\]|\\.)*")', re.DOTALL)
_NAMED: tuple[tuple[str, ...] | None, ...] = (
    ('"name"',), (":",), None, (",",), ('"arguments"', '"parameters"'), (":",),
)  # fmt: skip
_HEAD = (("{",), ('"name"', '"type"'), *_NAMED[1:])
_TYPED_HEAD = (("{",), ('"type"',), (":",), ('"function"',), (",",), *_NAMED)


class _Progress(Enum):
    GOES_ON = "goes on"
    ENDED = "ended"
    TAG = "tag"
    """The tag that closes a call, where none can stand: its model left something open."""


class _ObjectScanner:
    """Finds the end of JSON that comes in pieces, by its brackets alone; ``depth`` of them are open before it."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False

    def scan(self, text: str) -> tuple[int, _Progress]:
        """Return how much of ``text`` is certain, and what follows; what is not is to be given again."""
        at = 0
        while True:
            if self._in_string:
                inner = _STRING_REST.match(text, at)
                assert inner is not None  # it matches nothing too
                at = inner.end()
                if at == len(text) or text[at] == "\\":
                    return at, _Progress.GOES_ON  # half an escape, at most
                self._in_string, at = False, at + 1
                continue
            found = _OBJECT_MARK.search(text, at)
            if found is None:
                return len(text.rstrip()), _Progress.GOES_ON
            mark, before, at = found[0], found.start(), found.end()
            if mark == '"':
                self._in_string = True
            elif mark == "<":
                if text.startswith(END, before):
                    return before, _Progress.TAG
                if END.startswith(text[before:]):
                    return len(text[:before].rstrip()), _Progress.GOES_ON
            elif mark in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return at, _Progress.ENDED


_STRING_REST = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
_OBJECT_MARK = re.compile(r'["{}\[\]<]')


def _whole_call(block: str) -> list[Piece] | None:
    """Return the pieces of a call that is all of ``block``; ``None`` if it is none."""
    try:
        body = _WHOLE_DECODER.decode(block.strip())
        arguments = bytes(body.arguments)
        if arguments[:1] == b'"':
            # Some models write the object as a string, as the OpenAI dialect has it.
            arguments = msgspec.json.decode(arguments, type=str).encode()
        fields: dict[str, Any] = _OBJECT_DECODER.decode(arguments)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    if not body.name:
        return None
    return [CallBegins(body.name), CallArguments(arguments.decode() if fields else "{}"), CallEnds()]
