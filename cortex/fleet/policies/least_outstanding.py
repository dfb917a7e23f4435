"""Least outstanding requests: the candidate that is working on the fewest."""

from collections.abc import Mapping

from cortex.fleet.policies.policy import Policy, Prompt, tie_break


def choose(loads: Mapping[str, int], prompt: Prompt, slack: int) -> str:
    """Return the candidate with the fewest requests."""
    return min(loads, key=lambda node: (loads[node], tie_break(node, prompt.tie)))


POLICY = Policy("least_outstanding", choose)
