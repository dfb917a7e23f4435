"""Gateway process: its components, its paths, and the error responses of its endpoints.

It uses :class:`~cortex.http_io.Exchange`, not ASGI: a server's own interface is an adapter over this. One module, as
the table of paths names everything that it wires up.
"""

import asyncio
import contextlib
import logging
import pathlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from cortex import api_description, logs, store
from cortex.access.authenticator import Authenticator, principal_of
from cortex.access.keys import KeyRing
from cortex.access.rate_limiter import MemoryRateLimiter, RateLimiter
from cortex.access.valkey import ValkeyRateLimiter
from cortex.admin import Admin
from cortex.admin_keys import KeyAdmin
from cortex.admin_models import ModelAdmin
from cortex.admin_usage import UsageAdmin
from cortex.capture.admin import CaptureAdmin
from cortex.capture.capture import Capture
from cortex.capture.exchange import CapturedExchange
from cortex.capture.shelf import FolderShelf
from cortex.config import AccessSettings, Config, CountersKind, Price, StoreKind
from cortex.dashboard import assets
from cortex.dashboard.feed import Feed
from cortex.dialects import openapi, registry
from cortex.dialects.dialect import Dialect
from cortex.dialects.registry import RESPONSES
from cortex.endpoints import Endpoints, reply_error
from cortex.errors import GatewayStoppedError
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.service import FleetService
from cortex.fleet.state import Fleet, devices_in_use
from cortex.guard import Guard
from cortex.http_io import ClientDisconnectedError, Exchange, Header, Receive, Scope, Send, find_header
from cortex.inference import Inference
from cortex.loop_lag import watch_lag
from cortex.metrics import (
    FleetSample,
    Metrics,
    ModelSample,
    NodeSample,
    folder_of_workers,
    forget_dead_workers,
)
from cortex.pipeline.access import AccessRules
from cortex.pipeline.request import Pipeline
from cortex.request_log import Line, RequestLog
from cortex.responses.background import Background
from cortex.responses.conversations import Conversations
from cortex.responses.endpoints import ConversationEndpoints, ResponseEndpoints
from cortex.responses.hook import ResponsesHook
from cortex.responses.socket_memory import SocketMemory
from cortex.responses.stored import StoredResponses
from cortex.responses.websocket import ResponsesSocket, refuse_socket
from cortex.settings import ConfigError, split_address
from cortex.store import usage
from cortex.store.interface import StoreError
from cortex.store.sqlite import SqliteStore
from cortex.supervise import Supervisor
from cortex.usage_recorder import TASK, UsageRecorder
from cortex.wire.errors import ApiError, MethodNotAllowedError, NotFoundError
from cortex.wire.headers import REQUEST_ID, request_id_of
from cortex.wire.node import NodeState

log = logging.getLogger("cortex")

API = "/v1/"
"""Prefix of the clients' paths."""

METRICS_RETRY_S = 5.0
"""Seconds between attempts to listen for metrics at a port in use."""

Endpoint = Callable[[Exchange], Awaitable[None]]
Methods = Mapping[str, Endpoint]


