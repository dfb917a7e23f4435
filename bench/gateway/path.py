"""The gateway's own path of a request, without a kernel in it: what is between Granian's call and a node's socket.

A request comes as Granian's RSGI would bring it and goes to a connection whose wire answers at once, in this process;
everything between them is the product's own. For profiles, and for counts of instructions, which are the same in every
run where seconds are not.

    PYTHONPATH=bench python bench/gateway/path.py [KIND] [--requests N]
    PYTHONPATH=bench python bench/gateway/path.py --instructions [--keep]

The second counts them with valgrind, and fails where there are more than ``bench/results/gateway_path.json`` keeps.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import report
import uvloop
from gateway.rig import DISCOVERY, HEALTH, KEY, MODEL

from cortex import logs, request_log
from cortex._fast.http_client import Connection
from cortex._fast.watches import Watches
from cortex.access.keys import KeyRing, Limits, Principal
from cortex.asgi import Application
from cortex.config import Config, GatewaySettings, ModelProfile, NodeSettings, StoreSettings
from cortex.fleet.catalogue import Catalogue
from cortex.gateway import Gateway
from cortex.server.ending import Ending
from cortex.upstream import Pool
from cortex.worker import collect_seldom

NOWHERE = pathlib.Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process is there
NUM_SSE_EVENTS = 32
FEW_AND_MANY = 200, 600
NOISE = 0.05
NO_LIMITS = Limits()
COLLECTED = re.compile(r"Collected : (\d+)")
KEPT = pathlib.Path(__file__).parents[1] / "results" / "gateway_path.json"
WHOLE = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":'
    b'"assistant","content":"Hello, how can I help?"},"finish_reason":"stop"}],"usage":{"prompt_tokens":12,'
    b'"completion_tokens":8,"total_tokens":20}}'
)
SSE_EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
    b'"delta":{"content":" word"},"finish_reason":null}]}\n\n'
)
LAST = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
    b'"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)


def chunk(data: bytes) -> bytes:
    """Return a piece of a body as an HTTP/1.1 chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\nx-request-id: r\r\ndate: Wed, 25 Nov 2026 00:00:00 GMT\r\n"
ANSWER = (HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(WHOLE) + WHOLE,)
STREAM = (
    HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n",
    *([chunk(SSE_EVENT)] * NUM_SSE_EVENTS),
    chunk(LAST) + b"0\r\n\r\n",
)


@dataclass(frozen=True)
class Kind:
    """Kind of request: its body, the node's answer in pieces, how many nodes have the model, and the key's limits."""

    body: bytes
    answer: Sequence[bytes]
    num_replicas: int = 1
    limits: Limits = NO_LIMITS


def _body(stream: bool, pad: int = 0) -> bytes:
    text = "x" * pad
    return b'{"model":"m","messages":[{"role":"user","content":"Hi%s"}],"stream":%s}' % (
        text.encode(),
        b"true" if stream else b"false",
    )


KINDS: Mapping[str, Kind] = {
    "whole": Kind(_body(stream=False), ANSWER),
    "large": Kind(_body(stream=False, pad=60_000), ANSWER),
    "stream": Kind(_body(stream=True), STREAM),
    "agent": Kind(
        _body(stream=True, pad=60_000),
        STREAM,
        num_replicas=2,
        limits=Limits(max_concurrent=64, tokens_per_window=10**12),
    ),
}


class Wire(asyncio.Transport):
    """Transport whose other end answers each request in the same way, a loop iteration a piece, or not at all."""

    def __init__(self, loop: asyncio.AbstractEventLoop, answer: Sequence[bytes] = ()) -> None:
        super().__init__()
        self._loop = loop
        self.connection: Any = None
        self.answer = answer

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Be its own socket."""
        return self

    def setsockopt(self, *arguments: int) -> None:
        """Ignore an option."""

    def is_closing(self) -> bool:
        """Return that it is open."""
        return False

    def get_write_buffer_size(self) -> int:
        """Return that nothing waits."""
        return 0

    def write(self, data: Any) -> None:
        """Take a request."""
        if self.answer:
            self._loop.call_soon(self._send_piece, 0)

    def writelines(self, list_of_data: Any) -> None:
        """Take a request."""
        self.write(list_of_data)

    def pause_reading(self) -> None:
        """Do nothing."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Close."""

    def _send_piece(self, index: int) -> None:
        if index + 1 < len(self.answer):
            self._loop.call_soon(self._send_piece, index + 1)
        self.connection.data_received(self.answer[index])


