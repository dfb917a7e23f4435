"""Prefix-cache hits and times to the first token under routing policies, ours and others', on the same traces.

Discrete events, no network: four replicas of an 8-billion-parameter model on an H200 each, with continuous batching,
chunked prefill and a prefix cache of finite size, least recently used first out. A session asks its next turn when the
last one has ended and some time has passed, so that a slow answer delays what follows, as it does for an agent.

A prefill takes its arithmetic and a decode step its bytes, over what the card reached in probes (790 TFLOP/s of bf16,
4.3 TB/s), at :data:`EFFICIENCY`. The shape is Llama 3 8B's. A prompt's byte is a quarter of a token.

- Agents: a system prompt with tools of 8,000 tokens, shared by all sessions of its kind; sessions begin in bursts, as
  an agent starts others; 12 to 28 turns, each with the result of a tool's call, up to 60,000 tokens.
- Chats: short system prompts, 1 to 8 turns, minutes long.
- Documents: questions on a few documents of 20,000 tokens, some far more popular than others.

Ours see what a gateway sees: bodies as bytes, and the requests in flight. The others are the formulas that their
documentation publishes, with its defaults, since their programs run in real time only:

- SMG, ``cache_aware`` (lightseekorg/smg, ``docs/concepts/routing/cache-aware.md``): the worker with the longest match
  in a tree of what was sent where, if the match is over 0.3 of the prompt; the least loaded one otherwise, and where
  the most loaded one has over 64 requests more than the least loaded, and over 1.5 times as many.
- Dynamo, ``kv`` (ai-dynamo/dynamo, ``docs/components/router/router-concepts.md``): the least sum of prompt blocks to
  prefill, those at work included, and of blocks being decoded; what is cached is known exactly, from the workers'
  events.

    PYTHONPATH=bench python bench/routing.py [--keep]
"""

import dataclasses
import functools
import heapq
import itertools
import random
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import report

from cortex._fast.prefix_index import PrefixHashes, PrefixIndex, prefix_hashes
from cortex.config import GatewaySettings
from cortex.fleet.policies.policy import Policy, Prompt
from cortex.fleet.policies.registry import POLICIES

NODES: Final = ("a", "b", "c", "d")
EFFICIENCY: Final = 0.6
FLOPS, BYTES_PER_S = 790e12 * EFFICIENCY, 4.3e12 * EFFICIENCY
PARAMETERS, KV_BYTES, ATTENTION_FLOPS = 8e9, 131_072, 524_288
"""Parameters; bytes of a token's keys and values; operations of one token's attention to another one."""
CHUNK_TOKENS, MAX_SEQUENCES = 2048, 64
CACHE_TOKENS: Final = 400_000
BLOCK_TOKENS: Final = 64
TOKEN_BYTES: Final = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """Turn of a session. ``blocks`` are named by hashes over them and all before; ``num_answered`` is the output."""

    num_tokens: int
    num_answered: int
    blocks: tuple[int, ...]
    prefix: PrefixHashes
    pause_s: float
    """Time from the end of the turn before."""


Session = tuple[float, Sequence[Request]]
"""Time at which it begins, and its turns."""


