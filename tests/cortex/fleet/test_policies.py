"""Routing policies: what each chooses, and the laws that all of them keep."""

import collections
import random
from collections.abc import Mapping

import pytest
from fake_node import FakeNode
from gateway_rig import rig
from hypothesis import given
from hypothesis import strategies as st

from cortex.config import GatewaySettings, ModelProfile
from cortex.fleet.choice import Choices, least_busy
from cortex.fleet.policies import least_outstanding, power_of_two, prefix_affine
from cortex.fleet.policies.policy import Policy, Prompt
from cortex.fleet.policies.registry import POLICIES

LOADS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 30), min_size=1)
PROMPTS = st.builds(
    Prompt,
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 9) | st.just(9000)),
    st.integers(0, 5),
    st.integers(0, 2**40),
)
SLACKS = st.integers(0, 10)
ALL = pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))


@ALL
@given(LOADS, PROMPTS, SLACKS, st.randoms())
def test_a_choice_is_a_candidate_and_a_function_of_its_arguments(
    policy: Policy, loads: dict[str, int], prompt: Prompt, slack: int, rng: random.Random
) -> None:
    chosen = policy.choose(loads, prompt, slack)
    assert chosen in loads
    names = list(loads)
    rng.shuffle(names)
    assert policy.choose({name: loads[name] for name in names}, prompt, slack) == chosen


@ALL
@given(LOADS, PROMPTS, SLACKS, st.sampled_from("abcdefgh"))
def test_less_work_at_the_chosen_node_or_more_elsewhere_keeps_the_choice(
    policy: Policy, loads: dict[str, int], prompt: Prompt, slack: int, other: str
) -> None:
    chosen = policy.choose(loads, prompt, slack)
    assert policy.choose({**loads, chosen: max(0, loads[chosen] - 1)}, prompt, slack) == chosen
    # Under affinity, a busier least busy node lets one with a longer prefix be as much busier.
    if other != chosen and other in loads and not policy.uses_prefixes:
        assert policy.choose({**loads, other: loads[other] + 1}, prompt, slack) == chosen


@ALL
def test_requests_of_new_prompts_are_balanced(policy: Policy) -> None:
    """Within the bound of each: one request, and for two choices the logarithm of a logarithm."""
    loads = dict.fromkeys("abcdefgh", 0)
    for number in range(800):
        loads[policy.choose(loads, Prompt({}, number, number), 8)] += 1
    assert max(loads.values()) - min(loads.values()) <= {"power_of_two": 6}.get(policy.name, 1)


def test_least_outstanding() -> None:
    assert least_outstanding.choose({"b": 1, "a": 1, "c": 2}, Prompt(), 0) == "a"
    assert least_busy({"b": 1, "a": 2}) == "b"
    ties = {least_outstanding.choose(dict.fromkeys("abc", 3), Prompt(tie=tie), 0) for tie in range(1, 60)}
    assert ties == set("abc"), "new prompts spread out, in all gateways alike"


def test_two_choices_are_different_and_any_pair() -> None:
    loads = {"a": 0, "b": 1, "c": 2, "d": 9}
    counts = collections.Counter(power_of_two.choose(loads, Prompt(number=number), 0) for number in range(1200))
    # Of the six pairs, a is in three, b wins two of the rest, c one.
    assert set(counts) == set("abc")
    for name, share in (("a", 600), ("b", 400), ("c", 200)):
        assert counts[name] == pytest.approx(share, rel=0.2)
    assert power_of_two.choose({"a": 5}, Prompt(number=3), 0) == "a"


def test_two_choices_do_not_herd() -> None:
    """Gateways that see the same stale counts send to many nodes, where the least busy would get all of it."""
    stale = {name: load for load, name in enumerate("abcdefgh")}
    counts = collections.Counter(power_of_two.choose(stale, Prompt(number=number), 0) for number in range(800))
    assert max(counts.values()) <= 800 * 0.35
    assert {least_outstanding.choose(stale, Prompt(number=number), 0) for number in range(800)} == {"a"}


