"""Event stream of a node as it is read: its whole SSE events, its record, and the check that it ends as it has to."""

cimport cython

from cortex._fast.http_client cimport Response
from cortex._fast.record cimport Record
from cortex._fast.usage_scanner cimport UsageScanner

from cortex._fast.sse import SseEventTooLarge
from cortex.dialects.dialect import TAIL_CHUNKS as _TAIL
from cortex.dialects.failures import read_failure
from cortex.dialects.usage import clean_finish, read_usage
from cortex.errors import NotAnAnswerError, TooLongAnswerError
from cortex.fleet.refusals import DEATHS as _CODES
from cortex.wire.errors import UpstreamError

TRAILING_S = 2.0
TRAILING_BYTES = 64 * 1024
"""Limit of what may follow a stream's terminator: a comment with the usage, the end of the connection."""

cdef double _TRAILING_S = TRAILING_S
cdef Py_ssize_t _TRAILING_BYTES = TRAILING_BYTES
cdef Py_ssize_t _TAIL_CHUNKS = _TAIL
cdef tuple _DEATHS = tuple([b'"%b"' % code.encode() for code in _CODES])


@cython.final
cdef class NodeStream:
    """Stream of one request, of which the first and the last few chunks are kept.

    Bytes after the stream's end are bounded, in number and in time, on the ``response`` that they come from.
    """

    def __init__(self, Record record not None):
        self.first = b""
        self.record = record
        self.scanner = UsageScanner(checks=True)
        self.tail = [b""] * _TAIL_CHUNKS

    cpdef bytes take(self, bytes data):
        """Return the whole SSE events that ``data`` completes.

        Raises:
            SseEventTooLarge: one is longer than is read.
        """
        cdef UsageScanner scanner = self.scanner
        cdef bytes sse_events = scanner.feed(data)
        if sse_events:
            if not self.num_chunks:
                self.first = sse_events
            self.tail[self.num_chunks % _TAIL_CHUNKS] = sse_events
            self.num_chunks += 1
            if scanner.first_token:
                self.record.record_first_token()
            if scanner.terminated or scanner.failed:
                if self.trailing_bytes:
                    self.trailing_bytes += len(sse_events)
                else:
                    self.trailing_bytes = 1
                    if self.response is not None:
                        self.response.end_within(_TRAILING_S)
        return sse_events

    cpdef object check(self):
        """Raise :exc:`NotAnAnswerError` after a malformed SSE event, or after too many bytes behind the end."""
        if self.scanner.malformed:
            raise NotAnAnswerError("The node sent an event that is not JSON.")
        if self.trailing_bytes > _TRAILING_BYTES:
            raise NotAnAnswerError("The node went on after the end of its stream.")

    @property
    def is_complete(self):
        """Whether the stream has ended as its dialect demands, with or without an error."""
        return self.scanner.terminated or self.scanner.failed

    @property
    def last(self):
        """Last few chunks, joined."""
        at = self.num_chunks % _TAIL_CHUNKS
        return b"".join(self.tail[at:] + self.tail[:at])

    def conclude(self, answer, error):
        """Close the node's ``answer`` at the end of its stream; return the error that the stream ends with, if any.

        ``error`` is what ended the reading, ``None`` for the end of the response. After the terminator errors of the
        connection are ignored; before it the end is an error itself. The node's part in it is counted.
        """
        try:
            if self.is_complete:
                if self.scanner.failed:
                    last = self.last
                    if any([code in last for code in _DEATHS]):
                        answer.record_death()
                return None if isinstance(error, (UpstreamError, SseEventTooLarge)) else error
            if isinstance(error, SseEventTooLarge):
                error = TooLongAnswerError(f"{answer.node} sent an event of more than {error.max_event_bytes} bytes.")
            elif error is None:
                error = NotAnAnswerError(f"{answer.node} ended its answer before the stream's terminator.")
            if isinstance(error, UpstreamError):
                answer.record_broken(error)
            return error
        finally:
            answer.close()

    def record_end(self, dialect):
        """Record the stream's usage and finish; an error that was recorded before stays."""
        cdef Record record = self.record
        record.num_token_events = self.scanner.num_token_events
        if self.scanner.usage is not None:
            record.usage = read_usage(self.scanner.usage)
        if record.finish or not self.is_complete:
            return
        last = self.last
        finishes = dialect.finish.findall(last)
        record.finish = clean_finish(finishes.pop().decode("latin-1").rpartition(".")[2]) if finishes else ""
        if self.scanner.failed:
            error = read_failure(last)
            record.status, record.finish = error.status, error.code
