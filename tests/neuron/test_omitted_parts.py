"""Unsupported content parts: refused in the user's newest message, replaced by a line of text in earlier ones."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from asgi_client import Reply, ask
from scripted_model import HELLO, ScriptedHarness

from cortex.dialects.omitted_parts import readable
from cortex.wire.node import LoadRequest
from cortex.wire.request import ImagePart, MediaPart, Message, Role, TextPart
from neuron.api import Api
from neuron.config import Config, DaemonSettings
from neuron.service import Service

PIXEL = "data:image/png;base64,AAAA"
LINE = "[image omitted: this model takes text only]"
Part = dict[str, Any]
Conversation = Callable[[str], tuple[str, dict[str, Any]]]


USER, ASSISTANT, CALL, RESULT = "user", "assistant", "call", "result"
PARTS = "parts"
"""A text and an image, in place of a message's content."""

CONVERSATIONS: dict[str, list[tuple[str, str]]] = {
    "newest": [(USER, PARTS)],
    "newest of several": [(USER, "a"), (ASSISTANT, "b"), (USER, PARTS)],
    "earlier": [(USER, PARTS), (ASSISTANT, "b"), (USER, "c")],
    "result": [(USER, "a"), (CALL, ""), (RESULT, PARTS)],
}


def entries(where: str, parts: list[Part], call: Part, result: Callable[[Any], Part]) -> list[Part]:
    """Return a conversation in the form of a dialect: its content parts, its call, and a result of that."""
    found = []
    for role, text in CONVERSATIONS[where]:
        content: Any = parts if text == PARTS else text
        found.append(
            call if role == CALL else result(content) if role == RESULT else {"role": role, "content": content}
        )
    return found


def chat(where: str) -> tuple[str, dict[str, Any]]:
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    asked = {"role": "assistant", "tool_calls": [call]}
    found = entries(where, parts, asked, lambda seen: {"role": "tool", "tool_call_id": "c", "content": seen})
    return "/v1/chat/completions", {"model": "m", "messages": found}


def responses(where: str) -> tuple[str, dict[str, Any]]:
    parts = [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": PIXEL}]
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    found = entries(where, parts, call, lambda seen: {"type": "function_call_output", "call_id": "c", "output": seen})
    return "/v1/responses", {"model": "m", "input": found}


def messages(where: str) -> tuple[str, dict[str, Any]]:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    call = {"type": "tool_use", "id": "c", "name": "look", "input": {}}
    found = entries(
        where,
        [{"type": "text", "text": "see"}, image],
        {"role": "assistant", "content": [call]},
        lambda seen: {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": seen}]},
    )
    return "/v1/messages", {"model": "m", "max_tokens": 9, "messages": found}


def counted(where: str) -> tuple[str, dict[str, Any]]:
    _, body = messages(where)
    return "/v1/messages/count_tokens", {name: value for name, value in body.items() if name != "max_tokens"}


DIALECTS = pytest.mark.parametrize("dialect", [chat, responses, messages, counted])
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def ask_once(path: str, body: Any, harness: ScriptedHarness) -> Reply:
    async def run() -> Reply:
        service = Service(Config(daemon=DaemonSettings(name="node", devices="cpu")), {"torch": harness})
        await service.load(LoadRequest("m", "/"))
        return await ask(Api(service), "POST", path, body)

    return asyncio.run(run())


@DIALECTS
@STREAMED
@pytest.mark.parametrize("where", ["earlier", "result"])
def test_earlier_images_are_a_line_of_text(dialect: Conversation, stream: bool, where: str) -> None:
    harness = ScriptedHarness(sees=False)
    path, body = dialect(where)
    reply = ask_once(path, body | ({"stream": True} if stream else {}), harness)
    assert reply.status == 200
    assert reply.headers["x-cortex-omitted-parts"] == "1"
    for request in harness.models["m"].requests:
        content = [message.content for message in request.messages]
        assert f"see\n{LINE}" in content


@DIALECTS
@STREAMED
@pytest.mark.parametrize("where", ["newest", "newest of several"])
def test_in_the_newest_message_it_is_refused(dialect: Conversation, stream: bool, where: str) -> None:
    path, body = dialect(where)
    reply = ask_once(path, body | ({"stream": True} if stream else {}), ScriptedHarness(sees=False))
    assert reply.status == 400
    message = reply.json()["error"]["message"]
    assert "image" in message
    assert "no model here does" in message
    assert b"unsupported_parameter" in reply.body


@DIALECTS
@pytest.mark.parametrize("where", ["newest", "earlier", "result"])
def test_a_model_that_takes_images_gets_all_of_them(dialect: Conversation, where: str) -> None:
    harness = ScriptedHarness(lambda request: HELLO)
    path, body = dialect(where)
    reply = ask_once(path, body, harness)
    assert (reply.status, reply.headers.get("x-cortex-omitted-parts")) == (200, None)
    for request in harness.models["m"].requests:
        assert any(
            isinstance(part, ImagePart) for m in request.messages if isinstance(m.content, tuple) for part in m.content
        )


@pytest.mark.parametrize(
    ("path", "body", "part", "line"),
    [
        ("/v1/chat/completions", "messages", {"type": "input_audio", "input_audio": {"data": ""}}, "audio"),
        ("/v1/chat/completions", "messages", {"type": "file", "file": {"file_id": "f"}}, "file"),
        ("/v1/chat/completions", "messages", {"type": "video_url", "video_url": {"url": "x"}}, "video"),
        ("/v1/responses", "input", {"type": "input_file", "file_id": "f"}, "file"),
        ("/v1/responses", "input", {"type": "input_image", "file_id": "f"}, "image"),
        ("/v1/messages", "messages", {"type": "image", "source": {"type": "file", "file_id": "f"}}, "image"),
        (
            "/v1/messages",
            "messages",
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "A"}},
            "document",
        ),
        ("/v1/messages", "messages", {"type": "document", "source": {"type": "url", "url": "https://x"}}, "document"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sees", [False, True])
def test_content_parts_that_no_model_takes_are_treated_alike(
    path: str, body: str, part: Part, line: str, sees: bool
) -> None:
    harness = ScriptedHarness(sees=sees)
    now = [{"role": "user", "content": [part]}]
    reply = ask_once(path, {"model": "m", body: now}, harness)
    assert (reply.status, reply.json()["error"].get("code", "unsupported_parameter")) == (400, "unsupported_parameter")
    later = [*now, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    reply = ask_once(path, {"model": "m", body: later}, harness)
    assert (reply.status, reply.headers["x-cortex-omitted-parts"]) == (200, "1")
    content = harness.models["m"].requests[-1].messages[0].content
    assert isinstance(content, str)
    assert content.startswith(f"[{line} omitted: this model takes text")


def test_the_lines_stand_for_themselves() -> None:
    image, audio = ImagePart(PIXEL), MediaPart("audio", "x")
    parts = (image, TextPart("a"), image, image, TextPart("b\n"), audio, TextPart("c"))
    content = (Message(Role.USER, parts), Message(Role.ASSISTANT, "d"), Message(Role.USER, "e"))
    (first, *rest), count = readable(content, images=False, model="m")
    assert count == 4
    assert first.content == f"{LINE}\na\n{LINE}\n{LINE}\nb\n[audio omitted: this model takes text only]\nc"
    assert tuple(rest) == content[1:]


def test_a_refusal_names_the_models_that_see() -> None:
    with pytest.raises(Exception, match="these do: a, b"):
        readable([Message(Role.USER, (ImagePart(PIXEL),))], images=False, model="m", seeing=["a", "b"])
