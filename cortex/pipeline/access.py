"""Access of a principal to a path, and the nodes for a model: computed once, and cached by the pipeline.

A request is answered at once if its principal does not wait for spare capacity, and its body goes unchanged to every
node that has the model ready. Requests without access get none here, so that errors are made in one place.
"""

from collections.abc import Callable

from cortex.access.authenticator import Authenticator
from cortex.access.keys import Principal
from cortex.config import Config
from cortex.dialects import registry
from cortex.dialects.dialect import Dialect
from cortex.dialects.registry import RESPONSES
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.service import FleetService
from cortex.guard import Guard
from cortex.pipeline.request import Access, CachedRoute, NodeRoute
from cortex.upstream import Header
from cortex.wire.errors import ApiError
from cortex.wire.headers import PRINCIPAL, PRIORITY, REPORT_USAGE, REQUEST_ID, model_name_headers

JSON = b"application/json"
TO_EVERY_NODE: tuple[Header, ...] = ((b"content-type", JSON), (REPORT_USAGE, b"1"))


class AccessRules:
    """Accesses of a gateway process. ``settings`` and ``catalogue`` return those in force."""

    def __init__(
        self,
        authenticator: Authenticator,
        service: FleetService,
        settings: Callable[[], Config],
        catalogue: Callable[[], Catalogue],
        guard: Callable[[], Guard],
        captured_key: Callable[[], str | None],
    ) -> None:
        """``captured_key`` returns the name of the key whose requests are captured, if any."""
        self._authenticator = authenticator
        self._service = service
        self._settings = settings
        self._catalogue = catalogue
        self._guard = guard
        self._captured_key = captured_key
        self._dialects = {dialect.path: dialect for dialect in registry.DIALECTS}

    def find(self, path: str, header: str, value: str | None) -> Access | None:
        """Return the access at a path by a header with a key; ``None`` for a request to be examined first."""
        dialect = self._dialects.get(path)
        if dialect is None:
            return None
        if value is not None and header == "authorization" and value[:7].lower() != "bearer ":
            return None  # another header may carry the key
        given = None if value is None else value.encode()
        try:
            principal = self._authenticator.identify(lambda name: given if name == header.encode() else None)
        except ApiError:
            return None
        return None if principal.name == self._captured_key() else self.of(dialect, principal)

    def of(self, dialect: Dialect, principal: Principal) -> Access:
        """Return the access of a principal to a dialect's path."""
        is_stored = dialect.name == RESPONSES.name  # or continues a stored one
        is_forwarded = not is_stored and not principal.uses_spare_capacity
        return Access(
            self._settings(),
            self._authenticator.keys,
            dialect,
            principal,
            (lambda name: self._find_route(dialect, principal, name)) if is_forwarded else None,
            None if self._authenticator.is_proved(principal) else self._guard().known_hosts,
        )

    def _find_route(self, dialect: Dialect, principal: Principal, name: str) -> CachedRoute | None:
        model = self._catalogue().resolve(name)
        names = self._service.dispatcher.replicas(model, dialect.name)
        if not names or not principal.may_use(model):
            return None
        headers = [*TO_EVERY_NODE, *principal_headers(principal), *model_name_headers(name, model)]
        nodes = {}
        for node in names:
            pool = self._service.pools.get(node)
            if pool is None:
                return None
            head = pool.encode_head(b"POST", dialect.target, headers)
            nodes[node] = NodeRoute(node, pool, head + REQUEST_ID + b": ")
        return CachedRoute(self._service.fleet.state, model, model != name, nodes)


def principal_headers(principal: Principal) -> list[Header]:
    """Return the headers that name the principal and its priority to a node."""
    headers = []
    if principal.name:
        headers.append((PRINCIPAL, principal.name.encode()))
    if principal.priority:
        headers.append((PRIORITY, b"%d" % principal.priority))
    return headers
