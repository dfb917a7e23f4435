"""A fleet under failures: requests end in a right answer or a typed error, in time, and no model is loaded twice."""

import asyncio
import json
import os
import pathlib
import resource
import signal
import time
from collections import Counter
from typing import Any

import daemons
import httpx
import psutil
import pytest
from fleet import MODELS, NO_STORE, Client, Fleet, hang_up, swap_at_random, workers_of

pytestmark = pytest.mark.fleet

TYPED = {429, 502, 503, 504}


def is_right(reply: httpx.Response, model: str) -> bool:
    return reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"].startswith(f"{model}:0")


def is_typed(reply: httpx.Response) -> bool:
    return reply.status_code in TYPED and set(reply.json()["error"]) >= {"message", "type", "code"}


def ended_well(lines: list[str]) -> bool:
    return "data: [DONE]" in lines


def ended_in_an_error(lines: list[str]) -> bool:
    last = lines[-1]
    return last.startswith("status 5") or ('"error"' in last and "data: [DONE]" not in lines)


def test_a_cold_load_behind_a_stream_that_waits(fleet: Fleet) -> None:
    async def story(client: Client) -> list[str]:
        started = time.monotonic()
        lines = []
        async for line in client.stream("slow"):
            if not lines:
                assert time.monotonic() - started < 1.5, "headers and a heartbeat come before the model"
            lines.append(line)
        return lines

    lines = fleet.run(story)
    assert lines[0].startswith(": loading slow")
    assert ended_well(lines)


def test_fifty_requests_for_a_cold_model_are_one_load(fleet: Fleet) -> None:
    async def story(client: Client) -> list[httpx.Response]:
        return await asyncio.gather(*(client.chat("cold") for _ in range(50)))

    replies = fleet.run(story)
    assert all(is_right(reply, "cold") for reply in replies), Counter(reply.status_code for reply in replies)
    assert fleet.loads("cold") == 1
    assert len(fleet.where("cold")) == 1


def test_two_models_that_do_not_fit_together_alternate(fleet: Fleet) -> None:
    """200 requests by four callers through four workers: all are served, in far fewer swaps than requests."""

    async def story(client: Client) -> float:
        longest = 0.0

        async def caller(names: str) -> None:
            nonlocal longest
            for step in range(50):
                name = names[step % len(names)]
                started = time.monotonic()
                for _ in range(20):
                    reply = await client.chat(name)
                    if reply.status_code == 200:
                        break
                    assert is_typed(reply), reply.text
                    await asyncio.sleep(0.05)
                assert is_right(reply, name), reply.text
                longest = max(longest, time.monotonic() - started)

        await asyncio.gather(*(caller(names) for names in ("x", "y", "xy", "yx")))
        return longest

    longest_s = fleet.run(story)
    swaps = fleet.loads("x") + fleet.loads("y")
    assert swaps <= 120, swaps
    assert longest_s < 20, "no caller starves"
    assert {node for model in "xy" for node in fleet.where(model)} == {"a"}


def test_a_pinned_model_is_never_evicted(fleet: Fleet) -> None:
    async def story(client: Client) -> None:
        assert is_right(await client.chat("x"), "x")
        assert (await client.act("models/pin", model="x", node="a")).status_code == 200
        loads = fleet.loads("x")
        for gateway in range(2):
            refused = await client.chat("y", gateway=gateway)
            assert is_typed(refused), refused.text
            assert refused.json()["error"]["code"] in {"model_load_failed", "no_node"}
        assert is_right(await client.chat("x"), "x")
        assert fleet.loads("x") == loads
        await client.act("models/pin", model="x", node="a", pinned=False)
        deadline = time.monotonic() + 5  # until the other workers have it
        while not is_right(await client.chat("y"), "y"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)

    fleet.run(story)


def test_a_model_over_two_gpus(fleet: Fleet) -> None:
    async def story(client: Client) -> httpx.Response:
        return await client.chat("wide")

    assert is_right(fleet.run(story), "wide")
    assert fleet.where("wide") == ["d"]


def test_a_model_that_fits_nowhere_or_cannot_be_read_is_an_error(fleet: Fleet) -> None:
    async def story(client: Client) -> None:
        refused = await client.chat("huge")
        assert refused.status_code in {422, 503}
        assert refused.json()["error"]["code"] in {"model_load_refused", "no_node"}
        broken = await client.chat("broken")
        assert broken.status_code == 422
        assert "the weights are broken" in broken.json()["error"]["message"]

    fleet.run(story)


