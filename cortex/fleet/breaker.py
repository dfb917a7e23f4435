"""Which replicas are left alone because they have been failing: one circuit for each model on each node.

Only a node's own failures count: a connection that cannot be made or breaks, silence, what is no answer, and the few
codes with which a neuron says that its devices are lost. What a client did wrong is a success, and back-pressure (429,
503, 529) is neither, so that a busy replica is never taken for a broken one. After ``failures`` in a row a circuit
opens; when it has been open for a while one request tries, and its outcome closes the circuit or opens it for twice as
long.

A 500, 502 or 504 may be the node's fault or the request's, and a request that makes a node answer it can be sent at
will. So none opens a circuit: after as many in a row, of as many different requests, a replica is doubted for a while,
which means that it is asked only where no other replica can be. It looks at no clock: the time is an argument.
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
    """How long it is or was last open; 0 while it never was since its last success."""
    opened_at: float = 0.0
    is_tried: bool = False
    """Whether the one request that may try is under way."""


@dataclass(slots=True)
class _Doubt:
    bodies: set[int] = field(default_factory=set)
    until: float = 0.0


class Breakers:
    """The circuits that have seen a failure since their last success; all others are closed."""

    def __init__(self, settings: BreakerSettings) -> None:
        self.settings = settings
        self._states: dict[Circuit, _State] = {}
        self._doubts: dict[Circuit, _Doubt] = {}

    def __bool__(self) -> bool:
        """Return whether any has seen a failure since its last success."""
        return bool(self._states) or bool(self._doubts)

    def doubted(self, model: str, now: float) -> frozenset[str]:
        """Return the nodes that are to be asked for ``model`` only where there is no other."""
        if not self._doubts:
            return NO_NODES
        return frozenset(node for (node, other), doubt in self._doubts.items() if other == model and now < doubt.until)

    def doubt(self, node: str, model: str, body: bytes, now: float) -> None:
        """Count a failure that may be the request's."""
        self.let_go(node, model)
        doubt = self._doubts.setdefault((node, model), _Doubt())
        doubt.bodies.add(hash(body))
        if len(doubt.bodies) >= self.settings.failures:
            doubt.bodies.clear()
            doubt.until = now + self.settings.open_s

    def blocked(self, model: str, now: float) -> frozenset[str]:
        """Return the nodes that are not to be asked for ``model``."""
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
        """Note that a request goes there; where the circuit was open, it is the one that tries."""
        state = self._states.get((node, model))
        if state is not None and state.open_s:
            state.is_tried = True

    def answer(self, node: str, model: str) -> None:
        """Note that an answer has begun: the circuit is closed again, and opens at once if it breaks off."""
        state = self._states.get((node, model))
        if state is not None:
            state.open_s, state.is_tried = 0.0, False

    def succeed(self, node: str, model: str) -> None:
        """Forget all failures."""
        self._states.pop((node, model), None)
        self._doubts.pop((node, model), None)

    def fail(self, node: str, model: str, now: float) -> None:
        """Count a failure, and open the circuit if it is one too many."""
        state = self._states.setdefault((node, model), _State())
        state.failures += 1
        state.is_tried = False
        if state.open_s or state.failures >= self.settings.failures:
            state.open_s = min(self.settings.max_open_s, 2 * state.open_s or self.settings.open_s)
            state.opened_at = now

    def let_go(self, node: str, model: str) -> None:
        """Note that a request ended without saying anything of the node: another may try."""
        state = self._states.get((node, model))
        if state is not None:
            state.is_tried = False

    def keep(self, nodes: frozenset[str]) -> None:
        """Forget the circuits of nodes that are not among these any more."""
        self._states = {key: state for key, state in self._states.items() if key[0] in nodes}
        self._doubts = {key: doubt for key, doubt in self._doubts.items() if key[0] in nodes}

    def _is_open(self, state: _State, now: float) -> bool:
        return bool(state.open_s) and (state.is_tried or now < state.opened_at + state.open_s)
