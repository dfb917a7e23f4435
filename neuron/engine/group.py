"""Tensor parallelism: the ranks of one model, their all-reduces and gathers, and the steps that rank 0 sends.

Each rank is a worker process with a part of the weights. Rank 0 schedules, samples and answers; before it runs a step
it sends the step's plan to the others, which run it on their part and join its sums. They connect over TCP at rank 0's
address and listen at no others; only the connections for plans are authenticated. Sums go by NCCL between GPUs and by
Gloo otherwise; plans by a connection of their own, which a rank can poll beside its daemon's channel, unlike a
collective.

A rank that is gone or that hangs fails the others' sums, at once or after ``limit_s``, and ends the group with
:class:`GroupLostError`; an NCCL sum over the limit ends the process, by torch's watchdog. No schedulers or requests
here.
"""

import contextlib
import dataclasses
import datetime
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import numpy as np
import torch
from torch import distributed
from torch._C._distributed_c10d import AllgatherOptions, PrefixStore, Store, TCPStore  # typed there alone
from torch.distributed import ReduceOp

from neuron.device.jobs import GroupSettings
from neuron.engine.errors import GroupLostError
from neuron.engine.plan import StepPlan
from neuron.engine.sequence import Int32Array

TOKEN_BYTES: Final = 16
LOOK_S: Final = 0.001
"""Longest look for rank 0, during which running sequences wait."""
_LENGTH: Final = struct.Struct("<I")
_BACKEND: Final = {"cuda": "nccl", "cpu": "gloo"}


class Cleared(msgspec.Struct, frozen=True, tag="cleared"):
    """Pages to be zeroed in each table, and state slots behind them, as int32."""

    tables: tuple[bytes, ...]


class Planned(msgspec.Struct, frozen=True, tag="planned"):
    """The fields of a step's plan, by name: numbers, and int32 arrays as shape and bytes."""

    numbers: dict[str, int]
    arrays: dict[str, tuple[tuple[int, ...], bytes]]


class Group:
    """This rank's membership of the group, from when all have joined until :meth:`close`.

    Raises :class:`GroupLostError` if they do not join within ``limit_s``.
    """

    def __init__(self, settings: GroupSettings, device: torch.device) -> None:
        self.rank, self.size = settings.rank, settings.size
        self._device = device
        self._limit_s = settings.limit_s
        self._sockets: list[socket.socket] = []
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Planned | Cleared).decode
        host, port = _host_and_port(settings)
        limit = datetime.timedelta(seconds=settings.limit_s)
        # On the step's own stream: on another, collectives and kernels would wait for each other by four events a sum.
        self._sum_options, self._gather_options = distributed.AllreduceOptions(), AllgatherOptions()
        self._sum_options.asyncOp = self._gather_options.asyncOp = False
        with _lost("meeting the other ranks"):
            # torch would listen on every interface of this host.
            listener = socket.create_server((host, port)).detach() if self.rank == 0 else None
            self._store = TCPStore(
                host, port, self.size, self.rank == 0, limit, wait_for_workers=False, master_listen_fd=listener
            )
            self._connect(host)
            store = PrefixStore(_BACKEND[device.type], self._store)
            here = self._sockets[0].getsockname()[0] if self._sockets else host
            self._ranks = _process_group(device, store, self.rank, self.size, limit, here)
            self.least(0)  # a first collective makes all connections

    # ------------------------------------------------------------------ collectives

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``x`` over the ranks, in place."""
        with _lost("a sum"):
            _wait(self._ranks.allreduce([x], self._sum_options))
        return x

    def gather(self, x: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        """Return the parts of all ranks side by side: ``[R, sum(widths)]`` of this rank's ``[R, widths[rank]]``."""
        widest = max(widths)
        if x.shape[1] < widest:
            x = torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        parts = [torch.empty_like(x) for _ in widths]
        with _lost("a gather"):
            _wait(self._ranks.allgather([parts], [x.contiguous()], self._gather_options))
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def least(self, number: int) -> int:
        """Return the least of the ranks' numbers."""
        value = torch.tensor([number], dtype=torch.int64, device=self._device)
        options = distributed.AllreduceOptions()
        options.reduceOp = ReduceOp(ReduceOp.MIN)
        with _lost("a comparison"):
            self._ranks.allreduce([value], options).wait()
        return int(value)

    # ------------------------------------------------------------------ plans

    def send(self, message: StepPlan | tuple[Int32Array, ...]) -> None:
        """Send the other ranks a step, or pages of each table to be zeroed; rank 0 only."""
        if isinstance(message, tuple):
            encoded: Planned | Cleared = Cleared(tuple(pages.tobytes() for pages in message))
        else:
            fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
            encoded = Planned(
                {name: value for name, value in fields.items() if isinstance(value, int)},
                {
                    name: (value.shape, np.ascontiguousarray(value).tobytes())
                    for name, value in fields.items()
                    if isinstance(value, np.ndarray)
                },
            )
        data = self._encode(encoded)
        with _lost("sending a step"):
            for other in self._sockets:
                other.sendall(_LENGTH.pack(len(data)) + data)

    def fileno(self) -> int:
        """Return the descriptor that is readable when rank 0 has sent a message; other ranks only."""
        return self._sockets[0].fileno()

    def receive(self) -> Planned | Cleared | None:
        """Return the next message of rank 0, ``None`` once it has left; other ranks only."""
        with _lost("receiving a step"):
            size = self._read(_LENGTH.size)
            data = size and self._read(_LENGTH.unpack(size)[0])
        return self._decode(data) if data else None

    def close(self) -> None:
        """Leave the group: the next operation of the others fails."""
        for other in self._sockets:
            other.close()
        self._sockets.clear()
        with contextlib.suppress(RuntimeError):
            self._ranks.abort()
        del self._ranks

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._sockets[0].recv(size - len(data))
            if not piece:
                return b""
            data += piece
        return bytes(data)

    def _connect(self, host: str) -> None:
        """Connect rank 0 to each other rank. The store holds its port and a token to authenticate with."""
        if self.rank:
            where = self._store.get("plans").decode()
            port, _, token = where.partition(" ")
            link = socket.create_connection((host, int(port)), self._limit_s)
            self._sockets.append(link)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.sendall(bytes.fromhex(token))
            return
        token_bytes = secrets.token_bytes(TOKEN_BYTES)
        with socket.create_server((host, 0), backlog=self.size) as listener:
            listener.settimeout(self._limit_s)
            self._store.set("plans", f"{listener.getsockname()[1]} {token_bytes.hex()}")
            while len(self._sockets) < self.size - 1:
                link, _ = listener.accept()
                link.settimeout(self._limit_s)
                if link.recv(TOKEN_BYTES, socket.MSG_WAITALL) == token_bytes:
                    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._sockets.append(link)
                else:
                    link.close()


