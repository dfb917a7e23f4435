"""Bodies of /v1/completions and their answers."""

from typing import Any

import orjson
import pytest
from openai.types import Completion as SdkCompletion
from pydantic import TypeAdapter

from cortex._fast.sse import SseDecoder
from cortex._fast.usage_scanner import UsageScanner
from cortex.dialects.completions import encoder
from cortex.dialects.completions import request as completions_request
from cortex.dialects.completions.encoder import Completion
from cortex.wire.errors import ApiError, ErrorInfo, RemoteError, UpstreamError
from cortex.wire.events import (
    Failed,
    Finished,
    FinishReason,
    InferenceEvent,
    PromptEcho,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
)
from cortex.wire.request import InferenceRequest

SDK = TypeAdapter(SdkCompletion)
STORY: list[InferenceEvent] = [
    Started(7, 3),
    TextDelta('a"\n'),
    TextDelta("x", 1),
    ReasoningDelta("b"),
    Finished(FinishReason.STOP, 2),
    TextDelta("late"),
    Finished(FinishReason.LENGTH, 4, choice=1),
    TextDelta("later", 1),
]


def completion(**options: Any) -> Completion:
    return Completion("cmpl-1", "m", 1, 2, **options)


def decode(**body: Any) -> completions_request.CompletionCall:
    return completions_request.decode(orjson.dumps({"model": "m", "prompt": "hi"} | body))


@pytest.mark.parametrize("prompt", ["hi", ["hi"]])
def test_a_prompt(prompt: Any) -> None:
    assert decode(prompt=prompt, user="u", best_of=1).requests == (InferenceRequest("m", prompt="hi"),)
    call = decode(prompt=prompt, n=2, stop="x", stream=True, stream_options={"include_usage": True}, max_tokens=5)
    (request,) = call.requests
    assert (call.stream, call.include_usage, request.stop) == (True, True, ("x",))
    assert (request.num_choices, request.max_tokens, call.num_choices, request.top_logprobs) == (2, 5, 2, None)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        ([[0]], [(0,)]),
    ],
)
def test_several_prompts_and_token_ids(prompt: Any, prompts: list[Any]) -> None:
    call = decode(prompt=prompt, n=3, seed=5)
    assert [request.prompt for request in call.requests] == prompts
    assert {request.sampling.seed for request in call.requests} == {5}
    assert call.num_choices == 3 * len(prompts)


def test_echo_scores_and_suffix() -> None:
    (request,) = decode(echo=True, logprobs=0, max_tokens=0, suffix="behind").requests
    assert (request.echo, request.top_logprobs, request.max_tokens, request.suffix) == (True, 0, 0, "behind")
    assert decode(logprobs=5).request.top_logprobs == 5
    assert decode(logprobs=False).request.top_logprobs is None


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[]]}, "invalid_value", "prompt"),
        ({"prompt": [1, "a"]}, "invalid_value", "prompt"),
        ({"prompt": ["a", [1]]}, "invalid_value", "prompt"),
        ({"prompt": [1, [1]]}, "invalid_value", "prompt"),
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({"prompt": [1 << 31]}, "invalid_value", "prompt"),
        ({"prompt": [True]}, "invalid_type", "prompt[0]"),
        ({"prompt": ["a"] * 300, "n": 2}, "invalid_value", "prompt"),
        ({"prompt": 3}, "invalid_type", "prompt"),
        ({"logprobs": 21}, "invalid_value", "logprobs"),
        ({"logprobs": -1}, "invalid_value", "logprobs"),
        ({"logprobs": True}, "invalid_value", "logprobs"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"n": 0}, "invalid_value", "n"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode(**body)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_streamed_and_whole_are_equal() -> None:
    made, gathered, scanner = completion(include_usage=True, report_usage=True), completion(), UsageScanner()
    sse_events = b"".join(made.sse_events([event]) for event in STORY)
    assert completion(include_usage=True, report_usage=True).sse_events(STORY) == sse_events
    gathered.sse_events(STORY)
    whole = SDK.validate_json(gathered.whole(), strict=True)
    *data, done = [sse_event.data for sse_event in SseDecoder().feed(sse_events)]
    assert done == b"[DONE]"
    # A finish_reason of null is what the service sends and its SDK's type forbids.
    chunks = [SDK.validate_json(text.replace(b'_reason":null', b'_reason":"stop"'), strict=True) for text in data]
    nulls = [text.count(b'"finish_reason":null') for text in data]
    assert nulls == [1, 1, 1, 0, 0, 0]
    texts = ["", ""]
    reasons: list[str | None] = [None, None]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices] == ['a"\nb', "x"]
    assert reasons == [choice.finish_reason for choice in whole.choices] == ["stop", "length"]
    assert chunks[-1].usage == whole.usage
    assert scanner.feed(sse_events) == sse_events
    assert (scanner.first_token, scanner.terminated, scanner.failed) == (True, True, False)
    assert orjson.loads(scanner.usage or b"") == {
        "prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13, "cached_tokens": 3
    }  # fmt: skip


