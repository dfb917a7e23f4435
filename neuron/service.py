"""The life of the daemon: listen, start the workers, bring models up, serve, drain.

The listener is bound before anything warms up, so that a probe sees ``starting`` rather than a refused connection. The
service owns the workers, the text processes and the table of models; requests are read by the API.
"""

import asyncio
import contextlib
import logging
import os
import pathlib
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from granian.constants import Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from cortex import systemd
from cortex.extras import INSTALL, missing_for_neuron
from cortex.guard import Guard
from cortex.loop_lag import watch_lag
from cortex.request_body import HEAD_TIMEOUT_S
from cortex.settings import read_secret, split_address, url_of
from cortex.supervise import Supervisor
from cortex.wire.errors import ApiError, NoHarnessError, UnavailableError
from cortex.wire.node import (
    Discovery,
    DrainRequest,
    Fit,
    Health,
    LoadRequest,
    ModelSpec,
    ModelStatus,
    NodeState,
    UnloadRequest,
    WorkerHealth,
    WorkerState,
)
from neuron import __version__, metrics
from neuron.config import Config, DaemonSettings
from neuron.device import probe
from neuron.device.worker import Worker
from neuron.engine_settings import WorkerSettings
from neuron.errors import DeviceWorkerLostError, ListenError
from neuron.harness import Harness
from neuron.load import source
from neuron.load.entry import Retention
from neuron.load.eviction import EvictionTimeouts, Evictor
from neuron.load.loader import Loader
from neuron.load.table import ModelTable

if TYPE_CHECKING:
    from neuron.text.pool import TextPool

_log = logging.getLogger("neuron.service")

STOPPING_RETRY_AFTER_S = 5.0
HOUSEKEEPING_S = 0.5
"""Interval of the checks for idle models and for workers that are due for replacement."""
LISTEN_CHECK_S = 0.05
MAX_CONNECTIONS = 16384
"""Connections served at a time. Granian's own limit is the backlog: at 1,024 streams a node would answer no poll."""
CPU_ENVIRONMENT = {"GOMP_SPINCOUNT": "2000"}
"""torch's threads wait for each other by spinning, for milliseconds by default. Where other programs use
the cores that is slow: at a load of 7 on two cores, decode made 0.5-3 tokens/s, and 8-20 with this."""
NCCL_ENVIRONMENT = {
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250",
    "TORCH_FR_BUFFER_SIZE": "0",
}
"""For models on several GPUs. These are of one host: NCCL need listen to no other. A process whose sum outlasts its
limit is ended by torch four times that ``WAIT`` later (by default a minute), for what it recorded of the sums to be
written down; here it records nothing."""
START_RETRY_FIRST_S, START_RETRY_MAX_S = 2.0, 60.0


