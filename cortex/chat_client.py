"""A chat with a model of a gateway: the conversation so far, and one streamed answer at a time.

The dialect is Chat Completions, or completions for a model that cannot chat. Nothing is printed here; pieces of an
answer are yielded as they come.
"""

import argparse
import http.client
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from cortex.gateway_client import GatewayError, ask, opened

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OF_TEXTS: Final[dict[str, object]] = {"max_tokens": 256, "temperature": 0.0}
"""Settings for a model without a chat template, which may end no text by itself, and wanders if tokens are drawn."""
OF_QUESTIONS: Final[dict[str, object]] = {**OF_TEXTS, "stop": ["\n\nQuestion:", "\nQuestion:"]}
"""Settings for such a model where it is asked questions: it would go on to ask the next one itself."""

SETTINGS: Final[dict[str, type]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "seed": int,
    "reasoning_effort": str,
}
"""Parameters that a chat can set, with their types."""


@dataclass
class Answer:
    """An answer, complete or as far as it came."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    ttft_s: float = 0.0
    """Time to the first token."""
    seconds: float = 0.0
    """Time from the first token to the last."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens of the answer."""
        return int(self.usage.get("completion_tokens", 0))

    @property
    def tokens_per_s(self) -> float:
        """Return the rate of tokens after the first; 0 if it is not known."""
        return (self.num_tokens - 1) / self.seconds if self.num_tokens > 1 and self.seconds > 0 else 0.0

    def summary(self) -> str:
        """Return its figures as a line."""
        rate = f", {self.tokens_per_s:.1f} tokens/s" if self.tokens_per_s else ""
        return f"{self.num_tokens} tokens{rate}, TTFT {self.ttft_s * 1e3:.0f} ms"


class Conversation:
    """Messages and settings; :meth:`ask` adds a question and, once it has come, the answer.

    A model without a chat template continues a text, by ``/v1/completions``: the conversation as questions and their
    answers, or with ``is_text`` the conversation as it is.
    """

    def __init__(self, options: argparse.Namespace, model: str, system: str = "", *, is_text: bool = False) -> None:
        self._options = options
        self._is_text = is_text
        self._is_chat = True
        self.system = system
        self.settings: dict[str, object] = {}
        self.messages: list[dict[str, str]] = []
        self.change(model)

    def change(self, model: str) -> None:
        """Ask another model from now on, which is ready.

        Raises:
            GatewayError: it can neither chat nor continue a text.
        """
        rows = orjson.loads(ask(self._options, "GET", "/v1/models")).get("data", ())
        can = next((row.get("capabilities", ()) for row in rows if row["id"] == model), ())
        if can and "chat" not in can and "completion" not in can:
            raise GatewayError(f"{model} cannot chat; it can: {', '.join(can)}")
        self.model, self._is_chat = model, (not can or "chat" in can) and not self._is_text

    def ask(self, question: str, answer: Answer) -> Generator[tuple[str, str]]:
        """Yield the pieces of the answer, each after ``reasoning`` or ``text``, and fill ``answer`` with them.

        A question without any answer is taken back; a part of an answer stays, as that of a reader who stopped it.

        Raises:
            GatewayError: it refuses, cannot be reached, or ends the answer with an error.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            yield from self._stream(answer)
        finally:
            if answer.text:
                self.messages.append({"role": "assistant", "content": answer.text})
            else:
                self.messages.pop()

    def _request(self) -> tuple[str, dict[str, Any]]:
        """Return the path and the body that ask for the next answer."""
        streamed = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self._is_chat:
            system = [{"role": "system", "content": self.system}] if self.system else []
            return CHAT, {**streamed, "messages": [*system, *self.messages], **self.settings}
        if self.system or "reasoning_effort" in self.settings:
            why = "is asked to continue a text" if self._is_text else "has no chat template"
            raise GatewayError(f"{self.model} {why}, so there is no system prompt and no reasoning effort")
        if self._is_text:
            text = "".join(message["content"] for message in self.messages)
            return COMPLETIONS, {**streamed, "prompt": text, **OF_TEXTS, **self.settings}
        return COMPLETIONS, {**streamed, "prompt": _as_questions(self.messages), **OF_QUESTIONS, **self.settings}

    def _stream(self, answer: Answer) -> Iterator[tuple[str, str]]:
        path, body = self._request()
        start, first = time.monotonic(), 0.0
        with opened(self._options, "POST", path, body) as response:
            try:
                for chunk in _chunks(response):
                    answer.usage = chunk.get("usage") or answer.usage
                    for choice in chunk.get("choices", ()):
                        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                        for kind, piece in _pieces(choice):
                            if not answer.text and not self._is_chat and not self._is_text:
                                piece = piece.lstrip()
                                if not piece:
                                    continue
                            now = time.monotonic()
                            first = first or now
                            answer.ttft_s, answer.seconds = first - start, now - first
                            if kind == "text":
                                answer.text += piece
                            else:
                                answer.reasoning += piece
                            yield kind, piece
            except (OSError, http.client.HTTPException) as error:
                raise GatewayError(f"the answer broke off: {error}") from error
        if not answer.finish_reason:
            raise GatewayError("the answer broke off: the stream ended before it")


def _as_questions(messages: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation as questions and answers, for a model that continues texts to answer the last one."""
    form = {"user": "Question: {}\nAnswer:", "assistant": " {}\n\n"}
    return "".join(form[message["role"]].format(message["content"].strip()) for message in messages)


def _chunks(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the JSON of each event. Raises :class:`GatewayError` for one that is an error."""
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if not line.startswith(b"data: ") or data == b"[DONE]":
            continue
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = None
        if not isinstance(chunk, dict):
            raise GatewayError("what answers there is no gateway: its stream cannot be read")
        if error := chunk.get("error"):
            message = error.get("message") if isinstance(error, dict) else error
            raise GatewayError(f"the answer failed: {message}")
        yield chunk


def _pieces(choice: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the pieces in a choice of either dialect: ``reasoning`` or ``text``, and the piece."""
    delta = choice.get("delta") or {}
    if reasoning := delta.get("reasoning_content"):
        yield "reasoning", str(reasoning)
    if text := delta.get("content") or choice.get("text"):
        yield "text", str(text)


def parse_setting(name: str, value: str) -> object:
    """Return the value of a parameter, as its type.

    Raises:
        ValueError: there is no such parameter, or the value is not of its type; the message says so.
    """
    kind = SETTINGS.get(name)
    if kind is None:
        raise ValueError(f"there is no parameter {name!r}; there is: {', '.join(SETTINGS)}")
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{name} is {'an integer' if kind is int else 'a number'}, not {value!r}") from None
