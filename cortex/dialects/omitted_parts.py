"""Content parts that a model does not support: images for a text model, and audio, video and files for all.

In the user's newest message they are refused by name. In earlier messages and in results of tools each is replaced by a
line of text: agents send their whole history with every request, and one refused part would refuse all later ones. A
header of the response has their number.
"""

from collections.abc import Sequence

import msgspec

from cortex.wire.errors import UnsupportedParameterError
from cortex.wire.request import ImagePart, MediaPart, Message, Part, Role, TextPart


def readable(
    messages: Sequence[Message], *, images: bool, model: str, seeing: Sequence[str] = (), param: str = "messages"
) -> tuple[tuple[Message, ...], int]:
    """Return messages without unsupported content parts, and the number of these.

    ``images`` states whether the model takes images, ``seeing`` names other models that do. The user's newest messages
    are those after the assistant's last.

    Raises:
        UnsupportedParameterError: the newest messages have such a part.
    """
    if all(isinstance(message.content, str) for message in messages):
        return tuple(messages), 0
    newest = 1 + max((at for at, message in enumerate(messages) if message.role is Role.ASSISTANT), default=-1)
    found: list[Message] = []
    num_omitted = 0
    for at, message in enumerate(messages):
        if isinstance(message.content, str):
            found.append(message)
            continue
        unsupported = [part for part in message.content if _is_unsupported(part, images)]
        if not unsupported:
            found.append(message)
            continue
        if at >= newest and message.role is Role.USER:
            raise _refusal(unsupported[0], model, seeing, param)
        num_omitted += len(unsupported)
        found.append(msgspec.structs.replace(message, content=_replaced(message.content, images)))
    return tuple(found), num_omitted


def _is_unsupported(part: Part, images: bool) -> bool:
    return isinstance(part, MediaPart) or (isinstance(part, ImagePart) and not images)


def _replaced(parts: Sequence[Part], images: bool) -> str | tuple[Part, ...]:
    """Return the parts with a line of text in place of each unsupported part."""
    replaced: list[Part] = []
    for part in parts:
        if _is_unsupported(part, images):
            kind = part.kind if isinstance(part, MediaPart) else "image"
            takes = "text and images" if images and kind != "image" else "text only"
            replaced.append(TextPart(f"[{kind} omitted: this model takes {takes}]"))
        else:
            replaced.append(part)
    if all(isinstance(part, TextPart) for part in replaced):
        return _lines(replaced, parts)
    return tuple(replaced)


def _lines(replaced: Sequence[Part], parts: Sequence[Part]) -> str:
    """Join texts, with line ends around replaced parts only."""
    pieces: list[str] = []
    is_at_line_start = True
    for new, old in zip(replaced, parts, strict=True):
        assert isinstance(new, TextPart)
        if new is old:
            pieces.append(new.text)
            is_at_line_start = new.text.endswith("\n") if new.text else is_at_line_start
        else:
            pieces.append(new.text + "\n" if is_at_line_start else f"\n{new.text}\n")
            is_at_line_start = True
    text = "".join(pieces)
    return text.removesuffix("\n") if replaced and replaced[-1] is not parts[-1] else text


def _refusal(part: Part, model: str, seeing: Sequence[str], param: str) -> UnsupportedParameterError:
    if isinstance(part, MediaPart):
        return UnsupportedParameterError(
            f"Unsupported parameter: '{part.param}' is not supported here: no model takes a part of the kind "
            f"'{part.kind}'.",
            param=part.param,
        )
    others = f"these do: {', '.join(seeing)}" if seeing else "no model here does"
    return UnsupportedParameterError(
        f"Unsupported parameter: '{param}' has an image, and '{model}' takes no images; {others}.", param=param
    )
