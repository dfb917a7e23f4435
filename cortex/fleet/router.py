"""Where a request goes: to a node that serves its model, to a load, or back with a reason.

Pure and deterministic: the same state, counts and exclusions give the same :data:`Decision`. The node with the least
outstanding work wins, ties go by name. A model that is being recovered, or whose only replicas have just refused this
request, is not loaded a second time elsewhere: that is :class:`Busy`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cortex.config import ModelProfile
from cortex.fleet import placement
from cortex.fleet.state import FleetState
from cortex.wire.node import ModelState

RETRY_SOON_S = 1.0
RETRY_RECOVERY_S = 5.0
NO_NODES: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Serve:
    """Ask this node."""

    node: str


@dataclass(frozen=True, slots=True)
class Load:
    """Load the model on the first of these that will take it. One that is loading it already comes first."""

    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Busy:
    """Not now."""

    retry_after_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nobody offers this model."""


Decision = Serve | Load | Busy | Unknown


def route(
    state: FleetState,
    model: str,
    profile: ModelProfile | None,
    in_flight: Mapping[str, int],
    excluded: frozenset[str] = NO_NODES,
    pins: frozenset[str] = NO_NODES,
) -> Decision:
    """Decide for one request.

    ``profile`` is the catalogue's, or ``None`` for a model that only nodes know. ``in_flight`` counts this process's
    requests by node. ``excluded`` nodes have failed this request already.
    """
    serving = state.serving.get(model, ())
    best: str | None = None
    least = 0
    for node in serving:
        if node.name in excluded:
            continue
        load = in_flight.get(node.name, 0) + node.foreign_load
        if best is None or load < least:
            best, least = node.name, load
    if best is not None:
        return Serve(best)
    if serving:
        return Busy(RETRY_SOON_S, f"every replica of {model} refused the request")
    return _route_cold(state, model, profile, excluded, pins)


def _route_cold(
    state: FleetState, model: str, profile: ModelProfile | None, excluded: frozenset[str], pins: frozenset[str]
) -> Decision:
    listing = state.listing.get(model, ())
    states = {node.name: node.models[model].state for node in listing}
    if profile is None and not listing:
        if model in state.known:
            return Busy(RETRY_RECOVERY_S, f"the nodes that have {model} are down")
        return Unknown()
    if ModelState.RECOVERING in states.values():
        return Busy(RETRY_RECOVERY_S, f"{model} is being recovered after a fault of its device")
    profile = profile or offered_profile(state, model)
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
    candidates = placement.choose(state, profile, excluded, pins)
    if candidates:
        return Load(tuple(candidate.node for candidate in candidates))
    if ModelState.DRAINING in states.values():
        return Busy(RETRY_SOON_S, f"{model} is being unloaded")
    if not any(node.up for node in state.nodes.values()):
        return Busy(RETRY_RECOVERY_S, "no node is up")
    if excluded:
        return Busy(RETRY_SOON_S, f"no other node can load {model}")
    return Busy(RETRY_RECOVERY_S, f"no node that is up can load {model}")


def offered_profile(state: FleetState, model: str) -> ModelProfile | None:
    """Return a profile for a model of no catalogue, if a node that lists it says where its weights are."""
    for node in state.listing.get(model, ()):
        source = node.models[model].source
        if source:
            return ModelProfile(id=model, source=source)
    return None
