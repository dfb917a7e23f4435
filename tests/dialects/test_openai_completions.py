"""Bodies of /v1/completions and their answers."""

from typing import Any

import orjson
import pytest
from openai.types import Completion as SdkCompletion
from pydantic import TypeAdapter

from cortex._fast.sse import FrameDecoder
from cortex._fast.tap import StreamTap
from cortex.dialects import openai_completions
from cortex.dialects.openai_completions import Completion
from cortex.wire.errors import ApiError, ErrorInfo, RemoteError, UpstreamError
from cortex.wire.events import Failed, Finished, FinishReason, InferenceEvent, ReasoningDelta, Started, TextDelta
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


def decode(**body: Any) -> openai_completions.CompletionCall:
    return openai_completions.decode(orjson.dumps({"model": "m", "prompt": "hi"} | body))


@pytest.mark.parametrize("prompt", ["hi", ["hi"]])
def test_a_prompt(prompt: Any) -> None:
    assert decode(prompt=prompt, user="u", best_of=1).request == InferenceRequest("m", prompt="hi")
    call = decode(prompt=prompt, n=2, stop="x", stream=True, stream_options={"include_usage": True}, max_tokens=5)
    assert (call.stream, call.include_usage, call.request.stop) == (True, True, ("x",))
    assert (call.request.num_choices, call.request.max_tokens) == (2, 5)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [1, 2]}, "invalid_value", "prompt"),
        ({"prompt": [[1, 2]]}, "invalid_value", "prompt"),
        ({"prompt": ["a", "b"]}, "invalid_value", "prompt"),
        ({"prompt": 3}, "invalid_type", "prompt"),
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"logprobs": 0}, "unsupported_parameter", "logprobs"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"n": 0}, "invalid_value", "n"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode(**body)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_streamed_and_whole_say_the_same() -> None:
    made, gathered, tap = completion(include_usage=True, report_usage=True), completion(), StreamTap()
    frames = b"".join(made.frames([event]) for event in STORY)
    assert completion(include_usage=True, report_usage=True).frames(STORY) == frames
    gathered.add(STORY)
    whole = SDK.validate_json(gathered.body(), strict=True)
    *data, done = [frame.data for frame in FrameDecoder().feed(frames)]
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
    assert tap.feed(frames) == frames
    assert (tap.first_token, tap.terminated, tap.failed) == (True, True, False)
    assert orjson.loads(tap.usage or b"") == {
        "prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13, "cached_tokens": 3
    }  # fmt: skip


def test_failures() -> None:
    made = completion()
    error = Failed(ErrorInfo(503, "worker_lost", "gone"))
    sent = made.frames([Started(1), TextDelta("a"), error, TextDelta("b")])
    assert orjson.loads(sent.strip().split(b"data: ")[-1])["error"]["code"] == "worker_lost"
    with pytest.raises(RemoteError, match="gone"):
        completion().add([error])
    with pytest.raises(UpstreamError, match="not complete"):
        made.body()
