"""Prefix affinity: the candidate whose prefix cache has most of the prompt, among those that are not much busier."""

from collections.abc import Mapping

from cortex.fleet.policies.policy import Policy, Prompt, tie_break


def choose(loads: Mapping[str, int], prompt: Prompt, slack: int) -> str:
    """Return the candidate with the longest prefix among those with at most ``slack`` more than the least."""
    most = min(loads.values()) + slack
    near = [node for node in loads if loads[node] <= most]
    cached = prompt.cached_bytes
    return min(near, key=lambda node: (-cached.get(node, 0), loads[node], tie_break(node, prompt.tie)))


POLICY = Policy("prefix_affine", choose, uses_prefixes=True)
