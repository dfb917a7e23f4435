"""Decoding that the dialects share: bodies, ranges, content parts, tools and formats.

A wrong body becomes a typed error that names the field at fault in the client's own spelling. Which members of a body
are known is in :mod:`cortex.dialects.parameters`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from cortex.wire.errors import (
    InvalidJsonError,
    InvalidRequestError,
    InvalidTypeError,
    MissingParameterError,
    TooManyItemsError,
    UnsupportedParameterError,
)
from cortex.wire.request import FormatKind, ImagePart, OutputFormat, Part, TextPart

T = TypeVar("T")

MAX_BIASES = 4096
MAX_THINKING_TOKENS = (1 << 31) - 1
HOSTED_TOOL_NAMES = (
    "allowed_callers allowed_domains allowed_tools authorization background blocked_domains connector_id container "
    "defer_loading display_height display_height_px display_number display_width display_width_px "
    "eager_input_streaming enable_zoom environment external_web_access file_ids filters headers "
    "image_generation_options input_examples input_fidelity input_image_mask max_characters max_content_tokens "
    "max_num_results max_uses moderation output_compression output_format partial_images quality ranking_options "
    "require_approval search_content_types search_context_size server_description server_label server_url size "
    "use_cache user_location vector_store_ids"
)
"""Members of tools other than functions; a tool that is not offered to the model is reported whole."""

_TOKEN_ID = re.compile(r"[0-9]{1,9}", re.ASCII)

_TYPE_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
    "bytes": "a string in base64",
}
_TYPES = re.compile(r"`(?P<types>(?:int|float|str|bool|array|object|null|bytes)(?: \| \w+)*)`")
_VALUE = re.compile(r"^Invalid (?:enum )?value '?(?P<value>.*?)'?$", re.DOTALL)
_BYTE = re.compile(r"byte \d+")

_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")


def decode(body: bytes, kind: type[T]) -> T:
    """Return a request body as a ``kind``.

    Raises:
        InvalidJsonError: it is not JSON or not an object.
        MissingParameterError: a required field is absent.
        InvalidTypeError: a field has the wrong type, or an unknown ``type``.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except UnicodeDecodeError as error:
        raise InvalidJsonError(f"The request body is not valid UTF-8 at byte {error.start}.") from None
    except RecursionError:
        raise InvalidJsonError("The request body is nested too deeply.") from None
    except msgspec.DecodeError as error:
        at = _BYTE.search(str(error))
        raise InvalidJsonError(f"The request body is not valid JSON{f' at {at[0]}' if at else ''}.") from None


def invalid(error: msgspec.ValidationError, where: str = "") -> InvalidRequestError:
    """Return a decoder's failure as an error that names the field at fault; ``where`` is the place of the value."""
    match = _PATH.match(str(error))
    assert match is not None
    what, path = match["what"], (match["path"] or "").removeprefix(".")
    if where:
        path = f"{where}{path}" if path.startswith("[") else f"{where}.{path}" if path else where
    if missing := _MISSING.search(what):
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return MissingParameterError(f"Missing required parameter: '{name}'.", param=name)
    if not path:
        return InvalidJsonError(f"The request body must be a JSON object: {plain(what)}.")
    return InvalidTypeError(f"Invalid value for '{path}': {plain(what)}.", param=path)


def plain(what: str) -> str:
    """Return a decoder's message in terms of JSON instead of Python."""
    if given := _VALUE.match(what):
        value = given["value"]
        return f"'{value[:80]}' is not one of the values that are taken here"
    what = _TYPES.sub(lambda found: _in_words(found["types"].split(" | ")), what)
    what = what.replace("Object contains unknown field `", "it has a member that is not known: `").replace("`", "'")
    return what[:1].lower() + what[1:]


def _in_words(types: Sequence[str]) -> str:
    words = [_TYPE_WORDS.get(one, one) for one in types]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def in_range(name: str, value: T, low: float, high: float) -> T:
    """Return ``value``, which must be ``None`` or a finite number within [low, high]."""
    if value is None:
        return value
    assert isinstance(value, int | float)
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequestError(f"Invalid '{name}': {value} is not between {low:g} and {high:g}.", param=name)
    return value


