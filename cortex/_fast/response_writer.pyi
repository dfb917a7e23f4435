import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, final

from typing_extensions import disjoint_base

COALESCE_S: Final[float]
BYPASS_S: Final[float]

@final
class WriteCoalescer:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def bypass(self) -> None: ...
    def end(self) -> None: ...

@disjoint_base
class Writer:
    written_at: float
    def write(self, data: bytes) -> Coroutine[Any, Any, None] | None: ...

@final
class ResponseWriter(Writer):
    limit_bytes: int
    @property
    def sent_bytes(self) -> int: ...
    def __init__(
        self,
        send: Callable[[bytes], Any],
        wait: Callable[[ResponseWriter], Coroutine[Any, Any, None]],
        limit_bytes: int,
        coalescer: WriteCoalescer,
        *,
        is_tls: bool,
        counts_framing: bool = True,
    ) -> None: ...
    def close(self) -> None: ...
