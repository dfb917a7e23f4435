"""The list of models that clients may use, from the catalogue and the fleet.

Pure. A model is offered if the catalogue names it or a node that is up lists it; an alias is an entry of its own, for
clients that search by name (an alias that ends with ``*`` is none). Where nodes differ, the best state and the longest
context are reported. The nodes of a model, and the reasons of failures, are for operators only.
"""

import datetime

import msgspec

from cortex.fleet.catalogue import Catalogue
from cortex.fleet.state import FleetState
from cortex.wire.node import Capability, ModelState, ModelStatus, SamplingDefaults

BEST_FIRST = (
    ModelState.READY,
    ModelState.LOADING,
    ModelState.RECOVERING,
    ModelState.DRAINING,
    ModelState.AVAILABLE,
    ModelState.FAILED,
)


class NodeOffer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model on one node."""

    name: str
    state: ModelState
    progress: float = 0.0
    error: str | None = None


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """An OpenAI ``Model`` object with extensions. A ``context_length`` of 0 is not known yet."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "cortex"
    display_name: str
    state: ModelState
    context_length: int = 0
    capabilities: tuple[Capability, ...] = ()
    aliases: tuple[str, ...] = ()
    alias_of: str | None = None

    def as_anthropic(self) -> "ModelInfo":
        """Return the offer for Anthropic's clients."""
        return ModelInfo(
            id=self.id,
            display_name=self.display_name,
            created_at=datetime.datetime.fromtimestamp(self.created, datetime.UTC),
            max_input_tokens=self.context_length or None,
        )


class FullOffer(Offer, frozen=True, kw_only=True):
    """An offer with the fields for operators."""

    nodes: tuple[NodeOffer, ...] = ()
    sampling: SamplingDefaults = SamplingDefaults()
    """Sampling of a request that sets none, over the defaults of the model's own files."""

    def public(self) -> Offer:
        """Return the offer for clients."""
        return Offer(**{name: getattr(self, name) for name in Offer.__struct_fields__})


class FullOfferList(msgspec.Struct, frozen=True):
    """``GET /admin/models``."""

    data: tuple[FullOffer, ...]
    object: str = "list"


class OfferList(msgspec.Struct, frozen=True):
    """``GET /v1/models``."""

    data: tuple[Offer, ...]
    object: str = "list"

    def as_anthropic(self) -> "ModelInfoList":
        """Return the list for Anthropic's clients, all of it on one page."""
        data = tuple(offer.as_anthropic() for offer in self.data)
        return ModelInfoList(data, data[0].id if data else None, data[-1].id if data else None)


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An Anthropic ``ModelInfo``, without its ``capabilities``, whose meaning differs from an :class:`Offer`'s."""

    type: str = "model"
    id: str
    display_name: str
    created_at: datetime.datetime
    lifecycle: str = "active"
    max_input_tokens: int | None = None


class ModelInfoList(msgspec.Struct, frozen=True):
    """``GET /v1/models`` for a client that sends a version of Anthropic's API."""

    data: tuple[ModelInfo, ...]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


def offers(catalogue: Catalogue, state: FleetState) -> tuple[FullOffer, ...]:
    """Return every offer: models by id, then aliases by name."""
    models = sorted(catalogue.profiles.keys() | set(filter(catalogue.admits, state.listing)))
    by_id = {model: _offer(catalogue, state, model) for model in models}
    aliases = tuple(_alias(alias, by_id[model]) for alias, model in sorted(catalogue.aliases.items()))
    return (*by_id.values(), *aliases)


def find(catalogue: Catalogue, state: FleetState, name: str) -> FullOffer | None:
    """Return the offer of an id or alias, or ``None``."""
    model = catalogue.resolve(name)
    if not _is_offered(catalogue, state, model):
        model = catalogue.match(name) or model
    if not _is_offered(catalogue, state, model):
        return None
    offer = _offer(catalogue, state, model)
    return offer if name == model else _alias(name, offer)


def _is_offered(catalogue: Catalogue, state: FleetState, model: str) -> bool:
    return model in catalogue.profiles or (model in state.listing and catalogue.admits(model))


def _offer(catalogue: Catalogue, state: FleetState, model: str) -> FullOffer:
    profile = catalogue.profiles.get(model)
    found = [(node.name, node.models[model]) for node in state.listing.get(model, ())]
    statuses = [status for _, status in found]
    ready = [status for status in statuses if status.state is ModelState.READY]
    context_length = max((status.context_tokens for status in ready or statuses), default=0)
    context_length = context_length or (profile.context_tokens if profile else 0)
    return FullOffer(
        id=model,
        created=catalogue.created,
        display_name=model,
        state=min((status.state for status in statuses), key=BEST_FIRST.index, default=ModelState.AVAILABLE),
        nodes=tuple(_on_node(name, status) for name, status in found),
        sampling=profile.sampling if profile else SamplingDefaults(),
        context_length=context_length,
        capabilities=tuple(sorted({capability for status in statuses for capability in status.capabilities})),
        aliases=tuple(sorted(alias for alias, target in catalogue.aliases.items() if target == model)),
    )


def _on_node(name: str, status: ModelStatus) -> NodeOffer:
    return NodeOffer(name, status.state, status.progress, status.error)


def _alias(alias: str, offer: FullOffer) -> FullOffer:
    return msgspec.structs.replace(offer, id=alias, display_name=alias, aliases=(), alias_of=offer.id)
