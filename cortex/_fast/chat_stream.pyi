from collections.abc import Sequence
from typing import final

from cortex.wire.events import InferenceEvent

@final
class ChatStream:
    @property
    def finished(self) -> bool: ...
    def __init__(
        self,
        id: str,
        model: str,
        created: int,
        num_choices: int = 1,
        include_usage: bool = False,
        report_usage: bool = False,
        custom_tools: frozenset[str] = ...,
        keeps: bool = False,
    ) -> None: ...
    def sse_events(self, events: Sequence[InferenceEvent]) -> bytes: ...
    def whole(self) -> bytes: ...
