"""Prefixes of bodies, the nodes that were sent them, and conversations that go on where theirs is cached."""

import orjson
from fake_node import FakeNode
from gateway_rig import rig

from cortex.fleet.affinity import BLOCK_BYTES, LONG_BLOCK_BYTES, MAX_BYTES, PrefixIndex, prefix_hashes

SYSTEM = "You are a careful assistant. " * 100


def body(*prompts: str, system: str = SYSTEM, **fields: object) -> bytes:
    messages = [{"role": "system", "content": system}] + [{"role": "user", "content": prompt} for prompt in prompts]
    return orjson.dumps({"model": "m", "messages": messages, **fields})


def test_a_longer_conversation_has_the_prefixes_of_the_shorter_one() -> None:
    first, second = prefix_hashes("m", body("a" * 2000)), prefix_hashes("m", body("a" * 2000, "b" * 3000))
    shared = [one for one, other in zip(first.hashes, second.hashes, strict=False) if one == other]
    assert len(shared) >= len(first.hashes) - 1
    assert first.tie == second.tie
    assert prefix_hashes("n", body("a")).hashes != prefix_hashes("m", body("a")).hashes


def test_a_principal_has_prefix_hashes_of_its_own() -> None:
    mine, yours = (prefix_hashes("m", body("a" * 2000), principal=name) for name in ("me", "you"))
    assert not set(mine.hashes) & set(yours.hashes)
    assert mine.tie == yours.tie, "a new prompt goes to the same node for all principals"
    mine, yours = (prefix_hashes("m", body("a"), "key", principal=name) for name in ("me", "you"))
    assert mine.hashes != yours.hashes


def test_each_node_has_the_longest_prefix_that_it_was_sent() -> None:
    prefixes = PrefixIndex()
    one, other = prefix_hashes("m", body("x" * 4000)), prefix_hashes("m", body("y" * 4000))
    prefixes.record(one, "a")
    prefixes.record(other, "b")
    system = len(SYSTEM) // BLOCK_BYTES * BLOCK_BYTES
    assert prefixes.cached_bytes(prefix_hashes("m", body("x" * 4000, "more"))) == {"a": one.ends[-1], "b": system}
    assert prefixes.cached_bytes(prefix_hashes("m", body("y" * 4000, "more"))) == {"a": system, "b": other.ends[-1]}
    assert prefixes.cached_bytes(prefix_hashes("m", body("new"))) == {"a": system, "b": system}
    assert not prefixes.cached_bytes(prefix_hashes("m", body("q", system="z" * 5000)))
    prefixes.record(one, "b")
    prefixes.record(one, "b")
    assert prefixes.cached_bytes(one) == {"a": one.ends[-1], "b": one.ends[-1]}


def test_a_prefix_is_as_long_as_its_blocks() -> None:
    for size in (1, 1000, BLOCK_BYTES, 5000, 64 * 1024, 200_000, MAX_BYTES, MAX_BYTES + 1000):
        prefix = prefix_hashes("m", b"x" * size)
        assert len(prefix.ends) == len(prefix.hashes) > 0
        assert prefix.ends[-1] <= prefix.num_bytes
        if size > BLOCK_BYTES:
            assert min(size, MAX_BYTES) - prefix.ends[-1] < LONG_BLOCK_BYTES


def test_a_clients_own_key_stands_for_its_prompt() -> None:
    long = body("b" * 9000, system="z")
    assert prefix_hashes("m", body("a"), "key").hashes == prefix_hashes("m", long, "key").hashes
    assert prefix_hashes("m", body("a"), "key") != prefix_hashes("m", body("a"), "other")
    prefixes = PrefixIndex()
    prefixes.record(prefix_hashes("m", body("a"), "key"), "a")
    assert prefixes.cached_bytes(prefix_hashes("m", long, "key")) == {"a": len(long)}


def test_a_header_that_changes_each_time_is_left_out() -> None:
    def claude(number: int) -> bytes:
        return body("hi", system=f"x-anthropic-billing-header: cc_version=2; cch={number};" + SYSTEM)

    assert prefix_hashes("m", claude(1)) == prefix_hashes("m", claude(2))


def test_the_index_is_bounded() -> None:
    prefixes = PrefixIndex(max_prefixes=50)
    for number in range(1000):
        prefixes.record(prefix_hashes("m", body(system=f"{number}" * 900)), "a")
    assert len(prefixes._nodes) == 50


async def test_conversations_keep_to_their_node_and_spread_over_both() -> None:
    neurons = FakeNode("a").ready("m"), FakeNode("b").ready("m")
    async with rig(*neurons) as gateway:
        for _ in range(5):
            for name in "abcdefghij":
                messages = [{"role": "user", "content": f"conversation {name} " * 100}]
                call = await gateway.chat(messages=messages).end()
                assert call.status == 200
    asked = [{orjson.loads(a.body)["messages"][0]["content"] for a in neuron.requests} for neuron in neurons]
    assert not asked[0] & asked[1]
    assert all(asked)
