"""Routing: the decision to send a request to a node, to load its model, or to refuse it.

Pure and deterministic: the same state, counts, exclusions and choice give the same :data:`Decision`. Among several
ready replicas a policy chooses (:mod:`cortex.fleet.policies`). A model whose only replicas have just refused this
request is not loaded elsewhere: that is :class:`Busy`. It is loaded elsewhere at once where its only replicas are gone,
and, without eviction, while it is being recovered.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cortex.config import ModelProfile
from cortex.fleet import placement
from cortex.fleet.choice import least_busy
from cortex.fleet.state import FleetState
from cortex.wire.node import ModelState

RETRY_SOON_S = 1.0
RETRY_RECOVERY_S = 5.0
NO_NODES: frozenset[str] = frozenset()
EVERYWHERE = ("hf:", "pypi:")
"""Prefixes of sources that any node can fetch."""


@dataclass(frozen=True, slots=True)
class Serve:
    """Decision to send the request to a node."""

    node: str


@dataclass(frozen=True, slots=True)
class Load:
    """Decision to load the model on the first candidate that accepts it; a node that is loading it comes first."""

    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Busy:
    """Refusal of the request for now."""

    retry_after_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """Refusal of the request, since no node offers the model."""


Decision = Serve | Load | Busy | Unknown


def route(
    state: FleetState,
    model: str,
    profile: ModelProfile | None,
    in_flight: Mapping[str, int],
    excluded: frozenset[str] = NO_NODES,
    gone: frozenset[str] = NO_NODES,
    choose: Callable[[Mapping[str, int]], str] = least_busy,
) -> Decision:
    """Decide for one request.

    ``profile`` is the catalogue's, or ``None`` for a model that only nodes list. ``in_flight`` counts this process's
    requests by node. ``excluded`` nodes have refused this request or cannot serve it; ``gone`` nodes count as down.
    ``choose`` returns one of several replicas, given the outstanding requests of each.
    """
    serving = state.serving.get(model, ())
    loads = {
        node.name: in_flight.get(node.name, 0) + node.foreign_load
        for node in serving
        if node.name not in excluded and node.name not in gone
    }
    if loads:
        return Serve(next(iter(loads)) if len(loads) == 1 else choose(loads))
    if any(node.name not in gone for node in serving):
        return Busy(RETRY_SOON_S, f"every replica of {model} refused the request")
    return _route_cold(state, model, profile, excluded, gone)


def _route_cold(
    state: FleetState, model: str, profile: ModelProfile | None, excluded: frozenset[str], gone: frozenset[str]
) -> Decision:
    listing = state.listing.get(model, ())
    states = {node.name: node.models[model].state for node in listing if node.name not in gone}
    recovering = frozenset(name for name, known in states.items() if known is ModelState.RECOVERING)
    busy = bool(excluded)
    excluded |= gone
    if profile is None and not listing:
        if state.has_model(model):
            return Busy(RETRY_RECOVERY_S, f"the nodes that have {model} are down")
        return Unknown()
    profile = profile or offered_profile(state, model, gone)
    if recovering:
        # The recovery takes about as long as a load elsewhere, so nothing is evicted for it.
        beside = (
            candidate.node
            for candidate in (placement.choose(state, profile, excluded | recovering) if profile else ())
            if candidate.fit <= placement.Fit.UNKNOWN and not candidate.has_failed
        )
        return Load(found) if (found := tuple(beside)) else _recovering(model)
    if profile is None and gone:
        return Busy(RETRY_RECOVERY_S, f"the nodes that have {model} cannot be asked now")
    if profile is None:
        return Busy(RETRY_RECOVERY_S, f"{model} is not loaded, and no node says where its weights are")
    loading = tuple(name for name, known in states.items() if known is ModelState.LOADING and name not in excluded)
    if loading:
        return Load(loading)
    if any(known is ModelState.LOADING for known in states.values()):
        return Busy(RETRY_SOON_S, f"{model} is being loaded")
    for node in state.nodes.values():
        health = node.health
        if node.up and health is not None and model in health.activating and node.name not in excluded:
            return Load((node.name,))
    candidates = placement.choose(state, profile, excluded)
    if candidates:
        return Load(tuple(candidate.node for candidate in candidates))
    if not any(node.up for node in state.nodes.values()):
        return Busy(RETRY_RECOVERY_S, "no node is up")
    if busy:
        return Busy(RETRY_SOON_S, f"no other node can load {model}")
    return Busy(RETRY_RECOVERY_S, f"no node that is up can load {model}")


def _recovering(model: str) -> Busy:
    return Busy(RETRY_RECOVERY_S, f"{model} is being recovered after a fault of its device")


def offered_profile(state: FleetState, model: str, gone: frozenset[str] = NO_NODES) -> ModelProfile | None:
    """Return a profile for a model of no catalogue, if a node that lists it has the source of its weights.

    A path on a node that is gone is valid on no other.
    """
    for node in state.listing.get(model, ()):
        source = node.models[model].source
        if source and (node.name not in gone or source.startswith(EVERYWHERE)):
            return ModelProfile(id=model, source=source)
    return None
