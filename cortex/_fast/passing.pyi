from collections import deque
from typing import Protocol

from typing_extensions import disjoint_base

from cortex._fast.http_client import Sink
from cortex._fast.outlet import Outlet
from cortex._fast.record import Record
from cortex._fast.tap import StreamTap

class _Out(Protocol):
    @property
    def outlet(self) -> Outlet | None: ...
    def write_now(self, data: bytes) -> object: ...

@disjoint_base
class FrameRelay(Sink):
    out: _Out | None
    @property
    def first(self) -> bytes: ...
    @property
    def tail(self) -> deque[bytes]: ...
    @property
    def record(self) -> Record: ...
    @property
    def tap(self) -> StreamTap: ...
    def __init__(self, record: Record, tail_chunks: int) -> None: ...
    def take(self, data: bytes) -> bytes: ...
