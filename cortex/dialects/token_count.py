"""Counts of a prompt's tokens, in the dialects that have a path for them."""

from collections.abc import Mapping, Sequence

import msgspec

from cortex.dialects.call import Answering, GenerationCall
from cortex.wire.errors import UpstreamError
from cortex.wire.events import InferenceEvent, Started


class CountCall(GenerationCall, frozen=True):
    """A decoded call.

    Its request is for one token: the usage of a node that cannot count has the engine's own count, and the prompt is
    then cached.
    """

    members: dict[str, str]
    """Members of the answer beside the count."""

    @classmethod
    def of(cls, call: GenerationCall, **members: str) -> "CountCall":
        """Return the call that counts the prompt of another."""
        request = msgspec.structs.replace(call.request, max_tokens=1)
        return cls(request, False, members, ignored=call.ignored, num_omitted=call.num_omitted)

    def encoder(self, answering: Answering) -> "TokenCount":
        """Return the encoder of the answer, which names no model."""
        return TokenCount(self.members)


class TokenCount:
    """Encoder of a count, from the start of an inference."""

    def __init__(self, members: Mapping[str, str]) -> None:
        self._members = members
        self._tokens = 0

    def sse_events(self, events: Sequence[InferenceEvent], /) -> bytes:
        """Read a batch of events; a count is not streamed."""
        for event in events:
            if isinstance(event, Started):
                self._tokens = event.prompt_tokens
        return b""

    def whole(self) -> bytes:
        """Return the answer. Raises :class:`UpstreamError` if the node did not report the count."""
        if not self._tokens:
            raise UpstreamError("The node does not say how many tokens a prompt has.")
        return msgspec.json.encode({**self._members, "input_tokens": self._tokens})
