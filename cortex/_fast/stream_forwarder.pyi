from collections import deque
from typing import Final, Protocol

from typing_extensions import disjoint_base

from cortex._fast.http_client import Response, Sink
from cortex._fast.record import Record
from cortex._fast.response_writer import ResponseWriter
from cortex._fast.usage_scanner import UsageScanner

TRAILING_S: Final[float]
TRAILING_BYTES: Final[int]

class _Out(Protocol):
    @property
    def writer(self) -> ResponseWriter | None: ...
    def write_now(self, data: bytes) -> object: ...

@disjoint_base
class StreamForwarder(Sink):
    out: _Out | None
    response: Response | None
    @property
    def first(self) -> bytes: ...
    @property
    def tail(self) -> deque[bytes]: ...
    @property
    def record(self) -> Record: ...
    @property
    def scanner(self) -> UsageScanner: ...
    def __init__(self, record: Record, tail_chunks: int) -> None: ...
    def take(self, data: bytes) -> bytes: ...
    def check(self) -> None: ...
