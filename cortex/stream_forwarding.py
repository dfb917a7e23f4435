"""Forwarding of one stream: the record of it, and the check that it ends as its dialect demands."""

from types import TracebackType

from cortex._fast.record import Record
from cortex._fast.sse import SseEventTooLarge
from cortex._fast.stream_forwarder import StreamForwarder
from cortex.dialects.dialect import TAIL_CHUNKS, Dialect
from cortex.dialects.failures import read_failure
from cortex.dialects.usage import clean_finish, read_usage
from cortex.errors import NotAnAnswerError, TooLongAnswerError
from cortex.fleet.node_request import NodeResponse
from cortex.fleet.refusals import DEATHS
from cortex.wire.errors import UpstreamError


class DialectForwarder(StreamForwarder):
    """Forwarder that fills a request's record from the stream."""

    def __init__(self, record: Record) -> None:
        super().__init__(record, TAIL_CHUNKS)

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended as its dialect demands, with or without an error."""
        return self.scanner.terminated or self.scanner.failed

    @property
    def reports_death(self) -> bool:
        """Whether the stream ended with an error that reports the death of a worker."""
        last = b"".join(self.tail)
        return any(b'"%b"' % code.encode() in last for code in DEATHS)

    def record_end(self, dialect: Dialect) -> None:
        """Record the stream's usage and finish; an error that was recorded before stays."""
        record = self.record
        record.num_token_events = self.scanner.num_token_events
        if self.scanner.usage is not None:
            record.usage = read_usage(self.scanner.usage)
        if record.finish or not self.is_complete:
            return
        finishes = dialect.finish.findall(b"".join(self.tail))
        record.finish = clean_finish(finishes[-1].decode("latin-1").rpartition(".")[2]) if finishes else ""
        if self.scanner.failed:
            error = read_failure(b"".join(self.tail))
            record.status, record.finish = error.status, error.code


class Forwarding:
    """Context in which a node's stream is forwarded; at its end the node's response is closed.

    Raises:
        UpstreamError: the stream broke or ended before its terminator. After the terminator errors of the connection
        are
            ignored.
    """

    def __init__(self, answer: NodeResponse, forwarder: DialectForwarder) -> None:
        self._answer = answer
        self._forwarder = forwarder

    def __enter__(self) -> None:
        self._forwarder.response = self._answer.response

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        node = self._answer.node
        try:
            if self._forwarder.is_complete:
                if self._forwarder.scanner.failed and self._forwarder.reports_death:
                    self._answer.record_death()
                return isinstance(error, (UpstreamError, SseEventTooLarge))
            if isinstance(error, SseEventTooLarge):
                long = TooLongAnswerError(f"{node} sent an event of more than {error.max_event_bytes} bytes.")
                self._answer.record_broken(long)
                raise long from None
            if error is None:
                early = NotAnAnswerError(f"{node} ended its answer before the stream's terminator.")
                self._answer.record_broken(early)
                raise early
            if isinstance(error, UpstreamError):
                self._answer.record_broken(error)
            return False
        finally:
            self._answer.close()
