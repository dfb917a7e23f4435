"""Log probabilities: of the model's own distribution, for requests that ask for them, beside others."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from cortex.wire.events import TextDelta, TokenLogprob
from cortex.wire.request import Tool
from neuron.device.jobs import SamplerSettings, SequenceEnd
from neuron.engine.sampler import Sampler
from neuron.text.detokenize import Detokenizer
from neuron.text.forms import think
from neuron.text.token_bytes import token_bytes


def test_they_are_of_the_distribution_before_any_filter() -> None:
    sampler = Sampler(3, 50, torch.device("cpu"))
    nothing = np.zeros(1, np.int32)
    sampler.admit(0, SamplerSettings(top_logprobs=4, temperature=0.3, top_k=1, logit_bias=((7, 50.0),)), nothing)
    sampler.admit(1, SamplerSettings(), nothing)
    sampler.admit(2, SamplerSettings(top_logprobs=0, temperature=0.0, presence_penalty=2.0), nothing)
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    expected = logits.log_softmax(-1)
    ids = sampler.sample(logits.clone(), np.array([0, 1, 2], np.int32), np.zeros(3, np.int32)).tolist()
    assert ids[0] == 7
    assert sampler.report is not None
    found = sampler.report.rows()
    assert found.keys() == {0, 2}
    first, third = found[0], found[2]
    assert np.frombuffer(first.chosen, np.float32) == pytest.approx(expected[0, 7].item(), abs=1e-5)
    values, tokens = expected[0].topk(4)
    assert np.frombuffer(first.top_ids, np.int32).tolist() == tokens.tolist()
    assert np.frombuffer(first.top, np.float32) == pytest.approx(values.numpy(), abs=1e-5)
    assert np.frombuffer(third.chosen, np.float32) == pytest.approx(expected[2, ids[2]].item(), abs=1e-5)
    assert not third.top_ids
    sampler.sample(logits[1:2].clone(), np.array([1], np.int32), np.zeros(1, np.int32))
    assert sampler.report is None


def test_log_probabilities_change_no_token_and_are_only_of_requests_with_logprobs(
    harness: Callable[..., Any], tiny_llama: pathlib.Path
) -> None:
    driver = harness()
    driver.load(tiny_llama)
    for number in range(4):
        driver.generate(number, [5, 6, 7], 6, temperature=0.9, seed=1, top_logprobs=3 if number % 2 else -1)
    driver.run()
    outputs = driver.outputs()
    assert all(outputs[number] == outputs[0] for number in range(4))
    for row in driver.rows:
        assert (row.logprobs is not None) == (row.sequence % 2 == 1)
        if row.logprobs is not None:
            assert len(row.logprobs.top_ids) == 12
    driver.generate(9, [5], 5, top_logprobs=21)
    assert driver.failures()[9].code == "invalid_value"


@pytest.fixture(scope="module")
def tokenizer(talking_llama: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_file(str(talking_llama / "tokenizer.json"))


def feed(tokenizer: Tokenizer, text: str, **settings: Any) -> list[TokenLogprob]:
    """Return the log probabilities that arrive with the text, a token at a time."""
    detokenizer = Detokenizer(tokenizer, **settings)
    table = token_bytes(tokenizer)
    events = []
    for token in tokenizer.encode(text).ids:
        logprob = TokenLogprob(table[token].decode(errors="replace"), table[token], -1.0)
        events += detokenizer.feed([token], [logprob])
    events += detokenizer.close(SequenceEnd.STOP)
    return [logprob for event in events if isinstance(event, TextDelta) for logprob in event.logprobs]


def test_every_token_of_the_answer_has_one_whatever_is_held_back(tokenizer: Tokenizer) -> None:
    for text in ("plain", "é𝟫 bytes", "a <tool_call> that is none", "ends on <"):
        found = feed(tokenizer, text, tools=[Tool("f")], stop=["<never>"])
        assert b"".join(logprob.utf8 for logprob in found).decode() == text


def test_reasoning_has_none(tokenizer: Tokenizer) -> None:
    found = feed(tokenizer, "thought</think>yes", tags=think.FORM, starts_in_reasoning=True)
    assert b"".join(logprob.utf8 for logprob in found).decode() == "yes"


def test_the_first_call_is_the_last_where_calls_are_not_parallel(tokenizer: Tokenizer) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    detokenizer = Detokenizer(tokenizer, tools=[Tool("f")], parallel_calls=False)
    events = detokenizer.feed(tokenizer.encode(f"{call}\n{call}").ids)
    assert [type(event).__name__ for event in events] == ["ToolCallDelta", "Finished"]
    assert events[-1].reason == "tool_calls"  # type: ignore[union-attr]
    assert detokenizer.finished
    assert detokenizer.close(SequenceEnd.STOP) == []
