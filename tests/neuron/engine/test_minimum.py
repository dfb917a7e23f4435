"""Minimum length: no token ends a sequence before it, with any runner, sampler or grammar."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from cortex.wire.request import FormatKind, InferenceRequest, OutputFormat
from neuron.device import jobs
from neuron.device.jobs import ConstraintSettings, SequenceEnd
from neuron.engine.minimum import Minimum
from neuron.text.grammar import constraint_of

PROMPT = [1, 50, 60, 70]


@pytest.fixture
def driver(harness: Callable[..., Any], talking_llama: pathlib.Path) -> Any:
    found = harness()
    assert isinstance(found.load(talking_llama), jobs.Done)
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_ends_an_answer_before_its_least(driver: Any, temperature: float) -> None:
    driver.generate(0, PROMPT, 24, temperature=temperature, seed=4)
    driver.run()
    free = driver.outputs()[0]
    # Its first token would end it.
    ends = tuple(set(free))
    driver.sent.clear()
    driver.generate(1, PROMPT, 24, eos=ends, temperature=temperature, seed=4)
    driver.generate(2, PROMPT, 24, eos=ends, min_tokens=6, temperature=temperature, seed=4)
    driver.run()
    assert not driver.failures()
    outputs = driver.outputs()
    assert outputs.get(1, []) == []
    assert len(outputs[2]) >= 6
    assert not set(outputs[2][:6]) & set(ends)
    assert driver.ends()[1] is SequenceEnd.STOP


def test_a_complete_answer_ends_though_there_should_be_more_of_it(driver: Any, talking_llama: pathlib.Path) -> None:
    request = InferenceRequest("m", prompt="x", output_format=OutputFormat(FormatKind.JSON_SCHEMA, '{"const": 5}'))
    grammar = constraint_of(request)
    assert grammar is not None
    driver.generate(0, PROMPT, 40, eos=(2,), min_tokens=30, constraint=ConstraintSettings(grammar))
    driver.run()
    assert not driver.failures()
    text = Tokenizer.from_file(str(talking_llama / "tokenizer.json")).decode(driver.outputs()[0])
    assert json.loads(text) == 5
    assert driver.ends()[0] is SequenceEnd.STOP


def test_the_mask_goes_when_there_are_enough() -> None:
    minimum = Minimum(None, 2, frozenset({2, 33, 99}), 40)
    for _ in range(2):
        mask = minimum.mask()
        assert mask is not None
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:40]
        assert set(np.flatnonzero(bits == 0)) == {2, 33}
        assert minimum.accept(1) is False
    assert minimum.mask() is None
