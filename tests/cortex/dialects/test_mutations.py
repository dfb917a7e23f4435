"""Bodies changed at random: each is a request or an error of the request's, and none leaves memory behind."""

import gc
import random
import sys

from bodies import check, mutated

ROUNDS = 6_000


def test_no_body_crashes_a_decoder_or_leaks() -> None:
    chance = random.Random(20261125)
    blocks = []
    for _ in range(3):
        for _ in range(ROUNDS):
            check(*mutated(chance))
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    # Objects kept once (caches, interned names) are kept in the first rounds.
    assert blocks[2] - blocks[1] < ROUNDS / 20, blocks
