"""OpenAI's older text completions: a body of ``/v1/completions`` to ``InferenceRequest``s, one for each prompt.

A prompt is text, to which no chat template is applied, or token ids; a list of prompts is answered as one completion,
with ``n`` choices of each prompt in order. Responses are written by :mod:`cortex.dialects.completions.encoder`.
Accepted without effect: ``user``, and ``best_of`` up to ``n``.
"""

import secrets
import time
from collections.abc import Sequence
from typing import cast

import msgspec

from cortex.dialects import fields
from cortex.dialects.call import Answering, GenerationCall
from cortex.dialects.completions.encoder import Completion
from cortex.dialects.generation import GenerationBody, ResponseFormat, output_format_of
from cortex.dialects.parameters import OPEN_SERVERS, OPEN_SERVERS_WITHOUT_EFFECT, Parameters
from cortex.wire.errors import InvalidRequestError
from cortex.wire.request import InferenceRequest

MAX_CHOICES = 512
"""Greatest number of choices of a call, over all prompts; each is a sequence in the engine."""

MAX_LOGPROBS = 20
MAX_TOKEN_ID = (1 << 31) - 1


class CompletionCall(GenerationCall, frozen=True):
    """A decoded call, whose request lacks its prompts."""

    prompts: tuple[str | tuple[int, ...], ...]
    include_usage: bool

    @property
    def requests(self) -> tuple[InferenceRequest, ...]:
        """A request for each prompt."""
        return tuple(msgspec.structs.replace(self.request, prompt=prompt) for prompt in self.prompts)

    @property
    def num_choices(self) -> int:
        """Number of choices of all prompts together."""
        return len(self.prompts) * self.request.num_choices

    def encoder(self, answering: Answering) -> Completion:
        """Return the encoder of the answer."""
        return Completion(
            f"cmpl-{secrets.token_hex(12)}",
            answering.name or self.request.model,
            int(time.time()),
            self.num_choices,
            include_usage=self.include_usage,
            report_usage=answering.report_usage,
            scores=self.request.top_logprobs is not None,
        )


class CompletionBody(GenerationBody, kw_only=True):
    """A request body, as far as it is read."""

    model: str
    prompt: str | list[str | int | list[int]]
    stream: bool | None = None
    stream_options: fields.StreamOptions | None = None
    max_tokens: int | None = None
    n_predict: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    response_format: ResponseFormat | None = None
    echo: bool | None = None
    logprobs: int | bool | None = None
    suffix: str | None = None
    # known and refused
    best_of: int | None = None


PARAMETERS = Parameters(
    CompletionBody,
    without_effect={
        "": "metadata prompt_cache_key service_tier store user " + OPEN_SERVERS_WITHOUT_EFFECT,
        "stream_options": "include_obfuscation",
        "response_format.json_schema": "description",
    },
    refused={name: values for name, values in OPEN_SERVERS.items() if name != "best_of"}
    | {"add_special_tokens": (True,)},
)


def decode(body: bytes) -> CompletionCall:
    """Decode a request body.

    Raises:
        InvalidRequestError: with the parameter at fault; see :meth:`cortex.dialects.parameters.Parameters.decode`.
    """
    parsed, ignored = PARAMETERS.decode(body)
    prompts = [parsed.prompt] if isinstance(parsed.prompt, str) else _prompts(parsed.prompt)
    num_choices = fields.in_range("n", parsed.n, 1, 128) or 1
    fields.refuse((("best_of", parsed.best_of is not None and parsed.best_of != num_choices),))
    if len(prompts) * num_choices > MAX_CHOICES:
        raise InvalidRequestError(
            f"Invalid 'prompt': {len(prompts)} prompts with {num_choices} choices each; at most {MAX_CHOICES} choices "
            "are made in one call.",
            param="prompt",
        )
    limit_name, limit = fields.first_given(("max_tokens", parsed.max_tokens), ("n_predict", parsed.n_predict))
    request = InferenceRequest(
        model=parsed.model,
        suffix=parsed.suffix or "",
        echo=bool(parsed.echo),
        sampling=parsed.sampling(),
        max_tokens=fields.in_range(limit_name, limit, 0, 1 << 31),
        stop=fields.stop_strings(parsed.stop),
        ending=parsed.ending(),
        output_format=parsed.form(output_format_of(parsed.response_format), "response_format"),
        num_choices=num_choices,
        top_logprobs=_top_logprobs(parsed.logprobs),
    )
    include_usage = parsed.stream_options is not None and bool(parsed.stream_options.include_usage)
    return CompletionCall(request, bool(parsed.stream), tuple(prompts), include_usage, ignored=ignored)


def _top_logprobs(asked: int | bool | None) -> int | None:
    if asked is None or asked is False:
        return None
    if asked is True:
        raise InvalidRequestError(
            "Invalid 'logprobs': it is a number here, of alternatives for each token.", param="logprobs"
        )
    return fields.in_range("logprobs", asked, 0, MAX_LOGPROBS)


def _prompts(given: Sequence[str | int | list[int]]) -> list[str | tuple[int, ...]]:
    """Return the prompts of a list: texts, lists of token ids, or one such list itself.

    Raises:
        InvalidRequestError: it is empty, or of several kinds, or a number is not a token id.
    """
    if not given:
        raise InvalidRequestError("Invalid 'prompt': it is empty.", param="prompt")
    kinds = set(map(type, given))  # in one go: there may be a million
    if kinds == {str}:
        return cast("list[str | tuple[int, ...]]", given)
    if kinds == {int}:
        return [_tokens(cast("list[int]", given), "prompt")]
    if kinds == {list}:
        lists = cast("list[list[int]]", given)
        return [_tokens(tokens, f"prompt[{index}]") for index, tokens in enumerate(lists)]
    raise InvalidRequestError("Invalid 'prompt': texts and token ids cannot stand in one list.", param="prompt")


def _tokens(ids: Sequence[int], where: str) -> tuple[int, ...]:
    if not ids:
        raise InvalidRequestError(f"Invalid '{where}': it is empty.", param="prompt")
    if min(ids) < 0 or max(ids) > MAX_TOKEN_ID:
        raise InvalidRequestError(f"Invalid '{where}': a token id is from 0 to {MAX_TOKEN_ID}.", param="prompt")
    return tuple(ids)
