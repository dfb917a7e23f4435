"""Endpoints that the gateway answers without a node, such as the lists of models, and its error responses."""

import msgspec

from cortex import __version__
from cortex.access.authenticator import principal_of
from cortex.build_identity import COMMIT
from cortex.dialects.model_list import reply_model, reply_models
from cortex.dialects.registry import envelope_for
from cortex.errors import ReplyError
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.dispatch import Dispatcher
from cortex.fleet.offers import FullOfferList, find, offers
from cortex.fleet.state import Fleet
from cortex.http_io import Exchange, Header
from cortex.supervise import Supervisor
from cortex.wire.errors import ApiError, ModelNotFoundError
from cortex.wire.headers import retry_after


class Endpoints:
    """Endpoints outside the dialects. One for the life of a process."""

    def __init__(self, catalogue: Catalogue, fleet: Fleet, dispatcher: Dispatcher, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.catalogue = catalogue
        """Catalogue of offered models, replaced on reload."""
        self._fleet = fleet
        self._dispatcher = dispatcher

    async def models(self, exchange: Exchange) -> None:
        """``GET /v1/models``."""
        principal = principal_of(exchange.caller)
        await self._dispatcher.first_look()
        everything = offers(self.catalogue, self._fleet.state)
        await reply_models(exchange, [o.public() for o in everything if principal.may_use(o.alias_of or o.id)])

    async def model(self, exchange: Exchange) -> None:
        """``GET /v1/models/{id}``; an id may contain slashes."""
        principal = principal_of(exchange.caller)
        name = exchange.path.removeprefix("/v1/models/")
        await self._dispatcher.first_look()
        offer = find(self.catalogue, self._fleet.state, name)
        if offer is None or not principal.may_use(offer.alias_of or offer.id):
            raise ModelNotFoundError(f"The model {name!r} does not exist.", param="model")
        await reply_model(exchange, offer.public())

    async def all_models(self, exchange: Exchange) -> None:
        """``GET /admin/models``: the offers, where each is, and how it is sampled."""
        await self._dispatcher.first_look()
        await exchange.reply(200, msgspec.json.encode(FullOfferList(offers(self.catalogue, self._fleet.state))))

    async def health(self, exchange: Exchange) -> None:
        """``GET /health``: 200 while this process answers; the body reports whether a node is up."""
        nodes = self._fleet.state.nodes.values()
        num_up = sum(node.up for node in nodes)
        state = "ready" if num_up else "no_node"
        body = {
            "state": state,
            "nodes_up": num_up,
            "nodes": len(nodes),
            "in_flight": self.num_in_flight,
            "degraded": self._supervisor.degraded,
        }
        await exchange.reply(200, msgspec.json.encode(body))

    async def version(self, exchange: Exchange) -> None:
        """``GET /version``."""
        await exchange.reply(200, msgspec.json.encode({"name": "cortex", "version": __version__, "commit": COMMIT}))

    @property
    def num_in_flight(self) -> int:
        """Number of requests of this process that have a node and have not ended."""
        return sum(self._fleet.in_flight.by_node.values())


async def reply_error(exchange: Exchange, error: ApiError, headers: tuple[Header, ...] = ()) -> None:
    """Answer with an error, in the envelope of the path's dialect; a node's own error body is sent unchanged."""
    if error.retry_after_s is not None:
        headers = (*headers, (b"retry-after", retry_after(error.retry_after_s)))
    if error.worth_retrying is not None:  # which the SDKs of both families go by before they look at the status
        headers = (*headers, (b"x-should-retry", b"true" if error.worth_retrying else b"false"))
    if isinstance(error, ReplyError):
        await exchange.reply(error.status, error.body, headers=headers)
        return
    envelope, info = envelope_for(exchange.path), error.info()
    await exchange.reply(envelope.status(info), envelope.body(info, exchange.request_id), headers=headers)
