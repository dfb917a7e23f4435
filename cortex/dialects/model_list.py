"""Models as ``/v1/models`` of both daemons lists them: OpenAI's objects with what clients look for, and Anthropic's.

OpenAI's object has neither sizes nor abilities, so servers have names of their own for them, and each client looks for
some: ``max_model_len`` is vLLM's, ``context_length``, ``architecture`` and ``pricing`` are OpenRouter's,
``max_input_tokens`` and ``max_output_tokens`` LiteLLM's, ``modalities`` is of models.dev. What is not known is null.
"""

import datetime
from collections.abc import Iterable, Sequence
from typing import TypedDict

import msgspec

from cortex.http_io import Exchange
from cortex.wire.node import Capability, ModelState


class Modalities(msgspec.Struct, frozen=True):
    """Kinds of content that a model takes and makes."""

    input: tuple[str, ...]
    output: tuple[str, ...]


class Architecture(msgspec.Struct, frozen=True):
    """The same in OpenRouter's names."""

    input_modalities: tuple[str, ...]
    output_modalities: tuple[str, ...]


class Pricing(msgspec.Struct, frozen=True, omit_defaults=True):
    """Prices of a token in US dollars, as decimal numbers in text."""

    prompt: str
    completion: str
    input_cache_read: str | None = None
    """Price of a prompt's token that the prefix cache has, if it differs."""


class ListedModel(msgspec.Struct, frozen=True, kw_only=True):
    """An OpenAI ``Model`` object with extensions, most of which :func:`sizes_and_abilities` makes."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    name: str
    display_name: str
    state: ModelState
    context_length: int | None = None
    """Tokens of prompt and answer together; so the three that follow are the same."""
    max_model_len: int | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    capabilities: tuple[Capability, ...] = ()
    modalities: Modalities | None = None
    architecture: Architecture | None = None
    pricing: Pricing | None = None

    def as_anthropic(self) -> "ModelInfo":
        """Return it for Anthropic's clients."""
        return ModelInfo(
            id=self.id,
            display_name=self.display_name,
            created_at=datetime.datetime.fromtimestamp(self.created, datetime.UTC),
            max_input_tokens=self.max_input_tokens,
            max_tokens=self.max_output_tokens,
        )


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An Anthropic ``ModelInfo``, without its ``capabilities``, whose meaning differs from a :class:`ListedModel`'s."""

    type: str = "model"
    id: str
    display_name: str
    created_at: datetime.datetime
    lifecycle: str = "active"
    max_input_tokens: int | None = None
    max_tokens: int | None = None


class ModelObjects(msgspec.Struct, frozen=True):
    """``GET /v1/models``."""

    data: Sequence[ListedModel]
    object: str = "list"


class ModelInfos(msgspec.Struct, frozen=True):
    """``GET /v1/models`` for a client of Anthropic's, all on one page."""

    data: Sequence[ModelInfo]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


class Known(TypedDict, total=False):
    """Fields of a :class:`ListedModel` that follow from the length of its context and its capabilities."""

    context_length: int | None
    max_model_len: int | None
    max_input_tokens: int | None
    max_output_tokens: int | None
    capabilities: tuple[Capability, ...]
    modalities: Modalities | None
    architecture: Architecture | None


def sizes_and_abilities(context_tokens: int, capabilities: Iterable[Capability]) -> Known:
    """Return the fields of a model that say how long its context is (0: not known), and what it can do."""
    length, can = context_tokens or None, tuple(sorted(capabilities))
    known = Known(
        context_length=length, max_model_len=length, max_input_tokens=length, max_output_tokens=length, capabilities=can
    )
    if can:
        taken = ("text", "image") if Capability.VISION in can else ("text",)
        made = ("embeddings",) if can == (Capability.EMBEDDINGS,) else ("text",)
        known["modalities"], known["architecture"] = Modalities(taken, made), Architecture(taken, made)
    return known


async def reply_models(exchange: Exchange, models: Sequence[ListedModel]) -> None:
    """Answer with a list of models, in the form of the client's dialect."""
    if not _is_anthropic(exchange):
        await exchange.reply(200, msgspec.json.encode(ModelObjects(models)))
        return
    data = [model.as_anthropic() for model in models]
    ids = (data[0].id, data[-1].id) if data else (None, None)
    await exchange.reply(200, msgspec.json.encode(ModelInfos(data, *ids)))


async def reply_model(exchange: Exchange, model: ListedModel) -> None:
    """Answer with one model, in the form of the client's dialect."""
    described = model.as_anthropic() if _is_anthropic(exchange) else model
    await exchange.reply(200, msgspec.json.encode(described))


def _is_anthropic(exchange: Exchange) -> bool:
    """Return whether the client of a path that two dialects share is Anthropic's."""
    return exchange.header(b"anthropic-version") is not None
