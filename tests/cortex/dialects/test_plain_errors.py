"""Errors of wrong bodies: the place and the fault, without terms of the decoder."""

import json
import re
from typing import Any

import pytest

from cortex.dialects.dialect import Dialect
from cortex.dialects.registry import DIALECTS
from cortex.wire.errors import ApiError

OWN_WORDS = re.compile(
    r"`|msgspec|Struct|\bstr\b|\bint\b|\bbool\b|\bdict\b|NoneType|jSON|malformed|<state>|Traceback|\$\.|Object |Literal"
)


def with_input(message: Any, **fields: Any) -> bytes:
    """Return a body of every dialect at once, which has ``message`` wherever one of them looks for its input."""
    given = message if isinstance(message, list) else [message]
    return json.dumps({"model": "m", "messages": given, "input": given, "prompt": given, **fields}).encode()


HELLO = {"role": "user", "content": "a"}
INPUT = {"messages": [HELLO], "input": "a", "prompt": "a"}
BODIES = [
    *(b"", b"{", b"[]", b"3", b"null", b'"x"', b"{]", b'{"a" 1}', b'{"a":}', b'{"a":01}', b'{"a":"\xff"}'),
    *(b'{"a":"\\ud800"}', b'{"a":' * 3000, b"[" * 3000, b"\xff\xfe", b'{"model":3}', b'{"model":null}', b"{}"),
    b'{"model":"m"}',
    b'{"model":"m","messages":3,"input":true,"prompt":{},"stream":"yes"}',
    b'{"model":"m","messages":3,"input":true,"prompt":{}}',
    with_input({"role": "wizard", "content": "a"}),
    with_input({"role": "user", "content": [{"type": "hologram"}]}),
    with_input({"role": "user", "content": 3}),
    with_input([None]),
    with_input([]),
    json.dumps({"model": "m", **INPUT} | {"temperature": "hot", "dimensions": "x"}).encode(),
    json.dumps({"model": "m", **INPUT} | {"n": [], "top_p": {}, "tools": 3, "encoding_format": "xml"}).encode(),
    json.dumps({"model": "m", **INPUT} | {"tools": [{"type": 3}], "seed": "x", "dimensions": 1.5}).encode(),
    json.dumps({"model": "m", **INPUT} | {"top_p": 7, "dimensions": -1}).encode(),
    json.dumps({"model": "m", **INPUT} | {"stop": [3], "stop_sequences": [3], "encoding_format": 3}).encode(),
]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.path)
@pytest.mark.parametrize("body", BODIES)
def test_errors_are_in_plain_english(dialect: Dialect, body: bytes) -> None:
    try:
        dialect.decode(body)
    except ApiError as error:
        check(error)


def check(error: ApiError) -> None:
    assert 400 <= error.status < 500
    message = error.message
    assert OWN_WORDS.search(message) is None, message
    assert message[0].isupper(), message
    assert message.endswith("."), message
    assert len(message) < 400
