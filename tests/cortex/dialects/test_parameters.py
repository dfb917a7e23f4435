"""The table of each dialect: what is honoured, refused by name or reported as ignored, and how much is read."""

import json
import pathlib
from typing import Any

import pytest

from cortex.dialects.dialect import Dialect
from cortex.dialects.parameters import OPEN_SERVERS, OPEN_SERVERS_WITHOUT_EFFECT, add_header, ignored_header
from cortex.dialects.registry import CHAT, COMPLETIONS, DIALECTS, EMBEDDINGS, RESPONSES
from cortex.dialects.registry import MESSAGES as MESSAGES_API
from cortex.wire.errors import InvalidRequestError, TooDeepError, TooManyItemsError, UnsupportedParameterError
from cortex.wire.headers import IGNORED
from cortex.wire.request import Ending, FormatKind, InferenceRequest, OutputFormat

MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "chat": (CHAT, {"model": "m", "messages": MESSAGES}),
    "completions": (COMPLETIONS, {"model": "m", "prompt": "hi"}),
    "responses": (RESPONSES, {"model": "m", "input": "hi"}),
    "messages": (MESSAGES_API, {"model": "m", "max_tokens": 9, "messages": MESSAGES}),
}
EVERY = pytest.mark.parametrize("dialect", BODIES)
DOCUMENT = pathlib.Path(__file__).parents[3] / "docs" / "parameters.md"


def decode(dialect: str, **more: Any) -> Any:
    value, body = BODIES[dialect]
    return value.decode(json.dumps(body | more).encode())


def request(dialect: str, **more: Any) -> InferenceRequest:
    found = decode(dialect, **more).request
    assert isinstance(found, InferenceRequest)
    return found


@EVERY
def test_where_an_answer_ends_is_honoured_in_every_dialect(dialect: str) -> None:
    asked = {"ignore_eos": True, "stop_token_ids": [5, 7], "min_tokens": 3, "include_stop_str_in_output": True}
    call = decode(dialect, **asked, bad_words=["no"], min_p=0.1, repeat_penalty=1.5)
    assert call.request.ending == Ending(True, (5, 7), 3, True)
    assert (call.request.sampling.bad_words, call.request.sampling.min_p) == (("no",), 0.1)
    assert call.request.sampling.repetition_penalty == 1.5
    assert call.ignored == ()


@EVERY
@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"structured_outputs": {"json": {"type": "null"}}}, OutputFormat(FormatKind.JSON_SCHEMA, '{"type":"null"}')),
        ({"guided_json": '{"type":"null"}'}, OutputFormat(FormatKind.JSON_SCHEMA, '{"type":"null"}')),
        ({"json_schema": {"type": "null"}}, OutputFormat(FormatKind.JSON_SCHEMA, '{"type":"null"}')),
        ({"structured_outputs": {"json_object": True}}, OutputFormat(FormatKind.JSON_OBJECT)),
        ({"structured_outputs": {"regex": "a+"}}, OutputFormat(FormatKind.REGEX, "a+")),
        ({"guided_regex": "a+"}, OutputFormat(FormatKind.REGEX, "a+")),
        ({"regex": "a+"}, OutputFormat(FormatKind.REGEX, "a+")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, OutputFormat(FormatKind.GRAMMAR, 'start: "a"')),
        ({"guided_grammar": 'start: "a"'}, OutputFormat(FormatKind.GRAMMAR, 'start: "a"')),
        ({"grammar": 'root ::= "a"'}, OutputFormat(FormatKind.GRAMMAR, 'root ::= "a"')),
        ({"ebnf": 'root ::= "a"'}, OutputFormat(FormatKind.GRAMMAR, 'root ::= "a"')),
        ({"guided_choice": ["a", 'b"☃']}, OutputFormat(FormatKind.GRAMMAR, 'start: "a" | "b\\"☃"\n')),
        ({"structured_outputs": {"choice": ["a"]}}, OutputFormat(FormatKind.GRAMMAR, 'start: "a"\n')),
    ],
)
def test_every_way_to_ask_for_a_form_is_honoured(dialect: str, asked: dict[str, Any], wanted: OutputFormat) -> None:
    assert request(dialect, **asked).output_format == wanted


@EVERY
@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"bad_words": ["a", ""]}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(4097)}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
    ],
)
def test_meaningless_values_are_refused_by_name(dialect: str, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode(dialect, **asked)
    assert caught.value.param == param


def test_a_completion_has_a_form_too() -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}
    wanted = OutputFormat(FormatKind.JSON_SCHEMA, '{"type":"null"}', "n")
    assert request("completions", response_format=asked).output_format == wanted
    with pytest.raises(InvalidRequestError, match="'regex'"):
        decode("completions", response_format=asked, regex="a")


@EVERY
@pytest.mark.parametrize("name", [name for name in OPEN_SERVERS if name != "best_of"])
def test_parameters_of_other_servers_are_refused_unless_neutral(dialect: str, name: str) -> None:
    for neutral in (None, *OPEN_SERVERS[name]):
        assert decode(dialect, **{name: neutral}).ignored == ()
    with pytest.raises(UnsupportedParameterError) as caught:
        decode(dialect, **{name: 3.25})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@EVERY
