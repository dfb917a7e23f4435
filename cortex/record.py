"""What is written down of a request when it has ended: one log line, and its metrics. Never a word of its text.

A :class:`Record` is filled as the request goes and finished exactly once, however it ended. Time to first token is
to the first token, not to the first byte: heartbeats and headers do not count.
"""

import logging
import time

from cortex import logs
from cortex.dialects.passthrough import Usage
from cortex.metrics import Ended, Metrics
from cortex.tracing import Trace

log = logging.getLogger("cortex.request")

CLIENT_CLOSED_REQUEST = 499
"""The status that is counted where the client left before its answer was complete."""


class Record:
    """One request. ``model`` is set only once it is known to exist, so that it may label a metric."""

    __slots__ = (
        "dialect",
        "finish",
        "first_token_at",
        "is_stream",
        "key",
        "model",
        "node",
        "num_token_frames",
        "request_id",
        "started_at",
        "status",
        "trace",
        "usage",
    )

    def __init__(self, request_id: str, dialect: str) -> None:
        self.request_id = request_id
        self.dialect = dialect
        self.model = ""
        self.node = ""
        self.key = ""
        """The name of the key it came with."""
        self.num_token_frames = 0
        """Frames of a stream with something generated in them."""
        self.status = 500
        self.finish = ""
        self.is_stream = False
        self.usage: Usage | None = None
        self.trace: Trace | None = None
        self.started_at = time.perf_counter()
        self.first_token_at: float | None = None

    def note_node(self, node: str) -> None:
        """Note who is asked, the last one if several are."""
        self.node = node

    def note_first_token(self) -> None:
        """Take the time, the first time."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()

    def tokens_used(self, prompt_tokens: int) -> int:
        """Return what to book: what the node said, or where the answer broke off after its first token, an estimate.

        ``prompt_tokens`` is that of the prompt; a frame of a stream is about a token.
        """
        if self.usage is not None:
            return self.usage.tokens_in + self.usage.tokens_out
        return prompt_tokens + self.num_token_frames if self.first_token_at is not None else 0

    def finish_with(self, metrics: Metrics) -> None:
        """Count the request and write its line."""
        now = time.perf_counter()
        total_s = now - self.started_at
        fields: dict[str, object] = {"id": self.request_id, "dialect": self.dialect}
        if self.key:
            fields["key"] = self.key
        fields["model"] = self.model
        fields["node"] = self.node
        fields["status"] = self.status
        fields["stream"] = self.is_stream
        fields["finish"] = self.finish
        tokens = first_token_s = tokens_per_s = None
        if self.usage is not None:
            tokens = tokens_in, tokens_out, tokens_cached = self.usage.counts()
            fields["tokens_in"] = tokens_in
            fields["tokens_out"] = tokens_out
            fields["tokens_cached"] = tokens_cached
        if self.first_token_at is not None:
            first_token_s = self.first_token_at - self.started_at
            fields["ttft_s"] = round(first_token_s, 6)
            generation_s = now - self.first_token_at
            if tokens is not None and tokens_out > 1 and generation_s > 0:
                # The first token's time is the prompt's; the others are what the speed is about.
                tokens_per_s = (tokens_out - 1) / generation_s
        fields["total_s"] = round(total_s, 6)
        if self.trace is not None:
            fields["trace"] = self.trace.trace_id
            self.trace.end(fields)
        metrics.note_ended(
            Ended(self.model, self.node, self.dialect, self.status, total_s, first_token_s, tokens_per_s, tokens)
        )
        logs.info(log, "request", fields)
        metrics.on_finished(fields)
