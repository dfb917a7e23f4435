"""A routing policy: its name and its function, which chooses one of the candidates for a request.

The function is pure and is called for every request of a model with several replicas, so it sees little: how many
requests each candidate has, and what is known of the prompt. It never sees a node that may not be chosen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt of one request, as a policy sees it."""

    cached_bytes: Mapping[str, int] = field(default_factory=dict)
    """Length of the prompt's longest prefix that each node was sent before; nodes that were sent none are missing."""
    tie: int = 0
    """Hash of the prompt's beginning, the same in every gateway; 0: none."""
    number: int = 0
    """Number of the request, another one for each."""


Choose = Callable[[Mapping[str, int], Prompt, int], str]
"""Return the node for a request, given each candidate's outstanding requests by its name, at least one candidate; the
prompt; and the setting ``affinity_slack``."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Policy, under the name that settings give it."""

    name: str
    choose: Choose
    uses_prefixes: bool = False
    """Whether it needs ``cached_bytes`` and ``tie``, for which the request's body is hashed."""