def refuse(fields: Iterable[tuple[str, bool]]) -> None:
    """Raise :class:`UnsupportedParameterError` for the first field that is set."""
    for name, is_set in fields:
        if is_set:
            raise UnsupportedParameterError(f"Unsupported parameter: '{name}' is not supported here.", param=name)


def needed(value: T | None, where: str) -> T:
    """Return ``value``; raise :class:`MissingParameterError` if it is absent."""
    if value is None:
        raise MissingParameterError(f"Missing required parameter: '{where}'.", param=where)
    return value


def first_given(*given: tuple[str, int | None]) -> tuple[str, int | None]:
    """Return the first of some equivalent fields that is set, with its name."""
    return next((one for one in given if one[1] is not None), given[0])


def stop_strings(value: str | Sequence[str] | None, limit: int = 16, *, param: str = "stop") -> tuple[str, ...]:
    """Return the stop strings of a request; empty ones are refused since they would stop everything."""
    if value is None:
        return ()
    stops = (value,) if isinstance(value, str) else tuple(value)
    if len(stops) > limit:
        raise InvalidRequestError(f"Invalid '{param}': {len(stops)} strings, at most {limit} are taken.", param=param)
    if not all(stops):
        raise InvalidRequestError(f"Invalid '{param}': an empty string.", param=param)
    return stops


def token_bias(value: dict[str, float] | None) -> dict[int, float]:
    """Return ``logit_bias`` with integer token ids."""
    bias: dict[int, float] = {}
    if value is not None and len(value) > MAX_BIASES:
        raise TooManyItemsError(f"Too many items in 'logit_bias': at most {MAX_BIASES} are taken.", param="logit_bias")
    for token, amount in (value or {}).items():
        if _TOKEN_ID.fullmatch(token) is None:
            raise InvalidRequestError(f"Invalid 'logit_bias': '{token[:40]}' is not a token id.", param="logit_bias")
        bias[int(token)] = in_range("logit_bias", amount, -100, 100)
    return bias


def collapse(parts: Sequence[Part]) -> str | tuple[Part, ...]:
    """Join text-only parts into one string; keep mixed content as it is."""
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    return "".join(texts) if len(texts) == len(parts) else tuple(parts)


def image(url: str, detail: str | None, param: str) -> ImagePart:
    """Return an image part; its address must be ``data:``, ``http:`` or ``https:``."""
    if not url.startswith(("data:image/", "https://", "http://")):
        raise InvalidRequestError(f"Invalid '{param}': an image needs a data: or http(s): address.", param=param)
    return ImagePart(url, detail or "auto")


class StreamOptions(msgspec.Struct):
    """``stream_options`` of a request."""

    include_usage: bool | None = None


def output_format(
    kind: str, schema: dict[str, Any] | None, name: str | None, param: str, *, strict: bool | None = None
) -> OutputFormat:
    """Return the constraint that ``response_format`` or ``text.format`` asks for."""
    match kind:
        case "text":
            return OutputFormat()
        case "json_object" if schema is None:
            return OutputFormat(FormatKind.JSON_OBJECT)
        case "json_object" | "json_schema":  # llama.cpp and others have a schema with either
            source = msgspec.json.encode(needed(schema, f"{param}.schema")).decode()
            return OutputFormat(FormatKind.JSON_SCHEMA, source, name or "", strict)
    raise InvalidRequestError(f"Invalid '{param}.type': '{kind}' is not known.", param=f"{param}.type")


def thinking(effort: str | None, param: str) -> bool | None:
    """Return whether an effort asks for thinking; ``None`` leaves it to the model's template."""
    match effort:
        case None:
            return None
        case "none" | "minimal":
            return False
        case "low" | "medium" | "high" | "xhigh" | "max":
            return True
    raise InvalidRequestError(f"Invalid '{param}': '{effort}' is not an effort.", param=param)


def thinking_budget(*given: tuple[str, int | None]) -> int | None:
    """Return the first bound on the tokens of thinking that is given, of parameters and their values."""
    return next((in_range(name, value, 0, MAX_THINKING_TOKENS) for name, value in given if value is not None), None)


def effort_of(effort: str | None, param: str) -> str:
    """Return an effort that thinking is asked for with, "" for none. Raises as :func:`thinking`."""
    return effort if effort is not None and thinking(effort, param) else ""
