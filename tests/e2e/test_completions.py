"""Text completions of the real model: a prompt's log probabilities are those by which it would have been written."""

from typing import Any

import daemons
import httpx
import pytest


def complete(server: daemons.Daemon, prompt: Any, **fields: Any) -> Any:
    body = {"model": daemons.MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8} | fields
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_prompt_is_scored_as_it_would_be_written(gateway: daemons.Daemon) -> None:
    prompt = "The capital of France is"
    written = complete(gateway, prompt, logprobs=1)["choices"][0]
    whole = prompt + written["text"]
    read = complete(gateway, whole, logprobs=1, echo=True, max_tokens=0)["choices"][0]
    assert read["text"] == whole
    echoed, scored = written["logprobs"], read["logprobs"]
    assert "".join(scored["tokens"]) == whole
    assert scored["token_logprobs"][0] is None
    assert scored["top_logprobs"][0] is None
    assert scored["tokens"][-8:] == echoed["tokens"]
    # One token at a time rounds otherwise than all at once, where weights are of four bits.
    assert scored["token_logprobs"][-8:] == pytest.approx(echoed["token_logprobs"], abs=0.1)
    # Each was the likeliest: by the very number, as lm-eval asks it.
    for own, top in zip(scored["token_logprobs"][-8:], scored["top_logprobs"][-8:], strict=True):
        assert own == max(top.values())
    assert scored["text_offset"] == [
        len("".join(scored["tokens"][:index])) for index in range(len(scored["tokens"]))
    ]  # plain letters, so that a token is as long as its text


def test_token_ids_equal_their_text(gateway: daemons.Daemon) -> None:
    # "What is the capital of France?" in the model's own tokens.
    ids = [1780, 314, 260, 3575, 282, 4649, 47]
    by_text = complete(gateway, "What is the capital of France?", echo=True, logprobs=0)
    by_ids = complete(gateway, ids, echo=True, logprobs=0)
    assert by_ids["choices"] == by_text["choices"]
    assert by_ids["usage"]["prompt_tokens"] == len(ids)
    several = complete(gateway, [ids, ids[:3]], max_tokens=1, echo=True)
    assert several["choices"][0]["text"].startswith("What is the capital of France?")
    assert several["usage"]["prompt_tokens"] == len(ids) + 3


def test_a_token_that_the_model_does_not_have(gateway: daemons.Daemon) -> None:
    body = {"model": daemons.MODEL, "prompt": [1 << 30]}
    reply = httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=60)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")
