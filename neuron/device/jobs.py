"""Messages between a daemon and a device worker over their channel.

Each message is one MessagePack-encoded struct. A *job* is one request, answered by ``Done`` or
``JobFailed`` with its number; a *sequence* runs until ``SequenceFailed`` or a finished row in ``Tokens``.
Token ids travel as int32 in the machine's byte order (``array('i').tobytes()``).
"""

from enum import StrEnum
from typing import Final

import msgspec

from cortex.wire.errors import ErrorInfo
from cortex.wire.node import ModelSpec


class SequenceEnd(StrEnum):
    """Reason for which the engine ended a sequence."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Pooling(StrEnum):
    """Hidden states of a text that become its embedding."""

    LAST = "last"
    """Hidden state of the last token, which attends to all others."""
    MEAN = "mean"


class SamplerSettings(msgspec.Struct, frozen=True, array_like=True):
    """Sampling with every field resolved. ``temperature`` 0 is greedy; 0 turns ``top_k`` off, 1 turns ``top_p`` off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    top_logprobs: int = -1
    """Number of alternatives whose log probabilities are reported, beside the token's own; -1 reports none."""


class ConstraintSettings(msgspec.Struct, frozen=True, array_like=True):
    """Lark grammar that the output must follow, once reasoning is over.

    ``opens`` and ``closes`` are the tokens around reasoning, -1 for a model without; ``starts_inside``: the prompt has
    opened it already.
    """

    grammar: str
    opens: int = -1
    closes: int = -1
    starts_inside: bool = False


class ThinkingSettings(msgspec.Struct, frozen=True, array_like=True):
    """Bound on reasoning.

    Behind ``num_tokens`` of it the tokens ``forced`` follow, of which the last closes it. ``opens`` is the token before
    it; ``starts_inside``: the prompt has opened it already.
    """

    num_tokens: int
    opens: int
    forced: tuple[int, ...]
    starts_inside: bool


# ------------------------------------------------------------------ daemon -> worker

UNNUMBERED: Final = 0
"""Number of a sequence that its worker's owner has not numbered yet."""


class GroupSettings(msgspec.Struct, frozen=True, array_like=True):
    """Rank of a worker in a group that shares a model."""

    rank: int
    size: int
    address: str
    """``host:port`` of rank 0, where the ranks meet."""
    limit_s: float = 30.0
    """Time that a rank waits for the others before it takes them for lost."""


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Load a model. Answered by ``Done`` with :class:`LoadedModel`, with ``Progress`` before it."""

    job: int
    spec: ModelSpec
    path: str
    """Path of the weights on this host: a ``.gguf`` file, the first where there are several, or a folder with
    ``config.json`` and safetensors."""
    group: GroupSettings | None = None
    """Group whose workers each load a part; rank 0 takes the model's sequences. ``None``: not shared."""


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """Release a model and its memory. Its running sequences are cancelled."""

    job: int
    model: str


class QueryMemory(msgspec.Struct, frozen=True, tag="query_memory"):
    """Ask for :class:`Memory`."""

    job: int


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Run one sequence. ``prompt`` is int32 token ids; ``eos`` ids end it unless empty."""

    sequence: int
    model: str
    prompt: bytes
    max_tokens: int
    eos: tuple[int, ...]
    sampler: SamplerSettings
    principal: str = ""
    """On whose behalf: slots are shared out among principals."""
    priority: int = 0
    """The principal's: who waits with a higher one gets a slot first."""
    constraint: ConstraintSettings | None = None
    thinking: ThinkingSettings | None = None
    min_tokens: int = 0
    """Number of tokens before one of ``eos`` may end the sequence."""
    cache_salt: str = ""
    """Salt of the prefix cache: sequences share pages only with an equal salt."""
    scores_prompt: bool = False
    """Whether to return the log probabilities of the prompt's tokens; the prompt is then not read from the cache."""
    breakpoints: tuple[int, ...] = ()
    """Numbers of tokens, ascending, behind which prompts that come later are expected to part from this one; none: its
    end."""


class Embed(msgspec.Struct, frozen=True, tag="embed"):
    """Compute the embedding of ``prompt``, int32 token ids; answered by :class:`Embedding` or ``SequenceFailed``."""

    sequence: int
    model: str
    prompt: bytes
    pooling: Pooling
    principal: str = ""
    priority: int = 0
    cache_salt: str = ""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop a sequence and free its memory; unknown and finished sequences are ignored."""

    sequence: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Cancel everything, release the device and exit 0."""


ToWorker = Load | Unload | QueryMemory | Generate | Embed | Cancel | Shutdown

# ------------------------------------------------------------------ worker -> daemon


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker owns its device. First message of every worker."""

    device: str
    pid: int
    memory_total_bytes: int
    memory_free_bytes: int


class LoadedModel(msgspec.Struct, frozen=True, tag="loaded_model"):
    """Result of a load: the plan as carried out, in bytes and tokens."""

    model: str
    architecture: str
    dtype: str
    context_tokens: int
    max_sequences: int
    weights_bytes: int
    kv_cache_bytes: int
    expanded_bytes: int = 0
    """Bytes of the weights beyond those in the file, where no kernel reads the form they have there."""


class Memory(msgspec.Struct, frozen=True, tag="memory"):
    """Memory of the device in bytes; ``used_bytes`` is this process's share."""

    total_bytes: int
    free_bytes: int
    used_bytes: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A job succeeded."""

    job: int
    result: LoadedModel | Memory | None = None


class JobFailed(msgspec.Struct, frozen=True, tag="job_failed"):
    """A job failed; the worker goes on."""

    job: int
    error: ErrorInfo


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Progress of a load, 0 to 1."""

    job: int
    fraction: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities of a row's N tokens, and of the K likeliest at each position, before any filter."""

    chosen: bytes
    """float32 ``[N]``"""
    top_ids: bytes = b""
    """int32 ``[N, K]``, likeliest first"""
    top: bytes = b""
    """float32 ``[N, K]``"""


class TokenRow(msgspec.Struct, frozen=True, array_like=True):
    """Output of one step for one sequence: int32 ids, and the reason if it ended.

    An end-of-turn token is not among ``ids``. ``prompt_cached`` is set on the first row of a sequence. A row of a
    prompt that is still being scored has no ids.
    """

    sequence: int
    ids: bytes
    end: SequenceEnd | None = None
    prompt_cached: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt: TokenLogprobs | None = None
    """Log probabilities of the scored prompt's tokens that this step processed; the first token has none."""


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """Output of an engine step for all its sequences, and the queue lengths after it."""

    rows: tuple[TokenRow, ...]
    running: int
    waiting: int


class Embedding(msgspec.Struct, frozen=True, tag="embedding"):
    """Result of an embedding sequence: float32 ``[hidden]`` of length 1."""

    sequence: int
    vector: bytes


class SequenceFailed(msgspec.Struct, frozen=True, tag="sequence_failed"):
    """A sequence failed; others go on."""

    sequence: int
    error: ErrorInfo


class Poisoned(msgspec.Struct, frozen=True, tag="poisoned"):
    """The device faulted; the worker exits after this message."""

    reason: str


FromWorker = Ready | Done | JobFailed | Progress | Tokens | Embedding | SequenceFailed | Poisoned

EXIT_POISONED = 70
"""Exit status of a worker whose driver reported a fault."""
EXIT_WEDGED = 71
"""Exit status of a worker whose watchdog saw a step outlast its limit."""
EXIT_CRASHED = 72
"""Exit status of a worker whose engine let an exception escape."""
