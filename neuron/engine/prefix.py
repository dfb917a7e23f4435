"""Keys of pages for the prefix cache: a hash of a page's tokens and of all before them.

Sequences with a common prefix and the same salt have the same keys up to the page where they differ. With different
salts they share none, so that neither counts nor timing reveal other principals' prompts. 128 bits of a keyed hash: no
prompt can be made to collide with another, as with a fast hash of known seed, and by chance two of 2^40 pages collide
once in 2^49. A page of 16 tokens takes 1.1 us.
"""

import hashlib
import secrets
from typing import Final

from neuron.engine.sequence import Int32Array

KEY_BYTES: Final = 16
_SECRET: Final = secrets.token_bytes(32)


def root_key(salt: str) -> bytes:
    """Return the parent key of the first page of all sequences with this salt."""
    return hashlib.blake2b(salt.encode(), digest_size=KEY_BYTES, key=_SECRET, person=b"salt").digest() if salt else b""


def extend_keys(keys: list[bytes], tokens: Int32Array, num_pages: int, page_tokens: int, root: bytes = b"") -> None:
    """Append to ``keys`` until it has those of the first ``num_pages`` pages of ``tokens``; ``root`` is the salt's."""
    for page in range(len(keys), num_pages):
        parent = keys[-1] if keys else root
        own = tokens[page * page_tokens : (page + 1) * page_tokens].tobytes()
        keys.append(hashlib.blake2b(parent + own, digest_size=KEY_BYTES, key=_SECRET).digest())
