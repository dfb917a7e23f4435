from collections.abc import Mapping, Sequence
from typing import Final, Self, final

MAX_DEPTH: Final[int]
MAX_REFUSED: Final[int]

class PeekError(ValueError):
    reason: str
    offset: int
    def __init__(self, reason: str, offset: int) -> None: ...

class PeekTypeError(PeekError):
    field: str
    def __init__(self, field: str, reason: str, offset: int) -> None: ...

class PeekLimitError(PeekError):
    path: str
    limit: int
    is_depth: bool
    def __init__(self, path: str, limit: int, reason: str, offset: int, is_depth: bool = False) -> None: ...

@final
class KnownNames:
    def __new__(
        cls,
        objects: Sequence[tuple[Mapping[str, tuple[int | None, bool]] | None, int]],
        max_values: int,
        max_members: int,
    ) -> Self: ...

@final
class Peek:
    @property
    def model(self) -> str | None: ...
    @property
    def model_start(self) -> int: ...
    @property
    def model_end(self) -> int: ...
    @property
    def stream(self) -> bool: ...
    @property
    def previous_response_id(self) -> str | None: ...
    @property
    def prompt_cache_key(self) -> str | None: ...
    @property
    def stores(self) -> bool: ...
    @property
    def bounds(self) -> bytes: ...
    @property
    def unknown(self) -> tuple[str, ...]: ...
    @property
    def refused(self) -> tuple[str, ...]: ...

def peek(body: bytes, known: KnownNames = ...) -> Peek: ...
def splice(body: bytes, found: Peek, model: str) -> bytes: ...
