"""What a reasoning item carries as ``encrypted_content``: the thought itself, for a client that replays it unread.

Clients that keep no state on the server send it back with the next request. It hides nothing that the item does not say
in the open, and is opaque only in that no client has a use for it.
"""

import base64
import binascii

_PREFIX = "open1."


def seal(thought: str) -> str:
    """Return a thought as ``encrypted_content``."""
    return _PREFIX + base64.b64encode(thought.encode("utf-8", "replace")).decode()


def unseal(sealed: str) -> str | None:
    """Return the thought in what :func:`seal` made; ``None`` for what another server did."""
    if not sealed.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(sealed[len(_PREFIX) :], validate=True).decode()
    except (binascii.Error, ValueError):
        return None
