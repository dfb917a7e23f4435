"""Rules of the fast path (:mod:`cortex._fast.fast_path`): which requests may take it, and to which node.

The result is cached until something changes. A request qualifies if its key has no limits and does not expire, its
answer is not streamed, its body goes to the node unchanged, and only one node has the model ready, with no failure in
any circuit. Every other request takes the slow path, those without access too, so that errors are made in one place.
"""

from cortex import tracing
from cortex._fast.fast_path import CachedAccess, CachedRoute, FastPath
from cortex._fast.watches import Watches
from cortex.access.keys import Principal
from cortex.dialects.dialect import Dialect
from cortex.dialects.registry import CHAT, COMPLETIONS, COUNT_TOKENS, EMBEDDINGS, MESSAGES
from cortex.ending import Ending
from cortex.gateway import Gateway
from cortex.inference import TO_EVERY_NODE, principal_headers
from cortex.wire.errors import ApiError
from cortex.wire.headers import REQUEST_ID, model_name_headers, request_id_of

DIALECTS = {dialect.path: dialect for dialect in (CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, COUNT_TOKENS)}


class FastPathRules:
    """Fast path of a gateway process."""

    def __init__(self, gateway: Gateway, ending: Ending, watches: Watches, *, flushes: bool) -> None:
        """``flushes``: see :class:`~cortex._fast.fast_path.FastPath`."""
        self._gateway = gateway
        self._dispatcher = gateway.service.dispatcher
        self.fast_path = FastPath(
            find_access=self._find_access,
            gateway=gateway,
            breakers=self._dispatcher.breakers,
            deaths=self._dispatcher.deaths,
            ending=ending,
            watches=watches,
            new_request_id=request_id_of,
            flushes=flushes,
        )

    def _find_access(self, path: str, header: str, value: str | None) -> CachedAccess | None:
        dialect = DIALECTS.get(path)
        if dialect is None or tracing.is_exporting():
            return None
        if value is not None and header == "authorization" and value[:7].lower() != "bearer ":
            return None  # another header may carry the key
        given = None if value is None else value.encode()
        try:
            principal = self._gateway.authenticator.identify(lambda name: given if name == header.encode() else None)
        except ApiError:
            return None
        if not principal.is_unlimited or principal.name == self._gateway.capture.key:
            return None
        return CachedAccess(
            self._gateway.settings,
            self._gateway.authenticator.keys,
            dialect.name,
            dialect.read,
            principal.name,
            lambda model: self._find_route(dialect, principal, model),
            self._gateway.settings.gateway.max_body_bytes,
            self._gateway.settings.gateway.body_timeout_s,
            dialect.parameters.names,
            None if self._gateway.authenticator.is_proved(principal) else self._gateway.guard.known_hosts,
        )

    def _find_route(self, dialect: Dialect, principal: Principal, name: str) -> CachedRoute | None:
        model = self._gateway.offered.resolve(name)
        node = self._dispatcher.only_replica(model, dialect.name)
        pool = None if node is None else self._gateway.service.pools.get(node)
        if node is None or pool is None or not principal.may_use(model):
            return None
        headers = [*TO_EVERY_NODE, *principal_headers(principal), *model_name_headers(name, model)]
        head = pool.encode_head(b"POST", dialect.target, headers)
        return CachedRoute(
            self._gateway.fleet.state,
            model,
            node,
            pool,
            head + REQUEST_ID + b": ",
            model != name,
            pool.timeouts.answer_s,
            pool.timeouts.stall_s,
        )
