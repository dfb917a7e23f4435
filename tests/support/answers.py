"""Answers of nodes, whole and streamed, in each dialect."""

from typing import Any

import orjson


def chat_chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    """Return one SSE event of a chat stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


CHAT_STREAM = (
    chat_chunk({"role": "assistant", "content": ""}),
    chat_chunk({"content": "Hel"}),
    chat_chunk({"content": "lo"}),
    chat_chunk({}, "stop"),
    b"data: [DONE]\n\n",
    b': usage {"prompt_tokens":7,"completion_tokens":2,"cached_tokens":3}\n\n',
)
CHAT_ANSWER = orjson.dumps(
    {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }
)
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "status": "in_progress",
    "output": [],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}


def event(name: str, sequence: int, **fields: Any) -> bytes:
    """Return one SSE event of a Responses stream."""
    data = orjson.dumps({"type": name, "sequence_number": sequence, **fields})
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


DELTA = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
USAGE = {
    "input_tokens": 7,
    "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
    "output_tokens": 2,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 9,
}
RESPONSES_STREAM = (
    event("response.created", 0, response=RESPONSE),
    event("response.output_text.delta", 1, delta="Hel", **DELTA),
    event("response.output_text.delta", 2, delta="lo", **DELTA),
    event("response.completed", 3, response=RESPONSE | {"status": "completed", "usage": USAGE}),
)


def message_event(name: str, **fields: Any) -> bytes:
    """Return one SSE event of a Messages stream."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps({"type": name, **fields}) + b"\n\n"


MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
    "usage": {"input_tokens": 4, "cache_read_input_tokens": 3, "output_tokens": 0},
}
MESSAGES_STREAM = (
    message_event("message_start", message=MESSAGE),
    message_event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    message_event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hel"}),
    message_event("ping"),
    message_event("content_block_delta", index=0, delta={"type": "text_delta", "text": "lo"}),
    message_event("content_block_stop", index=0),
    message_event(
        "message_delta",
        delta={"stop_reason": "end_turn", "stop_sequence": None},
        usage={"input_tokens": 4, "cache_read_input_tokens": 3, "output_tokens": 2},
    ),
    message_event("message_stop"),
)
MESSAGES_ANSWER = orjson.dumps(
    MESSAGE
    | {
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 4, "cache_read_input_tokens": 3, "output_tokens": 2},
    }
)


WHOLE_ANSWERS = {
    "/v1/messages": MESSAGES_ANSWER,
    "/v1/responses": orjson.dumps(RESPONSE | {"status": "completed", "usage": USAGE}),
    "/v1/embeddings": b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.5]}],"model":"m",'
    b'"usage":{"prompt_tokens":7,"total_tokens":7}}',
}
