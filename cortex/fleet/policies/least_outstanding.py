"""Least outstanding requests: the candidate that is working on the fewest."""

import zlib
from collections.abc import Mapping

from cortex.fleet.policies.policy import Policy, Prompt


def choose(loads: Mapping[str, int], prompt: Prompt, slack: int) -> str:
    """Return the candidate with the fewest requests; among equals by the prompt's ``tie``, without one by name."""
    least = min(loads.values())
    equal = [node for node, load in loads.items() if load == least]
    tie = prompt.tie
    return min(equal, key=lambda node: (zlib.crc32(node.encode(), tie) if tie else 0, node))


POLICY = Policy("least_outstanding", choose)
