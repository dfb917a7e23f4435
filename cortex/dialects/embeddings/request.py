"""OpenAI's embeddings: a body of ``/v1/embeddings`` to an ``EmbeddingRequest``, and its answer.

Inputs are texts or token ids, one or many. Accepted without effect: ``user``. Vectors are float32 bytes between
processes; the response has them as base64 or as numbers, by the request's ``encoding_format``.
"""

import array
import base64
from collections.abc import Sequence
from typing import Any, Literal, cast

import msgspec

from cortex.dialects import fields
from cortex.dialects.call import Call
from cortex.dialects.parameters import Parameters
from cortex.wire.errors import InvalidRequestError
from cortex.wire.request import EmbeddingRequest

MAX_INPUTS = 2048
"""Greatest number of inputs, as OpenAI's."""

MAX_VALUES = 4_000_000
"""Greatest number of token ids of all inputs together."""


class EmbeddingCall(Call, frozen=True):
    """A decoded call."""

    request: EmbeddingRequest
    is_base64: bool

    def answer(self, vectors: Sequence[bytes], prompt_tokens: int, name: str) -> bytes:
        """Return the answer, from float32 vectors in this machine's byte order, which is little-endian.

        It has ``name`` for the model.
        """
        data: list[dict[str, Any]] = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector).decode() if self.is_base64 else array.array("f", vector).tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
        return msgspec.json.encode({"object": "list", "data": data, "model": name, "usage": usage})


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """A request body, as far as it is read."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


PARAMETERS = Parameters(
    EmbeddingBody,
    without_effect={"": "metadata request_id rid stream user"},
    refused={
        "add_special_tokens": (True,),
        "cache_salt": ("",),
        "embed_dtype": ("float32",),
        "embd_normalize": (2,),
        "input_type": (),
        "messages": (),
        "mm_processor_kwargs": ({},),
        "modality": (),
        "normalize": (True,),
        "priority": (0,),
        "task": (),
        "task_type": (),
        "truncate": (False, "NONE"),
        "truncate_prompt_tokens": (),
        "truncation": (False,),
    },
    max_values=MAX_VALUES,
)


def decode(body: bytes) -> EmbeddingCall:
    """Decode a request body.

    Raises:
        InvalidRequestError: with the parameter at fault; see :meth:`cortex.dialects.parameters.Parameters.decode`.
    """
    parsed, ignored = PARAMETERS.decode(body)
    request = EmbeddingRequest(
        model=parsed.model,
        inputs=_inputs(parsed.input),
        dimensions=fields.in_range("dimensions", parsed.dimensions, 1, 1 << 31),
    )
    return EmbeddingCall(request, parsed.encoding_format == "base64", ignored=ignored)


def _inputs(given: str | list[str | int | list[int]]) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(given, str):
        given = [given]
    elif set(map(type, given)) == {int}:  # in one go: there may be millions
        given = [cast("list[int]", given)]
    if not 1 <= len(given) <= MAX_INPUTS:
        raise InvalidRequestError(f"Invalid 'input': {len(given)} texts; 1 to {MAX_INPUTS} are taken.", param="input")
    inputs: list[str | tuple[int, ...]] = []
    for index, item in enumerate(given):
        if isinstance(item, int):
            raise InvalidRequestError("Invalid 'input': token ids among texts.", param="input")
        if not item:
            raise InvalidRequestError(f"Invalid 'input': text {index} is empty.", param=f"input[{index}]")
        inputs.append(item if isinstance(item, str) else tuple(item))
    return tuple(inputs)
