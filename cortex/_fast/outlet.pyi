import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, final

TURN_S: Final[float]
HURRY_S: Final[float]

@final
class Turns:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def hurry(self) -> None: ...
    def end(self) -> None: ...

@final
class Outlet:
    limit_bytes: int
    @property
    def written_at(self) -> float: ...
    @property
    def sent_bytes(self) -> int: ...
    def __init__(
        self,
        send: Callable[[bytes], Any],
        wait: Callable[[Outlet], Coroutine[Any, Any, None]],
        limit_bytes: int,
        turns: Turns,
        *,
        is_tls: bool,
        counts_framing: bool = True,
    ) -> None: ...
    def write(self, data: bytes) -> Coroutine[Any, Any, None] | None: ...
    def close(self) -> None: ...
