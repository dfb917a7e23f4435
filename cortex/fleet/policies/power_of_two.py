"""Power of two choices: the less busy of two candidates that are drawn at random.

Gateways that share a fleet do not see each other's newest requests. Where each sends to the least busy node, all send
to the same one at once; two random choices spread nearly as well and do not herd (Mitzenmacher, "The Power of Two
Choices in Randomized Load Balancing", 2001). The draw is a hash of the request's number.
"""

import zlib
from collections.abc import Mapping

from cortex.fleet.policies.policy import Policy, Prompt


def choose(loads: Mapping[str, int], prompt: Prompt, slack: int) -> str:
    """Return the less busy of two different candidates, the first drawn of equally busy ones."""
    nodes = sorted(loads)
    draw = zlib.crc32(prompt.number.to_bytes(8, "little"))
    first, rest = draw % len(nodes), draw // len(nodes)
    second = (first + 1 + rest % max(1, len(nodes) - 1)) % len(nodes)
    return min(nodes[first], nodes[second], key=loads.__getitem__)


POLICY = Policy("power_of_two", choose)
