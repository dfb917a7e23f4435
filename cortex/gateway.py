"""One gateway process put together: its parts, the paths it answers, and what leaves an endpoint as an error.

It speaks :class:`~cortex.http_io.Exchange`, not ASGI: a server's own interface is an adapter over this.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping

from cortex.admin import Admin
from cortex.config import Config
from cortex.dialects.passthrough import CHAT, COUNT_TOKENS, MESSAGES, RESPONSES
from cortex.endpoints import Endpoints, reply_error
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.service import FleetService
from cortex.fleet.state import Fleet
from cortex.http_io import ClientDisconnectedError, Exchange, Header
from cortex.metrics import FleetSample, Metrics, ModelSample, NodeSample, forget_dead_workers
from cortex.settings import split_address
from cortex.wire.errors import ApiError, MethodNotAllowedError, NotFoundError

log = logging.getLogger("cortex")

Endpoint = Callable[[Exchange], Awaitable[None]]


class Gateway:
    """One gateway process: what the lifespan starts and ends, and the paths it answers."""

    def __init__(self, settings: Config, offered: Catalogue) -> None:
        self.metrics = Metrics(self._sample)
        self.service = FleetService(
            settings,
            offered,
            on_retry=lambda node, reason: self.metrics.retries.labels(node, reason).inc(),
            on_in_flight=lambda node, count: self.metrics.in_flight.labels(node).set(count),
            on_load=lambda model, succeeded: self.metrics.loads.labels(model, "ok" if succeeded else "failed").inc(),
        )
        self._settings = settings
        self._stop_metrics: Callable[[], None] = lambda: None
        endpoints = Endpoints(settings, offered, self.fleet, self.service.dispatcher, self.metrics)
        self._paths: Mapping[str, tuple[str, Endpoint]] = {
            CHAT.path: ("POST", endpoints.infer(CHAT)),
            RESPONSES.path: ("POST", endpoints.infer(RESPONSES)),
            MESSAGES.path: ("POST", endpoints.infer(MESSAGES)),
            COUNT_TOKENS.path: ("POST", endpoints.infer(COUNT_TOKENS)),
            "/v1/models": ("GET", endpoints.models),
            "/health": ("GET", endpoints.health),
            "/version": ("GET", endpoints.version),
            "/admin/fleet": ("GET", Admin(self.fleet).fleet),
        }
        self._prefixes: tuple[tuple[str, str, Endpoint], ...] = (("/v1/models/", "GET", endpoints.model),)

    @property
    def fleet(self) -> Fleet:
        """What is known of the nodes."""
        return self.service.fleet

    def start(self) -> None:
        """Serve metrics and begin to watch the fleet."""
        forget_dead_workers()
        if self._settings.gateway.metrics_listen:
            self._stop_metrics = self.metrics.serve(*split_address(self._settings.gateway.metrics_listen))
        self.service.start()

    async def stop(self) -> None:
        """End what :meth:`start` began. Requests have ended by then."""
        await self.service.stop()
        self._stop_metrics()

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request."""
        try:
            endpoint = self._find(exchange.method, exchange.path)
            if endpoint is None:
                await exchange.reply(204, b"", headers=_allow(self._allowed(exchange.path)))
            else:
                await endpoint(exchange)
        except ClientDisconnectedError:
            return
        except MethodNotAllowedError as error:
            await reply_error(exchange, error, _allow(self._allowed(exchange.path)))
        except ApiError as error:
            await reply_error(exchange, error)
        except Exception:
            log.exception("request %s failed", exchange.request_id)
            if exchange.status:
                raise  # too late for a status: the server cuts the connection
            await reply_error(exchange, ApiError("The gateway failed to answer; its log says why."))

    def _find(self, method: str, path: str) -> Endpoint | None:
        """Return what answers; ``None`` for OPTIONS, which asks only what would."""
        allowed = self._allowed(path)
        if allowed is None:
            raise NotFoundError(f"Unknown request URL: {method} {path}.")
        if method == "OPTIONS":
            return None
        if method != allowed[0] and not (method == "HEAD" and allowed[0] == "GET"):
            raise MethodNotAllowedError(f"{method} is not allowed at {path}; use {allowed[0]}.")
        return allowed[1]

    def _allowed(self, path: str) -> tuple[str, Endpoint] | None:
        known = self._paths.get(path)
        if known is not None:
            return known
        for prefix, method, endpoint in self._prefixes:
            if path.startswith(prefix) and path != prefix:
                return method, endpoint
        return None

    def _sample(self) -> FleetSample:
        nodes = self.fleet.state.nodes.values()
        return FleetSample(
            tuple(
                NodeSample(
                    node.name,
                    node.up,
                    sum(device.memory_total_bytes for device in node.discovery.devices) if node.discovery else 0,
                    sum(device.memory_free_bytes for device in node.discovery.devices) if node.discovery else 0,
                )
                for node in nodes
            ),
            tuple(
                ModelSample(node.name, status.id, status.state, status.running, status.waiting)
                for node in nodes
                if node.up
                for status in node.models.values()
            ),
        )


def _allow(allowed: tuple[str, Endpoint] | None) -> tuple[Header, ...]:
    assert allowed is not None
    methods = "GET, HEAD, OPTIONS" if allowed[0] == "GET" else f"{allowed[0]}, OPTIONS"
    return ((b"allow", methods.encode()),)
