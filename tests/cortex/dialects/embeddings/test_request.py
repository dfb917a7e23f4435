"""Bodies of ``/v1/embeddings`` and their answers."""

import array
import base64
import json
from typing import Any

import pytest

from cortex.dialects.embeddings import request as embeddings_request
from cortex.wire.errors import InvalidRequestError


def decode(**fields: Any) -> embeddings_request.EmbeddingCall:
    return embeddings_request.decode(json.dumps({"model": "m", **fields}).encode())


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("text", ("text",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a", [3]], ("a", (3,))),
    ],
)
def test_forms_of_input(given: Any, inputs: Any) -> None:
    call = decode(input=given, user="u")
    assert call.request.inputs == inputs
    assert not call.is_base64


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", 3]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
    ],
)
def test_refusals_name_the_parameter(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode(**fields)
    assert caught.value.param == param


def test_a_reply_in_both_formats() -> None:
    vectors = [array.array("f", [0.6, -0.8]).tobytes(), array.array("f", [1.0, 0.0]).tobytes()]
    plain = json.loads(decode(input="a").answer(vectors, 7, "m"))
    assert plain["data"][0]["embedding"] == pytest.approx([0.6, -0.8])
    assert plain["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    packed = json.loads(decode(input="a", encoding_format="base64").answer(vectors, 7, "m"))
    assert [base64.b64decode(row["embedding"]) for row in packed["data"]] == vectors
    assert [row["index"] for row in packed["data"]] == [0, 1]
