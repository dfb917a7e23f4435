"""Key rings for tests, without a file."""

import hashlib

from cortex.access.keys import KeyRing, Principal

KEY = "sk-cortex-abc"


def ring(*principals: tuple[str, Principal], anonymous: Principal | None = None) -> KeyRing:
    """Return a ring of these keys."""
    digests = {hashlib.sha256(key.encode()).digest(): principal for key, principal in principals}
    return KeyRing({digest[:8]: (digest, principal) for digest, principal in digests.items()}, anonymous)
