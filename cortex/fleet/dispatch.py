"""From a model's name to an answer that has begun: route, load, ask, and ask another where that can help.

A request is sent again only while nothing of an answer has arrived: after a connection that could not be made, and
after a node's 503, 529 or 429. Silence is not retried, for the node may be working. After a connection that broke
before its first byte, or a node's word that the process behind it was lost, it is sent once more and never a second
time (:mod:`cortex.fleet.deaths`). A node that does not have the model after all, or not now, is believed, and the
request is routed anew. Replicas whose circuit is open are left out, and a model whose replicas are all dead is loaded
elsewhere. Of dialects it knows which nodes speak one.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import msgspec

from cortex._fast.http_client import Response, StaleConnectionError
from cortex._fast.in_flight import Seat
from cortex._fast.peek import peek, splice
from cortex.config import Config, ModelProfile, NodeType
from cortex.dialects.passthrough import CHAT
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
from cortex.fleet.affinity import NO_AFFINITY, Affinity, PrefixHashes, PrefixIndex, prefix_hashes
from cortex.fleet.breaker import Breakers
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.deaths import Deaths
from cortex.fleet.loader import Loader
from cortex.fleet.poller import Poller
from cortex.fleet.refusals import AMBIGUOUS, BACK_PRESSURE, DEATHS, OWN_FAULTS, read_refusal, wrong_head
from cortex.fleet.router import NO_NODES, RETRY_RECOVERY_S, Busy, Decision, Load, Serve, Unknown, offered_profile, route
from cortex.fleet.spare_capacity import SpareCapacity
from cortex.fleet.state import Fleet, FleetState
from cortex.upstream import Header, Pool
from cortex.wire.errors import ApiError, ModelNotFoundError, UpstreamError

log = logging.getLogger("cortex.fleet")

MAX_ATTEMPTS = 8
DEADLY = (
    "Nodes died while they had this request, so that it is not sent to another. The same body is taken again in two "
    "minutes."
)

NOT_READY = "model_not_ready"
"""The code with which a neuron says that a model is on its way in or out: a load of it waits for that."""


class Question(msgspec.Struct, frozen=True):
    """What is asked of a node. ``target`` is the path, ``model`` an id, never an alias.

    ``dialect`` must be spoken, unless ``as_chat`` gives the question as a chat, for a node that speaks that.
    """

    model: str
    dialect: str
    target: bytes
    headers: Sequence[Header]
    body: bytes
    is_stream: bool
    is_awaited: bool = True
    """Whether somebody reads the answer as it comes; else it is bounded as a whole, as one that is not streamed is."""
    arrived_at: float = 0.0
    """By ``time.monotonic``."""
    cache_key: str | None = None
    """A client's own name for what its prompts have in common."""
    principal: str = ""
    """Name of the principal. Prefixes are not shared between principals."""
    as_chat: Callable[[], bytes] | None = None
    priority: int = 0
    """Priority of the request. Below 0: nothing is evicted for it, and it waits for spare capacity."""
    name: str = ""
    """By which the client asked for the model; empty: by its id."""
    on_node: Callable[[str], None] = lambda node: None
    """Told of each node that is asked."""
    take_begun: Callable[[], tuple[str, Seat, Response] | None] = lambda: None
    """Takes over what a node was asked already: its name, the seat there, and the answer, which may have begun."""


@dataclass(slots=True)
class Answer:
    """A node's 200, with its body to come. Close it in every case."""

    node: str
    response: Response
    seat: Seat
    breakers: Breakers
    deaths: Deaths
    body: bytes
    """Of the question."""
    sent_at: float
    is_chat: bool = False
    """Whether the question was asked as a chat, so that this is one."""
    renamed: str = ""
    """The name that the model is to have in it, where the node was told another and cannot know better."""
    is_broken: bool = False

    async def read(self, limit_bytes: int) -> bytes:
        """Return the whole body.

        Raises:
            UpstreamError: it broke off, did not come, or is longer than ``limit_bytes``.
        """
        try:
            return await self.response.read_all(limit_bytes)
        except UpstreamError as error:
            self.note_broken(error)
            raise

    def note_broken(self, error: UpstreamError) -> None:
        """Count it against the node that the answer broke off, unless it is only long, which a request can bring about.

        If the node is lost it is counted against the question too.
        """
        self.is_broken = True
        if isinstance(error, TooLongAnswerError):
            self.breakers.let_go(self.node, self.seat.model)
        else:
            self.breakers.fail(self.node, self.seat.model, time.monotonic())
        if isinstance(error, CutAnswerError):
            self.note_death()

    def note_death(self) -> None:
        """Count it against the question that something died while it had it."""
        self.is_broken = True
        self.deaths.note(self.body, self.sent_at, time.monotonic())

    def close(self) -> None:
        """Give the seat back, and the connection up unless the body is complete."""
        if not self.is_broken and self.response.is_complete:
            self.breakers.succeed(self.node, self.seat.model)
            self.deaths.forget(self.body)
        self.response.close()
        self.seat.release()


