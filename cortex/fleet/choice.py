"""The choice of a replica for one request: the model's policy, with what the policy is told of the prompt.

Bodies are hashed only for policies that use prefixes. The index learns of a prefix when a node has begun to answer, for
only then is it in the node's cache.
"""

import itertools
from collections.abc import Mapping

from cortex._fast.prefix_index import PrefixHashes, PrefixIndex, prefix_hashes
from cortex.config import GatewaySettings, ModelProfile
from cortex.fleet.policies import least_outstanding
from cortex.fleet.policies.policy import Policy, Prompt
from cortex.fleet.policies.registry import POLICIES


class Choice:
    """Choice for one request, which may be asked again after a refusal."""

    __slots__ = ("_index", "_policy", "_prefix", "_prompt", "_slack")

    def __init__(
        self, policy: Policy, prompt: Prompt, slack: int, prefix: PrefixHashes | None, index: PrefixIndex
    ) -> None:
        self._policy = policy
        self._prompt = prompt
        self._slack = slack
        self._prefix = prefix
        self._index = index

    def __call__(self, loads: Mapping[str, int]) -> str:
        """Return the node, given the outstanding requests of each that may be chosen."""
        return self._policy.choose(loads, self._prompt, self._slack)

    def record(self, node: str) -> None:
        """Record the node that answers."""
        if self._prefix is not None:
            self._index.record(self._prefix, node)


class Choices:
    """Policies of a gateway's models, and the prefixes that its nodes were sent."""

    def __init__(self, settings: GatewaySettings, profiles: Mapping[str, ModelProfile]) -> None:
        self._index = PrefixIndex()
        self._numbers = itertools.count()
        self.reconfigure(settings, profiles)

    def reconfigure(self, settings: GatewaySettings, profiles: Mapping[str, ModelProfile]) -> None:
        """Apply other settings and models."""
        self._slack = settings.affinity_slack
        self._default = POLICIES[settings.routing_policy]
        self._policies = {
            profile.id: POLICIES[profile.routing_policy] for profile in profiles.values() if profile.routing_policy
        }

    def begin(self, model: str, body: bytes, cache_key: str | None, principal: str) -> Choice:
        """Return the choice for a request."""
        policy = self._policies.get(model, self._default)
        number = next(self._numbers)
        if not policy.uses_prefixes:
            return Choice(policy, Prompt(number=number), self._slack, None, self._index)
        prefix = prefix_hashes(model, body, cache_key, principal)
        prompt = Prompt(self._index.cached_bytes(prefix), prefix.tie, number)
        return Choice(policy, prompt, self._slack, prefix, self._index)


def least_busy(loads: Mapping[str, int]) -> str:
    """Return the least busy node: the choice where nothing is known of the request."""
    return least_outstanding.choose(loads, Prompt(), 0)
