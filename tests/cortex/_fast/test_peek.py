"""``peek`` accepts what orjson accepts and finds what orjson finds."""

import random
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cortex._fast.peek import MAX_DEPTH, Peek, PeekError, PeekLimitError, PeekTypeError, peek, splice

FIELDS = ("model", "stream", "previous_response_id", "prompt_cache_key")
KEYS = st.one_of(st.sampled_from(FIELDS), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS, v, max_size=4), max_leaves=12)
TOKENS = st.sampled_from(
    [bytes([c]) for c in b'{}[],:"\\019-+.eE \n\t\x00\x1f\x7f']
    + [b"\\u", b"d83d", b"de00", b"309", b"true", b"false", b"null", b"\xc3\xa9", b"\xe4\xbd\xa0", b"\xf0\x9f\x98\x80"]
    + [b"\xed\xa0\x80", b"\xc0\x80", b"\xef\xbb\xbf", b'"model"', b'"stream":', b'"a":']
)


def same_as_orjson(body: bytes) -> None:
    try:
        expected = orjson.loads(body)
    except orjson.JSONDecodeError:
        with pytest.raises(PeekError) as refused:
            peek(body)
        assert not isinstance(refused.value, PeekTypeError)
        assert 0 <= refused.value.offset <= len(body)
        return
    if not isinstance(expected, dict):
        with pytest.raises(PeekError, match="not a JSON object"):
            peek(body)
        return
    wrong = wrong_type(expected)
    if wrong:
        with pytest.raises(PeekTypeError) as refused:
            peek(body)
        assert refused.value.field == wrong
        return
    found = peek(body)
    assert found.model == expected.get("model")
    assert found.stream == bool(expected.get("stream"))
    assert found.previous_response_id == expected.get("previous_response_id")
    assert found.prompt_cache_key == expected.get("prompt_cache_key")
    if found.model is None:
        assert (found.model_start, found.model_end) == (-1, -1)
    else:
        assert orjson.loads(body[found.model_start : found.model_end]) == found.model


def wrong_type(body: dict[str, Any]) -> str | None:
    if not isinstance(body.get("model", ""), str):
        return "model"
    if not isinstance(body.get("stream"), bool | None):
        return "stream"
    for field in FIELDS[2:]:
        if not isinstance(body.get(field), str | None):
            return field
    return None


@given(st.dictionaries(KEYS, VALUES, max_size=6), st.sampled_from([0, orjson.OPT_INDENT_2]))
def test_any_object(body: dict[str, Any], option: int) -> None:
    same_as_orjson(orjson.dumps(body, option=option))


@given(VALUES)
def test_any_value(value: Any) -> None:
    same_as_orjson(orjson.dumps(value))


@given(st.binary(max_size=64))
def test_any_bytes(body: bytes) -> None:
    same_as_orjson(body)


@given(st.lists(TOKENS, max_size=24).map(b"".join), st.sampled_from([b"%b", b"{%b}", b'{"a":%b}', b'{"a":"%b"}']))
def test_any_tokens(inner: bytes, sse_event: bytes) -> None:
    same_as_orjson(sse_event.replace(b"%b", inner))


@given(st.dictionaries(KEYS, VALUES, max_size=5), st.integers(0, 2**32), st.integers(1, 3))
def test_mutated_json(body: dict[str, Any], seed: int, num_edits: int) -> None:
    chance = random.Random(seed)
    text = bytearray(orjson.dumps(body))
    for _ in range(num_edits):
        at = chance.randrange(len(text) + 1)
        match chance.randrange(3):
            case 0:
                text[at:at] = bytes([chance.choice(b'{}[]",:\\0e-. \x80\xff')])
            case 1:
                del text[at : at + chance.randrange(1, 4)]
            case _:
                text[at : at + 1] = bytes([chance.randrange(256)])
    same_as_orjson(bytes(text))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b"{}x",
        b"{} \r\n\t",
        b'{"a":1,}',
        b'{"a" 1}',
        b'{"a":[1,]}',
        b'{"a":[,1]}',
        b"{1:2}",
        b'{"a":01}',
        b'{"a":-}',
        b'{"a":1.}',
        b'{"a":.5}',
        b'{"a":1e}',
        b'{"a":1e+}',
        b'{"a":1e400}',
        b'{"a":-1e400}',
        b'{"a":0e400}',
        b'{"a":1e-400}',
        b'{"a":1.7976931348623158e308}',
        b'{"a":1.7976931348623159e308}',
        b'{"a":' + b"1" * 400 + b"}",
        b'{"a":' + b"1" * 400 + b"e-300}",
        b'{"a":0.' + b"0" * 400 + b"1e600}",
        b'{"a":nul}',
        b'{"a":nulll}',
        b'{"a":NaN}',
        b'{"a":"\\ud83d\\ude00"}',
        b'{"a":"\\ud83d"}',
        b'{"a":"\\ud83dx"}',
        b'{"a":"\\ud83d\\u0041"}',
        b'{"a":"\\ude00"}',
        b'{"a":"\\u00g0"}',
        b'{"a":"\\x"}',
        b'{"a":"\n"}',
        b'{"a":"\x7f"}',
        b'{"a":"',
        b'{"a":"\\',
        b'{"a":"\\u12',
        b'{"a":"\\ud83d\\u',
        b"\xef\xbb\xbf{}",
        b'{"a":"\xc0\x80"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\xe0\x80\x80"}',
        b'{"a":"\xf4\x90\x80\x80"}',
        b'{"a":"\xf0\x80\x80\x80"}',
        b'{"a":"\xe4\xbd"}',
        b'{"a":"\xe4\xbd\xa0\xe5"}',
        b'{"model":"a","model":"b"}',
        b'{"model":1,"model":"b"}',
        b'{"model":"a","model":1}',
        b'{"model":"a","model":{"model":"b"}}',
        b'{"mod\\u0065l":"x\\u0079\\ud83d\\ude00\\n"}',
        b'{"model\\u0000":"x"}',
        b'{"a":{"model":"inner"},"b":["model"]}',
        b'{"stream":true,"stream":null}',
        b'{"stream":1}',
        b'{"stream":"true"}',
        b'{"previous_response_id":null,"prompt_cache_key":[]}',
        b'{"\\u0070revious_response_id":"resp_1","prompt_cache_key":"k"}',
    ],
)
def test_like_orjson(body: bytes) -> None:
    same_as_orjson(body)