def test_a_conversation_goes_on_where_it_was_unless_that_is_much_busier() -> None:
    def place(cached: Mapping[str, int], **more: int) -> str:
        return prefix_affine.choose({"a": 0, "b": 0, "c": 0, **more}, Prompt(cached), 4)

    assert place({"b": 9000}) == "b"
    assert place({"b": 9000}, b=4) == "b"
    assert place({"b": 9000}, b=5) == "a"
    assert place({"b": 9000, "c": 2000}, b=5) == "c", "the next best of several replicas of a prefix"
    assert place({"b": 9000, "c": 9000}, b=4, c=1) == "c", "the less busy of equal ones"
    assert place({"gone": 9000}) == "a"


@given(LOADS, PROMPTS, SLACKS)
def test_affinity_is_bounded_by_the_slack_and_takes_the_longest_prefix_within_it(
    loads: dict[str, int], prompt: Prompt, slack: int
) -> None:
    chosen = prefix_affine.choose(loads, prompt, slack)
    cached, least = prompt.cached_bytes, min(loads.values())
    assert loads[chosen] <= least + slack
    assert all(cached.get(name, 0) <= cached.get(chosen, 0) for name in loads if loads[name] <= least + slack)
    # A longer prefix there keeps the choice; a longer one elsewhere moves it only there.
    longer = Prompt({**cached, chosen: 9001}, prompt.tie)
    assert prefix_affine.choose(loads, longer, slack) == chosen
    for name in loads:
        other = prefix_affine.choose(loads, Prompt({**cached, name: 9001}, prompt.tie), slack)
        assert other in {chosen, name}


def test_conversations_keep_their_hits_and_a_hot_prefix_gets_replicas() -> None:
    choices = Choices(GatewaySettings(), {})
    system = "You are an agent. " * 500
    loads = dict.fromkeys("abcd", 0)
    nodes: dict[int, list[str]] = collections.defaultdict(list)
    for turn in range(6):
        for talk in range(40):
            choice = choices.begin("m", (system + f"{talk} " * 2000 + "more " * 500 * turn).encode(), None, "me")
            node = choice(loads)
            choice.record(node)
            nodes[talk].append(node)
            loads[node] += 1
        loads = dict.fromkeys("abcd", 0)
    moves = sum(len(set(each)) - 1 for each in nodes.values())
    assert moves <= 4, "a turn is answered where the one before was, but for a few at the edge of the slack"
    assert {each[0] for each in nodes.values()} == set("abcd"), "the common prefix is at more than one node"


# ------------------------------------------------------------------ settings, and the recipe


def fullest(loads: Mapping[str, int], prompt: Prompt, slack: int) -> str:
    """Return the busiest candidate: a policy as the recipe has it, which no gateway should use."""
    return max(loads, key=lambda node: (loads[node], node))


async def test_a_new_policy_is_a_function_and_a_line_and_a_model_can_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "fullest", Policy("fullest", fullest))
    profiles = {"n": ModelProfile(id="n", source="/n", routing_policy="fullest")}
    choices = Choices(GatewaySettings(), profiles)
    assert choices.begin("n", b"{}", None, "me")({"a": 1, "b": 2}) == "b"
    assert choices.begin("m", b"{}", None, "me")({"a": 1, "b": 2}) == "a"
    choices.reconfigure(GatewaySettings(routing_policy="fullest"), {})
    assert choices.begin("m", b"{}", None, "me")({"a": 1, "b": 2}) == "b"
    nodes = FakeNode("a").ready("m"), FakeNode("b").ready("m")
    async with rig(*nodes, routing_policy="fullest") as gateway:
        for _ in range(4):
            assert (await gateway.chat().end()).status == 200
    assert [len(node.requests) for node in nodes] == [0, 4]


async def test_a_policy_without_prefixes_hashes_no_body(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashes(*arguments: object) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr("cortex.fleet.choice.prefix_hashes", hashes)
    for name, policy in POLICIES.items():
        choices = Choices(GatewaySettings(routing_policy=name), {})
        if policy.uses_prefixes:
            with pytest.raises(AssertionError, match="hashed"):
                choices.begin("m", b"{}", None, "me")
        else:
            choices.begin("m", b"{}", None, "me").record("a")
