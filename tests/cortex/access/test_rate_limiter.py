"""Limits hold to the request: in one process, and in Valkey for several. Each test runs over both."""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator

import orjson
import pytest
from daemons import free_port
from fake_node import FakeNode, answer_after
from gateway_rig import rig, until
from key_rig import KEY, ring

from cortex.access import rate_limiter as rate_limiters
from cortex.access.keys import Limits, Principal
from cortex.access.rate_limiter import Lease, MemoryRateLimiter, Reason, Refusal
from cortex.access.valkey import RateLimiterUnavailableError, ValkeyRateLimiter
from cortex.supervise import Supervisor

RateLimiter = MemoryRateLimiter | ValkeyRateLimiter


@pytest.fixture(params=["memory", "valkey"])
def url(request: pytest.FixtureRequest) -> str:
    return "" if request.param == "memory" else str(request.getfixturevalue("valkey"))


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[RateLimiter]:
    found = ValkeyRateLimiter(url) if url else MemoryRateLimiter()
    await found.open(Supervisor())
    try:
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(RateLimiterUnavailableError):
                    await found.usage("nobody", Limits())
                    break
                await asyncio.sleep(0.02)
        yield found
    finally:
        await found.close()


async def rush(found: RateLimiter, name: str, limits: Limits, count: int, reserve: int = 0) -> list[Lease | Refusal]:
    """Ask ``count`` times, 64 at once."""
    limit = asyncio.Semaphore(64)

    async def one() -> Lease | Refusal:
        async with limit:
            return await found.take(name, limits, reserve)

    return await asyncio.gather(*(one() for _ in range(count)))


def leases(outcomes: list[Lease | Refusal]) -> list[Lease]:
    return [outcome for outcome in outcomes if isinstance(outcome, Lease)]


def reasons(outcomes: list[Lease | Refusal]) -> set[Reason]:
    return {outcome.reason for outcome in outcomes if isinstance(outcome, Refusal)}


async def test_requests_a_minute(url: str) -> None:
    async with opened(url) as found:
        outcomes = await rush(found, "rate", Limits(requests_per_minute=37), 200)
        assert len(leases(outcomes)) == 37
        assert reasons(outcomes) == {Reason.REQUESTS}
        refusal = await found.take("rate", Limits(requests_per_minute=37), 0)
        assert isinstance(refusal, Refusal)
        assert 50 < (refusal.retry_after_s or 0) <= 60
        assert isinstance(await found.take("other", Limits(requests_per_minute=37), 0), Lease)


async def test_requests_at_a_time(url: str) -> None:
    limits = Limits(max_concurrent=5)
    async with opened(url) as found:
        running = leases(await rush(found, "concurrent", limits, 64))
        assert len(running) == 5
        await found.settle(running[0], 0)
        assert len(leases(await rush(found, "concurrent", limits, 64))) == 1


async def test_a_window_of_tokens(url: str) -> None:
    """Ten requests of 10 fit into 100 while they run; what they did not use is there again, what they used is not."""
    limits = Limits(tokens_per_window=100)
    async with opened(url) as found:
        outcomes = await rush(found, "tokens", limits, 64, reserve=10)
        assert len(leases(outcomes)) == 10
        assert reasons(outcomes) == {Reason.TOKENS}
        await asyncio.gather(*(found.settle(lease, 4) for lease in leases(outcomes)))
        assert (await found.usage("tokens", limits)).tokens == 40
        assert len(leases(await rush(found, "tokens", limits, 64, reserve=10))) == 6


async def test_used_tokens_leave_the_window(url: str) -> None:
    limits = Limits(tokens_per_window=10, window_s=1)
    async with opened(url) as found:
        (lease,) = leases([await found.take("rolling", limits, 10)])
        await found.settle(lease, 10)
        refusal = await found.take("rolling", limits, 10)
        assert isinstance(refusal, Refusal)
        assert refusal.retry_after_s is not None
        assert 0.5 < refusal.retry_after_s < 1.2
        await asyncio.sleep(refusal.retry_after_s + 0.02)
        assert isinstance(await found.take("rolling", limits, 10), Lease)


async def test_a_balance_does_not_come_back(url: str) -> None:
    limits = Limits(balance_tokens=100, window_s=1)
    async with opened(url) as found:
        outcomes = await rush(found, "balance", limits, 64, reserve=30)
        assert len(leases(outcomes)) == 3
        await asyncio.gather(*(found.settle(lease, 33) for lease in leases(outcomes)))
        refusal = await found.take("balance", limits, 30)
        assert refusal == Refusal(Reason.BALANCE, None)
        assert isinstance(await found.take("balance", Limits(balance_tokens=200), 30), Lease), "topped up"
        assert (await found.usage("balance", limits)).spent_tokens == 99


async def test_a_request_larger_than_a_budget_is_let_in_when_nothing_is_used(url: str) -> None:
    limits = Limits(tokens_per_window=100)
    async with opened(url) as found:
        (lease,) = leases([await found.take("large", limits, 5000)])
        assert isinstance(await found.take("large", limits, 1), Refusal)
        await found.settle(lease, 150)
        assert isinstance(await found.take("large", limits, 1), Refusal)


