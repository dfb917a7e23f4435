"""Many clients, leaving clients, and a device worker that is killed in the middle of a stream."""

import asyncio
import contextlib
import json
import pathlib
import random
import time

import daemons
import httpx
import pytest

LONG = {
    "model": daemons.MODEL,
    "messages": [{"role": "user", "content": "Count from one to one thousand."}],
    "temperature": 0,
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
}


def running(node: daemons.Daemon) -> int:
    worker = node.get("/health")["workers"][0]
    return int(worker["running"] + worker["waiting"])


def test_sixty_four_streams_all_end_properly(gateway: daemons.Daemon, node: daemons.Daemon) -> None:
    async def one(client: httpx.AsyncClient, tokens: int) -> None:
        body = LONG | {"max_tokens": tokens, "stream_options": {"include_usage": True}}
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            assert reply.status_code == 200
            lines = [line async for line in reply.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["usage"]["completion_tokens"] == tokens

    async def story() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=gateway.url, timeout=110, limits=limits) as client:
            await asyncio.gather(*(one(client, 4 + i % 13) for i in range(64)))

    asyncio.run(story())
    daemons.until(lambda: running(node) == 0, what="no sequence is left")


def test_two_hundred_clients_that_leave_leave_nothing(gateway: daemons.Daemon, node: daemons.Daemon) -> None:
    dice = random.Random(7)

    async def one(client: httpx.AsyncClient, leave_after_s: float, stream: bool) -> None:
        with contextlib.suppress(TimeoutError, httpx.HTTPError):
            async with (
                asyncio.timeout(leave_after_s),
                client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": stream}) as reply,
            ):
                async for _ in reply.aiter_bytes():
                    pass

    async def story() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=gateway.url, timeout=60, limits=limits) as client:
            for _ in range(4):
                await asyncio.gather(*(one(client, dice.uniform(0.01, 1.5), dice.random() < 0.8) for _ in range(50)))

    async def warm_up() -> None:
        """As many requests at once as below, so that the connections a gateway keeps to its nodes are there."""
        async with httpx.AsyncClient(base_url=gateway.url, timeout=100) as client:
            body = LONG | {"max_tokens": 1, "stream": False}
            await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(50)))

    asyncio.run(warm_up())
    daemons.until(lambda: running(node) == 0)
    before = gateway.open_files(), node.open_files()
    asyncio.run(story())
    daemons.until(lambda: running(node) == 0, what="no sequence is left")
    daemons.until(lambda: all(m["running"] == 0 for m in node.get("/models")["models"]), what="no request is left")
    daemons.until(lambda: gateway.open_files() <= before[0], what="the gateway's descriptors are given back")
    daemons.until(lambda: node.open_files() <= before[1], what="the neuron's descriptors are given back")


def test_a_killed_worker_is_reported_replaced_and_serves_again(
    tmp_path: pathlib.Path, smollm2_gguf: pathlib.Path
) -> None:
    with daemons.neuron(tmp_path, smollm2_gguf) as node, daemons.cortex(tmp_path, node) as gateway:
        seen: list[str] = []
        killed = 0.0
        with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=LONG, timeout=30) as reply:
            assert reply.status_code == 200
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    seen.append(line)
                if len(seen) == 5 and not killed:
                    (worker,) = node.workers()
                    worker.kill()
                    killed = time.monotonic()
        assert time.monotonic() - killed < 1.0, "the client gets the error within a second"
        assert json.loads(seen[-1][6:])["error"]["code"] == "device_worker_lost"
        daemons.until(lambda: daemons.model_state(node) == "recovering", 5, "recovering is seen")
        during = httpx.post(f"{node.url}/v1/chat/completions", json=LONG | {"stream": False, "max_tokens": 1})
        if during.status_code != 200:
            assert during.status_code == 503
            assert during.headers["retry-after"]
        daemons.until(lambda: daemons.model_state(node) == "ready", 60, "ready again")
        assert node.get("/health")["workers"][0]["restarts"] == 1

        def served() -> bool:
            after = httpx.post(
                f"{gateway.url}/v1/chat/completions", json=LONG | {"stream": False, "max_tokens": 4}, timeout=30
            )
            return after.status_code == 200

        daemons.until(served, 20, "the gateway serves again")


