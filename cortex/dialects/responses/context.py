"""Members of a response that a gateway decides, and tells a neuron in a header."""

import msgspec

from cortex.wire.headers import RESPONSE_CONTEXT


class ResponseContext(msgspec.Struct, frozen=True, omit_defaults=True):
    """Members of a response object that the gateway decides; a neuron repeats them in the response.

    With an empty ``id`` the neuron chooses one.
    """

    id: str = ""
    store: bool = False
    previous_response_id: str = ""
    background: bool = False
    conversation: str = ""

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """Return the header that carries it; none if every member has its default."""
        text = msgspec.json.encode(self)
        return () if text == b"{}" else ((RESPONSE_CONTEXT, text),)

    @classmethod
    def of(cls, header: bytes | None) -> "ResponseContext":
        """Return the context of a header; the default where the header is absent or not a gateway's."""
        try:
            return _CONTEXT.decode(header or b"{}")
        except (msgspec.DecodeError, UnicodeError):
            return cls()


NO_CONTEXT = ResponseContext()
"""Context of a request that came from no gateway."""

_CONTEXT = msgspec.json.Decoder(ResponseContext)
