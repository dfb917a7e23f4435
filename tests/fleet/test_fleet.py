"""What happens to a fleet: requests end in a right answer or a typed error, in time, and nothing is loaded twice."""

import asyncio
import json
import os
import signal
import time
from collections import Counter

import daemons
import httpx
import pytest
from fleet_rig import MODELS, Client, Fleet, hang_up, swap_at_random, workers_of

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


def test_two_models_that_do_not_fit_together_take_turns(fleet: Fleet) -> None:
    """200 requests by four callers through four workers: all are served, in far fewer swaps than requests."""

    async def story(client: Client) -> float:
        longest = 0.0

        async def caller(names: str) -> None:
            nonlocal longest
            for turn in range(50):
                name = names[turn % len(names)]
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
    assert longest_s < 20, "nobody starves"
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
        deadline = time.monotonic() + 5  # until the other workers have heard of it
        while not is_right(await client.chat("y"), "y"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)

    fleet.run(story)


def test_a_model_over_two_cards(fleet: Fleet) -> None:
    async def story(client: Client) -> httpx.Response:
        return await client.chat("wide")

    assert is_right(fleet.run(story), "wide")
    assert fleet.where("wide") == ["d"]


def test_what_fits_nowhere_or_cannot_be_read_says_so(fleet: Fleet) -> None:
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
        assert len(fleet_without(fleet, name).where("kill")) == 1
        fleet.nodes[name].start()

    fleet.run(story)


def fleet_without(fleet: Fleet, name: str) -> Fleet:
    return Fleet({k: v for k, v in fleet.nodes.items() if k != name}, fleet.gateways, fleet.proxy)


def test_a_frozen_node(fleet: Fleet) -> None:
    async def story(client: Client) -> None:
        assert is_right(await client.chat("freeze"), "freeze")
        (name,) = fleet.where("freeze")

        async def read() -> list[str]:
            return [line async for line in client.stream("freeze", "tokens=400 pause=0.05")]

        streams = [asyncio.ensure_future(read()) for _ in range(4)]
        await asyncio.sleep(0.5)
        fleet.nodes[name].send(signal.SIGSTOP)
        started = time.monotonic()
        for lines in await asyncio.gather(*streams):
            assert ended_in_an_error(lines), lines[-3:]
        assert time.monotonic() - started < 3 + 3, "the stall limit, and a little"
        deadline = time.monotonic() + 30
        while not is_right(reply := await client.chat("freeze"), "freeze"):
            assert is_typed(reply), reply.text
            assert time.monotonic() < deadline, reply.text
            await asyncio.sleep(0.1)
        fleet.nodes[name].send(signal.SIGCONT)

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


def test_a_drained_node_finishes_what_it_runs(fleet: Fleet) -> None:
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