def test_true_is_not_the_number_one(dialect: str) -> None:
    with pytest.raises(UnsupportedParameterError):
        decode(dialect, length_penalty=True)
    with pytest.raises(UnsupportedParameterError):
        decode(dialect, use_beam_search=0)


@EVERY
def test_an_unknown_name_is_reported_with_its_path(dialect: str) -> None:
    found = decode(dialect, temprature=0.1, max_tokns=1, structured_outputs={"regexp": "a"}).ignored
    assert set(found) == {"temprature", "max_tokns", "structured_outputs.regexp"}


@pytest.mark.parametrize(
    ("dialect", "more", "path"),
    [
        ("chat", {"stream_options": {"include_usge": True}}, "stream_options.include_usge"),
        ("chat", {"tools": [{"type": "function", "function": {"name": "f", "paramters": {}}}]},
         "tools[0].function.paramters"),
        ("chat", {"tools": [{"type": "function", "function": {"name": "f"}, "strct": 1}]}, "tools[0].strct"),
        ("chat", {"response_format": {"type": "text", "schma": {}}}, "response_format.schma"),
        ("chat", {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strct": True}}},
         "response_format.json_schema.strct"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "txt": 1}]}]},
         "messages[0].content[0].txt"),
        ("chat", {"messages": [{"role": "user", "content": "a", "nme": "x"}]}, "messages[0].nme"),
        ("completions", {"stream_options": {"include_usge": True}}, "stream_options.include_usge"),
        ("responses", {"reasoning": {"efort": "low"}}, "reasoning.efort"),
        ("responses", {"text": {"format": {"type": "text", "schma": {}}}}, "text.format.schma"),
        ("responses", {"text": {"verbsity": "low"}}, "text.verbsity"),
        ("responses", {"tools": [{"type": "function", "name": "f", "paramters": {}}]}, "tools[0].paramters"),
        ("responses", {"input": [{"role": "user", "content": "a", "rol": 1}]}, "input[0].rol"),
        ("messages", {"thinking": {"type": "enabled", "budget": 5}}, "thinking.budget"),
        ("messages", {"tools": [{"name": "f", "input_schema": {}, "descripton": "x"}]}, "tools[0].descripton"),
        ("messages", {"tool_choice": {"type": "auto", "nme": "x"}}, "tool_choice.nme"),
        ("messages", {"system": [{"type": "text", "text": "a", "txt": 1}]}, "system[0].txt"),
    ],
)  # fmt: skip
def test_names_in_typed_objects_are_looked_at_too(dialect: str, more: dict[str, Any], path: str) -> None:
    assert decode(dialect, **more).ignored == (path,)
    value, _ = BODIES[dialect]
    assert value.parameters.unknown(path).param == path


def test_free_form_values_are_not_validated() -> None:
    schema = {"type": "object", "properties": {"anything": {"odd_keyword": 1}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    more = {"tools": tools, "metadata": {"a": "b"}, "chat_template_kwargs": {"x": {"y": 1}}, "logit_bias": {"5": 1}}
    assert decode("chat", **more).ignored == ()


def test_embeddings_have_a_table_of_their_own() -> None:
    body = {"model": "m", "input": "a", "user": "u", "encodng_format": "float"}
    assert EMBEDDINGS.decode(json.dumps(body).encode()).ignored == ("encodng_format",)
    with pytest.raises(UnsupportedParameterError, match="truncate_prompt_tokens"):
        EMBEDDINGS.decode(json.dumps(body | {"truncate_prompt_tokens": 5}).encode())


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("temprature", "Did you mean 'temperature'?"),
        ("max_token", "Did you mean 'max_tokens'?"),
        ("stream_options.include_usge", "Did you mean 'stream_options.include_usage'?"),
        ("tools[3].function.paramters", "Did you mean 'tools[3].function.parameters'?"),
        ("something_else_entirely", "Unknown parameter: 'something_else_entirely'."),
    ],
)
def test_a_refusal_suggests_the_closest_name(path: str, meant: str) -> None:
    error = CHAT.parameters.unknown(path)
    assert (error.status, error.code, error.param) == (400, "unknown_parameter", path)
    assert error.message.endswith(meant)


# ------------------------------------------------------------------ the header


def test_a_name_cannot_end_the_header_that_reports_it() -> None:
    odd = "a\r\nset-cookie: x=1"
    (found,) = decode("chat", **{odd: 1}).ignored
    assert found == "a?r?nset-cookie??x?1"
    assert ignored_header([odd, "é", "x" * 1000]) == b"a??set-cookie??x=1, ?, " + b"x" * 80


