"""Budget of reasoning: behind so many tokens its end is forced, however steps run, and the grammar begins there."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from cortex.wire.request import FormatKind, InferenceRequest, OutputFormat
from neuron.device import jobs
from neuron.device.jobs import ConstraintSettings, ThinkingSettings
from neuron.engine.thinking_budget import ThinkingBudget
from neuron.text.grammar import constraint_of

PROMPT = [1, 50, 60, 70]
NEVER = -100.0


@pytest.fixture
def driver(harness: Callable[..., Any], talking_llama: pathlib.Path) -> Any:
    found = harness()
    assert isinstance(found.load(talking_llama), jobs.Done)
    return found


@pytest.fixture(scope="module")
def tokenizer(talking_llama: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_file(str(talking_llama / "tokenizer.json"))


def settings(tokenizer: Tokenizer, num_tokens: int, *, inside: bool = True) -> ThinkingSettings:
    words = tokenizer.encode("\nEnough.\n", add_special_tokens=False).ids
    opens, closes = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")
    return ThinkingSettings(num_tokens, opens, (*words, closes), inside)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_end_is_forced_behind_the_budget(
    driver: Any, tokenizer: Tokenizer, num_tokens: int, temperature: float
) -> None:
    bound = settings(tokenizer, num_tokens)
    never = ((bound.forced[-1], NEVER),)
    shared = {"temperature": temperature, "seed": 4}
    driver.generate(0, PROMPT, 90, logit_bias=never, **shared)
    driver.generate(1, PROMPT, 90, thinking=bound, **shared)
    driver.generate(2, PROMPT * 20, 90, thinking=bound, **shared)
    driver.run()
    assert not driver.failures()
    free, *bounded = (driver.outputs()[number] for number in range(3))
    for found in bounded:
        assert tuple(found[num_tokens : num_tokens + len(bound.forced)]) == bound.forced
        assert len(found) == 90
    if not temperature:
        assert bounded[0][:num_tokens] == free[:num_tokens], "until then it is free"


def test_reasoning_that_ends_by_itself_is_left_alone(driver: Any, tokenizer: Tokenizer) -> None:
    bound = settings(tokenizer, 5)
    soon = ((bound.forced[-1], 100.0),)
    driver.generate(0, PROMPT, 30, thinking=bound, logit_bias=soon)
    driver.generate(1, PROMPT, 30, thinking=settings(tokenizer, 5, inside=False), logit_bias=((bound.opens, NEVER),))
    driver.run()
    assert not driver.failures()
    assert set(driver.outputs()[0]) == {bound.forced[-1]}
    assert bound.forced[0] not in driver.outputs()[1][:1], "what has not begun does not end"


def test_the_grammar_begins_behind_the_forced_end(driver: Any, tokenizer: Tokenizer) -> None:
    bound = settings(tokenizer, 6)
    request = InferenceRequest("m", prompt="x", output_format=OutputFormat(FormatKind.JSON_SCHEMA, '{"const": 5}'))
    grammar = constraint_of(request)
    assert grammar is not None
    constraint = ConstraintSettings(grammar, closes=bound.forced[-1], starts_inside=True)
    never = ((bound.forced[-1], -5.0),)
    driver.generate(0, PROMPT, 60, eos=(2,), constraint=constraint, thinking=bound, logit_bias=never)
    driver.run()
    assert not driver.failures()
    answer = driver.outputs()[0][6 + len(bound.forced) :]
    assert json.loads(tokenizer.decode(answer)) == 5


def test_no_mask_is_needed_until_the_budget_is_near() -> None:
    bound = ThinkingBudget(None, ThinkingSettings(3, 7, (1, 2, 9), starts_inside=False), 40)
    assert (bound.free_tokens, bound.mask()) == (2, None)
    assert not bound.accept(7)
    assert not bound.accept(5)
    assert (bound.free_tokens, bound.mask()) == (1, None)
    assert not bound.accept(5)
    assert (bound.free_tokens, bound.mask()) == (0, None)
    assert not bound.accept(5)
    for token in (1, 2, 9):
        assert allowed(bound) == [token]
        assert not bound.accept(token)
    assert bound.mask() is None
    assert bound.free_tokens > 1000
    assert not bound.accept(7)
    assert bound.mask() is None, "what is over does not begin again"


def allowed(bound: ThinkingBudget) -> list[int]:
    mask = bound.mask()
    assert mask is not None
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