class Service:
    """The daemon. Construct, then :meth:`run` once."""

    def __init__(
        self,
        config: Config,
        harnesses: Mapping[str, Harness] | None = None,
        workers: Mapping[str, Worker] | None = None,
        look: Callable[[], probe.Host] = probe.probe,
    ) -> None:
        """``harnesses``, ``workers`` and ``look`` (a probe of the host) replace the configured ones in tests."""
        self._config = config
        self._look = look
        self._is_closed = False
        self.listen = config.daemon.listen
        self.max_body_bytes = config.daemon.max_body_bytes
        self.guard = Guard(hosts=(config.daemon.name, *config.daemon.allowed_hosts))
        self.body_timeout_s = config.daemon.body_timeout_s
        self.secret = read_secret(config.daemon.secret_file, "neuron.toml", "daemon.secret_file")
        """Secret that callers must send; empty: none."""
        self._started = time.monotonic()
        self._state = NodeState.STARTING
        self._stopping = asyncio.Event()
        self._supervisor = Supervisor(lambda task: metrics.BACKGROUND_FAILURES.labels(task).inc())
        if workers is None:
            host = look()
            if host.no_gpu is not None:
                _log.warning("no GPU can be used: %s", host.no_gpu)
            chosen = probe.parse_devices(
                config.daemon.devices, [device.id for device in host.devices], host.no_gpu_here
            )
            workers = {device: self._worker(device) for device in chosen}
        self._workers = workers
        self._texts: TextPool | None = None
        self._no_harness = "daemon.harnesses names none"
        self._harnesses = self._find_harnesses() if harnesses is None else dict(harnesses)
        daemon = config.daemon
        self.models = ModelTable(
            lambda entry: self._loader.load(entry),
            metrics.forget_model,
            fetch=lambda entry: self._loader.fetch(entry),
            max_models=daemon.max_models,
            failed_kept_s=daemon.failed_kept_s,
        )
        timeouts = EvictionTimeouts(daemon.hold_s, daemon.linger_s, daemon.patience_s)
        self._evictor = Evictor(self.models, timeouts, self._recycle)
        self._loader = Loader(pathlib.Path(daemon.cache) if daemon.cache else source.default_cache(), self._evictor)
        self._activating: set[str] = set()

    # ------------------------------------------------------------------ what the API asks

    def admit(self) -> None:
        """Raise unless inference may begin: not without a harness, not while draining."""
        if not self._harnesses:
            raise NoHarnessError(f"This neuron cannot run models: {self._no_harness}.")
        if self._state is NodeState.DRAINING:
            raise UnavailableError("This neuron is shutting down.", retry_after_s=STOPPING_RETRY_AFTER_S)
        if self._is_closed:
            raise UnavailableError("This neuron is drained for maintenance.", retry_after_s=STOPPING_RETRY_AFTER_S)

    async def load(self, asked: LoadRequest) -> ModelStatus:
        """Load a model; see :meth:`ModelTable.load`."""
        self.admit()
        retention = Retention(asked.pinned, asked.priority, asked.idle_ttl_s)
        return await self.models.load(asked.spec(), self._harness_of(asked), retention, asked.evict)

    async def pull(self, spec: ModelSpec) -> ModelStatus:
        """Download the files of a model; see :meth:`ModelTable.pull`."""
        self.admit()
        return await self.models.pull(spec, self._harness_of(spec))

    async def fit(self, spec: ModelSpec) -> Fit:
        """Return the weights of a source that fit this node best; see :meth:`Harness.fit`."""
        return await self._harness_of(spec).fit(spec, self._evictor.evictable_bytes())

    async def unload(self, asked: UnloadRequest) -> ModelStatus:
        """Unload a model; see :meth:`ModelTable.unload`."""
        return await self.models.unload(asked.id, asked.drain_timeout_s, asked.generation)

    def _harness_of(self, spec: ModelSpec) -> Harness:
        if spec.harness not in self._harnesses:
            known = ", ".join(self._harnesses)
            raise NoHarnessError(f"There is no harness '{spec.harness}' here; there is: {known}.", param="harness")
        return self._harnesses[spec.harness]

    def drain(self, asked: DrainRequest) -> Health:
        """Refuse new requests and loads while running ones finish, or accept them again."""
        self._is_closed = asked.draining
        _log.info("draining=%d", asked.draining)
        return self.health()

    async def discovery(self, dialects: Sequence[str]) -> Discovery:
        """Describe this host with fresh memory figures."""
        host = await asyncio.to_thread(self._look)
        workers = self._workers
        return Discovery(
            name=self._config.daemon.name,
            version=__version__,
            hostname=socket.gethostname(),
            os=f"{platform.system()} {platform.release()}",
            driver_version=host.driver_version,
            cuda_version=host.cuda_version,
            devices=tuple(
                msgspec.structs.replace(device, worker=workers[device.id].state if device.id in workers else None)
                for device in host.devices
            ),
            harnesses=tuple(self._harnesses),
            dialects=tuple(dialects),
            boot_id=_boot_id(),
        )

    def health(self) -> Health:
        """Return the state of the daemon and its workers."""
        return Health(
            state=NodeState.DRAINING if self._is_closed else self._state,
            uptime_s=time.monotonic() - self._started,
            workers=tuple(worker.health() for worker in self._workers.values()),
            activating=tuple(sorted(self._activating)),
            degraded=self._supervisor.degraded,
        )

    # ------------------------------------------------------------------ life

    def stop(self) -> None:
        """Begin an orderly shutdown; safe to call again."""
        self._stopping.set()

    async def run(self, app: Any) -> None:
        """Serve until :meth:`stop`, then drain in bounded time.

        Raises:
            ListenError: the address is taken or not of this host.
        """
        server = _server(app, self._config.daemon)
        serving = asyncio.create_task(server.serve())
        start = self._supervisor.start
        activation = start("activation", self._activate, is_restarted=False)
        housekeeping = start("housekeeping", self._housekeep)
        stopping = asyncio.create_task(self._stopping.wait())
        pulse = start("systemd pulse", self._notify_systemd)
        lag = start("loop lag", lambda: watch_lag(metrics.LOOP_LAG.observe))
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
                raise ListenError(f"The server on {self.listen} ended unexpectedly.")
            systemd.notify(systemd.STOPPING)
            await self._drain()
        finally:
            tasks = (activation, housekeeping, stopping, pulse, lag)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(
                *([] if self._texts is None else [self._texts.stop()]),
                *(worker.stop(self._config.daemon.stop_timeout_s) for worker in self._workers.values()),
            )
            server.stop()  # type: ignore[no-untyped-call]
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    async def _notify_systemd(self) -> None:
        """Notify systemd once the API answers, which is before any model is loaded, and then that the loop is alive."""
        host, port = split_address(self.listen)
        while True:
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError:
                await asyncio.sleep(LISTEN_CHECK_S)
            else:
                writer.close()
                break
        self._announce(host, port)
        systemd.notify(systemd.READY)
        await systemd.stay_alive()

    def _announce(self, host: str, port: int) -> None:
        """Log the version, address and devices."""
        daemon = self._config.daemon
        fields = {
            "version": __version__,
            "at": url_of("https" if daemon.tls_certificate else "http", host, port),
            "name": daemon.name,
            "devices": ",".join(self._workers),
            "models": len(self._config.models),
            "harnesses": ",".join(self._harnesses) or "none",
            "secret": "on" if self.secret else "off",
        }
        _log.info("started", extra={"fields": fields})

    async def _activate(self) -> None:
        """Start the workers, then load the configured models."""
        preload = [entry for entry in self._config.models if entry.preload]
        for entry in self._config.models:
            if entry.harness in self._harnesses:
                retention = Retention(entry.pinned, entry.priority, entry.idle_ttl_s)
                self.models.add(entry.spec(), self._harnesses[entry.harness], retention)
        self._activating = {entry.id for entry in preload}
        if not self._harnesses:  # nothing that a worker could import
            self._activating, self._state = set(), NodeState.READY
            return
        starts = {asyncio.create_task(self._start(worker)) for worker in self._workers.values()}
        try:
            # One device that does not come up holds up neither the others nor the models that fit there.
            due = preload
            while starts:
                done, starts = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
                self._state = NodeState.READY
                if any(task.result() for task in done):
                    due = preload
                # A model waits until as many of its devices are up as it takes, or until all are and it is told that it
                # cannot be loaded.
                ready = {device for device, worker in self._workers.items() if worker.ready is not None}
                later = [
                    entry
                    for entry in due
                    if starts and len(ready.intersection(entry.devices or ready)) < entry.tensor_parallel
                ]
                for entry in due:
                    if entry not in later:
                        await self._preload(entry)
                due = later
        finally:
            for task in starts:
                task.cancel()

    async def _start(self, worker: Worker) -> bool:
        """Start a worker, trying again with growing pauses; return whether it needed more than one try."""
        pause_s = START_RETRY_FIRST_S
        while True:
            try:
                await worker.start()
            except Exception as error:  # noqa: BLE001 - a device that never comes up is no reason to stop trying
                trace = None if isinstance(error, DeviceWorkerLostError) else error
                message = f"worker did not start device={worker.device_id} retry_s={pause_s:.0f} error={error}"
                _log.error("%s", message, exc_info=trace)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, START_RETRY_MAX_S)
            else:
                return pause_s > START_RETRY_FIRST_S

    async def _preload(self, asked: LoadRequest) -> None:
        try:
            await self.load(asked)
        except ApiError as error:
            _log.error("preload failed model=%s error=%s", asked.id, error.message)
        except Exception:  # noqa: BLE001 - the other models are brought up all the same
            _log.exception("preload failed model=%s", asked.id)
        finally:
            self._activating.discard(asked.id)

    async def _housekeep(self) -> None:
        """Unload models that have been idle for too long, and replace workers that are due for it."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            await self.models.unload_idle()
            self.models.forget_failed()
            await self._evictor.tidy(self._config.daemon.defrag_idle_s)

    async def _recycle(self, device: str) -> None:
        """Replace a worker; return when the new one is ready, however many tries it takes."""
        worker = self._workers[device]
        await worker.stop(self._config.daemon.stop_timeout_s)
        await self._start(worker)
        worker.recycles += 1

    async def _drain(self) -> None:
        """Close admission and wait for running requests, within the limit."""
        self._state = NodeState.DRAINING
        busy = [entry for entry in self.models.entries() if entry.running]
        _log.info("draining requests=%d", sum(entry.running for entry in busy))
        if busy:
            waits = [asyncio.ensure_future(entry.idle.wait()) for entry in busy]
            await asyncio.wait(waits, timeout=self._config.daemon.drain_timeout_s)
            for wait in waits:
                wait.cancel()

    def _find_harnesses(self) -> dict[str, Harness]:
        """Return the harnesses; none in an installation of the gateway alone, which is logged."""
        daemon = self._config.daemon
        if missing := missing_for_neuron():
            self._no_harness = f"not installed here: {', '.join(missing)} ({INSTALL})"
            _log.warning("no model can be loaded: %s", self._no_harness)
            return {}
        from neuron.text.pool import TextPool
        from neuron.torch_harness import TorchHarness

        self._texts = TextPool()
        return {
            name: TorchHarness(
                self._workers,
                self._texts,
                daemon.collective_limit_s,
                daemon.prefix_sharing,
                cpu_kernels=self._config.engine.cpu_kernels,
            )
            for name in daemon.harnesses
        }

    def _worker(self, device: str) -> Worker:
        async def restarted() -> None:
            await self.models.recover(device)

        def changed(health: WorkerHealth) -> None:
            _log.info("worker device=%s state=%s fault=%s", device, health.state, health.fault)
            if health.state is WorkerState.POISONED:
                for other in self.models.lose(device):
                    self._workers[other].replace(f"{device}, which held a model together with it, was lost")

        daemon = self._config.daemon
        settings = WorkerSettings(self._config.engine, daemon.step_limit_s, daemon.max_waiting, daemon.log_format)
        encoded = msgspec.json.encode(settings).decode()
        command = [sys.executable, "-P", "-m", "neuron.engine", "--settings", encoded]
        environment = CPU_ENVIRONMENT if device.startswith("cpu") else NCCL_ENVIRONMENT
        environment = {name: value for name, value in environment.items() if name not in os.environ}
        return Worker(
            device,
            command,
            environment=environment,
            on_state=changed,
            on_restarted=restarted,
            supervisor=self._supervisor,
        )


def _boot_id() -> str:
    """Return the kernel's identity since its start; empty where it has none."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _server(app: Any, daemon: DaemonSettings) -> Server:
    """Return the embedded HTTP server, if its address is free: Granian would share it silently."""
    listen = daemon.listen
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, int(port)))
        except OSError as error:
            reason = f"Cannot listen on {listen}: {error.strerror}"
            raise ListenError(f"{reason}; see who does (ss -ltnp), or give --listen another address.") from error
    return Server(
        app,
        address=host,
        port=int(port),
        interface=Interfaces.ASGINL,
        log_enabled=False,
        websockets=False,
        backlog=2048,
        backpressure=MAX_CONNECTIONS,
        http1_settings=HTTP1Settings(header_read_timeout=HEAD_TIMEOUT_S * 1000),
        ssl_cert=pathlib.Path(daemon.tls_certificate) if daemon.tls_certificate else None,
        ssl_key=pathlib.Path(daemon.tls_key) if daemon.tls_key else None,
    )
