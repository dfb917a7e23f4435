"""Grammars on an untrained model: every output follows them."""

import json
import pathlib
import random
import re
import threading
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from cortex.wire.request import FormatKind, InferenceRequest, OutputFormat, Tool, ToolChoice, ToolMode
from neuron.device import jobs
from neuron.device.jobs import ConstraintSettings, SequenceEnd
from neuron.engine.model_engine import ModelEngine
from neuron.text.detokenize import Detokenizer
from neuron.text.forms.form import CallForm
from neuron.text.forms.registry import FORMS, HERMES
from neuron.text.grammar import constraint_of

EOS = 2
PROMPT = [1, 50, 60, 70]


def grammar(kind: FormatKind, source: str = "", form: CallForm = HERMES, **changes: Any) -> str:
    request = InferenceRequest("m", prompt="x", output_format=OutputFormat(kind, source), **changes)
    found = constraint_of(request, form)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tokenizer(talking_llama: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_file(str(talking_llama / "tokenizer.json"))


@pytest.fixture
def driver(harness: Callable[..., Any], talking_llama: pathlib.Path) -> Any:
    found = harness()
    assert isinstance(found.load(talking_llama), jobs.Done)
    return found


def generate(
    driver: Any, tokenizer: Tokenizer, settings: list[ConstraintSettings], max_tokens: int = 300, **sampler: Any
) -> list[tuple[str, bool]]:
    """Return the output under each grammar, and whether it ended."""
    driver.sent.clear()
    for number, constraint in enumerate(settings):
        driver.generate(
            number,
            PROMPT,
            max_tokens,
            eos=(EOS,),
            constraint=constraint,
            **{"temperature": 0.7, "seed": number, **sampler},
        )
    driver.run()
    assert not driver.failures()
    outputs, ends = driver.outputs(), driver.ends()
    decode = tokenizer.decode
    return [(decode(outputs.get(n, [])), ends[n] is SequenceEnd.STOP) for n in range(len(settings))]


# ------------------------------------------------------------------ JSON by random schemas


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """Return a schema as clients write them: nested objects, arrays, enums, patterns, bounded numbers."""
    kinds = ["string", "pattern", "enum", "integer", "number", "boolean", "null", "const"]
    kind = rng.choice([*kinds, "object", "object", "object", "array", "array", "anyOf", "ref"] if depth else kinds)
    match kind:
        case "string":
            low = rng.randrange(3)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(1, 6)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(
                [r"^[a-z]{2,5}$", r"^\d{4}-\d{2}$", r"^(foo|bar)+x?$", r"^[A-F0-9]{3}$", r"^a.b$", r"^\w{1,4}@\w{2,3}$"]
            )}  # fmt: skip
        case "enum":
            return {"enum": rng.sample(["a", "bc", 'd"e', "é", 1, -2.5, None, True, "x y", []], rng.randrange(1, 5))}
        case "const":
            return {"const": rng.choice(["fixed", 0, None, [1, "two"], {"k": "v"}])}
        case "integer":
            low = rng.randrange(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(100)}
        case "number":
            return {"type": "number", "minimum": 0, "exclusiveMaximum": 10}
        case "array":
            low = rng.randrange(2)
            items = random_schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randrange(1, 3)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}
        case "ref":
            return {"$defs": {"T": random_schema(rng, 0)}, "$ref": "#/$defs/T"} if depth == 3 else {"type": "boolean"}
        case "object":
            names = rng.sample(["name", "age", "tags", "a b", "été", "x", "id"], rng.randrange(0, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth - 1) for name in names},
                "required": rng.sample(names, rng.randrange(len(names) + 1)),
                "additionalProperties": False,
            }
    return {"type": kind}


def check_schemas(driver: Any, tokenizer: Tokenizer, count: int) -> None:
    rng = random.Random(2024)
    schemas = [random_schema(rng) for _ in range(count)]
    settings = [ConstraintSettings(grammar(FormatKind.JSON_SCHEMA, json.dumps(schema))) for schema in schemas]
    completed = 0
    for start in range(0, count, 100):
        outputs = generate(driver, tokenizer, settings[start : start + 100])
        for schema, (text, ended) in zip(schemas[start : start + 100], outputs, strict=True):
            if ended:
                completed += 1
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
            assert not re.search(r"[ \n]{17}", text), "white space without end"
    assert completed > 0.9 * count, f"only {completed} of {count} came to an end"


def test_schemas(driver: Any, tokenizer: Tokenizer) -> None:
    check_schemas(driver, tokenizer, 40)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_hundred_schemas(driver: Any, tokenizer: Tokenizer) -> None:
    check_schemas(driver, tokenizer, 500)


# ------------------------------------------------------------------ other formats


