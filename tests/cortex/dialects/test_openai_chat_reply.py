"""Rules of whole chat responses; their equality with streams is tested with the streams."""

import orjson
import pytest

from cortex.dialects.openai_chat_reply import ChatReply
from cortex.wire.errors import ErrorInfo, RemoteError, UpstreamError
from cortex.wire.events import Failed, Finished, FinishReason, Started, TextDelta, ToolCallDelta

ERROR = ErrorInfo(502, "worker_lost", "the worker died", retry_after_s=2.0)


def test_reply_without_text_has_null_content() -> None:
    reply = ChatReply("c", "m", 1)
    reply.add([Started(1), ToolCallDelta(0, "i", "n", "{}"), Finished(FinishReason.TOOL_CALLS, 1)])
    assert orjson.loads(reply.body())["choices"][0]["message"]["content"] is None
    reply = ChatReply("c", "m", 1)
    reply.add([Started(1), Finished(FinishReason.STOP, 1)])
    assert orjson.loads(reply.body())["choices"][0]["message"]["content"] == ""


def test_reply_needs_an_end() -> None:
    reply = ChatReply("c", "m", 1, 2)
    reply.add([Started(1), TextDelta("a"), Finished(FinishReason.STOP, 1)])
    with pytest.raises(UpstreamError, match="not complete"):
        reply.body()
    with pytest.raises(RemoteError) as failed:
        reply.add([Failed(ERROR)])
    assert failed.value.info() == ERROR
