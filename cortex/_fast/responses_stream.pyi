from collections.abc import Sequence
from typing import final

from cortex.wire.events import InferenceEvent

@final
class ResponsesStream:
    @property
    def finished(self) -> bool: ...
    def __init__(
        self,
        id: str,
        model: str,
        created: int,
        echo: bytes,
        report_usage: bool = False,
        custom_tools: frozenset[str] = ...,
        namespaces: dict[str, tuple[str, str]] | None = None,
        summarises: bool = False,
        seals: bool = False,
    ) -> None: ...
    def sse_events(self, events: Sequence[InferenceEvent]) -> bytes: ...
    def beginning(self) -> bytes: ...
    def whole(self) -> bytes: ...
