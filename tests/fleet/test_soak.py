"""The fleet for a long time: swaps without end, memory that does not grow, and many streams at once."""

import asyncio
import time
from collections import Counter

import orjson
import psutil
import pytest
from fleet import Fleet, swap_at_random, workers_of

from cortex.config import Timeouts
from cortex.upstream import Pool

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

HEADERS = ((b"content-type", b"application/json"),)


def pool(fleet: Fleet, gateway: int = 0) -> Pool:
    return Pool("gateway", fleet.gateways[gateway].url, Timeouts(stall_s=120, first_byte_s=120), 4096)


def body(prompt: str, stream: bool, model: str = "cold") -> bytes:
    return orjson.dumps({"model": model, "messages": [{"role": "user", "content": prompt}], "stream": stream})


def test_a_thousand_random_swaps(fleet: Fleet) -> None:
    before = sum(fleet.loads(f"s{i}") for i in range(8))
    total = 0
    while sum(fleet.loads(f"s{i}") for i in range(8)) - before < 1000:
        counts = fleet.run(lambda client: swap_at_random(client, 300, callers=4))
        total += 300
        assert counts["wrong"] == 0, counts
        assert counts["right"] >= 290, counts
        assert total < 20_000, "they share loads too well for this test"
    print(f"{total} requests, {sum(fleet.loads(f's{i}') for i in range(8)) - before} loads")
    fleet.assert_idle()


def test_memory_does_not_grow(fleet: Fleet) -> None:
    """100,000 requests, half of them streamed: the workers' memory grows by less than 1 MB after the first 30,000."""
    workers = workers_of(fleet.gateways[0])

    async def story() -> tuple[list[float], Counter[int]]:
        connections, statuses, samples = pool(fleet), Counter[int](), []
        done = 0

        async def caller(number: int) -> None:
            nonlocal done
            payload, stream = body(f"tokens=2 caller={number}", bool(number % 2)), number % 2
            while done < 100_000:
                done += 1
                if done % 2500 == 0:
                    samples.append(sum(psutil.Process(worker.pid).memory_info().rss for worker in workers) / 2**20)
                response = await connections.request(b"POST", b"/v1/chat/completions", HEADERS, payload)
                answer = await response.read_all(1 << 20)
                statuses[response.status] += 1
                assert not stream or answer.endswith(b"[DONE]\n\n"), answer[-200:]

        await asyncio.gather(*(caller(number) for number in range(32)))
        connections.close()
        return samples, statuses

    samples, statuses = asyncio.run(story())
    assert set(statuses) == {200}
    later = samples[12:]
    # A line through the samples: what one that comes late happens to hold does not matter.
    middle = (len(later) - 1) / 2
    mean = sum(later) / len(later)
    slope = sum((i - middle) * (rss - mean) for i, rss in enumerate(later)) / sum(
        (i - middle) ** 2 for i in range(len(later))
    )
    growth_mb = slope * 40
    print(f"rss_mb first={samples[0]:.1f} last={samples[-1]:.1f} growth_per_100k={growth_mb:.2f}")
    assert growth_mb < 1.0, samples


def test_two_thousand_streams_at_once(fleet: Fleet) -> None:
    async def story() -> tuple[Counter[str], float]:
        connections, outcomes = pool(fleet, 1), Counter[str]()
        payload = body("tokens=20 pause=0.5", True, "many")
        started = time.monotonic()

        async def one(number: int) -> None:
            await asyncio.sleep(number / 500)
            response = await connections.request(b"POST", b"/v1/chat/completions", HEADERS, payload)
            answer = await response.read_all(1 << 20)
            whole = response.status == 200 and answer.endswith(b"[DONE]\n\n")
            outcomes["whole" if whole and answer.count(b"many:") == 20 else f"status {response.status}"] += 1

        await asyncio.gather(*(one(number) for number in range(2000)))
        connections.close()
        return outcomes, time.monotonic() - started

    outcomes, seconds = asyncio.run(story())
    print(f"2,000 streams of 20 tokens in {seconds:.1f} s: {dict(outcomes)}")
    assert outcomes == {"whole": 2000}
    fleet.assert_idle()
