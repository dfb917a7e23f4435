"""Fuzz ``peek`` against orjson: ``python tests/fuzz/fuzz_peek.py -runs=200000``.

The extension is not instrumented, so that coverage leads nowhere by itself: every input is made here, as a JSON object
with a few pieces put in, taken out or cut off. A sanitizer build reports reads outside the body.
"""

import random
import sys
from collections.abc import Callable

import atheris
import orjson

from cortex._fast.peek import PeekError, PeekLimitError, PeekTypeError, peek, splice

KEYS = [b'"model"', b'"mod\\u0065l"', b'"stream"', b'"previous_response_id"', b'"prompt_cache_key"', b'"x"', b'""']
SCALARS = [
    *[b"true", b"false", b"null", b"0", b"-0", b"1.5e3", b"1e308", b"1e309", b"1" * 308, b"1" * 310 + b"e-9", b'""'],
    *[b'"a"', b'"\\ud83d\\ude00"', b'"\xe4\xbd\xa0\xe5\xa5\xbd\xc3\xa9\xf0\x9f\x98\x80"', b'"\\n\\\\\\""'],
    *[b'"' + b"x" * length + b'"' for length in (14, 15, 16, 17, 40)],
    *[b'"' + b"x" * length + b'\\n"' for length in (13, 14, 15, 16)],
]
EDITS = [
    *[bytes([c]) for c in b'{}[],:"\\/019-+.eEu \n\t\x00\x1f\x7f\x80\xc0\xff'],
    *[b"\\u", b"\\ud83d", b"\\ude00", b"\xed\xa0\x80", b"\xe0\x80\x80", b"\xf4\x90\x80\x80", b"\xe4\xbd", b"[" * 1030],
    *[b"tru", b"nul", b"\xef\xbb\xbf", b'"model":"m",', b'"stream":1,'],
]


def value(chance: random.Random, depth: int) -> bytes:
    """Return a random JSON value."""
    kind = chance.randrange(6) if depth else 5
    if kind == 0:
        return b"[" + b",".join(value(chance, depth - 1) for _ in range(chance.randrange(4))) + b"]"
    return document(chance, depth - 1) if kind == 1 else chance.choice(SCALARS)


def document(chance: random.Random, depth: int) -> bytes:
    """Return a random JSON object, with white space here and there."""
    colon = chance.choice([b":", b" :", b": ", b":\n\t"])
    members = (chance.choice(KEYS) + colon + value(chance, max(depth, 0)) for _ in range(chance.randrange(6)))
    return b"{" + chance.choice([b",", b" , "]).join(members) + b"}"


def mutate(_data: bytes, max_size: int, seed: int) -> bytes:
    """Return a new input: an object, mostly broken."""
    chance = random.Random(seed)
    text = bytearray(document(chance, 3))
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        at = chance.randrange(len(text) + 1)
        match chance.randrange(4):
            case 0:
                text[at:at] = chance.choice(EDITS)
            case 1:
                text[at : at + 1] = chance.choice(EDITS)
            case 2:
                del text[at : at + chance.randrange(1, 6)]
            case _:
                del text[at:]
    return bytes(text[:max_size])


def refusal(call: Callable[[bytes], object], body: bytes) -> PeekError | None:
    """Return the error of a call, ``None`` if there is none."""
    try:
        call(body)
    except PeekError as error:
        return error
    return None


def check(body: bytes) -> str:
    """Fail unless ``peek`` and orjson agree on ``body``; return their result."""
    try:
        expected = orjson.loads(body)
    except orjson.JSONDecodeError:
        expected = None
    error = refusal(peek, body)
    if isinstance(error, PeekTypeError):
        assert isinstance(expected, dict), body
        assert error.field in expected, body
        return error.field
    if isinstance(error, PeekLimitError):  # which is stricter than orjson's
        assert error.is_depth, body
        assert body.count(b"[") + body.count(b"{") > error.limit, body
        return error.reason
    if error is not None:
        assert not isinstance(expected, dict), (body, error)
        assert 0 <= error.offset <= len(body), (body, error)
        return error.reason
    found = peek(body)
    assert isinstance(expected, dict), body
    assert found.model == expected.get("model"), body
    assert found.stream is bool(expected.get("stream")), body
    assert found.previous_response_id == expected.get("previous_response_id"), body
    assert found.prompt_cache_key == expected.get("prompt_cache_key"), body
    if found.model is None:
        return "no model"
    assert orjson.loads(splice(body, found, "n\n")) == expected | {"model": "n\n"}, body
    return "model"


@atheris.instrument_func  # type: ignore[untyped-decorator]
def one_input(data: bytes) -> None:
    """Check one input."""
    check(data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
    atheris.Fuzz()
