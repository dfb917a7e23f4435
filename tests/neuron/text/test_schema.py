"""Schemas as clients write them: all of zod's and pydantic's compile, and answers under their grammars fit them."""

import enum
import json
import pathlib
import random
import re
import tracemalloc
from typing import Annotated, Any, Literal

import jsonschema
import llguidance
import pydantic
import pytest

from cortex.wire.errors import InvalidSchemaError
from cortex.wire.request import FormatKind, InferenceRequest, OutputFormat, Tool, ToolChoice, ToolMode
from neuron.text.forms.form import CallForm
from neuron.text.forms.registry import FORMS, HERMES
from neuron.text.grammar import constraint_of
from neuron.text.schema import PreparedSchema, left_out

ZOD: dict[str, Any] = json.loads((pathlib.Path(__file__).parent / "schemas" / "zod.json").read_text())


class Color(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    name: str | None = None


class Node(pydantic.BaseModel):
    value: Annotated[int, pydantic.Field(ge=0, lt=100)]
    children: "list[Node]" = []


class Everything(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
    color: Color = Color.RED
    codes: dict[Annotated[str, pydantic.Field(pattern="^c_")], int] = {}
    colors: dict[Color, float] = {}
    unique: set[int] = set()
    pair: tuple[int, str] = (1, "a")
    email: Annotated[str, pydantic.Field(json_schema_extra={"format": "email"})] = "a@b.c"
    link: pydantic.AnyUrl | None = None
    file: pydantic.FilePath | None = None
    big: Annotated[float, pydantic.Field(le=1e30)] = 1.0
    long: Annotated[int, pydantic.Field(ge=-(2**63), le=2**63 - 1)] = 1
    amount: Annotated[float, pydantic.Field(multiple_of=0.5)] = 1.0
    secret: pydantic.SecretStr = pydantic.SecretStr("")
    packed: pydantic.Json[list[int]] | None = None
    raw: bytes = b""
    short: Annotated[str, pydantic.Field(min_length=1, max_length=3, pattern="^[a-z]+$")] = "a"
    number: Annotated[str, pydantic.Field(pattern=r"\bn\d\b")] = "n1"
    tree: Node | None = None
    others: "list[Everything]" = []
    anything: Any = None


def pydantics() -> dict[str, Any]:
    found = {"pydantic " + model.__name__: model.model_json_schema() for model in (Node, Cat, Dog, Everything)}
    found["pydantic serialized"] = Everything.model_json_schema(mode="serialization")
    found["pydantic union"] = pydantic.TypeAdapter(list[Cat | Dog] | dict[str, Node]).json_schema()
    return found


SCHEMAS = ZOD | pydantics()

LETTERS = [bytes([byte]) for byte in range(256)]
TOKENS = llguidance.LLTokenizer(
    llguidance.TokenizerWrapper(
        type(
            "Bytes",
            (),
            {
                "eos_token_id": 256,
                "bos_token_id": None,
                "tokens": [*LETTERS, b"<end>"],
                "special_token_ids": [256],
                "__call__": lambda self, text: list(text if isinstance(text, bytes) else text.encode()),
            },
        )()
    )
)
ENDING = b'"}],'


def sampled(grammar: str, pick: random.Random, max_bytes: int = 1500) -> bytes | None:
    """Return an answer that the grammar allows, ``None`` if it does not come to an end soon; ends are preferred."""
    matcher = llguidance.LLMatcher(TOKENS, grammar)
    assert not matcher.is_error(), matcher.get_error()
    output = b""
    for _ in range(max_bytes):
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(257) if mask[token // 8] >> token % 8 & 1]
        assert allowed, matcher.get_error()
        if 256 in allowed and (len(allowed) == 1 or pick.random() < 0.7):
            return output
        allowed = [token for token in allowed if token < 128] or allowed
        ends = [token for token in allowed if token in ENDING]
        dull = [token for token in allowed if chr(token) not in " \n\\"] or allowed
        token = pick.choice(ends if ends and pick.random() < 0.6 else dull)
        assert matcher.consume_token(token)
        output += bytes([token])
        if matcher.is_stopped():
            return output
    return None


def answer_grammar(schema: Any, **fields: Any) -> str:
    asked = OutputFormat(FormatKind.JSON_SCHEMA, json.dumps(schema), **fields)
    found = constraint_of(InferenceRequest("m", prompt="x", output_format=asked))
    assert found is not None
    return found


def check(answer: bytes, schema: Any) -> None:
    value = json.loads(answer)
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    # A pattern of JavaScript's means Unicode's classes, which Python's has no words for.
    problems = list(validator(schema).iter_errors(value))
    assert not problems, (answer, problems[0].message)


def judged(schema: Any) -> Any:
    """Return a schema without the patterns that Python cannot read."""
    match schema:
        case dict():
            return {
                key: judged(value)
                for key, value in schema.items()
                if not (key == "pattern" and isinstance(value, str) and "\\p{" in value)
            }
        case list():
            return [judged(value) for value in schema]
    return schema


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_of_zod_and_pydantic_compile_and_answers_fit_them(name: str) -> None:
    schema = SCHEMAS[name]
    grammar = answer_grammar(schema)
    given_up = PreparedSchema(schema).left_out
    ended = 0
    for seed in range(6):
        answer = sampled(grammar, random.Random(seed))
        if answer is not None:
            ended += 1
            if not given_up and "openapi" not in name:
                check(answer, judged(schema))
            else:
                json.loads(answer)
    assert ended or "recursive" in name or "Everything" in name or "serialized" in name


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("form", [HERMES, FORMS["llama"], FORMS["xml"]])
def test_tools_of_such_schemas_can_be_forced(name: str, form: CallForm) -> None:
    tool = Tool("f", "", SCHEMAS[name])
    choice = ToolChoice(ToolMode.NAMED, "f", parallel=False)
    grammar = constraint_of(InferenceRequest("m", prompt="x", tools=(tool, tool), tool_choice=choice), form)
    assert grammar is not None
    assert not llguidance.LLMatcher(TOKENS, grammar).is_error()


def closed(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object of exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


REFERENCES: list[dict[str, Any]] = [
    {**closed(next={"$ref": "#"}, v={"type": "integer"}), "required": ["v"]},
    closed(a={"type": "integer"}, b={"$ref": "#/properties/a"}),
    closed(a={"$ref": "#/$defs/x~1y%20z"}) | {"$defs": {"x/y z": {"const": 7}}},
    closed(a={"$ref": "#/definitions/d"})
    | {"definitions": {"d": {"$ref": "#/definitions/e"}, "e": {"enum": ["p", "q"]}}},
    closed(a={"$ref": "http://example.org/s#/$defs/x"}, b={"$ref": "#named"})
    | {"$defs": {"x": {"type": "boolean"}, "y": {"$anchor": "named", "type": "null"}}, "$id": "http://example.org/s"},
    closed(a={"$ref": "#/components/schemas/P"})
    | {"components": {"schemas": {"P": {"type": "integer", "minimum": 1, "maximum": 3}}}},
    closed(
        list={
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"$ref": "#/properties/list/prefixItems/0"}],
            "items": False,
            "minItems": 2,
        }
    ),
    {
        "$ref": "#/$defs/Args",
        "$defs": {"Args": closed(k={"const": 1}, more={"$ref": "#/$defs/Args"}) | {"required": ["k"]}},
    },
]


@pytest.mark.parametrize("schema", REFERENCES)
@pytest.mark.parametrize(("form", "key"), [(HERMES, "arguments"), (FORMS["llama"], "parameters")])
def test_references_of_a_forced_tool_are_to_its_own_schema(schema: dict[str, Any], form: CallForm, key: str) -> None:
    choice = ToolChoice(ToolMode.REQUIRED, parallel=False)
    tool = Tool("f", "", schema)
    grammar = constraint_of(InferenceRequest("m", prompt="x", tools=(tool,), tool_choice=choice), form)
    assert grammar is not None
    ended = 0
    for seed in range(12):
        answer = sampled(grammar, random.Random(seed))
        if answer is not None:
            ended += 1
            call = json.loads(re.sub(rb"</?tool_call>", b"", answer))
            check(json.dumps(call[key]).encode(), {**schema, "$id": "http://example.org/s"})
    assert ended


@pytest.mark.parametrize("schema", REFERENCES)
def test_references_of_an_answer(schema: dict[str, Any]) -> None:
    grammar = answer_grammar(schema)
    answers = [sampled(grammar, random.Random(seed)) for seed in range(8)]
    for answer in filter(None, answers):
        check(answer, {**schema, "$id": "http://example.org/s"})
    assert any(answers)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#"}, "refers to itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "refers to itself"),
        ({"$ref": "#/$defs/a"}, "there is nothing"),
        ({"$ref": "#nowhere"}, "there is nothing"),
        ({"$ref": "#/$defs/9999999999", "$defs": []}, "there is nothing"),
        ({"$ref": "http://example.org/other"}, "leads out"),
        ({"$ref": 3}, "one text"),
        ({"properties": {"a": 3}}, "a schema is an object"),
        ({"properties": []}, "not an object"),
        ({"anyOf": []}, "not a list"),
        ({"enum": [-(2**63)]}, "at least"),
        ({"const": {"a": [-(2**63) + 1]}}, "at least"),
        ({"const": float("inf")}, "no word for"),
        ({"multipleOf": 0}, "not a positive"),
        ({"minimum": "3"}, "not a number"),
        ({"type": 5, "format": "date"}, "."),
        ({"type": "string", "format": []}, "not a text"),
        ({"items": {"format": {}}}, "not a text"),
        ({"uniqueItems": True, "maxItems": []}, "."),
        ({"oneOf": [{"type": 5}, {"type": "string"}]}, "."),
    ],
)
def test_an_invalid_schema_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(InvalidSchemaError, match=message):
        answer_grammar(schema)


