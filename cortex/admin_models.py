"""The operators' endpoints that add models: a fit over the fleet, an added model, its removal, a download.

A fit asks every node that is up and changes nothing. Its answer has the profile to add. Added models are in a file of
the gateways' own (:mod:`cortex.fleet.added`); the operator's files are never written.
"""

import asyncio
import pathlib
import urllib.parse
from collections.abc import Callable, Mapping

import msgspec

from cortex.admin import Acted
from cortex.config import ModelProfile
from cortex.dialects import fields
from cortex.errors import (
    CatalogueNotWritableError,
    ModelExistsError,
    ModelNotAddedError,
    NoNodeError,
    NothingFitsError,
    UnknownNodeError,
)
from cortex.fleet import added, fit, naming, placement
from cortex.fleet.fit import FleetFit, PassedOverOnNode
from cortex.fleet.loader import UNLIMITED_S
from cortex.fleet.service import FleetService
from cortex.fleet.state import Node
from cortex.http_io import Exchange
from cortex.known_models import KnownModel, known_models
from cortex.settings import ConfigError
from cortex.wire.errors import ApiError, InvalidRequestError, ModelNotFoundError
from cortex.wire.node import (
    WANTED_TOKENS,
    ChosenWeights,
    Count,
    Fit,
    ForgetRequest,
    ModelId,
    ModelState,
    NodeState,
    UnloadRequest,
)

MAX_BODY_BYTES = 1 << 20
PATH = "/admin/models/"


class FitAct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/models/fit``: a name or a source. ``id`` is for a new model; ``node`` is the only one to ask."""

    model: str
    id: ModelId | None = None
    node: str = ""
    context_tokens: Count = 0


class KnownReport(msgspec.Struct, frozen=True):
    """``GET /admin/models/known``."""

    models: tuple[KnownModel, ...]


class PullAct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/models/pull``: without ``node``, on the one where it would be loaded."""

    model: str
    node: str = ""


class FitReport(msgspec.Struct, frozen=True):
    """A model as it would be added, and the node and the weights that were chosen for it.

    ``offered`` is whether the catalogue or a node has it already; then nothing is chosen. ``weights`` is ``None`` where
    they are measured once they are downloaded.
    """

    profile: ModelProfile
    offered: bool = False
    node: str = ""
    weights: ChosenWeights | None = None
    evict_for_tokens: int = 0
    """Context for which the load evicts idle models, where that is part of the choice."""
    passed_over: tuple[PassedOverOnNode, ...] = ()


class Removed(msgspec.Struct, frozen=True):
    """``DELETE /admin/models/{id}``: the nodes that have forgotten the model."""

    id: str
    nodes: tuple[str, ...]


