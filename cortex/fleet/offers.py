"""The list of models that clients may use, from the catalogue and the fleet.

Pure. A model is offered if the catalogue names it or a node that is up lists it; an alias is an entry of its own, for
clients that search by name (an alias that ends with ``*`` is none). Where nodes differ, the best state and the longest
context are reported. The nodes of a model, and the reasons of failures, are for operators only.
"""

from decimal import Decimal

import msgspec

from cortex.config import Price
from cortex.dialects.model_list import ListedModel, Pricing, sizes_and_abilities
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.state import FleetState
from cortex.wire.node import ModelState, ModelStatus, SamplingDefaults

MILLION = Decimal(1_000_000)

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


class Offer(ListedModel, frozen=True, kw_only=True):
    """A model as clients see it, with its aliases."""

    owned_by: str = "cortex"
    aliases: tuple[str, ...] = ()
    alias_of: str | None = None


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
    context_tokens = max((status.context_tokens for status in ready or statuses), default=0)
    context_tokens = context_tokens or (profile.context_tokens if profile else 0)
    return FullOffer(
        id=model,
        created=catalogue.created,
        name=model,
        display_name=model,
        state=min((status.state for status in statuses), key=BEST_FIRST.index, default=ModelState.AVAILABLE),
        nodes=tuple(_on_node(name, status) for name, status in found),
        sampling=profile.sampling if profile else SamplingDefaults(),
        pricing=pricing_of(profile.price) if profile and profile.price else None,
        **sizes_and_abilities(context_tokens, {can for status in statuses for can in status.capabilities}),
        aliases=tuple(sorted(alias for alias, target in catalogue.aliases.items() if target == model)),
    )


def _on_node(name: str, status: ModelStatus) -> NodeOffer:
    return NodeOffer(name, status.state, status.progress, status.error)


def pricing_of(price: Price) -> Pricing:
    """Return the prices of a token, given those of a million."""
    cached = price.input if price.cached_input is None else price.cached_input
    return Pricing(
        _of_token(price.input), _of_token(price.output), _of_token(cached) if cached != price.input else None
    )


def _of_token(price: float) -> str:
    """Return the price of a token, given that of a million, without an exponent."""
    return format((Decimal(str(price)) / MILLION).normalize(), "f")


def _alias(alias: str, offer: FullOffer) -> FullOffer:
    return msgspec.structs.replace(offer, id=alias, name=alias, display_name=alias, aliases=(), alias_of=offer.id)
