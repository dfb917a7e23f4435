"""Circuit breakers: one circuit for each model on each node, which keeps requests from a failing replica.

Only a node's own failures count: a connection that cannot be made or breaks, silence, an invalid answer, and the codes
of a neuron that has lost its devices. A client's error is a success, and back-pressure (429, 503, 529) is neither, so
that a busy replica is never taken for a broken one. After ``failures`` in a row a circuit opens; after its open time it
is half-open: one request tries, and its outcome closes the circuit or opens it for twice as long.

A 500, 502 or 504 may be the node's fault or the request's, and a client can repeat a request that causes it. So it
opens no circuit: after ``failures`` in a row, of different requests, the replica is suspect for a while, and gets
requests only where there is no other. There is no clock here: the time is an argument.
"""

from dataclasses import dataclass, field

from cortex.config import BreakerSettings

NO_NODES: frozenset[str] = frozenset()

Circuit = tuple[str, str]
"""A node and a model."""


@dataclass(slots=True)
class _State:
    failures: int = 0
    open_s: float = 0.0
    """Duration for which it is or was last open; 0 if it never was since its last success."""
    opened_at: float = 0.0
    is_tried: bool = False
    """Whether the trial request of the half-open circuit is under way."""


@dataclass(slots=True)
class _Suspicion:
    bodies: set[int] = field(default_factory=set)
    until: float = 0.0


class Breakers:
    """The circuits that have had a failure since their last success; all others are closed."""

    def __init__(self, settings: BreakerSettings) -> None:
        self.settings = settings
        self._states: dict[Circuit, _State] = {}
        self._suspicions: dict[Circuit, _Suspicion] = {}

    def __bool__(self) -> bool:
        """Return whether any circuit has had a failure since its last success."""
        return bool(self._states) or bool(self._suspicions)

    def suspects(self, model: str, now: float) -> frozenset[str]:
        """Return the nodes that get requests for ``model`` only where there is no other."""
        if not self._suspicions:
            return NO_NODES
        return frozenset(
            node for (node, other), suspicion in self._suspicions.items() if other == model and now < suspicion.until
        )

    def suspect(self, node: str, model: str, body: bytes, now: float) -> None:
        """Count a failure that the request may have caused."""
        self.let_go(node, model)
        suspicion = self._suspicions.setdefault((node, model), _Suspicion())
        suspicion.bodies.add(hash(body))
        if len(suspicion.bodies) >= self.settings.failures:
            suspicion.bodies.clear()
            suspicion.until = now + self.settings.open_s

    def blocked(self, model: str, now: float) -> frozenset[str]:
        """Return the nodes that get no requests for ``model``."""
        if not self._states:
            return NO_NODES
        return frozenset(
            node for (node, other), state in self._states.items() if other == model and self._is_open(state, now)
        )

    def retry_after_s(self, model: str, now: float) -> float:
        """Return when the first of the open circuits of ``model`` may be tried."""
        waits = (
            state.opened_at + state.open_s - now
            for (_, other), state in self._states.items()
            if other == model and state.open_s
        )
        return max(1.0, min(waits, default=1.0))

    def ask(self, node: str, model: str) -> None:
        """Record that a request is sent; where the circuit was open, it is the trial request."""
        state = self._states.get((node, model))
        if state is not None and state.open_s:
            state.is_tried = True

    def answer(self, node: str, model: str) -> None:
        """Record that an answer has begun: the circuit closes, and opens at once if the answer breaks off."""
        state = self._states.get((node, model))
        if state is not None:
            state.open_s, state.is_tried = 0.0, False

    def succeed(self, node: str, model: str) -> None:
        """Forget all failures."""
        self._states.pop((node, model), None)
        self._suspicions.pop((node, model), None)

    def fail(self, node: str, model: str, now: float) -> None:
        """Count a failure, and open the circuit if it is one too many."""
        state = self._states.setdefault((node, model), _State())
        state.failures += 1
        state.is_tried = False
        if state.open_s or state.failures >= self.settings.failures:
            state.open_s = min(self.settings.max_open_s, 2 * state.open_s or self.settings.open_s)
            state.opened_at = now

    def let_go(self, node: str, model: str) -> None:
        """Record that a request ended without evidence about the node: another may try."""
        state = self._states.get((node, model))
        if state is not None:
            state.is_tried = False

    def keep(self, nodes: frozenset[str]) -> None:
        """Forget the circuits of all other nodes."""
        self._states = {key: state for key, state in self._states.items() if key[0] in nodes}
        self._suspicions = {key: suspicion for key, suspicion in self._suspicions.items() if key[0] in nodes}

    def _is_open(self, state: _State, now: float) -> bool:
        return bool(state.open_s) and (state.is_tried or now < state.opened_at + state.open_s)