def test_the_header_is_bounded_and_has_each_name_once() -> None:
    found = decode("chat", **{f"unknown_{n}": 1 for n in range(1000)}).ignored
    assert (len(found), found[-1]) == (17, "...")
    messages = [{"role": "user", "content": "a", "odd": 1}] * 1000
    assert decode("chat", messages=messages).ignored == ("messages[0].odd",)
    headers: dict[bytes, bytes] = {}
    add_header(headers, IGNORED, b"a,b")
    add_header(headers, IGNORED, b"b, c\r\nx: y")
    assert headers == {IGNORED: b"a, b, c??x??y"}
    add_header(headers, IGNORED, b",".join(b"n%d" % n for n in range(100)))
    assert headers[IGNORED].endswith(b", ...")
    assert len(headers[IGNORED]) < 16 * 82 + 10


# ------------------------------------------------------------------ how much is read


@pytest.mark.parametrize(
    ("dialect", "more", "param"),
    [
        ("chat", {"messages": MESSAGES * 20_001}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 10_001}]},
         "messages[0].content"),
        ("chat", {"tools": [{"type": "function", "function": {"name": "f"}}] * 1001}, "tools"),
        ("responses", {"input": [{"role": "user", "content": "a"}] * 20_001}, "input"),
        ("responses", {"tools": [{"type": "function", "name": "f"}] * 1001}, "tools"),
        ("messages", {"messages": MESSAGES * 20_001}, "messages"),
        ("messages", {"metadata": {str(n): 1 for n in range(10_001)}}, "metadata"),
        ("completions", {"logit_bias": {str(n): 1 for n in range(10_001)}}, "logit_bias"),
        ("completions", {"user": [[1] * 1000] * 1000}, None),
    ],
)  # fmt: skip
def test_more_than_is_read_is_refused_by_name(dialect: str, more: dict[str, Any], param: str | None) -> None:
    with pytest.raises(TooManyItemsError) as caught:
        decode(dialect, **more)
    assert (caught.value.code, caught.value.status, caught.value.param) == ("too_many_items", 400, param)


@pytest.mark.parametrize(
    ("dialect", "name"),
    [("chat", "metadata"), ("completions", "vllm_xargs"), ("responses", "metadata"), ("messages", "tools")],
)
def test_values_too_deep_to_re_encode_are_refused_with_their_place(dialect: str, name: str) -> None:
    value, body = BODIES[dialect]
    for levels in (201, 300, 1000, 5000):
        text = json.dumps(body)[:-1] + f', "{name}": ' + "[" * levels + "]" * levels + "}"
        with pytest.raises(TooDeepError) as caught:
            value.decode(text.encode())
        assert (caught.value.code, caught.value.status) == ("too_deep", 400)
        assert str(caught.value.param).startswith(f"{name}[0][0]")


def test_every_refused_name_is_judged_however_many_there_are() -> None:
    neutral = {name: values[0] if values else None for name, values in OPEN_SERVERS.items() if name != "typical_p"}
    for dialect in BODIES:
        given = {name: value for name, value in neutral.items() if name != "best_of"}
        assert decode(dialect, **given).ignored == ()
        with pytest.raises(UnsupportedParameterError, match="'typical_p'"):
            decode(dialect, **given, typical_p=0.5)
    many = b'"ttl":null,' * 5000
    with pytest.raises(UnsupportedParameterError, match="'typical_p'"):
        CHAT.decode(b"{" + many + json.dumps(BODIES["chat"][1] | {"typical_p": 0.5}).encode()[1:])


@EVERY
def test_a_structural_tag_is_refused_wherever_it_is_asked_for(dialect: str) -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        decode(dialect, structured_outputs={"structural_tag": "{}"})
    assert caught.value.param == "structured_outputs.structural_tag"


@pytest.mark.parametrize("dialect", ["chat", "completions"])
@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_beside_the_type_of_the_format_is_honoured(dialect: str, kind: str) -> None:
    asked = {"type": kind, "schema": {"type": "null"}}
    assert request(dialect, response_format=asked).output_format == OutputFormat(
        FormatKind.JSON_SCHEMA, '{"type":"null"}'
    )
    with pytest.raises(InvalidRequestError, match="two schemas"):
        decode(dialect, response_format=asked | {"json_schema": {"name": "n", "schema": {}}})


@pytest.mark.parametrize("config", [{}, {"effort": "low"}, {"format": None}, None])
def test_the_older_name_of_a_format_counts_beside_a_config_without_one(config: dict[str, Any] | None) -> None:
    older = {"type": "json_schema", "schema": {"type": "null"}}
    found = request("messages", output_config=config, output_format=older).output_format
    assert (found.kind, found.source) == (FormatKind.JSON_SCHEMA, '{"type":"null"}')
    newer = {"format": {"type": "json_schema", "schema": {"type": "string"}}}
    found = request("messages", output_config=newer, output_format=older).output_format
    assert found.source == '{"type":"string"}'


# ------------------------------------------------------------------ its documentation


def test_the_document_has_every_name() -> None:
    text = DOCUMENT.read_text()
    names = {*OPEN_SERVERS, *OPEN_SERVERS_WITHOUT_EFFECT.split()}
    for one in DIALECTS:
        names |= set(one.parameters._root.members)
    assert not [name for name in sorted(names) if f"`{name}`" not in text]