class Talk:
    """A conversation that grows: its body, and the names of its blocks."""

    def __init__(self, rng: random.Random, start: bytes) -> None:
        self._rng = rng
        self._body = bytearray()
        self._blocks: list[int] = []
        self.add(start)

    def add(self, text: bytes) -> None:
        """Append a message."""
        self._body += text
        size = BLOCK_TOKENS * TOKEN_BYTES
        while (len(self._blocks) + 1) * size <= len(self._body):
            at = len(self._blocks) * size
            before = self._blocks[-1] if self._blocks else 0
            self._blocks.append(hash((before, bytes(self._body[at : at + size]))))

    def ask(self, num_asked: int, num_answered: int, pause_s: float) -> Request:
        """Append a message and return the request; its answer is appended for the next."""
        self.add(text(self._rng, num_asked))
        body = bytes(self._body)
        prompt = Request(len(body) // TOKEN_BYTES, num_answered, tuple(self._blocks), prefix_hashes("m", body), pause_s)
        self.add(text(self._rng, num_answered))
        return prompt


def text(rng: random.Random, num_tokens: int) -> bytes:
    """Return a text that no other one is like."""
    return rng.randbytes(num_tokens * TOKEN_BYTES // 2).hex().encode()


def agents(rng: random.Random) -> Iterator[Session]:
    """Make sessions of agents, some of which a first one has started at once, with a task in common."""
    systems = [text(rng, 8000) for _ in range(3)]
    began_s = 0.0
    for _ in range(36):
        began_s += rng.expovariate(1 / 8)
        start = rng.choice(systems) + text(rng, 1500)
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            talk = Talk(rng, start)
            turns = [
                talk.ask(
                    int(min(8000, rng.lognormvariate(7.1, 0.8))),
                    int(min(1500, rng.lognormvariate(5.2, 0.7))),
                    rng.lognormvariate(0.7, 0.8),
                )
                for _ in range(rng.randint(12, 28))
            ]
            yield began_s + rng.random() * 0.2, turns


def chats(rng: random.Random) -> Iterator[Session]:
    """Make conversations of people."""
    systems = [text(rng, num_tokens) for num_tokens in (200, 400, 800, 1500)]
    began_s = 0.0
    for _ in range(2000):
        began_s += rng.expovariate(9)
        talk = Talk(rng, rng.choice(systems))
        turns = [
            talk.ask(int(min(4000, rng.lognormvariate(4.6, 1.1))), rng.randint(80, 600), rng.uniform(5, 30))
            for _ in range(rng.randint(1, 8))
        ]
        yield began_s, turns


def documents(rng: random.Random) -> Iterator[Session]:
    """Make questions on documents, each popular in inverse proportion to its rank, now and then many at once."""
    texts = [text(rng, 20_000) for _ in range(40)]
    weights = [1 / (rank + 1) for rank in range(len(texts))]
    began_s = 0.0
    for _ in range(900):
        began_s += rng.expovariate(4)
        chosen = rng.choices(texts, weights)[0]
        for _ in range(12 if rng.random() < 0.03 else 1):
            talk = Talk(rng, chosen)
            yield began_s, [talk.ask(rng.randint(30, 200), rng.randint(100, 400), 0.0)]


TRACES: Final[Mapping[str, Callable[[random.Random], Iterator[Session]]]] = {
    "agents": agents,
    "chats": chats,
    "documents": documents,
}


@dataclasses.dataclass(slots=True)
class Running:
    """Request at a node. ``num_left`` are tokens to prefill, then tokens to decode."""

    request: Request
    sent_s: float
    session: Iterator[Request]
    num_cached: int = 0
    num_done: int = 0
    """Tokens of the prompt in the cache, then also those answered."""

    @property
    def num_to_prefill(self) -> int:
        """Tokens of the prompt that are not prefilled yet."""
        return self.request.num_tokens - self.num_done


class Node:
    """Replica: a queue, a batch and a prefix cache. It is asked when its next step ends, and to end it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: deque[Running] = deque()
        self.prefilling: deque[Running] = deque()
        self.decoding: list[Running] = []
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._step: tuple[float, float, int, list[tuple[Running, int]]] | None = None
        """Begin, duration of one step, number of steps, and what each prefills."""

    @property
    def load(self) -> int:
        """Requests that it has."""
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    def cached_tokens(self, request: Request) -> int:
        """Return the length of the prompt's longest prefix in the cache; its last token is never taken from there."""
        found = next((at for at, block in enumerate(request.blocks) if block not in self._cache), len(request.blocks))
        return min(found * BLOCK_TOKENS, request.num_tokens - 1)

    def _store(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):  # so that a prefix's end goes before its beginning
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) * BLOCK_TOKENS > CACHE_TOKENS:
            self._cache.popitem(last=False)

    def add(self, running: Running, now: float) -> None:
        """Take a request. Steps that only decode are cut short for it."""
        self.waiting.append(running)
        if self._step is not None and not self._step[3]:
            begun, each_s, num_steps, _ = self._step
            num_steps = min(num_steps, int((now - begun) / each_s) + 1)
            self._step = begun, each_s, num_steps, []

    def next_end(self, now: float) -> float | None:
        """Return when the step ends that is under way or begins now; ``None`` if there is nothing to do."""
        if self._step is None:
            self._begin(now)
        if self._step is None:
            return None
        begun, each_s, num_steps, _ = self._step
        return begun + each_s * num_steps

    def _begin(self, now: float) -> None:
        while self.waiting and len(self.prefilling) + len(self.decoding) < MAX_SEQUENCES:
            running = self.waiting.popleft()
            running.num_cached = running.num_done = self.cached_tokens(running.request)
            self.prefilling.append(running)
        left, flops, chunks = CHUNK_TOKENS, 0.0, []
        for running in self.prefilling:
            size = min(left, running.num_to_prefill)
            if not size:
                break
            left -= size
            context = running.num_done + size / 2
            flops += size * (2 * PARAMETERS + ATTENTION_FLOPS * context)
            chunks.append((running, size))
        if not chunks and not self.decoding:
            return
        num_read = sum(running.num_done for running in self.decoding)
        each_s = (2 * PARAMETERS + KV_BYTES * num_read) / BYTES_PER_S + flops / FLOPS
        shortest = min((r.request.num_tokens + r.request.num_answered - r.num_done for r in self.decoding), default=1)
        self._step = now, each_s, 1 if chunks else shortest, chunks

    def end(self, now: float) -> tuple[list[Running], list[Running]]:
        """End the step; return the requests that have their first token, and the ones that are complete."""
        assert self._step is not None
        _, _, num_steps, chunks = self._step
        self._step = None
        for running in self.decoding:
            running.num_done += num_steps
        begun = []
        for running, size in chunks:
            running.num_done += size
            if not running.num_to_prefill:
                self.prefilling.popleft()
                self._store(running.request.blocks)
                self.decoding.append(running)
                running.num_done += 1
                begun.append(running)
        ended = [r for r in self.decoding if r.num_done >= r.request.num_tokens + r.request.num_answered]
        self.decoding = [r for r in self.decoding if r.num_done < r.request.num_tokens + r.request.num_answered]
        return begun, ended


class Router:
    """Choice of a node for each request."""

    def choose(self, request: Request, nodes: Mapping[str, Node]) -> str:
        """Return the node for a request, which is sent there."""
        raise NotImplementedError

    def begin(self, request: Request, node: str) -> None:
        """Learn that a request's first token has come."""

    def end(self, request: Request, node: str) -> None:
        """Learn that a request is complete."""


class Ours(Router):
    """A policy of the gateway, with its index of prefixes, which learns of a request when its answer begins."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._index = PrefixIndex()
        self._numbers = itertools.count()

    def choose(self, request: Request, nodes: Mapping[str, Node]) -> str:
        """Ask the policy."""
        prefix = request.prefix
        prompt = Prompt(number=next(self._numbers))
        if self._policy.uses_prefixes:
            prompt = Prompt(self._index.cached_bytes(prefix), prefix.tie, prompt.number)
        loads = {name: node.load for name, node in nodes.items()}
        return self._policy.choose(loads, prompt, GatewaySettings().affinity_slack)

    def begin(self, request: Request, node: str) -> None:
        """Record the prefix."""
        if self._policy.uses_prefixes:
            self._index.record(request.prefix, node)


class Several(Router):
    """Gateways, or workers of one, that each learn only of their own requests; clients go to any of them."""

    def __init__(self, policy: Policy, num_gateways: int) -> None:
        self._gateways = [Ours(policy) for _ in range(num_gateways)]
        self._rng = random.Random(7)
        self._asked: dict[int, Ours] = {}

    def choose(self, request: Request, nodes: Mapping[str, Node]) -> str:
        """Ask a gateway."""
        gateway = self._asked[id(request)] = self._rng.choice(self._gateways)
        return gateway.choose(request, nodes)

    def begin(self, request: Request, node: str) -> None:
        """Let the gateway that was asked learn."""
        self._asked.pop(id(request)).begin(request, node)


class RoundRobin(Router):
    """Each node in turn."""

    def __init__(self) -> None:
        self._turn = itertools.cycle(NODES)

    def choose(self, request: Request, nodes: Mapping[str, Node]) -> str:
        """Take the next."""
        return next(self._turn)


class Random(Router):
    """Any node."""

    def __init__(self) -> None:
        self._rng = random.Random(7)

    def choose(self, request: Request, nodes: Mapping[str, Node]) -> str:
        """Draw one."""
        return self._rng.choice(NODES)


class Smg(Router):
    """SMG's ``cache_aware``: see the top."""

    CACHE_THRESHOLD, BALANCE_ABS, BALANCE_REL = 0.3, 64, 1.5

    def __init__(self) -> None:
        self._tree: dict[int, str] = {}

    def choose(self, request: Request, nodes: Mapping[str, Node]) -> str:
        """Take the longest match, or the least loaded node."""
        loads = {name: node.load for name, node in nodes.items()}
        least, most = min(loads.values()), max(loads.values())
        found = min(loads, key=loads.__getitem__)
        if not (most - least > self.BALANCE_ABS and most > self.BALANCE_REL * least):
            num_blocks = len(request.blocks)
            match = next((at for at in range(num_blocks, 0, -1) if request.blocks[at - 1] in self._tree), 0)
            if match * BLOCK_TOKENS > self.CACHE_THRESHOLD * request.num_tokens:
                found = self._tree[request.blocks[match - 1]]
        self._tree.update(dict.fromkeys(request.blocks, found))
        return found


class Dynamo(Router):
    """Dynamo's ``kv``: see the top. Costs are in tokens, in place of blocks, which is the same."""

    def __init__(self) -> None:
        self._prefill: dict[str, int] = dict.fromkeys(NODES, 0)
        self._decode: dict[str, int] = dict.fromkeys(NODES, 0)
        self._uncached: dict[int, int] = {}

    def choose(self, request: Request, nodes: Mapping[str, Node]) -> str:
        """Take the least cost."""
        cached = {name: node.cached_tokens(request) for name, node in nodes.items()}

        def cost(name: str) -> int:
            prefill = max(0, self._prefill[name] + request.num_tokens - cached[name])
            return prefill + self._decode[name] + request.num_tokens

        found = min(nodes, key=cost)
        self._uncached[id(request)] = request.num_tokens - cached[found]
        self._prefill[found] += self._uncached[id(request)]
        self._decode[found] += request.num_tokens
        return found

    def begin(self, request: Request, node: str) -> None:
        """Forget the prefill."""
        self._prefill[node] -= self._uncached.pop(id(request))

    def end(self, request: Request, node: str) -> None:
        """Forget the blocks."""
        self._decode[node] -= request.num_tokens


ROUTERS: Final[Mapping[str, Callable[[], Router]]] = {
    **{name.replace("_", " "): functools.partial(Ours, policy) for name, policy in POLICIES.items()},
    "prefix affine, 2 gateways": functools.partial(Several, POLICIES["prefix_affine"], 2),
    "round robin": RoundRobin,
    "random": Random,
    "SMG cache-aware": Smg,
    "Dynamo KV": Dynamo,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Figures of a trace under a policy."""

    hit_rate: float
    """Tokens of prompts that were in the chosen node's cache, of all."""
    first_p50_ms: float
    first_p99_ms: float
    imbalance: float
    """Prompt tokens computed by the node that computed most, over the mean."""
    length_s: float


def simulate(router: Router, sessions: Sequence[Session]) -> Outcome:
    """Run a trace to its end."""
    nodes = {name: Node(name) for name in NODES}
    events: list[tuple[float, int, Iterator[Request]]] = []
    order = itertools.count()
    firsts: list[float] = []
    computed = dict.fromkeys(NODES, 0)
    num_tokens = 0
    for began_s, turns in sessions:
        heapq.heappush(events, (began_s, next(order), iter(turns)))
    now = 0.0
    pending: dict[int, Request] = {}

    while True:
        ends = {name: end for name, node in nodes.items() if (end := node.next_end(now)) is not None}
        name = min(ends, key=ends.__getitem__, default=None)
        if events and (name is None or events[0][0] <= ends[name]):
            now, number, session = heapq.heappop(events)
            request = pending.pop(number, None) or next(session)
            chosen = router.choose(request, nodes)
            nodes[chosen].add(Running(request, now, session), now)
            continue
        if name is None:
            break
        now = ends[name]
        begun, ended = nodes[name].end(now)
        for running in begun:
            router.begin(running.request, name)
            firsts.append(now - running.sent_s)
            computed[name] += running.request.num_tokens - running.num_cached
            num_tokens += running.request.num_tokens
        for running in ended:
            router.end(running.request, name)
            following = next(running.session, None)
            if following is not None:
                number = next(order)
                pending[number] = following
                heapq.heappush(events, (now + following.pause_s, number, running.session))
    assert len(firsts) == sum(len(turns) for _, turns in sessions), "each request is answered once"
    firsts.sort()
    return Outcome(
        1 - sum(computed.values()) / num_tokens,
        1e3 * statistics.median(firsts),
        1e3 * firsts[int(0.99 * (len(firsts) - 1))],
        max(computed.values()) / statistics.mean(computed.values()),
        now,
    )


def main() -> None:
    """Simulate and print."""
    parser = report.arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="traces of each kind; figures are medians over them")
    options = parser.parse_args()
    began = time.perf_counter()
    rows: list[dict[str, object]] = []
    found: dict[tuple[str, str], Outcome] = {}
    for trace, make in TRACES.items():
        outcomes: dict[str, list[Outcome]] = {name: [] for name in ROUTERS}
        for seed in range(options.seeds):
            sessions = list(make(random.Random(seed)))
            for name, new in ROUTERS.items():
                outcomes[name].append(simulate(new(), sessions))
        for name, several in outcomes.items():
            fields = [field.name for field in dataclasses.fields(Outcome)]
            median = {field: statistics.median(getattr(outcome, field) for outcome in several) for field in fields}
            found[trace, name] = Outcome(**median)
            rows.append({"trace": trace, "policy": name, **median})
    ours = next(iter(ROUTERS))
    ratios: dict[str, float] = {}
    for trace in TRACES:
        own = found[trace, ours]
        ratios[f"hit_rate_{trace}"] = own.hit_rate
        for short, name in (("round_robin", "round robin"), ("smg", "SMG cache-aware"), ("dynamo", "Dynamo KV")):
            ratios[f"hit_rate_{trace}_{short}"] = own.hit_rate / found[trace, name].hit_rate
            ratios[f"ttft_p99_{trace}_{short}"] = own.first_p99_ms / found[trace, name].first_p99_ms
    report.write(
        "routing",
        rows,
        question="Which share of prompts is in the chosen node's prefix cache, and when does the first token come?",
        ratios=ratios,
        notes=[f"{time.perf_counter() - began:.0f} s; {options.seeds} traces of each kind, {len(NODES)} nodes"],
        keep=options.keep,
    )


if __name__ == "__main__":
    main()
