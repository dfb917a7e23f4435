"""The data of the charts: a point for each second, kept for some minutes.

A function of the fleet and the ended requests, with a history and no clock. A node's speed is its own count of tokens
over its own clock, so it is right for all gateways, however late a poll is.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from cortex.dashboard.journal import Batch, Entry
from cortex.fleet.state import Node, devices_in_use

SERIES = ("at", "tokens_per_s", "requests", "errors", "ttft_p50_s", "ttft_p95_s", "running", "waiting", "used", "total")
"""Names of the numbers of a point; ``used`` and ``total`` are bytes of device memory."""
HISTORY_POINTS = 300
WINDOW_S = 30.0
"""Window of the quantiles."""
WINDOW_REQUESTS = 1024
LEAST_SPAN_S = 1.0
"""Least time, by the node's clock, between two counts: over less, a speed is mostly noise."""

Point = tuple[float | None, ...]


class Rates:
    """The history of the whole fleet, and the current speed of each node."""

    def __init__(self) -> None:
        self.points: deque[Point] = deque(maxlen=HISTORY_POINTS)
        self.tokens_per_s: dict[str, float] = {}
        self._generated: dict[str, tuple[float, int]] = {}
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=WINDOW_REQUESTS)

    def take(self, at: float, nodes: Mapping[str, Node], ended: Batch, elapsed_s: float) -> Point:
        """Add the point of this moment and return it."""
        for name in self._generated.keys() - nodes.keys():
            del self._generated[name], self.tokens_per_s[name]
        for node in nodes.values():
            self._measure(node)
        elsewhere = sum(entry.tokens_out for entry in ended.entries if _counts_nothing(nodes.get(entry.node)))
        tokens_per_s = sum(self.tokens_per_s.values()) + elsewhere / max(elapsed_s, 1e-3)
        up = [node for node in nodes.values() if node.up]
        devices = devices_in_use(up)
        total = sum(device.memory_total_bytes for device in devices)
        waiting = sum(num_waiting(node) for node in up)
        running = max(0, sum(status.running for node in up for status in node.models.values()) - waiting)
        point = (
            round(at, 1),
            round(tokens_per_s, 1),
            ended.requests,
            ended.errors,
            *self._quantiles(at, ended.entries),
            running,
            waiting,
            total - sum(device.memory_free_bytes for device in devices),
            total,
        )
        self.points.append(point)
        return point

    def _measure(self, node: Node) -> None:
        """Update a node's speed if it has been polled again."""
        if not node.up or node.health is None:
            self._generated.pop(node.name, None)
            self.tokens_per_s.pop(node.name, None)
            return
        now = node.health.uptime_s, sum(worker.generated for worker in node.health.workers)
        before = self._generated.get(node.name)
        if before is None or now[0] < before[0] or now[1] < before[1]:  # a new node, or a restarted one
            self.tokens_per_s[node.name] = 0.0
        elif now[0] < before[0] + LEAST_SPAN_S:
            return
        else:
            self.tokens_per_s[node.name] = (now[1] - before[1]) / (now[0] - before[0])
        self._generated[node.name] = now

    def _quantiles(self, at: float, entries: Sequence[Entry]) -> tuple[float | None, float | None]:
        self._first_tokens.extend((entry.at, entry.ttft_s) for entry in entries if entry.ttft_s is not None)
        while self._first_tokens and self._first_tokens[0][0] < at - WINDOW_S:
            self._first_tokens.popleft()
        ordered = sorted(seconds for _, seconds in self._first_tokens)
        if not ordered:
            return None, None
        last = len(ordered) - 1
        return round(ordered[last // 2], 4), round(ordered[round(last * 0.95)], 4)


def num_waiting(node: Node) -> int:
    """Return the number of sequences that wait on a node."""
    return sum(worker.waiting for worker in node.health.workers) if node.health else 0


def _counts_nothing(node: Node | None) -> bool:
    """Return whether a node is no neuron, so that no worker of it counts generated tokens."""
    return node is not None and node.health is not None and not node.health.workers
