"""The ``encrypted_content`` of a reasoning or compaction item: its text, for clients that replay it unread.

Clients that keep no state on the server send it back with the next request. It is encoded, not encrypted: the item has
the same text in the open.
"""

import base64
import binascii

from cortex.wire.errors import InvalidRequestError

COMPACTIONS = frozenset({"compaction", "compaction_summary"})
"""Types of a compaction item. The second is Codex's older name."""

_PREFIX = "open1."


def seal(thought: str) -> str:
    """Return the ``encrypted_content`` of a text."""
    return _PREFIX + base64.b64encode(thought.encode("utf-8", "replace")).decode()


def unseal(sealed: str) -> str | None:
    """Return the text; ``None`` for another server's ``encrypted_content``."""
    if not sealed.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(sealed[len(_PREFIX) :], validate=True).decode()
    except (binascii.Error, ValueError):
        return None


def summary_of(encrypted_content: str | None, where: str) -> str:
    """Return the text of a compaction item. Raises :class:`InvalidRequestError` for another server's item."""
    summary = unseal(encrypted_content or "")
    if summary is None:
        raise InvalidRequestError(
            f"Invalid '{where}.encrypted_content': this compaction was not made here, and cannot be read.",
            param=f"{where}.encrypted_content",
        )
    return f"Summary of the conversation so far:\n\n{summary}"
