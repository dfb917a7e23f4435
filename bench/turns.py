"""Share of an agent's context that is prefilled again at each turn, and the time to the turn's first token.

A transcript of 20 requests grows to 30,000 tokens: a question, results of calls with reasoning before each, an answer,
the next question, whose chat template drops the reasoning of all calls before it. The script makes it, also what the
model would have answered, so that every run asks the same. It goes over HTTP through a real neuron on this CPU, which
has one of three small random models, with one tokenizer and template: dense, windowed (five of six layers see 512
tokens) and hybrid (three of four layers keep a recurrent state). The widths give attention over 30,000 tokens the share
of a prompt's work that it has in a dense model of 8 billion parameters.

*Again*: prompts n and n - 1 begin with S tokens alike, found with the neuron's own text code; what is behind them is
new. Of the P tokens of prompt n the neuron reports ``cached_tokens``, so max(0, S - cached_tokens) / P were prefilled
before and are prefilled again. A first prompt has none. In the table are the largest shares of turns 2 to 20, then the
share of all tokens prefilled, and times to the first token: of turn 2, of the last, and the median where a call's
result is new. Alone, two transcripts are asked one after the other, of which the shorter times count.

Besides alone, the hybrid model is asked beside two other conversations at a time, and in a cache that holds no more
than one of 35,000 tokens, with another one before turn 11, which must prefill again what that has evicted, and the
turns behind it no more.

    PYTHONPATH=bench:tests/support python bench/turns.py [--turns N] [--keep]
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import httpx
import report
import torch
import transformers
from daemons import START_TIMEOUT_S, Daemon, daemon, free_port, model_state, until
from hybrid_models import remember

from cortex.dialects.registry import CHAT
from neuron.text import tokenizer
from neuron.text.prompt import PromptFormat

TURNS: Final = 20
LOOP: Final = 4
"""Requests of a question: its own, and one for each call's result."""
TURN_TOKENS, REASONING_TOKENS = 1850, 250
CONTEXT_TOKENS: Final = 32768
FILES: Final = pathlib.Path(__file__).parents[1] / "tests" / "data" / "qwen3_5"
"""Folder with the tokenizer and the chat template, of Qwen3.5's form."""
SMALL_CACHE_BYTES: Final = 31 << 19
"""Cache of the hybrid model for 35,000 tokens, with states."""
MODEL: Final = "m"
TOOL: Final = {
    "type": "function",
    "function": {
        "name": "read",
        "description": "Reads a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
SHAPE: Final[dict[str, Any]] = {
    "vocab_size": 1024, "hidden_size": 512, "max_position_embeddings": CONTEXT_TOKENS, "bos_token_id": None,
    "eos_token_id": 993, "pad_token_id": 991, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 64,
    "num_attention_heads": 1,
}  # fmt: skip
MODELS: Final[dict[str, Callable[[], transformers.PreTrainedModel]]] = {
    "dense": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHAPE, intermediate_size=2048, num_hidden_layers=3)
    ),
    "windowed": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SHAPE, intermediate_size=1024, num_hidden_layers=6, sliding_window=512, query_pre_attn_scalar=64
        )
    ),
    "hybrid": lambda: transformers.Qwen3_5ForCausalLM(
        transformers.Qwen3_5TextConfig(
            **SHAPE, intermediate_size=2048, num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=64, linear_value_head_dim=64,
        )
    ),
}  # fmt: skip
"""Models of about 12 million parameters."""


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """A request of a transcript and what the neuron made of it."""

    num_tokens: int
    num_common: int
    """Tokens with which this prompt and the one before it begin."""
    num_cached: int
    first_token_s: float

    @property
    def again(self) -> float:
        """Share of the prompt that is prefilled again."""
        return max(0, self.num_common - self.num_cached) / self.num_tokens


