"""Messages between a daemon and its text processes.

Each message is one struct: towards a text process as JSON, since a client's numbers may be longer than MessagePack has,
back as MessagePack. A *job* is answered by one message with its number, after any number of ``Phase``; ``Close`` is not
answered. A process has one job at a time.
"""

from enum import StrEnum

import msgspec

from cortex.wire.errors import ErrorInfo
from cortex.wire.node import SpecialTokensInText
from cortex.wire.request import InferenceRequest


class Limits(msgspec.Struct, frozen=True, array_like=True):
    """Limits of a job: CPU time, and memory beyond that of the process at its start."""

    cpu_s: float
    data_bytes: int


class Step(StrEnum):
    """Step of a job in a text process; it names the cause if the process dies there."""

    FILES = "files"
    TEMPLATE = "template"
    TOKENS = "tokens"
    GRAMMAR = "grammar"


# ------------------------------------------------------------------ daemon -> text process


class _Job(msgspec.Struct, frozen=True):
    job: int
    limits: Limits
    model: int


class Open(_Job, frozen=True, tag="open"):
    """Read the text side of the model at ``path``, known as ``model`` from then on. Answered by ``Opened``."""

    path: str
    num_tokens: int
    """The width of the model's logits."""
    eos: tuple[int, ...]
    special_tokens_in_text: SpecialTokensInText = SpecialTokensInText.TEXT
    finds_breakpoints: bool = False
    """Whether prompts come with their cache breakpoints."""


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Forget a model."""

    model: int


class Build(_Job, frozen=True, tag="build"):
    """Make the prompt of a request. Answered by ``Built``."""

    request: InferenceRequest
    context_tokens: int
    """A prompt that does not leave a token of it is refused."""


class Count(_Job, frozen=True, tag="count"):
    """Count the tokens of a request's prompt. Answered by ``Counted``."""

    request: InferenceRequest
    context_tokens: int


class Tokenise(_Job, frozen=True, tag="tokenise"):
    """Make texts into ids, for embeddings. Answered by ``Tokenised``."""

    texts: tuple[str, ...]
    context_tokens: int


class Check(_Job, frozen=True, tag="check"):
    """Write the grammar that the answer to a request must follow, and try it. Answered by ``Checked``."""

    request: InferenceRequest


class Ask(_Job, frozen=True, tag="ask"):
    """Say what of a request's schemas its answer will not be held to. Answered by ``LeftOut``."""

    request: InferenceRequest


Job = Open | Build | Count | Tokenise | Check | Ask
ToText = Job | Close

# ------------------------------------------------------------------ text process -> daemon


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The process takes jobs. Its first message."""


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """Notice that the job has begun another step."""

    step: Step


class TextDescription(msgspec.Struct, frozen=True):
    """Description of a model's text side, with all that the daemon needs to decode answers.

    ``decoder`` is a ``tokenizer.json`` that only decodes. ``token_bytes`` are the bytes of all tokens in a row,
    ``token_ends`` their ends as int64.
    """

    can_chat: bool
    call_form: str
    reasoning: str
    """Name of its form of reasoning, "" for a model that does not reason."""
    tag_ids: tuple[int, int] | None
    """Ids of the tags around reasoning, where they are tokens."""
    early_end: tuple[int, ...]
    """Tokens that end reasoning early, of which the last is the closing tag; none where the tags are no tokens."""
    markers: dict[int, str]
    decoder: bytes
    token_bytes: bytes
    token_ends: bytes
    vocabulary_digest: bytes
    """Equal for two models with the same tokens."""


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """A model is open."""

    job: int
    description: TextDescription


class Built(msgspec.Struct, frozen=True, tag="built"):
    """A prompt, as int32 ids in the machine's byte order; see :class:`neuron.text.prompt.Prompt`."""

    job: int
    ids: bytes
    starts_in_reasoning: bool
    ends_reasoning: bool
    banned: tuple[int, ...] = ()
    """The tokens of the words that the answer may not have."""
    breakpoints: tuple[int, ...] = ()


class Counted(msgspec.Struct, frozen=True, tag="counted"):
    """The length of a prompt."""

    job: int
    num_tokens: int


class Tokenised(msgspec.Struct, frozen=True, tag="tokenised"):
    """The int32 ids of each text."""

    job: int
    ids: tuple[bytes, ...]


class Checked(msgspec.Struct, frozen=True, tag="checked"):
    """A grammar that was tried; ``None`` where the answer is free."""

    job: int
    grammar: str | None


class LeftOut(msgspec.Struct, frozen=True, tag="left_out"):
    """Keywords that no grammar can hold an answer to, by their place."""

    job: int
    keywords: tuple[str, ...]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The job cannot be done: the client's error, or the model's."""

    job: int
    error: ErrorInfo


class Retiring(msgspec.Struct, frozen=True, tag="retiring"):
    """Follows an answer: the process holds more than it should and can give no more back, so it ends."""


FromText = Ready | Phase | Opened | Built | Counted | Tokenised | Checked | LeftOut | Refused | Retiring