def test_a_node_killed_in_the_middle_of_streams(fleet: Fleet) -> None:
    async def story(client: Client) -> None:
        assert is_right(await client.chat("kill"), "kill")
        (name,) = fleet.where("kill")

        async def read(gateway: int) -> list[str]:
            return [line async for line in client.stream("kill", "tokens=200 pause=0.05", gateway)]

        streams = [asyncio.ensure_future(read(i)) for i in range(8)]
        await asyncio.sleep(1)
        fleet.nodes[name].kill()
        started = time.monotonic()
        for lines in await asyncio.gather(*streams):
            assert ended_in_an_error(lines), lines[-3:]
        assert time.monotonic() - started < 5
        deadline = time.monotonic() + 15
        while not is_right(reply := await client.chat("kill"), "kill"):
            assert is_typed(reply), reply.text
            assert time.monotonic() < deadline, reply.text
            await asyncio.sleep(0.1)
        assert len(fleet.without(name).where("kill")) == 1
        fleet.nodes[name].start()

    fleet.run(story)


def test_a_frozen_node(fleet: Fleet) -> None:
    async def story(client: Client) -> None:
        assert is_right(await client.chat("freeze"), "freeze")
        (name,) = fleet.where("freeze")

        async def read() -> list[str]:
            return [line async for line in client.stream("freeze", "tokens=400 pause=0.05")]

        streams = [asyncio.ensure_future(read()) for _ in range(4)]
        await asyncio.sleep(0.5)
        fleet.nodes[name].process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        for lines in await asyncio.gather(*streams):
            assert ended_in_an_error(lines), lines[-3:]
        assert time.monotonic() - started < 3 + 3, "the stall limit, and a little"
        deadline = time.monotonic() + 30
        while not is_right(reply := await client.chat("freeze"), "freeze"):
            assert is_typed(reply), reply.text
            assert time.monotonic() < deadline, reply.text
            await asyncio.sleep(0.1)
        fleet.nodes[name].process.send_signal(signal.SIGCONT)

    fleet.run(story)


def test_a_network_that_is_cut_and_healed(fleet: Fleet) -> None:
    async def story(client: Client) -> None:
        assert is_right(await client.chat("cut"), "cut")
        assert fleet.where("cut") == ["c"]
        stream = client.stream("cut", "tokens=200 pause=0.05")
        lines = [await anext(stream)]
        fleet.proxy.cut()
        lines += [line async for line in stream]
        assert ended_in_an_error(lines)
        reply = await client.chat("cut")
        assert is_right(reply, "cut") or is_typed(reply)
        fleet.proxy.heal()
        deadline = time.monotonic() + 15
        while (await client.http.get(f"{client.urls[0]}/health")).json()["nodes_up"] != 6:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert is_right(await client.chat("cut"), "cut")

    fleet.run(story)


def test_a_slow_node(fleet: Fleet) -> None:
    """Requests wait for it within the limits; requests of other nodes do not."""

    async def story(client: Client) -> None:
        assert is_right(await client.chat("cut"), "cut")
        assert is_right(await client.chat("cold"), "cold")
        for name in fleet.without("c").where("cut"):  # another node may have loaded it while the network was cut
            assert (await client.act("models/unload", model="cut", node=name)).status_code == 200
        assert fleet.where("cut") == ["c"]
        assert "c" not in fleet.where("cold")
        fleet.proxy.delay_s = 0.7
        started = time.monotonic()
        slow = [asyncio.ensure_future(client.chat("cut")) for _ in range(8)]
        quick = await asyncio.gather(*(client.chat("cold") for _ in range(40)))
        assert time.monotonic() - started < 0.7, "the others go by"
        assert all(is_right(reply, "cold") for reply in quick)
        assert all(is_right(reply, "cut") for reply in await asyncio.gather(*slow))

        fleet.proxy.delay_s = 30  # slower than any limit: its polls fail too
        started = time.monotonic()
        replies = await asyncio.gather(*(client.chat("cut") for _ in range(4)))
        lines = [line async for line in client.stream("cut")]
        assert time.monotonic() - started < 20 + 4 + 2, "the limits for a whole answer and a first byte, and a little"
        assert all(is_right(reply, "cut") or is_typed(reply) for reply in replies)
        assert ended_well(lines) or ended_in_an_error(lines)
        fleet.proxy.delay_s = 0
        deadline = time.monotonic() + 15
        while (await client.http.get(f"{client.url()}/health")).json()["nodes_up"] != 6:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        while not is_right(reply := await client.chat("cut"), "cut"):
            assert is_typed(reply), reply.text
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)

    fleet.run(story)


