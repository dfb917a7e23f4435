"""Prefix affinity: the candidate whose prefix cache has most of the prompt, among those that are not much busier.

A prefix that is asked for more than one node can answer comes to a second one this way, which from then on is as good.
"""

from collections.abc import Mapping

from cortex.fleet.policies import least_outstanding
from cortex.fleet.policies.policy import Policy, Prompt


def choose(loads: Mapping[str, int], prompt: Prompt, slack: int) -> str:
    """Return the least busy of the candidates with the longest prefix that have at most ``slack`` over the least."""
    if prompt.cached_bytes:
        most = min(loads.values()) + slack
        cached = {node: prompt.cached_bytes.get(node, 0) for node, load in loads.items() if load <= most}
        longest = max(cached.values())
        loads = {node: loads[node] for node, num_bytes in cached.items() if num_bytes == longest}
    return least_outstanding.choose(loads, prompt, slack)


POLICY = Policy("prefix_affine", choose, uses_prefixes=True)