@pytest.mark.parametrize("keyword", ["type", "format", "maxItems", "oneOf", "enum", "$ref", "required", "properties"])
@pytest.mark.parametrize("value", [5, [], {}, [5], [[]], [{"type": 5}, {"type": "string"}], None, "string", 1.5, True])
def test_whatever_a_keyword_holds_is_an_answer_or_a_refusal(keyword: str, value: object) -> None:
    schema = {"format": "date", "uniqueItems": True} | {keyword: value}
    asked = OutputFormat(FormatKind.JSON_SCHEMA, json.dumps(schema))
    choice = ToolChoice(ToolMode.REQUIRED)
    assert left_out(InferenceRequest("m", output_format=asked)) is not None
    assert left_out(InferenceRequest("m", tools=(Tool("f", "", schema),), tool_choice=choice)) is not None


def test_the_cost_of_a_schema_is_not_quadratic() -> None:
    wide = {"properties": {"k" * 100_000: {"properties": {f"p{index}": {} for index in range(5_000)}}}}
    chain = {f"a{index}": {"$ref": f"#/$defs/a{index + 1}"} for index in range(2_000)} | {"a2000": {"type": "null"}}
    chained = {"$defs": chain, "anyOf": [{"$ref": f"#/$defs/{name}"} for name in chain]}
    tracemalloc.start()
    try:
        assert PreparedSchema(wide).left_out == []
        prepared = PreparedSchema(chained)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert prepared.definitions == {"r0": {"type": "null"}}, "each leads to the end of the chain"