def test_a_second_daemon_on_the_same_address_exits_with_the_reason(
    node: daemons.Daemon, tmp_path: pathlib.Path
) -> None:
    import subprocess
    import sys

    program = pathlib.Path(sys.executable).with_name("neuron")
    done = subprocess.run(
        [str(program), "--devices", "cpu", "--listen", f"127.0.0.1:{node.port}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert f"Cannot listen on 127.0.0.1:{node.port}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--devices", "17"], "17"),
        (["--devices", "toaster"], "toaster"),
        (["--listen", "nowhere"], "daemon.listen"),
        (["--config", "/does/not/exist.toml"], "/does/not/exist.toml"),
    ],
)
def test_a_wrong_command_line_ends_at_once(arguments: list[str], expected: str) -> None:
    import subprocess
    import sys

    program = pathlib.Path(sys.executable).with_name("neuron")
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_worker_is_replaced_once_enough_models_have_left(tmp_path: pathlib.Path, smollm2_gguf: pathlib.Path) -> None:
    """With a real worker: another process, the same device, and the model answers as before."""
    with daemons.neuron(tmp_path, smollm2_gguf) as node:
        first = node.get("/health")["workers"][0]
        (before,) = node.workers()
        load = {"id": daemons.MODEL, "source": str(smollm2_gguf), "evict": {"defrag_after_cycles": 2}}
        for _ in range(2):
            assert httpx.post(f"{node.url}/models/unload", json={"id": daemons.MODEL}).status_code == 200
            status = httpx.post(f"{node.url}/models/load", json=load, timeout=60).json()
            assert status["state"] == "ready", status
        worker = node.get("/health")["workers"][0]
        assert (worker["state"], worker["recycles"], worker["restarts"]) == ("ready", 1, first["restarts"])
        (after,) = node.workers()
        assert after.pid != before.pid
        body = {"model": daemons.MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        assert httpx.post(f"{node.url}/v1/chat/completions", json=body, timeout=60).status_code == 200


@pytest.mark.parametrize("drain_s", [30, 1], ids=["finishes", "times out"])
def test_sigterm_closes_admission_and_ends_streams_in_time(
    tmp_path: pathlib.Path, smollm2_gguf: pathlib.Path, drain_s: int
) -> None:
    """Streams finish within their time, or end with an error; the daemon exits 0 (``daemons.daemon``)."""
    tokens = 150 if drain_s == 30 else 4000
    environment = {"NEURON_DAEMON__DRAIN_TIMEOUT_S": str(drain_s)}
    with daemons.neuron(tmp_path, smollm2_gguf, **environment) as node:

        async def one(client: httpx.AsyncClient, begun: asyncio.Event) -> list[str]:
            body = LONG | {"max_tokens": tokens, "stream_options": {"include_usage": True}}
            async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                assert reply.status_code == 200
                lines = []
                async for line in reply.aiter_lines():
                    if line.startswith("data: "):
                        lines.append(line)
                        begun.set()
            return lines

        async def story() -> None:
            async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
                begun = [asyncio.Event() for _ in range(4)]
                streams = [asyncio.create_task(one(client, event)) for event in begun]
                await asyncio.gather(*(event.wait() for event in begun))
                sent_at = time.monotonic()
                node.process.terminate()
                async with asyncio.timeout(5):
                    while (await client.get("/health")).json()["state"] != "draining":
                        await asyncio.sleep(0.01)
                late = await client.post("/v1/chat/completions", json=LONG | {"max_tokens": 1})
                assert late.status_code == 503
                assert late.headers["retry-after"]
                for lines in await asyncio.gather(*streams):
                    if drain_s == 30:
                        assert lines[-1] == "data: [DONE]"
                        assert json.loads(lines[-2][6:])["usage"]["completion_tokens"] == tokens
                    else:
                        assert json.loads(lines[-1][6:])["error"]["code"] == "answer_cut"
            assert await asyncio.to_thread(node.process.wait, 15) == 0
            if drain_s == 1:
                assert time.monotonic() - sent_at < 10

        asyncio.run(story())
