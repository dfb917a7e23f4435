"""Requests changed at random and made to hurt: a prompt and a grammar, or an error of the request's, and no death."""

import asyncio
import json
import pathlib
import random
import shutil
from typing import Any

import pytest
from bodies import DECODERS, mutated
from tokenizers import Tokenizer

from cortex.wire.errors import ApiError
from cortex.wire.request import FormatKind, InferenceRequest, Message, OutputFormat, Role, Tool, ToolCall
from neuron.errors import UnsupportedTokenizerError
from neuron.models.gguf import GgufHeader
from neuron.text import tokenizer
from neuron.text.model_text import decoder_of
from neuron.text.pool import TextModel, TextPool

ROUNDS = 300
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
)


async def served(model: TextModel, request: InferenceRequest) -> None:
    """Make the prompt and the grammar of a request; what is refused must be the client's fault."""
    for work in (model.build(request, 2048), model.count(request, 2048), model.grammar(request)):
        try:
            await work
        except ApiError as error:
            assert 400 <= error.info().status < 500, (error.info(), request)


@pytest.fixture
def chatty(talking_llama: pathlib.Path, tmp_path: pathlib.Path) -> str:
    shutil.copy(talking_llama / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return str(tmp_path)


def serve(folder: str, requests: list[InferenceRequest]) -> None:
    async def story() -> None:
        pool = TextPool()
        try:
            model = await pool.open(folder, 300, (2,))
            for request in requests:
                await served(model, request)
        finally:
            await pool.stop()

    asyncio.run(story())


def test_mutated_requests_are_served_or_refused(chatty: str) -> None:
    chance = random.Random(17)
    requests = []
    for _ in range(ROUNDS):
        dialect, body = mutated(chance)
        try:
            requests.append(DECODERS[dialect](body).request)
        except ApiError:
            continue
    assert requests
    serve(chatty, requests)


def chat(content: str = "x", **more: Any) -> InferenceRequest:
    return InferenceRequest("m", messages=(Message(Role.USER, content),), **more)


def calls(arguments: str) -> InferenceRequest:
    asked = Message(Role.ASSISTANT, "", tool_calls=(ToolCall("c", "f", arguments),))
    return InferenceRequest("m", messages=(Message(Role.USER, "x"), asked, Message(Role.TOOL, "y", tool_call_id="c")))


def deep(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"a": found}
    return found


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize(
    "request_",
    [
        calls("[" * 3000),
        calls("[" * 3000 + "]" * 3000),
        calls('{"a":' * 3000 + "1" + "}" * 3000),
        calls('{"a": "\\ud800"}'),
        calls('"\\ud800"'),
        calls("9" * 6000),
        calls('{"a": 1e999, "b": NaN, "c": -Infinity}'),
        chat("\ud800"),
        chat("\x00\ufffe\U0010ffff"),
        chat("".join(map(chr, range(0xFDD0, 0xFDF0)))),
        chat(template_arguments={"x": 1 << 2000}),
        chat(template_arguments={"messages": 1}),
        chat(template_arguments={"": None, "self": 1, "loop": 2, "range": 3}),
        chat(template_arguments=deep(900)),
        chat(template_arguments=deep(5000)),
        chat(tools=(Tool("f", "", deep(5000)),)),
        chat(tools=(Tool("", "", {"type": 1 << 70}),)),
        chat(tools=(Tool("f", "", LOOP),)),
        InferenceRequest("m", prompt="\udfff"),
        InferenceRequest("m", prompt="\x00"),
        *[
            chat(output_format=OutputFormat(FormatKind.JSON_SCHEMA, source))
            for source in (
                json.dumps(LOOP),
                '{"enum": ["\\ud800"]}',
                '{"const": 1e999}',
                '{"const": -9223372036854775808}',
                '{"const": ' + "9" * 5000 + "}",
                '{"properties": {"": {"": {"": 1}}}}',
                '{"type": ["\\u0000"]}',
                "NaN",
                "[]",
            )
        ],
        *[
            chat(output_format=OutputFormat(kind, source))
            for kind in (FormatKind.REGEX, FormatKind.GRAMMAR)
            for source in ("", "\ud800", "\x00", "(" * 10_000, "start: " + "[" * 10_000, "%", "start: %json {", "\\")
        ],
    ],
)
def test_expensive_inputs_are_served_or_refused(chatty: str, request_: InferenceRequest) -> None:
    serve(chatty, [request_])


HOSTILE_FIELDS: list[Any] = [None, 0, -1, 1 << 70, "x", [], {}, [None], {"a": [1]}, "\x00", True, [["a", "b"]]]


def test_a_damaged_tokenizer_is_refused_or_harmless(talking_llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Each field of ``tokenizer.json``, and those of the configuration beside it, each replaced."""
    whole = json.loads((talking_llama / "tokenizer.json").read_text())
    chance = random.Random(4)

    async def story() -> None:
        pool = TextPool()
        try:
            for index in range(20):  # the fuzz target goes on from here
                folder = tmp_path / str(index)
                folder.mkdir()
                damaged = json.loads(json.dumps(whole))
                parent, key = place(damaged, chance)
                parent[key] = chance.choice(HOSTILE_FIELDS)
                (folder / "tokenizer.json").write_text(json.dumps(damaged))
                fields = ("chat_template", "bos_token", "added_tokens_decoder", "add_bos_token", "eos_token")
                config = {name: chance.choice(HOSTILE_FIELDS) for name in fields}
                (folder / "tokenizer_config.json").write_text(json.dumps(config))
                try:
                    model = await pool.open(str(folder), 300, (2,))
                except ApiError as error:
                    assert error.info().status == 422, (error.info(), damaged)
                    continue
                await served(model, InferenceRequest("m", prompt="hello {"))
                model.close()
        finally:
            await pool.stop()

    asyncio.run(story())


def place(value: Any, chance: random.Random) -> tuple[Any, Any]:
    """Return a container within a value, and the key of something in it."""
    while True:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or chance.randrange(4) == 0:
            return value, key
        value = inner


def test_the_daemon_reads_ids_as_the_whole_tokenizer_does(
    talking_llama: pathlib.Path, smollm2_gguf: pathlib.Path
) -> None:

    for path in (talking_llama, smollm2_gguf):
        whole = tokenizer.load(path).tokenizer
        reader = Tokenizer.from_buffer(decoder_of(whole))
        chance = random.Random(1)
        for _ in range(200):
            ids = [chance.randrange(whole.get_vocab_size()) for _ in range(12)]
            for skips in (False, True):
                assert reader.decode(ids, skip_special_tokens=skips) == whole.decode(ids, skip_special_tokens=skips)


def test_a_piece_of_a_vocabulary_that_is_as_long_as_a_book_is_refused() -> None:
    tokens = ["<unk>", "a", "aa", "a" * 300_000]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 1, 1, 1],
    }
    with pytest.raises(UnsupportedTokenizerError, match="300000 characters"):
        tokenizer.from_gguf(GgufHeader(3, meta, (), 0))
