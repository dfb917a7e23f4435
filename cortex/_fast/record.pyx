"""Record of a request, kept until :mod:`cortex.request_log` writes it.

It never holds text of the request. Time to first token is to the first token, not to the first byte: heartbeats and
headers do not count.
"""

cimport cython
from libc.math cimport NAN, floor, isnan
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME

from cortex._fast.clock cimport seconds_of


cdef double to_microseconds(double time_s) noexcept:
    """Return a time without what is below a microsecond."""
    return floor(time_s * 1e6 + 0.5) / 1e6


@cython.final
@cython.freelist(64)
cdef class Record:
    """Record of one request. ``model`` is set only once it is known to exist, so that it may label a metric.

    ``key`` is the name of the request's key, ``node`` the last node it was sent to. ``usage`` is a
    :class:`~cortex.dialects.usage.Usage`, ``trace`` a :class:`~cortex.tracing.Trace`, or each is ``None``.
    ``num_token_events`` counts the SSE events of a stream that carry generated content: an estimate of its tokens where
    the stream ended before its usage.
    """

    def __init__(self, str request_id not None, str dialect not None):
        self.request_id = request_id
        self.dialect = dialect
        self.model = self.node = self.key = self.finish = ""
        self.status = 500
        self.begun_s = seconds_of(CLOCK_MONOTONIC)
        self.first_token_at_s = NAN

    def record_node(self, str node not None):
        """Record the node that the request is sent to, the last one if there are several."""
        self.node = node

    def record_first_token(self):
        """Record the time of the first token; later calls do nothing."""
        if isnan(self.first_token_at_s):
            self.first_token_at_s = seconds_of(CLOCK_MONOTONIC)

    def record_end(self):
        """Record the time of the end; ``ended_at`` is wall-clock time."""
        self.ended_s = seconds_of(CLOCK_MONOTONIC)
        self.ended_at = seconds_of(CLOCK_REALTIME)

    @property
    def has_first_token(self):
        """Whether anything generated has arrived."""
        return not isnan(self.first_token_at_s)

    @property
    def duration_s(self):
        """Seconds from arrival to end."""
        return self.ended_s - self.begun_s

    @property
    def first_token_s(self):
        """Seconds from arrival to the first token; ``None`` if there was none or the answer was not streamed."""
        return None if isnan(self.first_token_at_s) else self.first_token_at_s - self.begun_s

    @property
    def generation_s(self):
        """Seconds from the first token to the end; ``None`` if there was none."""
        return None if isnan(self.first_token_at_s) else self.ended_s - self.first_token_at_s

    def tokens_used(self, Py_ssize_t prompt_tokens):
        """Return the tokens to charge: the node's counts, or an estimate if the answer broke off after its first token.

        ``prompt_tokens`` is an estimate of the prompt; an SSE event of a stream is about a token.
        """
        cdef tuple counts = self.counts()
        if self.usage is not None:
            return counts[0] + counts[1]
        return 0 if isnan(self.first_token_at_s) else prompt_tokens + self.num_token_events

    cpdef tuple counts(self):
        """Return the tokens of the prompt, the answer and the cache, as far as they are known.

        A stream that broke off had at least one token for each SSE event, whatever usage its node had reported.
        """
        cdef tuple counts
        if self.final_counts is not None:
            return self.final_counts
        counts = (0, 0, 0) if self.usage is None else self.usage.counts()
        if (self.usage is None or self.status != 200) and self.num_token_events > counts[1]:
            counts = (counts[0], self.num_token_events, counts[2])
        if self.ended_s:
            self.final_counts = counts
        return counts

    def fields(self):
        """Return the fields of its log line."""
        cdef dict fields = {"id": self.request_id, "dialect": self.dialect}
        if self.key:
            fields["key"] = self.key
        fields["model"] = self.model
        fields["node"] = self.node
        fields["status"] = self.status
        fields["stream"] = self.is_stream
        fields["finish"] = self.finish
        if self.usage is not None or self.num_token_events:
            fields["tokens_in"], fields["tokens_out"], fields["tokens_cached"] = self.counts()
        if not isnan(self.first_token_at_s):
            fields["ttft_s"] = to_microseconds(self.first_token_at_s - self.begun_s)
        fields["total_s"] = to_microseconds(self.ended_s - self.begun_s)
        if self.trace is not None:
            fields["trace"] = self.trace.trace_id
        return fields
