"""The buffer writes the same JSON text as other encoders."""

import json

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cortex._fast.buffer import Buffer

VALID_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ANY_TEXT = st.text(st.characters())


def escaped(text: str, *, quotes: bool = True) -> bytes:
    buffer = Buffer()
    buffer.append_json(text, quotes=quotes)
    return buffer.take()


@given(VALID_TEXT)
@example("")
@example('\x00\x1f\x20\x7f"\\/\b\f\n\r\t')
@example("plain " * 40 + '"' + "plain " * 40)
@example("é" * 300)
@example("你好" * 300)
@example("😀" * 300)
def test_round_trip(text: str) -> None:
    assert orjson.loads(escaped(text)) == text
    assert json.loads(escaped(text)) == json.loads(json.dumps(text))


@given(VALID_TEXT)
def test_same_bytes_as_orjson(text: str) -> None:
    assert escaped(text) == orjson.dumps(text)


@given(ANY_TEXT)
@example("\ud800")
@example("a\udfff\U0001f600")
@example("\ud83d\ude00")
def test_a_lone_surrogate_becomes_the_replacement_character(text: str) -> None:
    replaced = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert orjson.loads(escaped(text)) == replaced


@pytest.mark.parametrize("position", range(40))
@pytest.mark.parametrize("byte", ['"', "\\", "\x01", "\n"])
def test_an_escape_is_seen_at_every_place_of_a_run(position: int, byte: str) -> None:
    text = "x" * position + byte + "x" * (40 - position)
    assert escaped(text) == orjson.dumps(text)


@given(st.lists(st.one_of(st.binary(), VALID_TEXT), max_size=20))
def test_appended_bytes_are_taken(parts: list[bytes | str]) -> None:
    buffer = Buffer()
    expected = b""
    for part in parts:
        if isinstance(part, bytes):
            buffer.append(part)
            expected += part
        else:
            buffer.append_json(part, quotes=False)
            expected += orjson.dumps(part)[1:-1]
        assert len(buffer) == len(expected)
    assert buffer.take() == expected
    assert len(buffer) == 0
    buffer.append(b"again")
    assert buffer.take() == b"again"


def test_grows_by_more_than_double() -> None:
    buffer = Buffer()
    buffer.append(b"a")
    buffer.append(b"b" * 100_000)
    buffer.append_json("c" * 1_000_000)
    assert buffer.take() == b"a" + b"b" * 100_000 + b'"' + b"c" * 1_000_000 + b'"'