class Protocol:
    """Stand for Granian's RSGI protocol object of one request."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.status = 0
        self.sent_bytes = 0

    async def __call__(self) -> bytes:
        """Return the body."""
        return self._body

    def response_bytes(self, status: int, headers: Any, body: bytes) -> None:
        """Take a whole answer."""
        self.status, self.sent_bytes = status, len(body)

    def response_stream(self, status: int, headers: Any) -> "Protocol":
        """Begin a stream."""
        self.status = status
        return self

    def send_bytes(self, data: bytes) -> Any:
        """Take a piece of a stream."""
        self.sent_bytes += len(data)
        return DONE

    def client_disconnect(self) -> Any:
        """Return what would be done when the client left."""
        return asyncio.get_running_loop().create_future()


class _Done:
    def __await__(self) -> Any:
        return iter(())


DONE = _Done()


class Scope:
    """A request's head, as Granian gives it."""

    proto = "http"
    http_version = "1.1"
    server = "127.0.0.1:31313"
    client = "127.0.0.1:50000"
    scheme = "http"
    method = "POST"
    path = "/v1/chat/completions"
    query_string = ""

    def __init__(self, body: bytes) -> None:
        self.headers = {
            "host": "127.0.0.1:31313",
            "content-type": "application/json",
            "content-length": str(len(body)),
            "authorization": f"Bearer {KEY}",
            "user-agent": "OpenAI/Python 2.0",
        }


async def ready_gateway(kind: Kind) -> Gateway:
    """Return a gateway of nodes with one model, with a connection to each."""
    digest = hashlib.sha256(KEY.encode()).digest()
    keys = KeyRing({digest[:8]: (digest, Principal("bench", ("*",), limits=kind.limits))}, None)
    nodes = tuple(
        NodeSettings(f"node{number}", f"http://127.0.0.1:{9 + number}") for number in range(kind.num_replicas)
    )
    config = Config(
        gateway=GatewaySettings(metrics_listen=""),
        store=StoreSettings(path=":memory:"),
        neurons=nodes,
    )
    gateway = Gateway(config, Catalogue({"m": ModelProfile(id="m", source="/m")}, {}, prefixes={}), keys)
    for node in nodes:
        known = gateway.fleet.state.nodes[node.name]
        gateway.fleet.replace(
            dataclasses.replace(known, up=True, polled=True, discovery=DISCOVERY, health=HEALTH, models={"m": MODEL})
        )
        _connect(gateway.service.pools[node.name], kind.answer)
    return gateway


def _connect(pool: Pool, answer: Sequence[bytes]) -> None:
    """Let a pool have one connection, whose other end answers."""
    wire = Wire(asyncio.get_running_loop(), answer)
    wire.connection = connection = Connection(pool, asyncio.get_running_loop())
    connection.connection_made(wire)

    async def connect() -> Connection:
        return connection

    pool._connect = connect  # type: ignore[method-assign]


async def run(kind: Kind, num_requests: int) -> float:
    """Serve requests one by one; return the CPU microseconds of one."""
    logs.configure(logs.LogFormat.TEXT)
    logging.getLogger("cortex").handlers[0].setStream(NOWHERE)  # type: ignore[attr-defined]
    gateway = await ready_gateway(kind)
    scope = Scope(kind.body)
    application = Application({})
    application.gateway, application.ending = gateway, Ending(0, [], gateway.end_requests)
    loop = asyncio.get_running_loop()
    application.open_rsgi(loop)
    # What depends on the clock would depend on the machine.
    application.watches = Watches(loop, 3600.0)
    request_log.WRITE_AFTER_S = 3600.0
    collect_seldom()
    before_s = time.process_time()
    for _ in range(num_requests):
        protocol = Protocol(kind.body)
        await application.__rsgi__(scope, protocol)
        assert protocol.status == 200
        assert protocol.sent_bytes
    return (time.process_time() - before_s) / num_requests * 1e6


def instructions(kind: str) -> float:
    """Return the instructions of one request, by valgrind: what more requests take, start and end left out."""
    few, many = (_counted(kind, number) for number in FEW_AND_MANY)
    return (many - few) / (FEW_AND_MANY[1] - FEW_AND_MANY[0])


def _counted(kind: str, num_requests: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, "-P", __file__, kind]
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [*command, "--requests", str(num_requests)], capture_output=True, text=True, check=True, env=environment
    )
    found = COLLECTED.search(done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


def compare(*, keep: bool) -> int:
    """Count every kind's instructions; return 1 if one has more than are kept, by more than noise."""
    kept = {}
    if KEPT.exists():
        kept = {row["request"]: row["instructions"] for row in json.loads(KEPT.read_text())["rows"]}
    counts = {kind: instructions(kind) for kind in KINDS}
    rows = [{"request": kind, "instructions": round(count), "kept": kept.get(kind)} for kind, count in counts.items()]
    report.write(
        "gateway_path",
        rows,
        question="How many instructions is the gateway's own path of a request, without a kernel?",
        packages=("granian", "uvloop", "httptools", "msgspec", "orjson", "prometheus-client"),
        keep=keep,
    )
    more = [kind for kind, count in counts.items() if count > (1 + NOISE) * kept.get(kind, count)]
    if more and not keep:
        print(f"more than {NOISE:.0%} above what is kept: {', '.join(more)}")
    return int(bool(more) and not keep)


def main() -> None:
    """Print what a request costs."""
    parser = report.arguments(__doc__)
    parser.add_argument("kind", nargs="?", choices=KINDS, default="whole")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--instructions", action="store_true", help="count instructions, of every kind")
    options = parser.parse_args()
    if options.instructions:
        sys.exit(compare(keep=options.keep))
    cost_us = uvloop.run(run(KINDS[options.kind], options.requests))
    print(f"{options.kind}: {cost_us:.2f} us a request")


if __name__ == "__main__":
    main()
