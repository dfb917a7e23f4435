"""Fuzz grammars: ``python tests/fuzz/fuzz_grammar.py [tests/fuzz/corpus/grammar]``.

An input is a letter (``s`` for a JSON schema, ``r`` for a regular expression, ``g`` for a grammar) and its source. It
is compiled and followed, or refused as the client's error. The compiler is another process's: inputs are made here.
"""

import json
import pathlib
import random
import sys

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

from text_fuzz import Texts

from cortex.wire.request import FormatKind, InferenceRequest, OutputFormat

KINDS = {"s": FormatKind.JSON_SCHEMA, "r": FormatKind.REGEX, "g": FormatKind.GRAMMAR}
NUMBERS = [0, 1, -1, 2**31, 2**53, 2**63 - 1, -(2**63), -(2**63) + 1, 2**64, 10**30, 1e308, -1e-308, 0.1, 999983]
PATTERNS = ["a", "^a{1000}$", "(a|b)*", "(a{99}){99}", ".*x.{9}", "\\p{L}+", "[", "(?=a)", "", "\\b"]
RULES = [
    'start: a\na: "x" a | "y"\n',
    "start: /a{3}/\n",
    'start: start "a" | "b"\n',
    'root ::= "a" root | "b"',
    "start:",
]
TEXTS = ["a", "", "type", "\x00", "é", "#", "#/$defs/a", "date-time", "uuid"]


def schema(chance: random.Random, depth: int) -> object:
    """Return a random schema."""
    if depth == 0 or chance.random() < 0.1:
        return chance.choice([True, False, {}, {"type": "string"}, {"$ref": "#"}, {"$ref": "#/$defs/a"}])
    inner = [schema(chance, depth - 1) for _ in range(chance.randrange(1, 4))]
    number = chance.choice(NUMBERS)
    found: dict[str, object] = {}
    for _ in range(chance.randrange(1, 4)):
        found |= chance.choice(
            [
                {"enum": [number, chance.choice(NUMBERS), "a"]},
                {"const": number},
                {"type": chance.choice(["integer", "number", "string", "object", "array", "null", ["string", "null"]])},
                {chance.choice(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]): number},
                {chance.choice(["minLength", "maxLength", "minItems", "maxItems", "minProperties"]): number},
                {"pattern": chance.choice(PATTERNS)},
                {"format": chance.choice(TEXTS)},
                {"properties": dict(zip("abc", inner, strict=False)), "required": ["a", "z"]},
                {"patternProperties": {chance.choice(PATTERNS): inner[0]}},
                {"items": inner[0], "prefixItems": inner},
                {chance.choice(["anyOf", "oneOf", "allOf"]): inner},
                {"$defs": {"a": inner[0]}, "additionalProperties": inner[-1]},
            ]
        )
    return found


def mutate(_data: bytes, max_size: int, seed: int) -> bytes:
    """Return a new input."""
    chance = random.Random(seed)
    kind = chance.choice("sssrg")
    if kind == "s":
        text = json.dumps(schema(chance, 4))
    else:
        text = "".join(chance.choices(PATTERNS if kind == "r" else RULES, k=chance.randrange(1, 6)))
    if chance.random() < 0.2:
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(["{", "}", "[" * 99, '"', "\\", "9" * 40, "(", "*"]) + text[at + 1 :]
    return (kind + text).encode()[:max_size]


def one_input(data: bytes) -> None:
    """Check one grammar."""
    kind, source = data[:1].decode("latin-1"), data[1:].decode(errors="replace")
    asked = OutputFormat(KINDS.get(kind, FormatKind.JSON_SCHEMA), source)
    TEXT.check(MODEL.grammar(InferenceRequest("m", prompt="x", output_format=asked)))


if __name__ == "__main__":
    TEXT = Texts()
    MODEL = TEXT.open()
    atheris.Setup([sys.argv[0], "-max_len=16384", *sys.argv[1:]], one_input, custom_mutator=mutate)
    atheris.Fuzz()
