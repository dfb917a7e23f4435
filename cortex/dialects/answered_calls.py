"""Matching of tool results to tool calls, by the rule that all dialects share.

A result must answer a call. A call without a result is no error: interrupted clients send such histories, and so do
clients that compact theirs. Ids may repeat, as some servers count the calls of each message from zero: each call takes
one result. The wording of the refusal is the dialect's.
"""


class OpenCalls:
    """The calls that still wait for a result."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def add(self, call_id: str) -> None:
        """Add a call."""
        self._open[call_id] = self._open.get(call_id, 0) + 1

    def answer(self, call_id: str) -> bool:
        """Take a result; return whether a call was waiting for it."""
        left = self._open.get(call_id, 0)
        if left:
            self._open[call_id] = left - 1
        return left > 0

    def has_call(self, call_id: str) -> bool:
        """Return whether a call of this id exists, answered or not."""
        return call_id in self._open

    def forget(self) -> None:
        """Forget all calls."""
        self._open.clear()