def _host_and_port(settings: GroupSettings) -> tuple[str, int]:
    host, _, port = settings.address.rpartition(":")
    return host, int(port)


def rank_0_waits(settings: GroupSettings) -> bool:
    """Return whether rank 0 listens and does nothing but wait for the others.

    Other ranks connect only then: before, rank 0 may run steps of other models, which this rank has a part in.
    """
    try:
        with socket.create_connection(_host_and_port(settings), LOOK_S) as link:
            # A port without listener may be given to this very socket, which then connects to itself.
            return bool(link.getsockname() != link.getpeername())
    except OSError:
        time.sleep(LOOK_S)
        return False


def _process_group(
    device: torch.device, store: Store, rank: int, size: int, limit: datetime.timedelta, here: str
) -> Any:
    """Return the collectives, of a process group of their own: torch's global group cannot be made anew per model.

    ``here`` is this rank's address.
    """
    if device.type == "cuda":
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = limit
        return distributed.ProcessGroupNCCL(store, rank, size, options)
    gloo: Any = distributed.ProcessGroupGloo  # whose types lack the options
    chosen = gloo._Options()
    chosen._devices, chosen._threads, chosen._timeout = [gloo.create_device(hostname=here)], 2, limit
    return gloo(store, rank, size, chosen)


def _wait(work: Any) -> None:
    """Wait for a collective; NCCL returns none where the stream orders it."""
    if work is not None:
        work.wait()


@contextlib.contextmanager
def _lost(doing: str) -> Iterator[None]:
    """Raise a failure between the ranks as GroupLostError. torch raises RuntimeError for lost and slow connections."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise GroupLostError(f"a rank of the group was lost in {doing}: {str(error).splitlines()[0]}") from error


def plan_of(planned: Planned) -> StepPlan:
    """Return the plan of rank 0; fields that are no numbers or arrays are not sent."""
    arrays = {
        name: np.frombuffer(data, np.int32).reshape(shape).copy() for name, (shape, data) in planned.arrays.items()
    }
    known: dict[str, Any] = {**planned.numbers, **arrays}
    return StepPlan(**{field.name: known.get(field.name, ()) for field in dataclasses.fields(StepPlan)})
