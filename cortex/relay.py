"""One stream passing through a gateway, and what is to be remembered of it."""

from collections import deque

from cortex._fast.tap import StreamTap
from cortex.dialects.passthrough import TAIL_CHUNKS, Dialect, read_usage
from cortex.record import Record
from cortex.wire.errors import UpstreamError


class Relay:
    """Lets whole frames through, and remembers the first and the last of them."""

    def __init__(self) -> None:
        self.first = b""
        self.tail: deque[bytes] = deque(maxlen=TAIL_CHUNKS)
        self._tap = StreamTap()

    def take(self, data: bytes) -> bytes:
        """Return the whole frames that ``data`` completes.

        Raises:
            FrameTooLarge: one is longer than is read.
        """
        frames = self._tap.feed(data)
        if frames:
            if not self.first:
                self.first = frames
            self.tail.append(frames)
        return frames

    @property
    def has_token(self) -> bool:
        """Whether a token has passed."""
        return self._tap.first_token

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended as its dialect demands, well or with an error of its own."""
        return self._tap.terminated or self._tap.failed

    def note_end(self, dialect: Dialect, record: Record) -> None:
        """Write down what the stream said of itself; an error that ended it has been written already."""
        if self._tap.usage is not None:
            record.usage = read_usage(self._tap.usage)
        if record.finish or not self.is_complete:
            return
        finishes = dialect.finish.findall(b"".join(self.tail))
        record.finish = finishes[-1].decode().rpartition(".")[2] if finishes else ""
        if self._tap.failed:
            record.status, record.finish = UpstreamError.status, "failed"