def test_regular_expressions_and_grammars(driver: Any, tokenizer: Tokenizer) -> None:
    asked = [
        (FormatKind.REGEX, r"[a-c]{3}/\d{2}", r"[a-c]{3}/\d{2}"),
        (FormatKind.REGEX, "(yes|no)", "yes|no"),
        (FormatKind.GRAMMAR, 'root ::= "a" b\nb ::= [0-9] [0-9]', r"a\d\d"),
        (FormatKind.GRAMMAR, 'rest: /x{2}/\nstart: "<" rest ">"', "<xx>"),
    ]
    outputs = generate(driver, tokenizer, [ConstraintSettings(grammar(kind, source)) for kind, source, _ in asked])
    for (_, _, pattern), (text, ended) in zip(asked, outputs, strict=True):
        assert ended
        assert re.fullmatch(pattern, text), text


def test_an_object_of_any_kind_is_json(driver: Any, tokenizer: Tokenizer) -> None:
    outputs = generate(
        driver, tokenizer, [ConstraintSettings(grammar(FormatKind.JSON_OBJECT))] * 6, 500, temperature=1.2
    )
    whole = [json.loads(text) for text, ended in outputs if ended]
    assert all(isinstance(value, dict) for value in whole)
    assert all(text.startswith("{") for text, _ in outputs)


TOOLS = (
    Tool("get_weather", "", {"type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}, "required": ["n"],
                             "additionalProperties": False,
                             "$defs": {"N": {"type": "integer", "maximum": 9, "minimum": 0}}}),
    Tool("stop", "", {"type": "object", "properties": {}, "additionalProperties": False}),
)  # fmt: skip


@pytest.mark.parametrize("mode", [ToolMode.REQUIRED, ToolMode.NAMED])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("form", {form.grammar: form for form in FORMS.values()}.values(), ids=lambda form: form.name)
def test_a_call_is_forced(driver: Any, tokenizer: Tokenizer, mode: ToolMode, parallel: bool, form: CallForm) -> None:
    choice = ToolChoice(mode, "stop" if mode is ToolMode.NAMED else None, parallel)
    constraint = ConstraintSettings(grammar(FormatKind.TEXT, form=form, tools=TOOLS, tool_choice=choice))
    driver.sent.clear()
    for number in range(6):
        driver.generate(number, PROMPT, 400, eos=(EOS,), constraint=constraint, temperature=2.0, seed=number)
    driver.run()
    seen = set()
    for number, ids in driver.outputs().items():
        text = Detokenizer(tokenizer, tools=TOOLS, call_form=form, parallel_calls=parallel)
        events = [*text.feed(ids), *text.close(driver.ends()[number])]
        calls = [event for event in events if type(event).__name__ == "ToolCallDelta"]
        assert calls
        assert parallel or len(calls) == 1
        for call in calls:
            seen.add(call.name)
            tool = next(tool for tool in TOOLS if tool.name == call.name)
            jsonschema.Draft202012Validator(tool.parameters).validate(json.loads(call.arguments))
        assert not [e for e in events if type(e).__name__ == "TextDelta" and driver.ends()[number] is SequenceEnd.STOP]
    assert seen == ({"stop"} if mode is ToolMode.NAMED else {"stop", "get_weather"})


# ------------------------------------------------------------------ reasoning


def test_the_grammar_begins_where_reasoning_ends(driver: Any, tokenizer: Tokenizer) -> None:
    opens, closes = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")
    digits = grammar(FormatKind.REGEX, r"\d{4}")
    # The bias ends the reasoning sooner or later; without it, it would never end.
    inside = ConstraintSettings(digits, closes=closes, starts_inside=True)
    before = ConstraintSettings(digits, opens=opens, closes=closes)
    for settings, bias, reasons in (
        (inside, ((closes, 8.0), (EOS, -100.0)), True),
        (before, ((opens, 100.0), (closes, 98.0)), True),
        (before, ((opens, -100.0),), False),
    ):
        (text, ended), *_ = generate(driver, tokenizer, [settings], 2000, temperature=1.0, logit_bias=bias)
        assert ended
        head, tag, answer = text.rpartition("</think>")
        assert bool(tag) == reasons, text
        assert re.fullmatch(r"\d{4}", answer)
        assert settings is inside or not reasons or head.startswith("<think>")


