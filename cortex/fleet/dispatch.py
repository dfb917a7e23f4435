"""Dispatch of a request, up to a response that has begun: route, load, send, and retry elsewhere where that can help.

A request is retried only while nothing of a response has arrived: after a failed connection, and after a node's 503,
529 or 429. Silence is not retried, since the node may be working. After a connection that broke before its first byte,
or a node's report that its worker process was lost, it is retried once (:mod:`cortex.fleet.deaths`). Where a node does
not have the model any more, the request is routed anew. Replicas whose circuit is open are left out, and a model whose
replicas are all dead is loaded elsewhere.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import assert_never

from cortex._fast.http_client import Response, StaleConnectionError
from cortex._fast.peek import peek, splice
from cortex.config import Config, ModelProfile, NodeType
from cortex.dialects.registry import CHAT
from cortex.errors import (
    ConnectError,
    ConnectionLostError,
    CutAnswerError,
    DeadlyRequestError,
    LoadRefusedError,
    NodeDeniedError,
    NoNodeError,
    NotAnAnswerError,
    PoolFullError,
    TooLongAnswerError,
)
from cortex.fleet.breaker import Breakers
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.choice import Choice, Choices, least_busy
from cortex.fleet.deaths import Deaths
from cortex.fleet.loader import Loader
from cortex.fleet.node_request import NodeRequest, NodeResponse
from cortex.fleet.poller import Poller
from cortex.fleet.refusals import AMBIGUOUS, BACK_PRESSURE, DEATHS, OWN_FAULTS, read_refusal, wrong_head
from cortex.fleet.router import NO_NODES, RETRY_RECOVERY_S, Busy, Decision, Load, Serve, Unknown, offered_profile, route
from cortex.fleet.spare_capacity import SpareCapacity
from cortex.fleet.state import Fleet, FleetState
from cortex.upstream import Pool
from cortex.wire.errors import ApiError, ModelNotFoundError, UpstreamError

log = logging.getLogger("cortex.fleet")

MAX_ATTEMPTS = 8
DEADLY = (
    "Nodes died while they had this request, so that it is not sent to another. The same body is taken again in two "
    "minutes."
)

NOT_READY = "model_not_ready"
"""Error code of a neuron for a model that is being loaded or unloaded: a load of it waits for that."""


class Dispatcher:
    """Sends each request to a node."""

    def __init__(
        self,
        fleet: Fleet,
        config: Config,
        catalogue: Catalogue,
        pools: dict[str, Pool],
        loader: Loader,
        poller: Poller,
        on_retry: Callable[[str, str], None] = lambda node, reason: None,
    ) -> None:
        self._fleet = fleet
        self._pools = pools
        self._loader = loader
        self._poller = poller
        self._on_retry = on_retry
        self._choices = Choices(config.gateway, catalogue.profiles)
        self._spare_capacity = SpareCapacity(fleet)
        self._without_dialects: tuple[FleetState, dict[tuple[str, bool], frozenset[str]]] = fleet.state, {}
        self.breakers = Breakers(config.gateway.breaker)
        self.deaths = Deaths()
        self.reconfigure(config, catalogue)

    def reconfigure(self, config: Config, catalogue: Catalogue) -> None:
        """Apply other settings and models."""
        self._catalogue = catalogue
        self._choices.reconfigure(config.gateway, catalogue.profiles)
        self._first_look_s = config.gateway.polling.timeout_s + 1
        self._spare_capacity_wait_s = config.access.spare_capacity_wait_s
        self._names_there = {node.name: node.models for node in config.neurons if node.type is NodeType.OPENAI}
        self.breakers.settings = config.gateway.breaker
        self.breakers.keep(frozenset(node.name for node in config.neurons))

    def has_model(self, model: str) -> bool:
        """Return whether a model is in the catalogue, or on a node even if that is down now, and may be offered."""
        return model in self._catalogue.profiles or (
            self._catalogue.admits(model) and self._fleet.state.has_model(model)
        )

    def unknown(self, name: str) -> ApiError:
        """Return the error for a model that no node has: not found, or unavailable while a node was never polled."""
        unpolled = [node.name for node in self._fleet.state.nodes.values() if node.discovery is None]
        if not unpolled or not self._catalogue.admits(name):
            return ModelNotFoundError(f"The model {name!r} does not exist.", param="model")
        message = f"No node has the model {name!r}, and {', '.join(unpolled)} has not answered yet."
        return NoNodeError(message, retry_after_s=RETRY_RECOVERY_S)

    def replicas(self, model: str, dialect: str) -> tuple[str, ...]:
        """Return the nodes that serve a model; none unless each has the dialect and takes the body unchanged."""
        serving = self._fleet.state.serving.get(model, ())
        if not self._catalogue.admits(model):
            return ()
        for node in serving:
            if node.name in self._names_there or node.discovery is None or dialect not in node.discovery.dialects:
                return ()
        return tuple(node.name for node in serving)

    def choose(self, model: str, body: bytes, cache_key: str | None, principal: str) -> tuple[str, Choice] | None:
        """Return the best of several replicas at once, and the choice, which is told when the node has begun to answer.

        ``None`` where that takes more than a moment: no node has the model, or a circuit has had a failure.
        """
        choice = self._choices.begin(model, body, cache_key, principal)
        node = self._ready(model, NO_NODES, choice)
        return None if node is None else (node, choice)

    def load_progress(self, model: str) -> float | None:
        """Return the progress of the load that requests for ``model`` wait for; ``None`` if there is none."""
        return self._loader.progress(model)

    async def first_look(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Wait until every node was polled once or could have been, or until ``enough`` is true."""
        try:
            async with asyncio.timeout(self._first_look_s):
                while not self._fleet.state.complete and not enough():
                    await self._fleet.changed()
        except TimeoutError:
            pass

    async def ask(self, request: NodeRequest) -> NodeResponse:
        """Return the response of a node to ``request``.

        Raises:
            ModelNotFoundError: no node offers the model.
            NoNodeError: it cannot be served now.
            ReplyError: the last node that was tried answered with an error.
            ApiError: the load failed, or the last node that was tried could not be reached.
        """
        model = request.model
        excluded = self._without_dialect(request)
        gone: frozenset[str] = frozenset()
        if self.deaths.is_deadly(request.body, time.monotonic()):
            raise DeadlyRequestError(DEADLY)
        if request.priority < 0:
            await self._spare_capacity.wait(model, request.priority, self._spare_capacity_wait_s)
        begun = request.take_begun()
        choice: Choice | None = None
        last: ApiError | None = None
        for _ in range(MAX_ATTEMPTS):
            response: Response | None = None
            if begun is not None:
                (node, in_flight_request, response, choice), begun = begun, None
                is_chat, sent_at = False, request.arrived_at
            else:
                if choice is None and len(self._fleet.state.serving.get(model, ())) > 1:
                    choice = self._choices.begin(model, request.body, request.cache_key, request.principal)
                node = self._ready(model, excluded | gone, choice) or await self._find(
                    request, excluded, gone, last, choice
                )
                request.on_node(node)
                # Counted before it is sent: many requests at once must not pile onto one replica.
                in_flight_request = self._fleet.in_flight.add(node, model)
                self.breakers.ask(node, model)
                is_chat, sent_at = self._is_asked_as_chat(node, request), time.monotonic()
            try:
                response, sent_at = await self._exchange(node, request, is_chat, response, sent_at)
                if response.status == 200:
                    self._check_head(node, response, request)
                    self.breakers.answer(node, model)
                    if choice is not None:
                        choice.record(node)
                    return NodeResponse(
                        node,
                        response,
                        in_flight_request,
                        self.breakers,
                        self.deaths,
                        request.body,
                        sent_at,
                        is_chat,
                        self._renamed(node, request),
                    )
                refusal = await self._read_refusal(node, response, is_chat)
            except (ConnectError, ConnectionLostError) as error:
                in_flight_request.release()
                last = error
                self.breakers.fail(node, model, time.monotonic())
                self._poller.poll_soon(node)
                if isinstance(error, ConnectionLostError):
                    self._record_death(request, sent_at)
                self._on_retry(node, error.code)
                gone |= {node}
                continue
            except PoolFullError as error:
                in_flight_request.release()
                last = error
                self.breakers.let_go(node, model)
                self._on_retry(node, error.code)
                excluded |= {node}
                continue
            except UpstreamError as error:
                in_flight_request.release()
                if isinstance(error, TooLongAnswerError):
                    self.breakers.let_go(node, model)
                else:
                    self.breakers.fail(node, model, time.monotonic())
                if isinstance(error, CutAnswerError):
                    self.deaths.record(request.body, sent_at, time.monotonic())
                raise
            except BaseException:
                in_flight_request.release()
                self.breakers.let_go(node, model)
                raise
            in_flight_request.release()
            is_missing = refusal.status == ModelNotFoundError.status and refusal.code == ModelNotFoundError.code
            if refusal.code in OWN_FAULTS or isinstance(refusal, NodeDeniedError):
                self.breakers.fail(node, model, time.monotonic())
                last = refusal
                if refusal.code in DEATHS:
                    self._record_death(request, sent_at)
                excluded |= {node}
            elif is_missing or refusal.code == NOT_READY:
                # Being loaded, being unloaded, or gone: a new load joins the first, waits for the second, or is needed.
                self.breakers.let_go(node, model)
                self._fleet.forget_model(node, model)
                last = NoNodeError(f"{node} does not have {model} ready any more.", retry_after_s=1)
            elif refusal.status in BACK_PRESSURE:
                self.breakers.let_go(node, model)
                last = refusal
                excluded |= {node}
            else:
                if refusal.status in AMBIGUOUS:
                    self.breakers.suspect(node, model, request.body, time.monotonic())
                else:
                    self.breakers.succeed(node, model)
                raise refusal
            self._on_retry(node, refusal.code)
        assert last is not None
        raise last

    async def _exchange(
        self, node: str, request: NodeRequest, is_chat: bool, begun: Response | None, sent_at: float
    ) -> tuple[Response, float]:
        """Return a response whose head has arrived, and the time at which the request was sent.

        A node may close a kept-alive connection just as a request is sent on it, or die of the request: that counts as
        a death until a complete answer clears it, and the request is sent again on a fresh connection.

        Raises:
            DeadlyRequestError: the request has reached the limit of deaths.
            ApiError: as :meth:`~cortex.upstream.Pool.request`.
        """
        try:
            if begun is not None:
                return await begun.begin(), sent_at
            return await self._post(node, request, is_chat), sent_at
        except StaleConnectionError:
            self._record_death(request, sent_at)
        sent_at = time.monotonic()
        try:
            return await self._post(node, request, is_chat, is_fresh=True), sent_at
        except ConnectionLostError:
            self._record_death(request, sent_at)
            raise

    def _record_death(self, request: NodeRequest, sent_at: float) -> None:
        """Count a death of a request. Raises :class:`DeadlyRequestError` at the limit."""
        if self.deaths.record(request.body, sent_at, time.monotonic()):
            raise DeadlyRequestError(DEADLY)

    def _check_head(self, node: str, response: Response, request: NodeRequest) -> None:
        """Close a response with status 200 and an invalid head. Raises :class:`NotAnAnswerError`."""
        if wrong := wrong_head(response, is_stream=request.is_stream):
            response.close()
            raise NotAnAnswerError(f"{node} answered {wrong}.")

    async def _read_refusal(self, node: str, response: Response, is_chat: bool) -> ApiError:
        """Return the error of a response, and close it. Raises :class:`UpstreamError`."""
        try:
            pool = self._pools.get(node)
            stall_s = pool.timeouts.stall_s if pool is not None else 1.0
            refusal = await read_refusal(node, response, stall_s, is_chat=is_chat)
        finally:
            response.close()
        if isinstance(refusal, NotAnAnswerError):
            raise refusal
        return refusal

    def _without_dialect(self, request: NodeRequest) -> frozenset[str]:
        """Return the nodes that do not have the dialect of ``request``, among those that were polled."""
        state, known = self._without_dialects
        if state is not self._fleet.state:
            known = {}
            self._without_dialects = self._fleet.state, known
        key = request.dialect, request.as_chat is not None
        found = known.get(key)
        if found is None:
            found = known[key] = frozenset(
                node.name
                for node in self._fleet.state.nodes.values()
                if node.discovery is not None and not _can_ask(request, node.discovery.dialects)
            )
        return found

    def _decide(
        self,
        model: str,
        excluded: frozenset[str],
        gone: frozenset[str],
        choice: Choice | None,
        profile: ModelProfile | None = None,
    ) -> Decision:
        fleet = self._fleet
        return route(fleet.state, model, profile, fleet.in_flight.by_node, excluded, gone, choice or least_busy)

    def _ready(self, model: str, excluded: frozenset[str], choice: Choice | None) -> str | None:
        """Return a node that has the model ready, if there is one and no circuit has had a failure."""
        if self.breakers or model not in self._fleet.state.serving:
            return None
        decision = self._decide(model, excluded, NO_NODES, choice)
        return decision.node if isinstance(decision, Serve) else None

    async def _find(
        self,
        request: NodeRequest,
        excluded: frozenset[str],
        gone: frozenset[str],
        last: ApiError | None,
        choice: Choice | None,
    ) -> str:
        """Return a node that has the model ready, after a load if need be.

        ``excluded`` nodes have refused the request, ``gone`` nodes count as down.
        """
        model = request.model
        profile = self._catalogue.profiles.get(model)
        now = time.monotonic()
        blocked = self.breakers.blocked(model, now)
        if blocked:
            gone |= blocked
            last = last or NoNodeError(
                f"Every replica of {model} has been failing; it is tried again in a moment.",
                retry_after_s=self.breakers.retry_after_s(model, now),
            )

        def decide() -> Decision:
            # A suspect replica gets requests only where there is no other.
            if suspects := self.breakers.suspects(model, now):
                decision = self._decide(model, excluded | suspects, gone, choice)
                if isinstance(decision, Serve):
                    return decision
            return self._decide(model, excluded, gone, choice, profile)

        decision = decide()
        if not isinstance(decision, Serve) and not self._fleet.state.complete:
            # Just started: a node that has not been polled yet may have the model ready.
            await self.first_look(lambda: isinstance(decide(), Serve))
            decision = decide()
        match decision:
            case Serve(node):
                return node
            case Load(candidates):
                profile = profile or offered_profile(self._fleet.state, model, gone)
                assert profile is not None
                try:
                    return await self._loader.load(profile, candidates, may_evict=request.priority >= 0)
                except LoadRefusedError as error:
                    if not gone:
                        raise
                    # The other nodes refuse for good, but a node that is gone may come back.
                    raise NoNodeError(
                        f"{', '.join(sorted(gone))} cannot be asked now. {error.message}",
                        retry_after_s=RETRY_RECOVERY_S,
                    ) from error
            case Busy(retry_after_s, reason):
                raise last or NoNodeError(f"{reason[0].upper()}{reason[1:]}.", retry_after_s=retry_after_s)
            case Unknown():
                raise last or self.unknown(model)
            case _:
                assert_never(decision)

    def _is_asked_as_chat(self, node: str, request: NodeRequest) -> bool:
        """Return whether a request is sent to a node as a chat, since the node lacks the request's own dialect."""
        if request.as_chat is None:
            return False
        known = self._fleet.state.nodes.get(node)
        discovery = known.discovery if known is not None else None
        return discovery is not None and request.dialect not in discovery.dialects

    def _renamed(self, node: str, request: NodeRequest) -> str:
        """Return the model name to write into a node's response; empty for a neuron, which does so itself."""
        names = self._names_there.get(node)
        name = request.name or request.model
        return "" if names is None or name == (names.get(request.model) or request.model) else name

    def _post(self, node: str, request: NodeRequest, is_chat: bool, *, is_fresh: bool = False) -> Awaitable[Response]:
        pool = self._pools.get(node)
        if pool is None:
            raise ConnectError(f"{node} is not a node of this gateway any more.", retry_after_s=1)
        headers, target, body = request.headers, request.target, request.body
        if is_chat and request.as_chat is not None:
            target, body = CHAT.path.encode(), request.as_chat()
        names = self._names_there.get(node)
        if names is not None:  # no neuron: it gets only the headers it needs
            headers = [(name, value) for name, value in headers if not name.startswith(b"x-cortex-")]
            if other := names.get(request.model, ""):
                body = splice(body, peek(body), other)
        timeouts = pool.timeouts
        return pool.request(
            b"POST",
            target,
            headers,
            body,
            first_byte_s=timeouts.first_byte_s if request.is_stream else timeouts.answer_s,
            whole_s=0 if request.is_stream and request.is_awaited else timeouts.answer_s,
            is_fresh=is_fresh,
            tells_stale=not is_fresh,
        )


def _can_ask(request: NodeRequest, dialects: Sequence[str]) -> bool:
    return request.dialect in dialects or (request.as_chat is not None and CHAT.name in dialects)