class Transcript:
    """Messages of an agent's requests, made from ``seed``."""

    def __init__(self, seed: int, num_turns: int, form: PromptFormat) -> None:
        self._random = random.Random(seed)
        self._form = form
        self.bodies: list[dict[str, Any]] = []
        messages: list[dict[str, Any]] = [{"role": "system", "content": "You are an agent. " + self._text(1000)}]
        for turn in range(num_turns):
            if turn % LOOP == 0:
                if turn:
                    messages.append(
                        {"role": "assistant", "content": "It is done.", "reasoning_content": self._text(50)}
                    )
                messages.append({"role": "user", "content": self._text(TURN_TOKENS)})
            else:
                call = {"name": "read", "arguments": json.dumps({"path": f"src/{seed}/{turn}.py"})}
                messages += [
                    {
                        "role": "assistant",
                        "content": "",
                        "reasoning_content": self._text(REASONING_TOKENS),
                        "tool_calls": [{"id": f"call_{turn}", "type": "function", "function": call}],
                    },
                    {
                        "role": "tool",
                        "tool_call_id": f"call_{turn}",
                        "content": self._text(TURN_TOKENS - REASONING_TOKENS),
                    },
                ]
            # A bias has the random model write text that it need not hold back.
            self.bodies.append(
                {"model": MODEL, "messages": list(messages), "tools": [TOOL], "max_tokens": 16, "temperature": 0,
                 "stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"65": 100}}
            )  # fmt: skip
        self.ids = [self._form.build(CHAT.decode(json.dumps(body).encode()).request).ids for body in self.bodies]

    def _text(self, num_tokens: int) -> str:
        """Return words of about ``num_tokens``."""
        words = ("file", "line", "error", "page", "state", "test", "model", "token", "cache", "value")
        return " ".join(f"{self._random.choice(words)} {self._random.randrange(100)}" for _ in range(num_tokens // 5))

    def ask(self, turn: int, url: str) -> Turn:
        """Send a request."""
        body, first_s = self.bodies[turn], 0.0
        began = time.perf_counter()
        usage: dict[str, Any] = {}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as reply:
            assert reply.status_code == 200, reply.read()
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                delta = event["choices"][0]["delta"] if event["choices"] else {}
                if not first_s and any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls")):
                    first_s = time.perf_counter() - began
                usage = event.get("usage") or usage
        ids, before = self.ids[turn], self.ids[turn - 1] if turn else []
        assert usage["prompt_tokens"] == len(ids)
        common = next((at for at, pair in enumerate(zip(ids, before)) if pair[0] != pair[1]), len(before))  # noqa: B905
        return Turn(len(ids), common, usage["prompt_tokens_details"]["cached_tokens"], first_s)


def write_model(kind: str, folder: pathlib.Path) -> pathlib.Path:
    """Write a random model with the tokenizer and the chat template of :data:`FILES`."""
    torch.manual_seed(3)
    model = MODELS[kind]().to(torch.bfloat16)
    if kind == "hybrid":
        for name, parameter in model.named_parameters():
            remember(name, parameter.data)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(FILES / name, folder)
    return folder


@contextlib.contextmanager
def serving(path: pathlib.Path, folder: pathlib.Path, **settings: int) -> Iterator[Daemon]:
    """Run a neuron with a model."""
    port, config = free_port(), folder / "neuron.toml"
    entries = {"context_tokens": CONTEXT_TOKENS, "max_sequences": 4, **settings}
    config.write_text(
        f'[daemon]\nname = "bench"\nlisten = "127.0.0.1:{port}"\ndevices = "cpu"\n\n[[models]]\nid = "{MODEL}"\n'
        f'source = "{path}"\n' + "".join(f"{key} = {value}\n" for key, value in entries.items())
    )
    with daemon("neuron", "--config", str(config), port=port, log=folder / "neuron.log") as found:
        until(lambda: model_state(found, MODEL) == "ready", START_TIMEOUT_S, "the model is ready")
        yield found


def row_of(case: str, turns: list[Turn]) -> dict[str, Any]:
    """Return the row of a transcript."""
    results = [turn.first_token_s for index, turn in enumerate(turns) if index % LOOP]
    tokens = sum(turn.num_tokens for turn in turns)
    return {
        "case": case,
        "tokens of the last prompt": turns[-1].num_tokens,
        "again, most of a turn": max(turn.again for turn in turns[1:]),
        "prefilled, of all": 1 - sum(turn.num_cached for turn in turns) / tokens,
        "first token of turn 2, ms": 1000 * turns[1].first_token_s,
        "last": 1000 * turns[-1].first_token_s,
        "median": 1000 * statistics.median(results),
    }


def main() -> None:
    """Measure and print."""
    parser = report.arguments(__doc__)
    parser.add_argument("--turns", type=int, default=TURNS, help="requests of each transcript, at least 4")
    options = parser.parse_args()
    form = PromptFormat(tokenizer.load(FILES))
    talks = [Transcript(seed, options.turns, form) for seed in range(3)]
    rows: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}

    def keep(case: str, found: list[Turn]) -> None:
        rows.append(row_of(case, found))
        turns.extend({"case": case, "turn": n, **dataclasses.asdict(turn)} for n, turn in enumerate(found, 1))

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for kind in MODELS:
            path = write_model(kind, folder / kind)
            with serving(path, folder) as node:
                talks[0].ask(0, node.url)  # the first request of a neuron starts more than its own work
                # No transcript has another one's system message, so they share nothing.
                passes = [[talk.ask(turn, node.url) for turn in range(options.turns)] for talk in talks[1:]]
            ratios[f"prefilled_{kind}"] = max(turn.again for found in passes for turn in found[1:])
            alone = [
                dataclasses.replace(
                    max(both, key=lambda turn: turn.again), first_token_s=min(turn.first_token_s for turn in both)
                )
                for both in zip(*passes, strict=True)
            ]
            keep(f"{kind}, alone", alone)
            if kind != "windowed":
                ratios[f"ttft_20_over_2_{kind}"] = alone[-1].first_token_s / alone[1].first_token_s
        with serving(path, folder) as node, concurrent.futures.ThreadPoolExecutor(len(talks)) as threads:

            def talk(each: Transcript) -> list[Turn]:
                return [each.ask(turn, node.url) for turn in range(options.turns)]

            busy = list(threads.map(talk, talks))
            for found in busy:
                keep("hybrid, beside two others", found)
            ratios["prefilled_hybrid_busy"] = max(turn.again for found in busy for turn in found[1:])
        half = options.turns // 2
        with serving(path, folder, kv_cache_bytes=SMALL_CACHE_BYTES) as node:
            found = [talks[0].ask(turn, node.url) for turn in range(half)]
            talks[1].ask(options.turns - 1, node.url)
            found += [talks[0].ask(turn, node.url) for turn in range(half, options.turns)]
            keep("hybrid, but for the turn behind an eviction", found[:half] + found[half + 1 :])
            keep("hybrid, that turn", found[half - 1 : half + 1])
    report.write(
        "turns",
        rows,
        question="How much of an agent's context is prefilled again at each turn, and how long does that take?",
        packages=("torch", "transformers"),
        ratios=ratios,
        keep=options.keep,
        more={"turns": turns},
    )


if __name__ == "__main__":
    main()
