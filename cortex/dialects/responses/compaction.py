"""Compaction of a conversation, ``/v1/responses/compact``: a conversation replaced by the model's own summary.

A compaction is an ordinary Responses request with one more message, which asks for the summary, and a response of
another shape: the messages of users and the instructions, word for word, and one ``compaction`` item for the rest.
Clients send the item back as input; it is read as an assistant's message (:mod:`cortex.dialects.responses.items`).
Every node that a Responses request can be sent to or translated for can compact.

This module neither sends the request nor resolves chains of responses.
"""

import secrets
import time
from typing import Any

import msgspec
import orjson

from cortex._fast.responses_stream import ResponsesStream
from cortex.dialects.call import Answering, GenerationCall
from cortex.dialects.responses import request
from cortex.dialects.responses.sealed import seal
from cortex.wire.errors import InvalidJsonError, InvalidRequestError, InvalidTypeError, UpstreamError

SUMMARY_TOKENS = 4096
"""Default limit of a summary: enough for an agent's hour, and no model's whole context."""

INSTRUCTION = (
    "This conversation is about to be cut down to a summary, which will be all that is left of it but for the user's "
    "own messages. Write that summary for whoever goes on with the work: what was asked for, what was found out and "
    "decided, with names, places and numbers, what has been done and how it came out, and what is left to do. Write "
    "nothing else."
)

_KEPT_ROLES = frozenset({"user", "system", "developer"})
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NOT_ASKED = frozenset(
    {
        *("stream", "stream_options", "store", "include", "text", "background", "top_logprobs"),
        *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        *("json_schema", "regex", "ebnf", "grammar"),
        *("stop", "stop_token_ids", "ignore_eos", "min_tokens"),
    }
)
"""Parameters of the response's form, which do not apply to a compaction."""


class _Part(msgspec.Struct):
    text: str | None = None


class _Item(msgspec.Struct):
    type: str
    content: list[_Part] | None = None


class _Response(msgspec.Struct):
    """The members of a response that a compaction needs."""

    output: list[_Item]
    usage: msgspec.Raw
    status: str | None = None


def with_input(body: bytes) -> bytes:
    """Return a body whose ``input`` is a list, empty if absent.

    Raises:
        InvalidJsonError: it is not a JSON object.
        InvalidTypeError: its input is neither a text nor a list.
    """
    given = _given(body)
    return msgspec.json.encode(given | {"input": msgspec.Raw(orjson.dumps(_items(given)))})


class Compaction:
    """A compaction: the request to the model, and the response to the client."""

    def __init__(self, body: bytes) -> None:
        """Take a request whose chain has been resolved. Raises as :func:`with_input` does."""
        self._given = _given(body)
        self._items = _items(self._given)

    def question(self) -> bytes:
        """Return the Responses request that asks for the summary. Raises :class:`InvalidRequestError`."""
        if not self._items:
            raise InvalidRequestError("Invalid 'input': there is nothing to compact.", param="input")
        for number, item in enumerate(self._items):
            if not isinstance(item.get("role", ""), str):
                where = f"input[{number}].role"
                raise InvalidTypeError(f"Invalid value for '{where}': expected a string.", param=where)
        asked = {
            name: value
            for name, value in self._given.items()
            if name not in _NOT_ASKED and bytes(value).strip() != b"null"
        }
        asked.setdefault("max_output_tokens", msgspec.Raw(b"%d" % SUMMARY_TOKENS))
        asked.setdefault("reasoning", msgspec.Raw(b'{"effort":"none"}'))  # the tokens are for the summary
        instruction = {"type": "message", "role": "user", "content": INSTRUCTION}
        asked["input"] = msgspec.Raw(orjson.dumps([*self._items, instruction]))
        # Tools stay, since a prompt that begins as the last one did is half computed; calls would be no summary.
        asked["tool_choice"] = msgspec.Raw(b'"none"')
        asked["store"] = msgspec.Raw(b"false")
        return msgspec.json.encode(asked)

    def answer(self, response: bytes) -> bytes:
        """Return the compaction from the model's response. Raises :class:`UpstreamError` if it has no whole text."""
        try:
            answered = msgspec.json.decode(response, type=_Response)
        except msgspec.DecodeError:
            raise UpstreamError("The node's answer is no response, so nothing was compacted.") from None
        if answered.status not in (None, "completed"):
            raise UpstreamError("The summary was not written to its end, so nothing was compacted.")
        texts = [part.text or "" for item in answered.output if item.type == "message" for part in item.content or ()]
        summary = "".join(texts).strip()
        if not summary:
            raise UpstreamError("The model wrote no summary, so nothing was compacted.")
        id = secrets.token_hex(24)
        kept = [
            _shown(item, id, number)
            for number, item in enumerate(self._items)
            if (item.get("type") or "message") == "message" and item.get("role") in _KEPT_ROLES
        ]
        return orjson.dumps(
            {
                "id": f"resp_{id}",
                "object": "response.compaction",
                "created_at": int(time.time()),
                "output": [*kept, {"type": "compaction", "id": f"cmp_{id}", "encrypted_content": seal(summary)}],
                "usage": orjson.Fragment(bytes(answered.usage)),
            }
        )


class CompactCall(GenerationCall, frozen=True):
    """A decoded call."""

    compaction: Compaction

    def encoder(self, answering: Answering) -> "_CompactionEncoder":
        """Return the encoder of the answer, which names no model."""
        return _CompactionEncoder(self.compaction, ResponsesStream("", "", 0, b"{}"))


class _CompactionEncoder:
    def __init__(self, compaction: Compaction, response: ResponsesStream) -> None:
        self._compaction = compaction
        self._response = response
        self.sse_events = response.sse_events

    def whole(self) -> bytes:
        return self._compaction.answer(self._response.whole())


def decode(body: bytes) -> CompactCall:
    """Decode a request body. Raises :class:`InvalidRequestError`."""
    request.PARAMETERS.read(body)  # counts the items
    compaction = Compaction(body)
    call = request.decode(compaction.question())
    return CompactCall(call.request, False, compaction, ignored=call.ignored, num_omitted=call.num_omitted)


def _given(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _FIELDS.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise InvalidJsonError("The request body must be a JSON object.") from None


def _items(given: dict[str, msgspec.Raw]) -> list[dict[str, Any]]:
    try:
        value = orjson.loads(bytes(given.get("input", msgspec.Raw(b"null"))))
    except orjson.JSONDecodeError as error:  # half a surrogate pair, above all
        raise InvalidJsonError(f"The 'input' is not valid JSON: {error.msg}.") from None
    if value is None:
        return []
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InvalidTypeError("Invalid value for 'input': expected a string or a list of objects.", param="input")
    return value


def _shown(item: dict[str, Any], id: str, number: int) -> dict[str, Any]:
    """Return a message as an output item."""
    content = item.get("content")
    parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
    parts = list(parts) if isinstance(parts, list) else []
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "input_image":
            part.setdefault("detail", "auto")
    return {"id": f"msg_{id}_{number}", "status": "completed", **item, "type": "message", "content": parts}