class Dispatcher:
    """Finds a node for each request."""

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
        self._prefix_index = PrefixIndex()
        self._spare_capacity = SpareCapacity(fleet)
        self._without_dialects: tuple[FleetState, dict[tuple[str, bool], frozenset[str]]] = fleet.state, {}
        self.breakers = Breakers(config.gateway.breaker)
        self.deaths = Deaths()
        self.reconfigure(config, catalogue)

    def reconfigure(self, config: Config, catalogue: Catalogue) -> None:
        """Go by these from now on."""
        self._catalogue = catalogue
        self._slack = config.gateway.affinity_slack
        self._first_look_s = config.gateway.polling.timeout_s + 1
        self._leftover_wait_s = config.access.leftover_wait_s
        self._names_there = {node.name: node.models for node in config.neurons if node.type is NodeType.OPENAI}
        self.breakers.settings = config.gateway.breaker
        self.breakers.keep(frozenset(node.name for node in config.neurons))

    def has_model(self, model: str) -> bool:
        """Return whether a model is in the catalogue, or on a node even if that is down now, and may be offered."""
        return model in self._catalogue.profiles or (
            self._catalogue.admits(model) and self._fleet.state.has_model(model)
        )

    def unknown(self, name: str) -> ApiError:
        """Return what is said of a model that nobody has: none for good, or for now while a node never answered."""
        unpolled = [node.name for node in self._fleet.state.nodes.values() if node.discovery is None]
        if not unpolled or not self._catalogue.admits(name):
            return ModelNotFoundError(f"The model {name!r} does not exist.", param="model")
        message = f"No node has the model {name!r}, and {', '.join(unpolled)} has not answered yet."
        return NoNodeError(message, retry_after_s=RETRY_RECOVERY_S)

    def only_replica(self, model: str, dialect: str) -> str | None:
        """Return the node that alone serves a model, if it is asked in a dialect with the body as it came."""
        serving = self._fleet.state.serving.get(model, ())
        if len(serving) != 1 or serving[0].name in self._names_there or not self._catalogue.admits(model):
            return None
        discovery = serving[0].discovery
        return serving[0].name if discovery is not None and dialect in discovery.dialects else None

    def load_progress(self, model: str) -> float | None:
        """Return how far the load is that requests for ``model`` wait for; ``None`` if they wait for none."""
        return self._loader.progress(model)

    async def first_look(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Return when every node has been polled once or has had the time to be, or as soon as ``enough`` is true."""
        try:
            async with asyncio.timeout(self._first_look_s):
                while not self._fleet.state.complete and not enough():
                    await self._fleet.changed()
        except TimeoutError:
            pass

    async def ask(self, question: Question) -> Answer:
        """Return the answer of a node to ``question``.

        Raises:
            ModelNotFoundError: nobody offers the model.
            NoNodeError: it cannot be served now.
            ReplyError: a node answered with an error, the last one that was tried.
            ApiError: the load failed, or the last node that was tried could not be reached.
        """
        model = question.model
        excluded = self._without_dialect(question)
        gone: frozenset[str] = frozenset()
        if self.deaths.is_deadly(question.body, time.monotonic()):
            raise DeadlyRequestError(DEADLY)
        if question.priority < 0:
            await self._spare_capacity.wait(model, question.priority, self._leftover_wait_s)
        begun = question.take_begun()
        prefix: PrefixHashes | None = None
        last: ApiError | None = None
        for _ in range(MAX_ATTEMPTS):
            response: Response | None = None
            if begun is not None:
                (node, seat, response), begun = begun, None
                is_chat, sent_at = False, question.arrived_at
            else:
                if prefix is None and self._slack >= 0 and len(self._fleet.state.serving.get(model, ())) > 1:
                    prefix = prefix_hashes(model, question.body, question.cache_key, question.principal)
                node = self._ready(model, excluded | gone, prefix) or await self._find(
                    question, excluded, gone, last, prefix
                )
                question.on_node(node)
                # Counted from here on, before the node knows: a burst must not pile onto one replica.
                seat = self._fleet.in_flight.take(node, model)
                self.breakers.ask(node, model)
                is_chat, sent_at = self._is_asked_as_chat(node, question), time.monotonic()
            try:
                response, sent_at = await self._exchange(node, question, is_chat, response, sent_at)
                if response.status == 200:
                    self._check_head(node, response, question)
                    self.breakers.answer(node, model)
                    if prefix is not None:
                        self._prefix_index.record(prefix, node)
                    return Answer(
                        node,
                        response,
                        seat,
                        self.breakers,
                        self.deaths,
                        question.body,
                        sent_at,
                        is_chat,
                        self._renamed(node, question),
                    )
                refusal = await self._read_refusal(node, response, is_chat)
            except (ConnectError, ConnectionLostError) as error:
                seat.release()
                last = error
                self.breakers.fail(node, model, time.monotonic())
                self._poller.poll_soon(node)
                if isinstance(error, ConnectionLostError):
                    self._note_death(question, sent_at)
                self._on_retry(node, error.code)
                gone |= {node}
                continue
            except PoolFullError as error:
                seat.release()
                last = error
                self.breakers.let_go(node, model)
                self._on_retry(node, error.code)
                excluded |= {node}
                continue
            except UpstreamError as error:
                seat.release()
                if isinstance(error, TooLongAnswerError):
                    self.breakers.let_go(node, model)
                else:
                    self.breakers.fail(node, model, time.monotonic())
                if isinstance(error, CutAnswerError):
                    self.deaths.note(question.body, sent_at, time.monotonic())
                raise
            except BaseException:
                seat.release()
                self.breakers.let_go(node, model)
                raise
            seat.release()
            is_missing = refusal.status == ModelNotFoundError.status and refusal.code == ModelNotFoundError.code
            if refusal.code in OWN_FAULTS or isinstance(refusal, NodeDeniedError):
                self.breakers.fail(node, model, time.monotonic())
                last = refusal
                if refusal.code in DEATHS:
                    self._note_death(question, sent_at)
                excluded |= {node}
            elif is_missing or refusal.code == NOT_READY:
                # On its way in or out, or gone: a load joins the one, waits for the other, and is needed for the third.
                self.breakers.let_go(node, model)
                self._fleet.forget_model(node, model)
                last = NoNodeError(f"{node} does not have {model} ready any more.", retry_after_s=1)
            elif refusal.status in BACK_PRESSURE:
                self.breakers.let_go(node, model)
                last = refusal
                excluded |= {node}
            else:
                if refusal.status in AMBIGUOUS:
                    self.breakers.suspect(node, model, question.body, time.monotonic())
                else:
                    self.breakers.succeed(node, model)
                raise refusal
            self._on_retry(node, refusal.code)
        assert last is not None
        raise last

    async def _exchange(
        self, node: str, question: Question, is_chat: bool, begun: Response | None, sent_at: float
    ) -> tuple[Response, float]:
        """Return an answer whose head is there, and when that was asked for.

        A node may close a kept connection just as a request goes out on it, or die of the request: that counts as a
        death until a complete answer clears it, and a connection of its own tells which it was.

        Raises:
            DeadlyRequestError: it was one death too many.
            ApiError: as :meth:`~cortex.upstream.Pool.request`.
        """
        try:
            if begun is not None:
                return await begun.begin(), sent_at
            return await self._post(node, question, is_chat), sent_at
        except StaleConnectionError:
            self._note_death(question, sent_at)
        sent_at = time.monotonic()
        try:
            return await self._post(node, question, is_chat, is_fresh=True), sent_at
        except ConnectionLostError:
            self._note_death(question, sent_at)
            raise

    def _note_death(self, question: Question, sent_at: float) -> None:
        """Count it against a question that something died while it had it. Raises if it was one death too many."""
        if self.deaths.note(question.body, sent_at, time.monotonic()):
            raise DeadlyRequestError(DEADLY)

    def _check_head(self, node: str, response: Response, question: Question) -> None:
        """Give a 200 up that does not begin as an answer does. Raises :class:`NotAnAnswerError`."""
        if wrong := wrong_head(response, is_stream=question.is_stream):
            response.close()
            raise NotAnAnswerError(f"{node} answered {wrong}.")

    async def _read_refusal(self, node: str, response: Response, is_chat: bool) -> ApiError:
        """Return the error that an answer is; it is closed. Raises :class:`UpstreamError`."""
        try:
            pool = self._pools.get(node)
            stall_s = pool.timeouts.stall_s if pool is not None else 1.0
            refusal = await read_refusal(node, response, stall_s, is_chat=is_chat)
        finally:
            response.close()
        if isinstance(refusal, NotAnAnswerError):
            raise refusal
        return refusal

    def _without_dialect(self, question: Question) -> frozenset[str]:
        """Return the nodes that cannot be asked ``question``; one that has not said what it speaks is none of them."""
        state, known = self._without_dialects
        if state is not self._fleet.state:
            known = {}
            self._without_dialects = self._fleet.state, known
        key = question.dialect, question.as_chat is not None
        found = known.get(key)
        if found is None:
            found = known[key] = frozenset(
                node.name
                for node in self._fleet.state.nodes.values()
                if node.discovery is not None and not _can_ask(question, node.discovery.dialects)
            )
        return found

    def _decide(
        self,
        model: str,
        excluded: frozenset[str],
        gone: frozenset[str],
        prefix: PrefixHashes | None,
        profile: ModelProfile | None = None,
    ) -> Decision:
        fleet = self._fleet
        affinity = NO_AFFINITY if prefix is None else self._affinity(prefix)
        return route(fleet.state, model, profile, fleet.in_flight.by_node, excluded, affinity, self._slack, gone)

    def _ready(self, model: str, excluded: frozenset[str], prefix: PrefixHashes | None) -> str | None:
        """Return a node that has the model ready, if that is how it is and no circuit has seen a failure."""
        if self.breakers or model not in self._fleet.state.serving:
            return None
        decision = self._decide(model, excluded, NO_NODES, prefix)
        return decision.node if isinstance(decision, Serve) else None

    async def _find(
        self,
        question: Question,
        excluded: frozenset[str],
        gone: frozenset[str],
        last: ApiError | None,
        prefix: PrefixHashes | None,
    ) -> str:
        """Return a node that has the model ready, loading it if need be.

        ``excluded`` nodes have refused the request, ``gone`` ones are as if they were down.
        """
        model = question.model
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
                decision = self._decide(model, excluded | suspects, gone, prefix)
                if isinstance(decision, Serve):
                    return decision
            return self._decide(model, excluded, gone, prefix, profile)

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
                    return await self._loader.load(profile, candidates, may_evict=question.priority >= 0)
                except LoadRefusedError as error:
                    if not gone:
                        raise
                    # For good elsewhere, and not for good where it was: that node may come back.
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

    def _affinity(self, prefix: PrefixHashes) -> Affinity:
        return self._prefix_index.find(prefix, self._fleet.state.nodes.__contains__)

    def _is_asked_as_chat(self, node: str, question: Question) -> bool:
        """Return whether a node has to be asked in chat, which it speaks, for want of the question's own dialect."""
        if question.as_chat is None:
            return False
        known = self._fleet.state.nodes.get(node)
        discovery = known.discovery if known is not None else None
        return discovery is not None and question.dialect not in discovery.dialects

    def _renamed(self, node: str, question: Question) -> str:
        """Return the name that a node's answer has to be given: one of ours puts it in by itself."""
        names = self._names_there.get(node)
        name = question.name or question.model
        return "" if names is None or name == (names.get(question.model) or question.model) else name

    def _post(self, node: str, question: Question, is_chat: bool, *, is_fresh: bool = False) -> Awaitable[Response]:
        pool = self._pools.get(node)
        if pool is None:
            raise ConnectError(f"{node} is not a node of this gateway any more.", retry_after_s=1)
        headers, target, body = question.headers, question.target, question.body
        if is_chat and question.as_chat is not None:
            target, body = CHAT.path.encode(), question.as_chat()
        names = self._names_there.get(node)
        if names is not None:  # a server that is not ours: it is told no more than it needs
            headers = [(name, value) for name, value in headers if not name.startswith(b"x-cortex-")]
            if other := names.get(question.model, ""):
                body = splice(body, peek(body), other)
        timeouts = pool.timeouts
        return pool.request(
            b"POST",
            target,
            headers,
            body,
            first_byte_s=timeouts.first_byte_s if question.is_stream else timeouts.answer_s,
            whole_s=0 if question.is_stream and question.is_awaited else timeouts.answer_s,
            is_fresh=is_fresh,
            tells_stale=not is_fresh,
        )


def _can_ask(question: Question, dialects: Sequence[str]) -> bool:
    return question.dialect in dialects or (question.as_chat is not None and CHAT.name in dialects)