class ModelAdmin:
    """The endpoints that change which models are offered."""

    def __init__(
        self,
        service: FleetService,
        reload: Callable[[], None],
        added_path: Callable[[], pathlib.Path | None],
        known: Mapping[str, KnownModel] | None = None,
    ) -> None:
        self._service = service
        self._fleet = service.fleet
        self._reload = reload
        self._added_path = added_path
        self._known = known_models() if known is None else known

    async def fit(self, exchange: Exchange) -> None:
        """``POST /admin/models/fit``."""
        asked = fields.decode(await exchange.read_body(MAX_BODY_BYTES), FitAct)
        await self._service.dispatcher.first_look()
        offered = naming.find(asked.model, self._service.catalogue, self._fleet.state, self._known)
        if offered is not None:
            await exchange.reply(200, msgspec.json.encode(FitReport(offered, offered=True)))
            return
        profile = naming.describe(asked.model, self._known, asked.id or "")
        profile = msgspec.structs.replace(profile, context_tokens=asked.context_tokens)
        self._check_id(profile)
        await exchange.reply(200, msgspec.json.encode(await self._fitted(profile, asked.node)))

    async def known(self, exchange: Exchange) -> None:
        """``GET /admin/models/known``: the models that are known by a short name."""
        await exchange.reply(200, msgspec.json.encode(KnownReport(tuple(self._known.values()))))

    async def pull(self, exchange: Exchange) -> None:
        """``POST /admin/models/pull``: returns when a node has downloaded the files of a model of the catalogue."""
        asked = fields.decode(await exchange.read_body(MAX_BODY_BYTES), PullAct)
        profile = self._service.catalogue.profiles.get(self._service.catalogue.resolve(asked.model))
        if profile is None:
            raise ModelNotFoundError(f"The model {asked.model!r} is not in the catalogue.", param="model")
        if asked.node:
            name = self._node(asked.node).name
        else:
            candidates = placement.choose(self._fleet.state, profile)
            if not candidates:
                raise NoNodeError(f"No node that is up can load {profile.id}.", retry_after_s=5)
            name = candidates[0].node
        status = await self._service.neurons[name].pull(profile.spec(), timeout_s=UNLIMITED_S)
        self._fleet.set_model(name, status)
        await exchange.reply(200, msgspec.json.encode(Acted({name: status})))

    async def add(self, exchange: Exchange) -> None:
        """``POST /admin/models``: offers a model from now on; one that was added from the same source is changed."""
        profile = fields.decode(await exchange.read_body(MAX_BODY_BYTES), ModelProfile)
        if not profile.source:
            raise InvalidRequestError("'source' is empty.", param="source")
        for node in (*profile.pinned, *profile.preferred_nodes):
            self._node(node)
        self._check_id(profile)
        for alias in profile.aliases:
            taken = self._service.catalogue.aliases.get(alias)
            if alias.endswith("*") or alias in self._service.catalogue.profiles or taken not in {None, profile.id}:
                raise ModelExistsError(
                    f"The alias {alias!r} is taken, or a prefix, which only models.toml may have.", param="aliases"
                )
        await self._change(lambda path: added.add(path, profile))
        await exchange.reply(200, msgspec.json.encode(profile))

    async def remove(self, exchange: Exchange) -> None:
        """``DELETE /admin/models/{id}``: no longer offers an added model, and unloads it. Its files stay."""
        name = urllib.parse.unquote(exchange.path.removeprefix(PATH))
        model = self._service.catalogue.resolve(name)
        if model not in self._service.catalogue.added:
            if model in self._service.catalogue.profiles:
                raise ModelNotAddedError(f"{model!r} is in models.toml: take it out there.", param="model")
            if model in self._fleet.state.listing:
                raise ModelNotAddedError(f"{model!r} is a node's own; `cortex unload` frees its memory.", param="model")
            raise ModelNotFoundError(f"The model {name!r} is not in the catalogue.", param="model")
        await self._change(lambda path: added.remove(path, model))
        nodes = [node.name for node in self._fleet.state.listing.get(model, ())]
        done = await asyncio.gather(*(self._forget(node, model) for node in nodes), return_exceptions=True)
        forgotten = tuple(node for node, error in zip(nodes, done, strict=True) if not isinstance(error, BaseException))
        await exchange.reply(200, msgspec.json.encode(Removed(model, forgotten)))

    async def _forget(self, node: str, model: str) -> None:
        neuron = self._service.neurons[node]
        status = self._fleet.state.status(node, model)
        if status is not None and status.state is not ModelState.AVAILABLE:
            await neuron.unload(UnloadRequest(model, generation=status.generation))
        await neuron.forget(ForgetRequest(model))
        await self._service.poller.poll(node)

    async def _change(self, change: Callable[[pathlib.Path | None], None]) -> None:
        """Change the file of added models and put it in force."""
        await asyncio.to_thread(change, self._added_path())
        try:
            self._reload()
        except ConfigError as error:
            raise CatalogueNotWritableError(f"The change is written, but not in force: {error}") from None

    def _check_id(self, profile: ModelProfile) -> None:
        """Raise :class:`ModelExistsError` if another model has the id."""
        catalogue = self._service.catalogue
        there = catalogue.profiles.get(catalogue.resolve(profile.id))
        if there is None:
            return
        is_same = naming.repository(there.source) == naming.repository(profile.source)
        if there.id != profile.id or profile.id not in catalogue.added or not is_same:
            raise ModelExistsError(
                f"{profile.id!r} is in the catalogue already, from {there.source}: give the new one another name "
                "(--id NAME), or remove that one.",
                param="id",
            )

    async def _fitted(self, profile: ModelProfile, only: str) -> FitReport:
        """Return what fits best, on one node or on all that are up.

        Raises:
            NoNodeError: no node is up.
            NothingFitsError: no node has the memory.
            ApiError: no node could tell, each for the same reason.
        """
        nodes = [self._node(only)] if only else list(self._fleet.state.nodes.values())
        asked = [node for node in nodes if node.up and node.health and node.health.state is not NodeState.DRAINING]
        asked = [node for node in asked if node.discovery and profile.harness in node.discovery.harnesses]
        if not asked:
            why = "; ".join(f"{node.name}: {node.fault or 'it takes no loads'}" for node in nodes)
            raise NoNodeError(
                f"No node is up that can load a model ({why}): start `neuron` on a host, and see `cortex status`.",
                retry_after_s=5,
            )
        if profile.source.startswith("pypi:"):
            return self._placed(profile, asked)
        answers = await asyncio.gather(*(self._ask(node.name, profile) for node in asked))
        by_node = {node.name: answer for node, answer in zip(asked, answers, strict=True)}
        errors = [answer for answer in answers if isinstance(answer, ApiError)]
        if len(errors) == len(answers) and len({error.code for error in errors}) == 1:
            raise errors[0]
        found = fit.choose(by_node, profile.context_tokens)
        if found.weights is None:
            raise NothingFitsError(_nothing(profile.source, found), param="model")
        return FitReport(
            _with_weights(profile, found.node, found.weights),
            node=found.node,
            weights=found.weights,
            evict_for_tokens=min(found.weights.context_tokens, WANTED_TOKENS) if found.weights.evicts else 0,
            passed_over=found.passed_over,
        )

    async def _ask(self, node: str, profile: ModelProfile) -> Fit | ApiError:
        try:
            return await self._service.neurons[node].fit(profile.spec())
        except ApiError as error:
            return error

    def _placed(self, profile: ModelProfile, asked: list[Node]) -> FitReport:
        """Return the node for weights that are measured once they are there: the best by the placement of loads."""
        others = frozenset(self._fleet.state.nodes) - {node.name for node in asked}
        candidates = placement.choose(self._fleet.state, profile, others)
        if not candidates:
            raise NothingFitsError(
                f"{profile.source} needs about {profile.memory_bytes / 1e9:.1f} GB, and no node has as much: free "
                "memory (`cortex ps`, `cortex unload`), or take a smaller model (`cortex search`).",
                param="model",
            )
        node = candidates[0].node
        return FitReport(msgspec.structs.replace(profile, preferred_nodes=(node,)), node=node)

    def _node(self, name: str) -> Node:
        node = self._fleet.state.nodes.get(name)
        if node is None:
            known = ", ".join(self._fleet.state.nodes)
            raise UnknownNodeError(f"There is no node '{name}'; there is: {known}.", param="node")
        return node


def _with_weights(profile: ModelProfile, node: str, weights: ChosenWeights) -> ModelProfile:
    """Return the profile of the chosen weights."""
    return msgspec.structs.replace(
        profile,
        source=naming.with_choice(profile.source, weights.choice),
        preferred_nodes=(node,),
        tensor_parallel=len(weights.devices),
        memory_bytes=0,
    )


def _nothing(source: str, found: FleetFit) -> str:
    """Return the message of a fit that found nothing: of each node, why its smallest weights do not fit."""
    smallest = {passed.node: passed for passed in sorted(found.passed_over, key=lambda each: -each.size_bytes)}
    reasons = "; ".join(
        f"{node}: {f'{passed.choice} ({passed.size_bytes / 1e9:.1f} GB), ' if passed.choice else ''}{passed.reason}"
        for node, passed in sorted(smallest.items())
    )
    return (
        f"{source} fits no node. {reasons}. Free memory (`cortex ps`, `cortex unload`), ask for less context, or take "
        "a smaller model (`cortex search`)."
    )