def test_an_id_behind_a_long_way_is_found() -> None:
    schema = {"$ref": "there", "properties": {"a/b~": {"items": [{"$id": "there", "type": "null"}]}}}
    assert PreparedSchema(schema).definitions == {"r0": {"type": "null"}}


LEFT_OUT: list[tuple[str, dict[str, Any]]] = [
    ("propertyNames", {"type": "object", "propertyNames": {"minLength": 3}}),
    ("format", {"type": "string", "format": "shoe-size"}),
    ("uniqueItems", {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
    ("oneOf", {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 3}]}),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    ("pattern", {"type": "string", "pattern": r"\bfoo\b"}),
    ("pattern", {"type": "string", "pattern": "^(?!x).*$"}),
    ("pattern", {"type": "string", "pattern": "(?<=x)y"}),
    ("pattern", {"type": "string", "pattern": r"(a)\1"}),
    ("patternProperties", {"type": "object", "patternProperties": {"(?=a)": {}}, "additionalProperties": False}),
    ("maximum", {"type": "number", "maximum": 1e30}),
    ("minimum", {"type": "integer", "minimum": -(2**63)}),
    ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": -1e300}),
    ("multipleOf", {"type": "number", "multipleOf": 1e12}),
    ("not", {"type": "string", "not": {"const": "a"}}),
    ("if", {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("dependentSchemas", {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}),
    ("dependencies", {"type": "object", "dependencies": {"a": ["b"]}}),
    ("contains", {"type": "array", "contains": {"const": 1}}),
    ("maxContains", {"type": "array", "contains": {"const": 1}, "minContains": 0, "maxContains": 2}),
    ("unevaluatedProperties", {"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False}),
    ("unevaluatedItems", {"anyOf": [{"prefixItems": [{}]}, {"type": "null"}], "unevaluatedItems": False}),
]


@pytest.mark.parametrize(("keyword", "schema"), LEFT_OUT)
def test_unenforceable_keywords_are_left_out_and_reported_and_refused_where_strict(
    keyword: str, schema: dict[str, Any]
) -> None:
    inner = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    assert not llguidance.LLMatcher(TOKENS, answer_grammar(inner)).is_error()
    asked = OutputFormat(FormatKind.JSON_SCHEMA, json.dumps(inner))
    tool = Tool("f", "", inner)
    request = InferenceRequest("m", output_format=asked, tools=(tool,))
    assert left_out(request) == [f"response_format.{keyword}", f"tools[0].parameters.{keyword}"]
    with pytest.raises(InvalidSchemaError, match=f"'{re.escape(keyword)}' cannot be enforced") as caught:
        answer_grammar(inner, strict=True)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_schema", "response_format")
    strict = InferenceRequest(
        "m", tools=(Tool("f", "", inner, strict=True),), tool_choice=ToolChoice(ToolMode.REQUIRED)
    )
    with pytest.raises(InvalidSchemaError, match=keyword) as caught:
        constraint_of(strict)
    assert caught.value.param == "tools"


TEXT: dict[str, Any] = {"type": "string"}
MAP: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "integer"}}

ENFORCED: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"type": "array", "uniqueItems": False, "items": {"const": 1}}, [[1, 1]], [[2]]),
    (MAP | {"propertyNames": {"enum": ["a", "b"]}}, [{"a": 1}], [{"c": 1}, {"a": "x"}]),
    (MAP | {"propertyNames": {"pattern": "^k_"}}, [{"k_a": 1}], [{"c": 1}]),
    ({"type": "object", "propertyNames": {"type": "string"}}, [{"a": 1}], []),
    ({"type": "object", "properties": {"a": {"not": {}}}, "additionalProperties": False}, [{}], [{"a": 1}]),
    ({"type": "object", "additionalProperties": {"not": {}}}, [{}], [{"a": 1}]),
    ({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}, [{"a": 1}], [{"b": 1}]),
    ({"oneOf": [{"type": "string"}, {"type": "null"}]}, ["a", None], [1]),
    ({"oneOf": [{"const": 1}, {"const": 2}]}, [1, 2], [3]),
    ({"type": "string", "nullable": True}, ["a", None], [1]),
    ({"type": "string", "enum": ["a"], "nullable": True}, ["a", None], ["b"]),
    ({"$ref": "#/$defs/a", "nullable": True, "$defs": {"a": {"type": "integer"}}}, [1, None], ["a"]),
    ({"type": "array", "items": [{"const": 1}, {"const": 2}], "additionalItems": False}, [[1, 2]], [[2], [1, 2, 3]]),
    ({"type": "integer", "format": "int64", "maximum": 9}, [9], [10]),
    ({"type": "string", "pattern": r"^[(?=]a\\b\[(?:x)$"}, ["(a\\b[x"], ["a"]),
    ({"type": "string", "maxLength": 10**12}, ["a"], [1]),
    ({"type": "number", "minimum": float("-inf"), "maximum": 3}, [3], [4]),
    ({"anyOf": [TEXT, {"type": "integer"}], "oneOf": [{"type": "integer"}, {"type": "null"}]}, [1], ["a", None]),
    ({"type": "string", "default": 10**400, "examples": [float("inf")], "x-other": 1}, ["a"], [1]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "fits", "fails"), ENFORCED)
def test_keywords_with_an_equivalent_are_enforced(schema: dict[str, Any], fits: list[Any], fails: list[Any]) -> None:
    grammar = answer_grammar(schema, strict=True)

    def takes(value: Any) -> bool:
        matcher = llguidance.LLMatcher(TOKENS, grammar)
        return all(matcher.consume_token(byte) for byte in json.dumps(value).encode()) and matcher.is_accepting()

    assert [value for value in fits if not takes(value)] == []
    assert [value for value in fails if takes(value)] == []