PROGRAM = """
import asyncio, sys
from cortex.access.keys import Limits
from cortex.access.rate_limiter import Lease
from cortex.access.valkey import ValkeyRateLimiter

async def main():
    found = ValkeyRateLimiter(sys.argv[1])
    limit = asyncio.Semaphore(64)
    async def one(name, limits, reserve):
        async with limit:
            return isinstance(await found.take(name, limits, reserve), Lease)
    counts = []
    for name, limits, reserve in (
        ("p-rate", Limits(requests_per_minute=101), 0),
        ("p-concurrent", Limits(max_concurrent=17), 0),
        ("p-tokens", Limits(tokens_per_window=1000), 30),
    ):
        counts.append(sum(await asyncio.gather(*(one(name, limits, reserve) for _ in range(150)))))
    print(*counts)
    await found.close()

asyncio.run(main())
"""


def test_four_processes_count_together(valkey: str) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, valkey], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert not any(process.returncode for process in processes)
    counts = [[int(number) for number in output.split()] for output in outputs]
    assert [sum(column) for column in zip(*counts, strict=True)] == [101, 17, 33]


async def test_the_leases_of_a_killed_gateway_expire(valkey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cortex.access.valkey.LEASE_S", 0.3)
    limits = Limits(max_concurrent=1, tokens_per_window=10)
    killed = ValkeyRateLimiter(valkey)  # never opened: it renews nothing
    async with opened(valkey) as found:
        assert isinstance(await killed.take("lost", limits, 10), Lease)
        assert isinstance(await found.take("lost", limits, 10), Refusal)
        await asyncio.sleep(0.35)
        assert isinstance(await found.take("lost", limits, 10), Lease)
        await asyncio.sleep(0.5)
        assert isinstance(await found.take("lost", limits, 10), Refusal), "one that is held is renewed"
    await killed.close()


async def test_no_server_is_a_typed_error() -> None:
    found = ValkeyRateLimiter(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(RateLimiterUnavailableError) as caught:
        await found.take("a", Limits(max_concurrent=1), 0)
    assert (caught.value.status, caught.value.code) == (503, "access_counters_unavailable")
    await found.close()


def test_the_memory_window_by_its_own_clock() -> None:
    async def story() -> None:
        now = 1000.0
        found = MemoryRateLimiter(lambda: now)
        limits = Limits(requests_per_minute=2, tokens_per_window=100, window_s=600)
        for _ in range(2):
            (lease,) = leases([await found.take("a", limits, 10)])
            await found.settle(lease, 50)
        assert isinstance(await found.take("a", limits, 10), Refusal)
        now += 60
        refusal = await found.take("a", limits, 10)
        assert isinstance(refusal, Refusal)
        assert refusal.reason is Reason.TOKENS
        now += refusal.retry_after_s or 0
        assert isinstance(await found.take("a", limits, 10), Lease)

    asyncio.run(story())
    assert rate_limiters.NUM_BUCKETS == 60


# ------------------------------------------------------------------ through the gateway


async def test_a_limit_is_an_error_of_each_dialect_and_leases_are_released(url: str) -> None:
    go = asyncio.Event()
    neuron = FakeNode().ready("m")

    neuron.script = answer_after(go)
    access = {"counters": "valkey", "url": url} if url else {}
    principal = Principal(f"gated{time.time()}", limits=Limits(max_concurrent=2))
    given = {"authorization": f"Bearer {KEY}"}
    async with rig(neuron, keys=ring((KEY, principal)), access=access) as gateway:
        body = {"model": "m", "messages": []}
        held = [gateway.call("POST", "/v1/chat/completions", body | {"stream": i > 0}, given) for i in range(2)]
        await until(lambda: len(neuron.requests) == 2)
        refused = await gateway.call("POST", "/v1/chat/completions", body, given).end()
        assert (refused.status, refused.json()["error"]["code"]) == (429, "concurrency_exceeded")
        assert refused.headers["retry-after"] == "1"
        refused = await gateway.call("POST", "/v1/messages", body | {"max_tokens": 1}, given).end()
        assert (refused.status, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        held[0].leave()
        await until(lambda: not gateway.in_flight or gateway.in_flight == 1)
        go.set()
        for call in held:
            await call.end()
        rate_limiter = gateway.gateway.authenticator.rate_limiter
        usage = await rate_limiter.usage(principal.name, principal.limits)
        assert usage.running == 0
        reserved = 1024 + len(orjson.dumps(body | {"stream": False})) // 4
        assert usage.spent_tokens == 9 + reserved, "the answered one as its node counted, the other as was reserved"


async def test_exactly_as_many_as_allowed_get_through_the_gateway() -> None:
    neuron = FakeNode().ready("m")
    principal = Principal("alice", limits=Limits(requests_per_minute=50))
    async with rig(neuron, keys=ring((KEY, principal))) as gateway:
        body, given = {"model": "m", "messages": []}, {"x-api-key": KEY}
        calls = [gateway.call("POST", "/v1/chat/completions", body, given) for _ in range(64)]
        statuses = Counter([(await call.end()).status for call in calls])
        assert statuses == {200: 50, 429: 14}
        assert len(neuron.requests) == 50
