"""Tables of parameters for the first reading of a body, one for each path of inference."""

from collections.abc import Mapping
from typing import Any

from cortex.dialects import (
    anthropic_messages,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
)
from cortex.dialects.parameters import Parameters
from cortex.dialects.passthrough import (
    CHAT,
    COMPACT,
    COMPLETIONS,
    COUNT_TOKENS,
    EMBEDDINGS,
    INPUT_TOKENS,
    MESSAGES,
    RESPONSES,
)

PARAMETERS: Mapping[str, Parameters[Any]] = {
    CHAT.path: openai_chat.PARAMETERS,
    COMPLETIONS.path: openai_completions.PARAMETERS,
    EMBEDDINGS.path: openai_embeddings.PARAMETERS,
    RESPONSES.path: openai_responses.PARAMETERS,
    COMPACT.path: openai_responses.PARAMETERS,
    INPUT_TOKENS.path: openai_responses.PARAMETERS,
    MESSAGES.path: anthropic_messages.PARAMETERS,
    COUNT_TOKENS.path: anthropic_messages.PARAMETERS,
}
"""Parameters by path."""