def test_drafts_verified_behind_reasoning_are_sampled_again(
    driver: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mask held them to the grammar, which the answer would then break."""
    closes, letter = tokenizer.token_to_id("</think>"), tokenizer.token_to_id("a")
    steps = iter([[closes, letter, letter]])
    monkeypatch.setattr(driver.model().speculation, "verify", lambda _, sampled: next(steps, sampled))
    settings = ConstraintSettings(grammar(FormatKind.REGEX, r"\d{4}"), closes=closes, starts_inside=True)
    driver.generate(0, PROMPT, 40, eos=(EOS,), constraint=settings)
    driver.run()
    assert not driver.failures()
    assert re.fullmatch(r"</think>\d{4}", tokenizer.decode(driver.outputs()[0], skip_special_tokens=False))


# ------------------------------------------------------------------ refusals


def test_a_bad_grammar_is_this_sequences_error(driver: Any, tokenizer: Tokenizer) -> None:
    driver.generate(1, PROMPT, 9, constraint=ConstraintSettings("start: nothing"))
    driver.run()
    error = driver.failures()[1]
    assert (error.status, error.code) == (400, "invalid_schema")
    assert generate(driver, tokenizer, [ConstraintSettings(grammar(FormatKind.REGEX, "ok"))])[0] == ("ok", True)


def test_a_model_without_a_tokenizer_is_an_error(harness: Callable[..., Any], tiny_llama: pathlib.Path) -> None:
    driver = harness()
    driver.load(tiny_llama)
    driver.generate(1, PROMPT, 9, constraint=ConstraintSettings("start: /a/"))
    driver.run()
    assert driver.failures()[1].code == "unsupported_tokenizer"


def test_a_grammar_survives_preemption_and_neighbours(driver: Any, tokenizer: Tokenizer) -> None:
    settings = [ConstraintSettings(grammar(FormatKind.REGEX, r"([a-z]\d){30}"))] * 4
    alone, _ = generate(driver, tokenizer, settings[:1], seed=7)[0]
    driver.sent.clear()
    scheduler = driver.engine._models["m"].scheduler
    for number, constraint in enumerate(settings):
        driver.generate(number, PROMPT, 300, eos=(EOS,), constraint=constraint, temperature=0.7, seed=7)
    driver.generate(9, PROMPT, 40)
    while not all(number in scheduler.running for number in range(4)) or scheduler.running[2].num_output < 3:
        driver.engine.step()
    scheduler._preempt(scheduler.running[2])
    driver.run()
    assert [tokenizer.decode(driver.outputs()[number]) for number in range(4)] == [alone] * 4


def test_others_go_on_while_a_grammar_is_compiled(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow compile delays its own sequence only, and can be cancelled, or unloaded with its model."""
    released = threading.Event()
    compile_now = ModelEngine.constrain

    def slow(model: ModelEngine, settings: ConstraintSettings) -> Any:
        assert released.wait(600)
        return compile_now(model, settings)

    monkeypatch.setattr(ModelEngine, "constrain", slow)
    settings = ConstraintSettings(grammar(FormatKind.REGEX, "a{3}"))
    driver.generate(1, PROMPT, 20, constraint=settings)
    driver.generate(2, PROMPT, 20)
    driver.generate(3, PROMPT, 20, constraint=settings)
    for _ in range(200):
        driver.engine.step()
        if 2 in driver.ends():
            break
    assert driver.ends() == {2: SequenceEnd.LENGTH}
    assert driver.engine.busy, driver.failures()
    driver.post(jobs.Cancel(3))
    assert driver.ends()[3] is SequenceEnd.CANCELLED
    released.set()
    driver.run()
    assert driver.ends()[1] is SequenceEnd.STOP
    assert not driver.failures()
    released.clear()
    driver.generate(4, PROMPT, 20, constraint=settings)
    driver.post(jobs.Unload(9, "m"))
    released.set()
    driver.run()
    assert driver.ends()[4] is SequenceEnd.CANCELLED


def test_a_grammar_that_becomes_too_costly_ends_its_own_answer(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1_000_000))
    monkeypatch.setattr("neuron.engine.constraint.time.thread_time", lambda: next(clock) / 20)
    driver.generate(1, PROMPT, 200, constraint=ConstraintSettings(grammar(FormatKind.REGEX, "a{150}")))
    driver.generate(2, PROMPT, 20)
    driver.run()
    error = driver.failures()[1]
    assert (error.status, error.code, error.param) == (400, "constraint_failed", "response_format")
    assert driver.ends()[2] is SequenceEnd.LENGTH


@pytest.mark.parametrize("pattern", ["a{1,2000}b{1,2000}c{1,2000}", "(a|b|ab){1,500}c"])
def test_choices_share_a_compiled_grammar(driver: Any, pattern: str) -> None:
    settings = ConstraintSettings(grammar(FormatKind.REGEX, pattern))
    for number in range(4):
        driver.generate(number, PROMPT, 12, constraint=settings, temperature=1.0, seed=number)
    driver.run()
    assert not driver.failures()
    assert set(driver.ends()) == {0, 1, 2, 3}
