"""Whether each result of a tool answers a call: the rule that every dialect holds a conversation to.

A result that answers nothing makes no sense to a model, and templates render it as something that nobody said. A call
without a result is no error: clients that were interrupted send such histories, and so do those that compact theirs.
Ids may come again, as some servers count calls of each turn from zero: each call takes one result. It does not know how
a dialect words the refusal.
"""


class OpenCalls:
    """The calls so far that a result may still answer."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def add(self, call_id: str) -> None:
        """Take a call."""
        self._open[call_id] = self._open.get(call_id, 0) + 1

    def answer(self, call_id: str) -> bool:
        """Take a result; return whether a call was waiting for it."""
        left = self._open.get(call_id, 0)
        if left:
            self._open[call_id] = left - 1
        return left > 0

    def knows(self, call_id: str) -> bool:
        """Return whether there was such a call, so that a result too many is a second one."""
        return call_id in self._open

    def forget(self) -> None:
        """Begin anew, where only the latest calls may be answered."""
        self._open.clear()