@pytest.mark.parametrize("length", range(34))
@pytest.mark.parametrize("byte", [b'"', b"\\n", b"\x01", b"\xc3\xa9", b"\x80", b"\\"])
def test_every_place_in_a_string(length: int, byte: bytes) -> None:
    same_as_orjson(b'{"model":"' + b"x" * length + byte + b'"}')
    same_as_orjson(b'{"model":"' + b"x" * length + byte + b"x" * 20 + b'"}')


@pytest.mark.parametrize("body", [b'{"model":"qwen3","stream":true,"a":[1.5e3,null,"\\ud83d\\ude00\xe4\xbd\xa0"]}'])
def test_every_truncation(body: bytes) -> None:
    for length in range(len(body)):
        same_as_orjson(body[:length])


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_has_a_limit_within_those_of_orjson(opening: bytes, closing: bytes) -> None:
    for depth in (MAX_DEPTH - 1, MAX_DEPTH):
        inner = opening * (depth - 1) + b"1" + closing * (depth - 1)
        same_as_orjson(b'{"model":"x","a":' + inner + b"}")
    inner = opening * MAX_DEPTH + b"1" + closing * MAX_DEPTH
    with pytest.raises(PeekLimitError, match="too deep") as caught:
        peek(b'{"a":' + inner + b"}")
    assert (caught.value.limit, caught.value.is_depth) == (MAX_DEPTH, True)
    assert caught.value.path.startswith("a")
    assert orjson.dumps(orjson.loads(b"[" * 40 + inner[: MAX_DEPTH * len(opening) - len(opening)] + b"1"
                                     + closing * (MAX_DEPTH - 1) + b"]" * 40))  # fmt: skip


def test_reason_and_offset() -> None:
    with pytest.raises(PeekError) as refused:
        peek(b'{"model":"x","a":"\n"}')
    assert refused.value.reason == "a control character is not escaped"
    assert refused.value.offset == 18
    assert str(refused.value) == "a control character is not escaped (at byte 18)"
    with pytest.raises(PeekTypeError) as wrong:
        peek(b'{"stream":true,"model":null}')
    assert (wrong.value.field, wrong.value.offset) == ("model", 23)


def test_types_are_judged_after_the_whole_body() -> None:
    with pytest.raises(PeekError) as refused:
        peek(b'{"model":1,')
    assert not isinstance(refused.value, PeekTypeError)


MODEL_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(st.dictionaries(KEYS, SCALARS, max_size=4), MODEL_NAMES, MODEL_NAMES)
@example({}, "a", 'quote " and \\ and é')
def test_splice_changes_the_model_only(body: dict[str, Any], old: str, new: str) -> None:
    body = {key: value for key, value in body.items() if key not in FIELDS} | {"model": old, "stream": True}
    text = orjson.dumps(body)
    assert orjson.loads(splice(text, peek(text), new)) == body | {"model": new}


def test_splice_keeps_every_other_byte() -> None:
    body = b'{ "a" : 1.0, "model" :\t"old" , "b":"\\u0041" }\n'
    assert splice(body, peek(body), "new") == b'{ "a" : 1.0, "model" :\t"new" , "b":"\\u0041" }\n'


def test_splice_needs_the_body_that_was_peeked() -> None:
    with pytest.raises(ValueError, match="no model"):
        splice(b"{}", peek(b"{}"), "new")
    found = peek(b'{"model":"a-long-name"}')
    with pytest.raises(ValueError, match="another body"):
        splice(b"{}", found, "new")
    with pytest.raises(ValueError, match="another body"):
        splice(b'{"stream":true,"a":1,"b":2}', found, "new")


def test_repr_names_the_fields() -> None:
    found = peek(b'{"model":"m","stream":true}')
    assert isinstance(found, Peek)
    assert repr(found) == (
        "Peek(model='m', stream=True, previous_response_id=None, prompt_cache_key=None, stores=True, unknown=(), "
        "refused=())"
    )


@pytest.mark.parametrize(
    ("body", "bounds"),
    [
        (b"{}", b"{}"),
        (b'{"model":"m","messages":[{"n":4,"max_tokens":1}]}', b"{}"),
        (b'{"n": 2 ,"max_tokens":7.0,"x":{"n":3}}', b'{"max_tokens":7.0,"n":2}'),
        (
            b'{"\\u006e":3,"prompt":["a",["b"]],"best_of":{"n":[1]}}',
            b'{"n":3,"best_of":{"n":[1]},"prompt":["a",["b"]]}',
        ),
        (b'{"max_output_tokens":[],"n_predict":null,"n_predict":5}', b'{"max_output_tokens":[],"n_predict":5}'),
    ],
)
def test_the_members_that_bound_the_answers_are_found(body: bytes, bounds: bytes) -> None:
    assert peek(body).bounds == bounds
