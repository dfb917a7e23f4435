"""Measure the rate that clients of a neuron, and of a gateway before it, see; print it as JSON, for ``run.py``.

The daemons are the installed commands. The client is a bare asyncio reader of event streams in this process: it shares
the cores with the engine, as a client on the same machine does.
"""

import argparse
import asyncio
import json
import pathlib
import tempfile
import time

from daemons import MODEL, Daemon, cortex, neuron

TEXT = ", ".join(map(str, range(1, 26))) + ", "
"""Text that a model at temperature 0 continues."""


async def stream(port: int, tokens: int) -> tuple[float, float, int]:
    """Request a completion; return the times of its first and last SSE event, and its tokens."""
    body = json.dumps(
        {"model": MODEL, "prompt": TEXT, "max_tokens": tokens, "temperature": 0, "stream": True,
         "stream_options": {"include_usage": True}}
    )  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
    first = last = 0.0
    kept = b""
    while received := await reader.read(1 << 16):
        kept = (kept + received)[-4096:]
        if b'"text":' in received:
            last = time.perf_counter()
            first = first or last
    writer.close()
    at = kept.rindex(b'"completion_tokens":') + len(b'"completion_tokens":')
    return first, last, int(kept[at : kept.index(b",", at)])


async def rate(port: int, streams: int, tokens: int) -> float:
    """Return the tokens a second that all streams get together while all of them run."""
    found = await asyncio.gather(*(stream(port, tokens) for _ in range(streams)))
    assert all(count == tokens for _, _, count in found), "a stream ended early"
    # From the first token of the last to the last of the first: nearly all of it, since they run in step.
    return sum((count - 1) / (last - first) for first, last, count in found)


def measure(daemon: Daemon, options: argparse.Namespace) -> dict[str, float]:
    """Return the best rate for each number of streams."""
    asyncio.run(rate(daemon.port, 1, 8))
    return {
        f"generate_{streams}": max(
            asyncio.run(rate(daemon.port, streams, options.tokens)) for _ in range(options.repeats)
        )
        for streams in options.streams
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with neuron(folder, options.model) as node, cortex(folder, node) as gateway:
            print(json.dumps({"neuron": measure(node, options), "cortex": measure(gateway, options)}))


if __name__ == "__main__":
    main()
