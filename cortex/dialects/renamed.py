"""The model's name in another server's answer, put back to the one that the client asked for.

Agents take an answer of another name for another model's. Every other byte stays as it came. Chats and completions
have the name at the top level, Responses and Messages within the object of their first and last events. Data that is
not JSON is left as it is.
"""

import msgspec

from cortex._fast.peek import PeekError, peek, splice
from cortex._fast.sse import SseDecoder, encode

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_CARRIERS = ("response", "message")


def rename(answer: bytes, name: str, *, is_outer: bool = True) -> bytes:
    """Return a JSON object with ``name`` for the model, if it names one: at its top or, ``is_outer``, one level in."""
    if b'"model"' not in answer:
        return answer
    try:
        found = peek(answer)
        if found.model is not None:
            return splice(answer, found, name)
        fields = _FIELDS.decode(answer)
    except (PeekError, msgspec.DecodeError, UnicodeError, RecursionError):
        return answer
    for carrier in _CARRIERS if is_outer else ():
        inner = bytes(fields.get(carrier, msgspec.Raw(b"null")))
        if inner.startswith(b"{"):
            fields[carrier] = msgspec.Raw(rename(inner, name, is_outer=False))
            return msgspec.json.encode(fields)
    return answer


class RenamedStream:
    """Reader of another server's event stream, in pieces of any size. Comments are dropped."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._decoder = SseDecoder()

    def sse_events(self, data: bytes) -> bytes:
        """Return the events that some bytes complete. Raises :class:`SseEventTooLarge`."""
        return b"".join(
            [encode(rename(sse_event.data, self._name), sse_event.event) for sse_event in self._decoder.feed(data)]
        )

    def end(self) -> bytes:
        """Return the last events: none, as an event without an end is none."""
        return b""