async def load_two(client: Client, fleet: Fleet, first: str, second: str) -> None:
    """Have two models on ``d`` and nothing else; the first is used last."""
    for known in fleet.nodes["d"].get("/models")["models"]:
        if known["state"] == "ready":
            assert (await client.act("models/unload", model=known["id"], node="d")).status_code == 200
    for name in (first, second, first):
        assert is_right(reply := await client.chat(name), name), reply.text
    assert fleet.where(first) == fleet.where(second) == ["d"]


def test_the_least_recently_used_model_goes(fleet: Fleet) -> None:
    async def story(client: Client) -> None:
        await load_two(client, fleet, "p0", "p2")
        assert is_right(await client.chat("p1"), "p1")
        assert (fleet.where("p0"), fleet.where("p2")) == (["d"], [])

    fleet.run(story)


def test_the_model_of_the_lowest_priority_goes(fleet: Fleet) -> None:
    """Although it was used last; and one that matters more than the newcomer never does."""

    async def story(client: Client) -> None:
        await load_two(client, fleet, "p0", "p2")
        assert is_right(await client.chat("p1"), "p1")
        assert (fleet.where("p0"), fleet.where("p2")) == ([], ["d"])
        refused = await client.chat("p0")
        assert is_typed(refused)
        assert "matters more" in refused.json()["error"]["message"]
        assert (fleet.where("p1"), fleet.where("p2")) == (["d"], ["d"])

    with fleet.with_gateway("by-priority", '[eviction]\nstrategy = "priority"\n' + NO_STORE) as other:
        other.run(story)


def test_a_disk_that_is_full(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    """Answers are given though they cannot be kept, which is logged; with free space again, they are kept again."""

    async def story(client: Client) -> None:
        async def respond(prompt: str, **more: Any) -> httpx.Response:
            body = {"model": "cold", "input": prompt, **more}
            return await client.http.post(f"{client.url()}/v1/responses", json=body)

        def limit_files(size_bytes: int) -> None:
            for process in workers_of(running):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))

        kept = (await respond("tokens=3")).json()
        limit_files(100_000)
        started = time.monotonic()
        for _ in range(4):
            lost = await respond(f"tokens=3 {'x' * 200_000}")
            assert lost.json()["status"] == "completed"
            refused = await respond("tokens=3", previous_response_id=lost.json()["id"])
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "previous_response_not_found"
        body = {"model": "cold", "input": "x" * 200_000, "stream": True}
        async with client.http.stream("POST", f"{client.url()}/v1/responses", json=body) as streamed:
            assert "response.completed" in (await streamed.aread()).decode()
        background = await respond("x" * 200_000, background=True)
        assert background.status_code == 503
        assert background.json()["error"]["code"] == "store_unavailable"
        assert is_right(await client.chat("cold"), "cold")
        assert time.monotonic() - started < 5
        assert running.log.read_text().count("responses.db: ") >= 6
        limit_files(resource.RLIM_INFINITY)
        while not (await respond("tokens=3")).json()["store"]:  # the store is tried again after a while
            assert time.monotonic() - started < 30
            await asyncio.sleep(0.2)
        for _ in range(4):
            kept = (await respond("tokens=3", previous_response_id=kept["id"])).json()
            assert kept["status"] == "completed"

    with fleet.with_gateway("full", f'[store]\npath = "{tmp_path / "responses.db"}"\n') as other:
        running = other.gateways[0]
        other.run(story)


