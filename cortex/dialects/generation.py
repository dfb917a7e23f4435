"""Parameters of generation that all dialects share: sampling, end conditions and output formats.

OpenAI's own fields, and beside them those by which other servers of open-weight models (vLLM, SGLang, llama.cpp) ask
for the same things. A form may be asked for in one way only.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from cortex.dialects.fields import in_range, output_format, refuse, token_bias
from cortex.wire.errors import InvalidRequestError
from cortex.wire.request import Ending, FormatKind, OutputFormat, Sampling

MAX_STOP_TOKENS = 64
MAX_BAD_WORDS = 256
MAX_GUIDED_CHOICES = 1024
MAX_TOKEN_ID = (1 << 31) - 1

SAMPLING: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, 1 << 31),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (-(1 << 63), (1 << 63) - 1),
}
"""Numbers of :class:`Sampling` that every dialect has under the same name, and their limits."""

Schema = dict[str, Any] | str
"""A JSON schema, or the text of it."""


class StructuredOutputs(msgspec.Struct):
    """vLLM's parameter for an output format."""

    json: Schema | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    # known and refused
    structural_tag: object = None


class _JsonSchema(msgspec.Struct):
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """OpenAI's parameter for an output format."""

    type: str
    json_schema: _JsonSchema | None = None
    schema: dict[str, Any] | None = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """The fields of generation that the dialects share; a body is a subclass."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: Schema | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None

    def sampling(self) -> Sampling:
        """Return the sampling parameters, with every range checked."""
        repetition = self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty
        repetition_name = "repeat_penalty" if self.repetition_penalty is None else "repetition_penalty"
        return Sampling(
            **{name: in_range(name, getattr(self, name), *limits) for name, limits in SAMPLING.items()},
            repetition_penalty=in_range(repetition_name, repetition, 1e-3, 10),
            logit_bias=token_bias(self.logit_bias),
            bad_words=_texts("bad_words", self.bad_words, MAX_BAD_WORDS) if self.bad_words else (),
        )

    def ending(self) -> Ending:
        """Return the end conditions of an answer, beside its stop strings."""
        ids = self.stop_token_ids or []
        if len(ids) > MAX_STOP_TOKENS:
            raise InvalidRequestError(
                f"Invalid 'stop_token_ids': {len(ids)} tokens; at most {MAX_STOP_TOKENS} are taken.",
                param="stop_token_ids",
            )
        for id in ids:
            in_range("stop_token_ids", id, 0, MAX_TOKEN_ID)
        return Ending(
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(ids),
            min_tokens=in_range("min_tokens", self.min_tokens, 0, MAX_TOKEN_ID) or 0,
            includes_stop=bool(self.include_stop_str_in_output) or bool(self.no_stop_trim),
        )

    def form(self, asked: OutputFormat, param: str) -> OutputFormat:
        """Return the output format: ``asked``, from ``param``, or the format of another server's parameter.

        Raises:
            InvalidRequestError: two fields ask for a form.
        """
        forms = list(self._forms())
        if asked.kind is not FormatKind.TEXT:
            forms.insert(0, (param, asked))
        if len(forms) > 1:
            first, second = forms[0][0], forms[1][0]
            raise InvalidRequestError(
                f"Invalid '{second}': '{first}' asks for a form of the answer already.", param=second
            )
        return forms[0][1] if forms else asked

    def _forms(self) -> Iterator[tuple[str, OutputFormat]]:
        """Yield the formats of other servers' parameters, after the parameter's name."""
        structured = self.structured_outputs or StructuredOutputs()
        refuse((("structured_outputs.structural_tag", structured.structural_tag is not None),))
        asked: tuple[tuple[str, FormatKind, Schema | None], ...] = (
            ("structured_outputs.json", FormatKind.JSON_SCHEMA, structured.json),
            ("guided_json", FormatKind.JSON_SCHEMA, self.guided_json),
            ("json_schema", FormatKind.JSON_SCHEMA, self.json_schema),
            ("structured_outputs.json_object", FormatKind.JSON_OBJECT, "" if structured.json_object else None),
            ("structured_outputs.regex", FormatKind.REGEX, structured.regex),
            ("guided_regex", FormatKind.REGEX, self.guided_regex),
            ("regex", FormatKind.REGEX, self.regex),
            ("structured_outputs.grammar", FormatKind.GRAMMAR, structured.grammar),
            ("guided_grammar", FormatKind.GRAMMAR, self.guided_grammar),
            ("ebnf", FormatKind.GRAMMAR, self.ebnf),
            ("grammar", FormatKind.GRAMMAR, self.grammar),
        )
        for name, kind, source in asked:
            if source is not None:
                text = source if isinstance(source, str) else msgspec.json.encode(source).decode()
                yield name, OutputFormat(kind, text)
        choices = {"structured_outputs.choice": structured.choice, "guided_choice": self.guided_choice}
        for name, choice in choices.items():
            if choice is not None:
                texts = _texts(name, choice, MAX_GUIDED_CHOICES)
                alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
                yield name, OutputFormat(FormatKind.GRAMMAR, f"start: {alternatives}\n")


def _texts(name: str, given: list[str], most: int) -> tuple[str, ...]:
    if not 1 <= len(given) <= most:
        raise InvalidRequestError(f"Invalid '{name}': {len(given)} texts; 1 to {most} are taken.", param=name)
    if not all(given):
        raise InvalidRequestError(f"Invalid '{name}': an empty string.", param=name)
    return tuple(given)


def output_format_of(body: ResponseFormat | None) -> OutputFormat:
    """Return the output format of ``response_format``. Raises :class:`InvalidRequestError`."""
    if body is None:
        return OutputFormat()
    named = body.json_schema or _JsonSchema()
    if named.schema is not None and body.schema is not None:
        raise InvalidRequestError("Invalid 'response_format': it has two schemas.", param="response_format.schema")
    schema = body.schema if named.schema is None else named.schema
    return output_format(body.type, schema, named.name, "response_format", strict=named.strict)