class Gateway:
    """Gateway process: start and stop, and the paths it answers."""

    def __init__(
        self,
        settings: Config,
        offered: Catalogue,
        keys: KeyRing | None = None,
        reload: Callable[[], None] = lambda: None,
        config_error: Callable[[], ConfigError | None] = lambda: None,
        local_token: str = "",
        added_models: Callable[[], pathlib.Path | None] = lambda: None,
        added_keys: Callable[[], pathlib.Path | None] = lambda: None,
    ) -> None:
        """``reload`` and ``config_error`` serve ``/admin``: reread the files, and return the error of the last reading.

        ``added_models`` and ``added_keys`` return the paths of the files that this gateway owns.

        ``local_token`` is an administrator's key for commands on this host.

        Raises:
            ConfigError: the counters of keys cannot be used.
        """
        self.metrics = Metrics(self._sample, self._in_flight)
        self.supervisor = Supervisor(lambda task: self.metrics.background_failures.labels(task).inc())
        """Background tasks of this process."""
        self.service = FleetService(
            settings,
            offered,
            on_retry=self.metrics.record_retry,
            on_load=lambda model, succeeded: self.metrics.loads.labels(model, "ok" if succeeded else "failed").inc(),
            supervisor=self.supervisor,
        )
        self.settings, self.offered = settings, offered
        self._stop_metrics: Callable[[], None] = lambda: None
        self._has_metrics = False
        self._serving_metrics: asyncio.Task[None] | None = None
        self._counting: asyncio.Task[None] | None = None
        self._lag: asyncio.Task[None] | None = None
        self._recording: asyncio.Task[None] | None = None
        self._following_capture: asyncio.Task[None] | None = None
        self._store = store.make(settings.store)
        if isinstance(self._store, SqliteStore):
            self._store.on_damaged = self.metrics.damaged_stores.inc
        self._socket_memory = SocketMemory(settings.store.socket_bytes, settings.store.socket_bytes_per_key)
        self._responses = StoredResponses(self._store, max_bytes=settings.gateway.max_body_bytes)
        self._conversations = Conversations(self._store, max_bytes=settings.gateway.max_body_bytes)
        self.authenticator = Authenticator(
            keys or KeyRing(), _rate_limiter(settings.access), settings.access.reserve_tokens, local_token
        )
        self.guard = _guard(settings)
        self._background = Background(supervisor=self.supervisor)
        self.request_log = RequestLog(self.metrics)
        dispatcher = self.service.dispatcher
        self._endpoints = endpoints = Endpoints(offered, self.fleet, dispatcher, self.supervisor)
        hook = ResponsesHook(self._responses, self._background, self.authenticator)
        self._inference = Inference(settings, offered, dispatcher, self.request_log, self.authenticator, hook)
        self._accesses = AccessRules(
            self.authenticator,
            self.service,
            lambda: self.settings,
            lambda: self.offered,
            lambda: self.guard,
            lambda: self.capture.key,
        )
        self._pipeline = Pipeline(
            find_access=self._accesses.find,
            steps=self._inference.infer,
            choose=dispatcher.choose,
            heartbeat=self._inference.heartbeat,
            gateway=self,
            breakers=dispatcher.breakers,
            deaths=dispatcher.deaths,
        )
        admin = Admin(self.service, reload, config_error, self.supervisor)
        changes = ModelAdmin(self.service, reload, added_models)
        self._usage = UsageRecorder(usage.make(self._store, settings.store.usage_days), self._price_of, self.supervisor)
        keys_of_clients = KeyAdmin(self.authenticator, self._usage, lambda: self.settings, reload, added_keys)
        folder = folder_of_workers()
        self._shares_capture = folder is not None
        self.capture = Capture(None if folder is None else FolderShelf(folder), self._forget_accesses)
        """Capture of one key's requests."""
        captures = CaptureAdmin(self.capture, lambda: self.authenticator.keys)
        page = assets.read()
        self._feed = Feed(
            self.service,
            config_error,
            self._check,
            build=assets.build_of(page),
            folder=folder_of_workers(),
            supervisor=self.supervisor,
            capture=self.capture,
        )
        self.request_log.on_written = self._pass_on
        counted = self._counted
        stored = ResponseEndpoints(self._responses, self._background)
        named = ConversationEndpoints(self._conversations)
        self._paths: Mapping[str, Methods] = {
            **{dialect.path: {"POST": self._endpoint(dialect)} for dialect in registry.DIALECTS},
            "/v1/conversations": {"POST": counted(named.create)},
            "/v1/models": {"GET": endpoints.models},
            "/health": {"GET": endpoints.health},
            "/version": {"GET": endpoints.version},
            "/admin/fleet": {"GET": admin.fleet},
            "/admin/keys": {"GET": keys_of_clients.list, "POST": keys_of_clients.add},
            "/admin/usage": {"GET": UsageAdmin(self._usage).report},
            "/admin/capture": {"GET": captures.show, "POST": captures.begin, "DELETE": captures.remove},
            "/admin/capture/end": {"POST": captures.end},
            "/admin/models": {"GET": endpoints.all_models, "POST": changes.add},
            "/admin/models/known": {"GET": changes.known},
            "/admin/models/fit": {"POST": changes.fit},
            "/admin/models/pull": {"POST": changes.pull},
            "/admin/models/load": {"POST": admin.load},
            "/admin/models/unload": {"POST": admin.unload},
            "/admin/models/forget": {"POST": admin.forget},
            "/admin/models/pin": {"POST": admin.pin},
            "/admin/nodes/drain": {"POST": admin.drain},
            "/admin/reload": {"POST": admin.reload},
            openapi.PATH: {"GET": self._describe},
        }
        # What a browser gets. The page and its feed are of one version and speak to each other alone: no API.
        self._pages: Mapping[str, Methods] = {
            "/admin/events": {"GET": self._feed.events},
            **{path: {"GET": assets.serve(asset)} for path, asset in page.items()},
        }
        self._patterns: tuple[tuple[re.Pattern[str], Methods], ...] = (
            (re.compile(r"/v1/models/.+"), {"GET": endpoints.model}),
            (re.compile(r"/admin/capture/[^/]+"), {"GET": captures.get}),
            (re.compile(r"/admin/models/.+"), {"DELETE": changes.remove}),
            (
                re.compile(r"/admin/keys/[^/]+"),
                {"PATCH": keys_of_clients.change, "DELETE": keys_of_clients.revoke},
            ),
            (re.compile(r"/v1/responses/[^/]+"), {"GET": counted(stored.get), "DELETE": counted(stored.delete)}),
            (re.compile(r"/v1/responses/[^/]+/input_items"), {"GET": counted(stored.input_items)}),
            (re.compile(r"/v1/responses/[^/]+/cancel"), {"POST": counted(stored.cancel)}),
            (
                re.compile(r"/v1/conversations/[^/]+"),
                {"GET": counted(named.get), "POST": counted(named.update), "DELETE": counted(named.delete)},
            ),
            (
                re.compile(r"/v1/conversations/[^/]+/items"),
                {"GET": counted(named.items), "POST": counted(named.add_items)},
            ),
            (
                re.compile(r"/v1/conversations/[^/]+/items/[^/]+"),
                {"GET": counted(named.item), "DELETE": counted(named.delete_item)},
            ),
        )

    def _endpoint(self, dialect: Dialect) -> Endpoint:
        """Return the endpoint of a dialect for requests that had to be examined."""

        async def answer(exchange: Exchange) -> None:
            access = self._accesses.of(dialect, principal_of(exchange.caller))
            await self._pipeline.request(exchange, access).serve()

        return answer

    def _counted(self, endpoint: Endpoint) -> Endpoint:
        """Return an endpoint that needs no node but counts as a request of its key."""

        async def answer(exchange: Exchange) -> None:
            await self.authenticator.count(principal_of(exchange.caller))
            await endpoint(exchange)

        return answer

    @property
    def fleet(self) -> Fleet:
        """State of the nodes."""
        return self.service.fleet

    async def start(self) -> None:
        """Open the store, serve metrics and start to poll the fleet.

        Raises:
            ConfigError: the configured store cannot be used.
        """
        if self._store is not None:
            try:
                await self._store.open()
            except StoreError as error:
                if self.settings.store.kind is not StoreKind.VALKEY:
                    raise ConfigError("cortex.toml", "store", str(error)) from None
                # Another program's to start, and no reason not to serve: each request to it tries anew.
                log.error("the store of responses does not answer, and is asked again when it is needed: %s", error)
        await self.authenticator.rate_limiter.open(self.supervisor)
        forget_dead_workers()
        if self.settings.gateway.metrics_listen:
            self._serve_metrics(is_first=True)
            if not self._has_metrics:
                self._serving_metrics = self.supervisor.start("metrics listener", self._keep_trying_to_serve_metrics)
        self._counting = self.supervisor.start("metrics", self.metrics.run)
        self._recording = self.supervisor.start(TASK, self._usage.run)
        self._lag = self.supervisor.start("loop lag", lambda: watch_lag(self.metrics.loop_lag_s.observe))
        self.service.start()
        self._feed.start()
        if self._shares_capture:
            self._following_capture = self.supervisor.start("capture", self.capture.refresh)

    def _serve_metrics(self, *, is_first: bool) -> None:
        """Serve metrics if the port is free. Of workers that share metrics, one suffices."""
        host, port = split_address(self.settings.gateway.metrics_listen)
        is_shared = folder_of_workers() is not None
        try:
            self._stop_metrics = self.metrics.serve(host, port, lambda: self.guard)
            self._has_metrics = True
        except OSError as error:
            if is_first:
                level = logging.INFO if is_shared else logging.WARNING
                why = error.strerror or str(error)
                message = "metrics are not served by this worker: %s:%d: %s; tried again every %.0f s"
                log.log(level, message, host, port, why, METRICS_RETRY_S)
        else:
            if not is_first:
                log.info("metrics are served now: %s:%d", host, port)
        self.supervisor.mark("metrics listener", is_degraded=not self._has_metrics and not is_shared)

    async def _keep_trying_to_serve_metrics(self) -> None:
        while not self._has_metrics:
            await asyncio.sleep(METRICS_RETRY_S)
            self._serve_metrics(is_first=False)

    def prepare_to_stop(self) -> None:
        """End the responses that last until their client disconnects."""
        self._feed.close()

    def end_requests(self) -> None:
        """End running requests with an error in their own dialect."""
        message = "The gateway is being restarted, and this answer took longer than it waits."
        self.service.end_requests(GatewayStoppedError(message, retry_after_s=1))

    async def stop(self) -> None:
        """End what :meth:`start` began. Requests have ended by then."""
        await self._feed.stop()
        if self._following_capture is not None:
            self._following_capture.cancel()
        self.capture.close()
        if self._lag is not None:
            self._lag.cancel()
        await self._background.stop()
        await self.service.stop()
        await self.authenticator.rate_limiter.close()
        await self._stop_counting()
        await self._stop_recording()
        if self._serving_metrics is not None:
            self._serving_metrics.cancel()
        self._stop_metrics()
        if self._store is not None:
            await self._store.close()

    async def _stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.cancel()
            await asyncio.wait({self._counting})
        self.metrics.fold()

    async def _stop_recording(self) -> None:
        if self._recording is not None:
            self._recording.cancel()
            await asyncio.wait({self._recording})
        with contextlib.suppress(StoreError):  # logged
            await self._usage.write()

    def _pass_on(self, lines: Sequence[Line]) -> None:
        """Pass the lines of ended requests to the dashboard, to the capture and to the record of use."""
        self._feed.journal.record(lines)
        self.capture.record(lines)
        self._usage.record(lines)

    def _price_of(self, model: str) -> Price | None:
        profile = self.offered.profiles.get(model)
        return None if profile is None else profile.price

    def reconfigure(self, settings: Config, offered: Catalogue, keys: KeyRing) -> None:
        """Replace nodes, models, keys and limits; running requests are not affected."""
        self.settings, self.offered, self.guard = settings, offered, _guard(settings)
        self.authenticator.keys, self.authenticator.reserve_tokens = keys, settings.access.reserve_tokens
        self._endpoints.catalogue = offered
        self._inference.reconfigure(settings, offered)
        self._responses.max_bytes = self._conversations.max_bytes = settings.gateway.max_body_bytes
        self.service.reconfigure(settings, offered)

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request."""
        exchange.body_timeout_s = self.settings.gateway.body_timeout_s
        try:
            request = self._pipeline.begin(exchange)
            if request is not None:
                await request.serve()
                return
            if exchange.path.startswith(API) and exchange.method != "OPTIONS":
                exchange.extra_headers.update(self.guard.cors(exchange.header(b"origin")))
            endpoint = self._let_in(exchange)
            if endpoint is None:
                await self._reply_options(exchange)
            else:
                if self.capture.key is not None:
                    exchange = self.capture.tap(exchange)
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
        finally:
            if isinstance(exchange, CapturedExchange):
                self.capture.keep(exchange)

    def _forget_accesses(self) -> None:
        """Have the accesses looked up anew that were cached for the keys in force."""
        self.authenticator.keys = replace(self.authenticator.keys)

    async def handle_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket; only Responses have one."""
        try:
            owner = self._let_socket_in(scope)
        except ApiError as error:
            await receive()
            await refuse_socket(scope, send, error)
            return
        await ResponsesSocket(
            scope,
            receive,
            send,
            handle=self.handle,
            new_request_id=lambda: request_id_of(None),
            max_message_bytes=self.settings.gateway.max_body_bytes,
            history=self._socket_memory.connection(owner),
        ).serve()

    def _let_in(self, exchange: Exchange) -> Endpoint | None:
        """Return the endpoint of a request, ``None`` for OPTIONS; log a request that is rejected here.

        Raises:
            ApiError: access is denied, or there is no such path or method.
        """
        try:
            self._check(exchange)
            return self._find(exchange.method, exchange.path)
        except ApiError as error:
            self.metrics.rejected.labels(error.status).inc()
            logs.rejected(log, exchange.request_id, exchange.method, exchange.path, error.status, error.code)
            raise

    def _check(self, exchange: Exchange) -> None:
        """Check that the request may use this path at all; the endpoint checks the rest."""
        if exchange.method == "OPTIONS":
            return
        if exchange.path.startswith(API):
            exchange.caller = principal = self.authenticator.identify(exchange.header)
            if not self.authenticator.is_proved(principal):
                self.guard.check_site(exchange.header, setting="gateway")
        elif exchange.path.startswith("/admin/"):
            exchange.caller = self.authenticator.check_admin(exchange.header)
        else:
            return
        self.guard.check_media_type(exchange.method, exchange.header)

    def _let_socket_in(self, scope: Scope) -> str:
        """Check that a WebSocket may be opened, by this principal and from this origin; return its owner.

        Raises:
            ApiError: it may not.
        """
        path = scope["path"]

        def header(name: bytes) -> bytes | None:
            return find_header(scope["headers"], name)

        try:
            if path != RESPONSES.path:
                raise NotFoundError(f"There is no WebSocket at {path}.")
            principal = self.authenticator.identify(header)
            if self.authenticator.is_proved(principal):
                origin, host = header(b"origin"), header(b"host")
                self.guard.check_origin(origin, host, setting="gateway", any_is_allowed=True)
            else:
                self.guard.check_site(header, setting="gateway")
            return principal.name
        except ApiError as error:
            self.metrics.rejected.labels(error.status).inc()
            logs.rejected(log, request_id_of(header(REQUEST_ID)), "GET", path, error.status, error.code)
            raise

    async def _reply_options(self, exchange: Exchange) -> None:
        """Answer OPTIONS with a path's methods, and a preflight with its CORS headers."""
        allow = _allow(self._allowed(exchange.path))
        if exchange.path.startswith(API):
            allowed = self.guard.preflight(exchange.header, allow[0][1].decode(), setting="gateway")
            allow = (*allow, *allowed)
        await exchange.reply(204, b"", headers=allow)

    def _find(self, method: str, path: str) -> Endpoint | None:
        """Return the endpoint of a method and path; ``None`` for OPTIONS."""
        allowed = self._allowed(path)
        if allowed is None:
            raise NotFoundError(f"Unknown request URL: {method} {path}.")
        if method == "OPTIONS":
            return None
        endpoint = allowed.get("GET" if method == "HEAD" else method)
        if endpoint is None:
            raise MethodNotAllowedError(f"{method} is not allowed at {path}; use {' or '.join(allowed)}.")
        return endpoint

    def _allowed(self, path: str) -> Methods | None:
        known = self._paths.get(path) or self._pages.get(path)
        if known is not None:
            return known
        return next((methods for pattern, methods in self._patterns if pattern.fullmatch(path)), None)

    async def _describe(self, exchange: Exchange) -> None:
        await exchange.reply(200, api_description.description())

    def _in_flight(self) -> Mapping[str, int]:
        counts = self.fleet.in_flight.by_node
        return {node: counts.get(node, 0) for node in self.fleet.state.nodes}

    def _sample(self) -> FleetSample:
        nodes = self.fleet.state.nodes.values()
        return FleetSample(
            tuple(
                NodeSample(
                    node.name,
                    node.up,
                    node.health is not None and node.health.state is NodeState.DRAINING,
                    sum(device.memory_total_bytes for device in devices_in_use([node])),
                    sum(device.memory_free_bytes for device in devices_in_use([node])),
                )
                for node in nodes
            ),
            tuple(
                ModelSample(node.name, status.id, status.state, status.running, status.waiting)
                for node in nodes
                if node.up
                for status in node.models.values()
            ),
            self.fleet.state.known.union(self.offered.profiles),
        )


def _guard(settings: Config) -> Guard:
    return Guard(settings.gateway.allowed_origins, settings.gateway.allowed_hosts)


def _rate_limiter(access: AccessSettings) -> RateLimiter:
    if access.counters is CountersKind.MEMORY:
        return MemoryRateLimiter()
    try:
        return ValkeyRateLimiter(access.url)
    except ValueError as error:
        raise ConfigError("cortex.toml", "access.url", str(error)) from None


def _allow(allowed: Methods | None) -> tuple[Header, ...]:
    assert allowed is not None
    methods = [name for method in allowed for name in ((method, "HEAD") if method == "GET" else (method,))]
    return ((b"allow", ", ".join([*methods, "OPTIONS"]).encode()),)
