"""The ``encrypted_content`` of a reasoning item: its text, for clients that replay it unread.

Clients that keep no state on the server send it back with the next request. It is encoded, not encrypted: the item has
the same text in the open.
"""

import base64
import binascii

_PREFIX = "open1."


def seal(thought: str) -> str:
    """Return the ``encrypted_content`` of a reasoning text."""
    return _PREFIX + base64.b64encode(thought.encode("utf-8", "replace")).decode()


def unseal(sealed: str) -> str | None:
    """Return the reasoning text; ``None`` for another server's ``encrypted_content``."""
    if not sealed.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(sealed[len(_PREFIX) :], validate=True).decode()
    except (binascii.Error, ValueError):
        return None
