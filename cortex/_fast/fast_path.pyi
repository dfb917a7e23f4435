from collections.abc import Callable
from typing import Any, Protocol, final

from cortex._fast.http_client import Listener, Response
from cortex._fast.in_flight import InFlightRequest
from cortex._fast.peek import KnownNames
from cortex._fast.record import Record
from cortex._fast.watches import Watches
from cortex.access.authenticator import Authenticator
from cortex.access.keys import KeyRing
from cortex.config import Config
from cortex.dialects.usage import Usage
from cortex.ending import Ending
from cortex.fleet.breaker import Breakers
from cortex.fleet.deaths import Deaths
from cortex.fleet.state import Fleet, FleetState
from cortex.request_log import RequestLog
from cortex.upstream import Pool
from cortex.wire.errors import ApiError

@final
class CachedRoute:
    def __init__(
        self,
        state: FleetState,
        model: str,
        node: str,
        pool: Pool,
        head: bytes,
        is_alias: bool,
        first_byte_s: float,
        stall_s: float,
    ) -> None: ...

@final
class CachedAccess:
    def __init__(
        self,
        settings: Config,
        keys: KeyRing,
        dialect: str,
        read_answer: Callable[[bytes], tuple[Usage | None, str] | None],
        key: str,
        find: Callable[[str], CachedRoute | None],
        max_body_bytes: int,
        body_timeout_s: float,
        known: KnownNames,
        hosts: set[str | None] | None,
    ) -> None: ...

class _Gateway(Protocol):
    @property
    def settings(self) -> Config: ...
    @property
    def authenticator(self) -> Authenticator: ...
    @property
    def fleet(self) -> Fleet: ...
    @property
    def request_log(self) -> RequestLog: ...

@final
class FastPath:
    def __init__(
        self,
        *,
        find_access: Callable[[str, str, str | None], CachedAccess | None],
        gateway: _Gateway,
        breakers: Breakers,
        deaths: Deaths,
        ending: Ending,
        watches: Watches,
        new_request_id: Callable[[bytes | None], str],
        flushes: bool,
    ) -> None: ...
    def begin(self, scope: Any, protocol: Any) -> FastRequest | None: ...

@final
class FastRequest(Listener):
    record: Record
    body: bytes | None
    error: ApiError | None
    async def answer(self) -> bool: ...
    def take(self) -> tuple[str, InFlightRequest, Response] | None: ...
    def disconnect(self) -> None: ...
    def give_up(self) -> None: ...
    def cut_off(self) -> None: ...
