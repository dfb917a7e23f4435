"""Requests of a compaction to a model, and the compaction from its response."""

from typing import Any

import orjson
import pytest

from cortex.dialects.responses.compaction import SUMMARY_TOKENS, Compaction
from cortex.wire.errors import InvalidTypeError, UpstreamError

MESSAGE = {"type": "message", "role": "user", "content": "We launch on Tuesday."}


def question(**fields: Any) -> dict[str, Any]:
    asked: dict[str, Any] = orjson.loads(
        Compaction(orjson.dumps({"model": "m", "input": [MESSAGE], **fields})).question()
    )
    return asked


def answer(**fields: Any) -> bytes:
    message = {"type": "message", "content": [{"type": "output_text", "text": "Tuesday."}]}
    response = orjson.dumps({"output": [message], "usage": {}, **fields})
    return Compaction(orjson.dumps({"model": "m", "input": [MESSAGE]})).answer(response)


def test_a_summary_has_no_response_format() -> None:
    forms = {
        "structured_outputs": {"regex": "a"},
        "guided_json": {},
        "guided_regex": "a",
        "guided_choice": ["a"],
        "guided_grammar": "a",
        "json_schema": {},
        "regex": "a",
        "ebnf": "a",
        "grammar": "a",
        "stop": "the",
        "stop_token_ids": [1],
        "ignore_eos": True,
        "min_tokens": 9,
    }
    assert not forms.keys() & question(**forms).keys()


def test_a_null_is_as_good_as_nothing() -> None:
    asked = question(max_output_tokens=None, reasoning=None)
    assert (asked["max_output_tokens"], asked["reasoning"]) == (SUMMARY_TOKENS, {"effort": "none"})
    assert question(max_output_tokens=7)["max_output_tokens"] == 7


@pytest.mark.parametrize("role", [[], {}, 1, None])
def test_a_role_that_is_no_string_is_refused(role: object) -> None:
    with pytest.raises(InvalidTypeError) as caught:
        question(input=[MESSAGE, MESSAGE | {"role": role}])
    assert caught.value.param == "input[1].role"


@pytest.mark.parametrize("status", ["incomplete", "failed", "cancelled"])
def test_a_summary_that_was_cut_is_none(status: str) -> None:
    with pytest.raises(UpstreamError, match="to its end"):
        answer(status=status)


def test_a_summary_that_was_written_to_its_end_is_one() -> None:
    for fields in ({}, {"status": "completed"}):
        assert [item["type"] for item in orjson.loads(answer(**fields))["output"]] == ["message", "compaction"]
