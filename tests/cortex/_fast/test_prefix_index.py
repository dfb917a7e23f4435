"""Prefixes of bodies, the nodes that were sent them, and conversations that go on where theirs is cached."""

import orjson
from fake_node import FakeNode
from gateway_rig import rig
from hypothesis import given
from hypothesis import strategies as st

from cortex._fast.prefix_index import BLOCK_BYTES, LONG_BLOCK_BYTES, MAX_BYTES, PrefixIndex, prefix_hashes

SYSTEM = "You are a careful assistant. " * 100


def body(*prompts: str, system: str = SYSTEM, **fields: object) -> bytes:
    messages = [{"role": "system", "content": system}] + [{"role": "user", "content": prompt} for prompt in prompts]
    return orjson.dumps({"model": "m", "messages": messages, **fields})


def test_a_longer_conversation_has_the_prefixes_of_the_shorter_one() -> None:
    first, second = prefix_hashes("m", body("a" * 2000)), prefix_hashes("m", body("a" * 2000, "b" * 3000))
    shared = [one for one, other in zip(first.hashes, second.hashes, strict=False) if one == other]
    assert len(shared) >= len(first.hashes) - 1
    assert first.tie == second.tie
    assert first.hashes == prefix_hashes("m", body("a" * 2000)).hashes
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
        assert prefix.ends[-1] <= max(size, BLOCK_BYTES)
        if size > BLOCK_BYTES:
            assert min(size, MAX_BYTES) - prefix.ends[-1] < LONG_BLOCK_BYTES


def test_a_clients_own_key_stands_for_its_prompt() -> None:
    long = body("b" * 9000, system="z")
    assert prefix_hashes("m", body("a"), "key").hashes == prefix_hashes("m", long, "key").hashes
    assert prefix_hashes("m", body("a"), "key").hashes != prefix_hashes("m", body("a"), "other").hashes
    prefixes = PrefixIndex()
    prefixes.record(prefix_hashes("m", body("a"), "key"), "a")
    assert prefixes.cached_bytes(prefix_hashes("m", long, "key")) == {"a": len(long)}


def test_a_header_that_changes_each_time_is_left_out() -> None:
    def claude(number: int) -> bytes:
        return body("hi", system=f"x-anthropic-billing-header: cc_version=2; cch={number};" + SYSTEM)

    assert prefix_hashes("m", claude(1)).hashes == prefix_hashes("m", claude(2)).hashes


def test_the_index_is_bounded() -> None:
    prefixes = PrefixIndex(max_prefixes=50)
    for number in range(1000):
        prefixes.record(prefix_hashes("m", body(system=f"{number}" * 900)), "a")
    assert len(prefixes) == 50


@given(st.binary(max_size=70), st.integers(0, 3 * BLOCK_BYTES), st.integers(0, 69), st.integers(1, 255))
def test_every_byte_of_a_block_counts(text: bytes, size: int, at: int, change: int) -> None:
    one = (text + bytes(70))[:70] + bytes(size)
    other = bytearray(one)
    other[at] ^= change
    changed = prefix_hashes("m", bytes(other)).hashes
    assert not set(changed) & set(prefix_hashes("m", one).hashes)
    assert prefix_hashes("m", text).hashes != prefix_hashes("m", text + b"\0").hashes


@given(
    st.lists(st.tuples(st.lists(st.sampled_from("xyz"), max_size=5), st.sampled_from("abc")), max_size=30),
    st.integers(1, 12),
)
def test_the_index_is_a_set_of_nodes_for_each_prefix_the_latest_kept(
    requests: list[tuple[list[str], str]], most: int
) -> None:
    """Against a model that keeps all, then forgets the longest prefixes of the oldest requests."""
    index = PrefixIndex(most)
    model: dict[int, set[str]] = {}
    for blocks, node in requests:
        prefix = prefix_hashes("m", b"s" * BLOCK_BYTES + b"".join(name.encode() * BLOCK_BYTES for name in blocks))
        known = [(end, model.get(name, set())) for name, end in zip(prefix.hashes, prefix.ends, strict=True)]
        expected = {name: max(end for end, nodes in known if name in nodes) for _, nodes in known for name in nodes}
        assert index.cached_bytes(prefix) == expected
        index.record(prefix, node)
        for name in reversed(prefix.hashes):
            model[name] = model.pop(name, set()) | {node}
        while len(model) > most:
            del model[next(iter(model))]
        assert len(index) == len(model)


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