def test_failures() -> None:
    made = completion()
    error = Failed(ErrorInfo(503, "worker_lost", "gone"))
    sent = made.sse_events([Started(1), TextDelta("a"), error, TextDelta("b")])
    assert orjson.loads(sent.strip().split(b"data: ")[-1])["error"]["code"] == "worker_lost"
    with pytest.raises(RemoteError, match="gone"):
        made.whole()
    made = completion()
    made.sse_events([Started(1), TextDelta("a")])
    with pytest.raises(UpstreamError, match="not complete"):
        made.whole()


def scored(utf8: bytes, logprob: float, **top: float) -> TokenLogprob:
    others = tuple(TokenLogprob(name, name.encode(), value) for name, value in top.items())
    return TokenLogprob(utf8.decode(errors="replace"), utf8, logprob, others)


PROMPT = PromptEcho("é!", 0, (scored(b"<s>", 0.0), scored(b"\xc3", -1.0, a=-0.5), scored(b"\xa9!", -2.0, b=-2.0)))
SCORED: list[InferenceEvent] = [
    Started(3),
    PROMPT,
    TextDelta("so", logprobs=(scored(b"so", -0.25, so=-0.25, x=-3.0),)),
    TextDelta("", logprobs=(scored(b"\xff", float("-inf")),)),
    Finished(FinishReason.LENGTH, 2),
]


def test_log_probabilities_of_prompt_and_answer() -> None:
    made = Completion("cmpl-1", "m", 1, scores=True)
    made.sse_events(SCORED)
    (choice,) = orjson.loads(made.whole())["choices"]  # the SDK's types know no null, which OpenAI itself sends
    assert choice["text"] == "é!so"
    found = choice["logprobs"]
    # A token that is no text has a name of its own; a beginning that is not in the text has no place in it.
    assert found["tokens"] == ["<s>", "bytes:\\xc3", "bytes:\\xa9\\x21", "so", "bytes:\\xff"]
    assert found["token_logprobs"] == [None, -1.0, -2.0, -0.25, -9999.0]
    assert found["top_logprobs"] == [
        None, {"a": -0.5, "bytes:\\xc3": -1.0}, {"b": -2.0, "bytes:\\xa9\\x21": -2.0}, {"so": -0.25, "x": -3.0},
        {"bytes:\\xff": -9999.0},
    ]  # fmt: skip
    assert found["text_offset"] == [0, 0, 0, 2, 4]


def test_streamed_log_probabilities_are_the_same() -> None:
    made, whole = Completion("cmpl-1", "m", 1, scores=True), Completion("cmpl-1", "m", 1, scores=True)
    sse_events = b"".join(made.sse_events([event]) for event in SCORED)
    whole.sse_events(SCORED)
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for sse_event in SseDecoder().feed(sse_events)[:-1]:
        for choice in orjson.loads(sse_event.data)["choices"]:
            for name, values in (choice["logprobs"] or {}).items():
                lists[name] += values
    assert lists == orjson.loads(whole.whole())["choices"][0]["logprobs"]


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("ab", b"a", b"b"),
        ("b", b"<s>", b"b"),
        ("a b", b" a", b" b"),
    ],  # as it is, a beginning, a space of the tokenizer's
)
def test_tokens_stand_where_their_text_does(text: str, first: bytes, second: bytes) -> None:
    made = Completion("cmpl-1", "m", 1, scores=True)
    made.sse_events(
        [Started(2), PromptEcho(text, 0, (scored(first, 0.0),)), PromptEcho("", 0, (scored(second, -1.0),))]
    )
    made.sse_events([Finished(FinishReason.LENGTH, 0)])
    (choice,) = orjson.loads(made.whole())["choices"]
    assert choice["text"] == text
    offsets = choice["logprobs"]["text_offset"]
    assert text[offsets[1] :] == second.decode()
    assert offsets[0] == 0
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]


def test_an_answer_has_only_so_many_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "MAX_NUMBERS", 5)
    made = Completion("cmpl-1", "m", 1, num_choices=2, scores=True)
    piece = (scored(b"a", -1.0, a=-1.0, b=-2.0),)
    made.sse_events([Started(2), PromptEcho("a", 0, piece)])
    with pytest.raises(ApiError) as caught:
        made.sse_events([PromptEcho("a", 1, piece)])
    assert (caught.value.status, caught.value.param) == (400, "logprobs")


def test_usage_is_of_all_prompts() -> None:
    made = completion()
    made.sse_events(
        [Started(3, 1), Started(5, 2), Finished(FinishReason.STOP, 1), Finished(FinishReason.STOP, 2, choice=1)]
    )
    usage = orjson.loads(made.whole())["usage"]
    assert usage == {
        "prompt_tokens": 8, "completion_tokens": 3, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 3}
    }  # fmt: skip
