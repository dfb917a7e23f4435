"""What the dialects share when a body is read: decoding, ranges, content parts, tools and formats.

A wrong body becomes a typed error that names the field at fault in the client's own spelling. Fields this project has
never heard of pass (clients send many); fields it knows and cannot honour are refused by the dialect modules.
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
    UnsupportedParameterError,
)
from cortex.wire.request import FormatKind, ImagePart, OutputFormat, Part, Sampling, TextPart, Tool

T = TypeVar("T")

_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")


def decode(body: bytes, decoder: "msgspec.json.Decoder[T]") -> T:
    """Decode a request body.

    Raises:
        InvalidJsonError: it is not JSON or not an object.
        MissingParameterError: a required field is absent.
        InvalidTypeError: a field has the wrong type, or a ``type`` that is not known.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        match = _PATH.match(str(error))
        assert match is not None
        what, path = match["what"], (match["path"] or "").removeprefix(".")
        if missing := _MISSING.search(what):
            name = f"{path}.{missing['name']}" if path else missing["name"]
            raise MissingParameterError(f"Missing required parameter: '{name}'.", param=name) from None
        if not path:
            raise InvalidJsonError(f"The request body must be a JSON object. {what}.") from None
        raise InvalidTypeError(f"Invalid value for '{path}': {_lower_first(what)}.", param=path) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJsonError(f"The request body is not valid JSON: {_lower_first(str(error))}.") from None


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
    for token, amount in (value or {}).items():
        if not token.isdecimal():
            raise InvalidRequestError(f"Invalid 'logit_bias': '{token}' is not a token id.", param="logit_bias")
        bias[int(token)] = in_range("logit_bias", amount, -100, 100)
    return bias


def collapse(parts: Sequence[Part]) -> str | tuple[Part, ...]:
    """Join text-only parts into one string; keep mixed content as it is."""
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    return "".join(texts) if len(texts) == len(parts) else tuple(parts)


def image(url: str, detail: str | None, param: str) -> ImagePart:
    """Return an image part; only addresses a server could follow are taken."""
    if not url.startswith(("data:image/", "https://", "http://")):
        raise InvalidRequestError(f"Invalid '{param}': an image needs a data: or http(s): address.", param=param)
    return ImagePart(url, detail or "auto")


class StreamOptions(msgspec.Struct):
    """What a client wants of a stream beside the answer."""

    include_usage: bool | None = None


class SamplingBody(msgspec.Struct, kw_only=True):
    """The sampling fields that chat and text completions share; a body is a subclass."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None

    def sampling(self) -> Sampling:
        """Return what is asked for, with every range checked."""
        return Sampling(
            temperature=in_range("temperature", self.temperature, 0, 2),
            top_p=in_range("top_p", self.top_p, 0, 1),
            top_k=in_range("top_k", self.top_k, -1, 1 << 31),
            min_p=in_range("min_p", self.min_p, 0, 1),
            repetition_penalty=in_range("repetition_penalty", self.repetition_penalty, 1e-3, 10),
            presence_penalty=in_range("presence_penalty", self.presence_penalty, -2, 2),
            frequency_penalty=in_range("frequency_penalty", self.frequency_penalty, -2, 2),
            logit_bias=token_bias(self.logit_bias),
            seed=in_range("seed", self.seed, -(1 << 63), (1 << 63) - 1),
        )


class FunctionBody(msgspec.Struct):
    """A function as both dialects describe it."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """Return the tool this describes."""
        return Tool(self.name, self.description or "", self.parameters or {}, bool(self.strict))


def output_format(kind: str, schema: dict[str, Any] | None, name: str | None, param: str) -> OutputFormat:
    """Return the constraint that ``response_format`` or ``text.format`` asks for."""
    match kind:
        case "text":
            return OutputFormat()
        case "json_object":
            return OutputFormat(FormatKind.JSON_OBJECT)
        case "json_schema":
            if schema is None:
                raise MissingParameterError(f"Missing required parameter: '{param}.schema'.", param=f"{param}.schema")
            return OutputFormat(FormatKind.JSON_SCHEMA, msgspec.json.encode(schema).decode(), name or "")
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


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
