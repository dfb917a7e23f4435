from collections.abc import Sequence
from typing import Final, final

from cortex.wire.events import InferenceEvent

SIGNATURE: Final[str]

@final
class MessagesStream:
    @property
    def finished(self) -> bool: ...
    def __init__(self, id: str, model: str) -> None: ...
    def sse_events(self, events: Sequence[InferenceEvent]) -> bytes: ...
    def whole(self) -> bytes: ...
