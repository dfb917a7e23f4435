"""One stream passing through a gateway: what may go on of it, what is to be remembered of it, and how it ends."""

from types import TracebackType

from cortex._fast.passing import FrameRelay
from cortex._fast.record import Record
from cortex._fast.sse import FrameTooLarge
from cortex.dialects.passthrough import TAIL_CHUNKS, Dialect, read_usage
from cortex.fleet.dispatch import Answer
from cortex.wire.errors import UpstreamError


class Relay(FrameRelay):
    """Lets whole frames through, and remembers the first and the last of them."""

    def __init__(self, record: Record) -> None:
        super().__init__(record, TAIL_CHUNKS)

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended as its dialect demands, well or with an error of its own."""
        return self.tap.terminated or self.tap.failed

    def note_end(self, dialect: Dialect) -> None:
        """Write down what the stream said of itself; an error that ended it has been written already."""
        record = self.record
        record.num_token_frames = self.tap.num_token_frames
        if self.tap.usage is not None:
            record.usage = read_usage(self.tap.usage)
        if record.finish or not self.is_complete:
            return
        finishes = dialect.finish.findall(b"".join(self.tail))
        record.finish = finishes[-1].decode().rpartition(".")[2] if finishes else ""
        if self.tap.failed:
            record.status, record.finish = UpstreamError.status, "failed"


class Passing:
    """A block in which a node's stream is passed on. However it ends, the answer is closed.

    Raises:
        UpstreamError: the stream was broken, or has ended before its terminator. With that, only the connection's own
            end can be missing, which is nobody's loss.
    """

    def __init__(self, answer: Answer, relay: Relay) -> None:
        self._answer = answer
        self._relay = relay

    def __enter__(self) -> None:
        content_type = self._answer.response.header(b"content-type") or b""
        if not content_type.startswith(b"text/event-stream"):
            self._answer.close()
            kind = content_type.decode("latin-1")
            raise UpstreamError(f"{self._answer.node} answered a streamed request with {kind}.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        node = self._answer.node
        try:
            if isinstance(error, FrameTooLarge):
                self._answer.note_broken()
                raise UpstreamError(f"{node} sent a frame of more than {error.max_frame_bytes} bytes.") from None
            if self._relay.is_complete:
                return isinstance(error, UpstreamError)
            if error is None:
                self._answer.note_broken()
                raise UpstreamError(f"{node} ended its answer before the stream's terminator.")
            if isinstance(error, UpstreamError):
                self._answer.note_broken()
            return False
        finally:
            self._answer.close()
