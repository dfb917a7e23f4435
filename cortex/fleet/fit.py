"""The choice of a node and of a model's weights for it, out of what each node says fits there best.

Pure. Nodes choose by their own memory plans (``POST /models/fit``); their choices are compared by the same order
(:meth:`cortex.wire.node.ChosenWeights.rank`), and by the nodes' names where that finds no difference.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cortex.wire.errors import ApiError
from cortex.wire.node import ChosenWeights, Fit, PassedOver


class PassedOverOnNode(PassedOver, frozen=True, kw_only=True):
    """Weights that were not chosen for a node; ``choice`` is empty where the node could not choose."""

    node: str


@dataclass(frozen=True, slots=True)
class FleetFit:
    """A node with the weights chosen for it, unless none fit, and all that was passed over."""

    node: str
    weights: ChosenWeights | None
    passed_over: tuple[PassedOverOnNode, ...]


def choose(answers: Mapping[str, Fit | ApiError], wanted_tokens: int = 0) -> FleetFit:
    """Return the best of the nodes' choices. ``wanted_tokens`` is the context that they were asked for."""
    found: dict[str, ChosenWeights] = {}
    passed_over: list[PassedOverOnNode] = []
    for node, answer in sorted(answers.items()):
        if isinstance(answer, ApiError):
            passed_over.append(PassedOverOnNode("", 0, answer.message, node=node))
            continue
        passed_over += (PassedOverOnNode(p.choice, p.size_bytes, p.reason, node=node) for p in answer.passed_over)
        if answer.chosen is not None:
            found[node] = answer.chosen
    # Of equal ones the first by name: max() keeps it.
    best = max(found, key=lambda node: found[node].rank(wanted_tokens), default=None)
    if best is None:
        return FleetFit("", None, tuple(passed_over))
    others = (
        PassedOverOnNode(weights.choice, weights.size_bytes, _comparison(weights, best, found[best]), node=node)
        for node, weights in found.items()
        if node != best
    )
    return FleetFit(best, found[best], (*others, *passed_over))


def _comparison(weights: ChosenWeights, node: str, best: ChosenWeights) -> str:
    """Return why ``best``, on ``node``, was preferred."""
    if any(device.startswith("cuda") for device in best.devices) and not weights.devices[0].startswith("cuda"):
        return f"on a CPU; {node} has it on {'+'.join(best.devices)}"
    if weights.context_tokens < best.context_tokens and weights.held_bytes >= best.held_bytes:
        return f"leaves room for {weights.context_tokens} tokens; {node} for {best.context_tokens}"
    if weights.held_bytes < best.held_bytes:
        return f"fits, and {node} has room for {best.choice or 'more'}"
    if weights.evicts and not best.evicts:
        return f"needs evictions, and {node} does not"
    return f"fits as well as on {node}"