def test_a_gateway_killed(fleet: Fleet) -> None:
    """All of its processes at once, with streams and a load under way: the load is not begun twice, nothing is left."""

    async def story(client: Client) -> None:
        async def ask(model: str) -> str:
            try:
                lines = [line async for line in client.stream(model, "tokens=400 pause=0.05", 0)]
            except httpx.HTTPError:
                return "cut"
            return "well" if ended_well(lines) else "error"

        await client.act("models/unload", model="slow")
        loads = fleet.loads("slow")
        asked = [asyncio.ensure_future(ask(model)) for model in ["cold"] * 8 + ["slow"] * 4]
        await asyncio.sleep(1)
        running = other.gateways[0]
        for process in [*workers_of(running), psutil.Process(running.process.pid)]:
            process.kill()
        assert set(await asyncio.gather(*asked)) == {"cut"}
        replies = await asyncio.gather(*(Client(client.http, urls).chat("slow") for _ in range(8)))
        assert all(is_right(reply, "slow") for reply in replies)
        assert fleet.loads("slow") == loads + 1

    urls = [running.url for running in fleet.gateways]
    with fleet.with_gateway("killed") as other:
        other.run(story)
    fleet.assert_idle()


def test_a_drained_node_finishes_its_requests(fleet: Fleet) -> None:
    async def story(client: Client) -> None:
        assert is_right(await client.chat("x"), "x")
        stream = client.stream("x", "tokens=20 pause=0.05")
        lines = [await anext(stream)]
        assert (await client.act("nodes/drain", node="a")).json()["state"] == "draining"
        lines += [line async for line in stream]
        assert ended_well(lines)
        await asyncio.sleep(0.5)
        refused = [await client.chat("x") for _ in range(4)]
        assert all(is_typed(reply) for reply in refused)
        await client.act("nodes/drain", node="a", draining=False)
        deadline = time.monotonic() + 10
        while not is_right(await client.chat("x"), "x"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)

    fleet.run(story)


def test_clients_that_leave_leave_nothing_behind(fleet: Fleet) -> None:
    async def story(client: Client) -> None:
        async def leave() -> None:
            stream = client.stream("cold", "tokens=1000 pause=0.05")
            await anext(stream)
            await stream.aclose()

        await asyncio.gather(*(leave() for _ in range(40)))

    fleet.run(story)
    fleet.assert_idle()


def test_a_gateway_worker_killed(fleet: Fleet) -> None:
    async def story(client: Client) -> None:
        async def ask() -> str:
            try:
                lines = [line async for line in client.stream("cold", "tokens=60 pause=0.05", 0)]
            except httpx.HTTPError:
                return "cut"
            return "well" if ended_well(lines) else "error"

        streams = [asyncio.ensure_future(ask()) for _ in range(8)]
        await asyncio.sleep(1)
        os.kill(workers_of(fleet.gateways[0])[0].pid, signal.SIGKILL)
        outcomes = Counter(await asyncio.gather(*streams))
        assert set(outcomes) <= {"cut", "well"}
        assert is_right(await client.chat("cold", gateway=1), "cold")
        deadline = time.monotonic() + 20
        while True:
            try:
                if is_right(await client.chat("cold", gateway=0), "cold"):
                    break
            except httpx.HTTPError:
                pass
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)

    fleet.run(story)


def test_the_files_are_read_again_by_every_worker(fleet: Fleet) -> None:
    running = fleet.gateways[1]
    path = running.log.parent / "models.toml"
    before = path.read_text()

    def names() -> set[str]:
        return {model["id"] for _ in range(8) for model in running.get("/v1/models")["data"]}

    path.write_text(before + '[aliases]\nother = "cold"\n')
    hang_up(running)
    daemons.until(lambda: all("other" in {m["id"] for m in running.get("/v1/models")["data"]} for _ in range(8)), 10)
    path.write_text("[[models")
    hang_up(running)
    daemons.until(lambda: "configuration not reloaded" in running.log.read_text(), 10)
    assert "other" in names()
    path.write_text(before)
    hang_up(running)
    daemons.until(lambda: "other" not in names(), 10)


def test_the_real_model_on_two_real_nodes(fleet: Fleet) -> None:
    async def story(client: Client) -> list[httpx.Response]:
        return await asyncio.gather(*(client.chat(daemons.MODEL, f"What is {i} + {i}?") for i in range(8)))

    for reply in fleet.run(story):
        assert reply.status_code == 200
        assert reply.json()["usage"]["completion_tokens"] > 0
        assert json.loads(reply.text)["model"] == daemons.MODEL


def test_random_swaps(fleet: Fleet) -> None:
    """60 requests for eight models of which two fit, from both gateways at once (1,000 in the soak)."""
    counts = fleet.run(lambda client: swap_at_random(client, 60))
    assert counts["wrong"] == 0, counts
    assert counts["right"] >= 50, counts
    assert len(MODELS) > 10
