from typing import final

from cortex.dialects.passthrough import Usage
from cortex.tracing import Trace

@final
class Record:
    request_id: str
    dialect: str
    model: str
    node: str
    key: str
    finish: str
    status: int
    is_stream: bool
    num_token_frames: int
    usage: Usage | None
    trace: Trace | None
    begun_s: float
    ended_at: float
    def __init__(self, request_id: str, dialect: str) -> None: ...
    def note_node(self, node: str) -> None: ...
    def note_first_token(self) -> None: ...
    def note_end(self) -> None: ...
    @property
    def has_first_token(self) -> bool: ...
    @property
    def duration_s(self) -> float: ...
    @property
    def first_token_s(self) -> float | None: ...
    @property
    def generation_s(self) -> float | None: ...
    def tokens_used(self, prompt_tokens: int) -> int: ...
    def fields(self) -> dict[str, object]: ...
