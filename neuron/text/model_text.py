"""The whole text side of one model in a text process: prompts, counts, grammars, and its description for the daemon.

Everything foreign that reads a client's text is behind this: the model's template, its tokenizer, the compiler of
grammars. It is used in a process whose time, memory and stack are bounded; nothing here bounds them. No torch.
"""

import array
import collections
import contextlib
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from tokenizers import Tokenizer

from cortex.wire.errors import (
    ApiError,
    ContextLengthError,
    InvalidRequestError,
    InvalidSchemaError,
    UnprocessableError,
    UnsupportedParameterError,
)
from cortex.wire.node import SpecialTokensInText
from cortex.wire.request import InferenceRequest, Message, Role
from neuron.errors import TemplateError, UnsupportedTokenizerError
from neuron.text import pieces, tokenizer
from neuron.text.grammar import constraint_of
from neuron.text.jobs import Step, TextDescription
from neuron.text.matcher import Vocabulary
from neuron.text.prompt import Prompt, PromptFormat
from neuron.text.schema import left_out
from neuron.text.token_bytes import token_bytes

MAX_VOCABULARY: Final = 1 << 20
"""Tokens of a model. The largest vocabularies in use have 262,144."""
MAX_TEMPLATE_CHARS: Final = 1 << 20
COUNTED_CONTEXTS: Final = 4
"""A prompt of more than so many contexts is refused without being counted to its end."""
MAX_COUNTED: Final = 1 << 20
"""Most tokens counted for a request of the count alone: 2 s for a text of digits."""
KNOWN_GRAMMARS: Final = 64
"""Grammars remembered as tried, so that a client that sends its schema with each request waits for it once."""

MAX_DECODER_STEPS: Final = 8
"""Steps of a decoder. SentencePiece takes four."""
MAX_GROWTH: Final = 4
"""Characters that the steps of a decoder may make of one."""

_T = TypeVar("_T")
Announce = Callable[[Step], None]
"""Function that reports the next step to the daemon."""


class ModelText:
    """Construct with the model's files; raises :class:`ApiError` for those that cannot be used."""

    def __init__(
        self,
        path: pathlib.Path,
        num_tokens: int,
        eos: tuple[int, ...],
        special: SpecialTokensInText = SpecialTokensInText.TEXT,
        announce: Announce = lambda step: None,
        *,
        finds_breakpoints: bool = False,
    ) -> None:
        self._announce = announce
        self._num_tokens = num_tokens
        self._eos = eos
        self._files = _guarded(
            lambda: tokenizer.load(path), lambda reason: UnsupportedTokenizerError(f"The tokenizer fails: {reason}.")
        )
        size = self._files.tokenizer.get_vocab_size()
        if size > MAX_VOCABULARY:
            raise UnsupportedTokenizerError(f"The vocabulary has {size} tokens; at most {MAX_VOCABULARY} are read.")
        announce(Step.TEMPLATE)
        if len(self._files.chat_template or "") > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"The chat template is longer than {MAX_TEMPLATE_CHARS} characters.")
        self._prompts = _guarded(
            lambda: PromptFormat(self._files, special, finds_breakpoints=finds_breakpoints),
            lambda reason: TemplateError(f"The chat template fails: {reason}."),
        )
        self._try_template()
        announce(Step.FILES)
        self._vocabulary: Vocabulary | None = None
        self._known: collections.OrderedDict[str, None] = collections.OrderedDict()
        self.description = _guarded(
            self._describe, lambda reason: UnsupportedTokenizerError(f"The vocabulary cannot be used: {reason}.")
        )

    def build(self, request: InferenceRequest, context_tokens: int) -> Prompt:
        """Return the prompt of ``request``. Raises :class:`ApiError`, of one too long :class:`ContextLengthError`."""
        with self._counting(_param(request), context_tokens, COUNTED_CONTEXTS * context_tokens):
            prompt = self._built(request)
        if len(prompt.ids) >= context_tokens:
            raise ContextLengthError(context_tokens, len(prompt.ids), param=_param(request))
        return prompt

    def banned(self, request: InferenceRequest) -> tuple[int, ...]:
        """Return the tokens of the request's ``bad_words``, at the beginning of a text or behind a space.

        Raises :class:`UnsupportedParameterError` for a word that is several tokens.
        """
        words = request.sampling.bad_words
        return _guarded(
            lambda: tuple(sorted(self._ids_of(words))),
            lambda reason: InvalidRequestError(f"The words cannot be read: {reason}.", param="bad_words"),
        )

    def _ids_of(self, words: Sequence[str]) -> set[int]:
        found: set[int] = set()
        for word in words:
            texts = (word, f" {word}")
            ids = [self._files.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
            single = {one[0] for one in ids if len(one) == 1}
            if not single:
                raise UnsupportedParameterError(
                    f"Unsupported parameter: 'bad_words' takes words of one token, and '{word[:40]}' is "
                    f"{len(ids[0])} tokens of this model.",
                    param="bad_words",
                )
            found |= single
        return found

    def count(self, request: InferenceRequest, context_tokens: int) -> int:
        """Return the length of the prompt of ``request``, which may be too long for the context."""
        most = max(MAX_COUNTED, COUNTED_CONTEXTS * context_tokens)
        with self._counting(_param(request), context_tokens, most):
            return len(self._built(request).ids)

    def tokenise(self, texts: tuple[str, ...], context_tokens: int) -> list[bytes]:
        """Return the int32 ids of each of ``texts``."""
        found = []
        for index, text in enumerate(texts):
            with self._counting(f"input[{index}]", context_tokens, COUNTED_CONTEXTS * context_tokens):
                ids = self._built(InferenceRequest("", prompt=text), whole=True).ids
            if len(ids) >= context_tokens:
                raise ContextLengthError(context_tokens, len(ids), param=f"input[{index}]")
            found.append(as_bytes(ids))
        return found

    def grammar(self, request: InferenceRequest) -> str | None:
        """Return the grammar that the answer to ``request`` must follow, tried on this model's vocabulary."""
        return _guarded(
            lambda: constraint_of(request, self._prompts.call_form, self._problem_with),
            lambda reason: InvalidSchemaError(f"it cannot be compiled: {reason}", param=param_of_grammar(request)),
        )

    def left_out(self, request: InferenceRequest) -> tuple[str, ...]:
        """Return what of the schemas of ``request`` its answer will not be held to, by place and keyword."""
        return _guarded(
            lambda: tuple(left_out(request)),
            lambda reason: InvalidSchemaError(f"it cannot be read: {reason}", param=param_of_grammar(request)),
        )

    def _problem_with(self, grammar: str) -> str:
        digest = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).hexdigest()
        if digest in self._known:
            self._known.move_to_end(digest)
            return ""
        if not self._eos:
            raise UnprocessableError("This model has no end-of-text token, so no grammar can end.")
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._files.tokenizer, self._num_tokens, self._eos)
        problem = self._vocabulary.problem_with(grammar)
        if not problem:
            self._known[digest] = None
            if len(self._known) > KNOWN_GRAMMARS:
                self._known.popitem(last=False)
        return problem

    @contextlib.contextmanager
    def _counting(self, param: str, context_tokens: int, most: int) -> Iterator[None]:
        """Refuse a text of more than ``most`` tokens before all of it has been looked at."""
        try:
            with pieces.at_most(most):
                yield
        except pieces.TooManyTokensError as error:
            raise ContextLengthError(context_tokens, error.num_tokens, param=param, at_least=True) from None

    def _built(self, request: InferenceRequest, *, whole: bool = False) -> Prompt:
        return _guarded(
            lambda: self._prompts.build(request, whole=whole),
            lambda reason: InvalidRequestError(f"The prompt cannot be made: {reason}.", param=_param(request)),
        )

    def _try_template(self) -> None:
        """Render the least conversation. Many templates refuse some; those that do not return end the process here."""
        if self._prompts.can_chat:
            try:
                self._built(InferenceRequest("", messages=(Message(Role.USER, "x"),)))
            except ApiError:
                return

    def _describe(self) -> TextDescription:
        files, prompts = self._files, self._prompts
        pieces = token_bytes(files.tokenizer)
        ends = array.array("q")
        end = 0
        for piece in pieces:
            end += len(piece)
            ends.append(end)
        tags, tag_ids = prompts.tags, None
        early_end: tuple[int, ...] = ()
        if tags is not None:
            opens, closes = (files.tokenizer.token_to_id(tag) for tag in (tags.start, tags.end))
            if opens is not None and closes is not None:
                words = files.tokenizer.encode(tags.early_end, add_special_tokens=False).ids
                tag_ids, early_end = (opens, closes), (*words, closes)
        vocabulary = sorted(files.tokenizer.get_vocab().items())
        return TextDescription(
            can_chat=prompts.can_chat,
            call_form=prompts.call_form.name,
            reasoning="" if tags is None else tags.name,
            tag_ids=tag_ids,
            early_end=early_end,
            markers=prompts.markers,
            decoder=decoder_of(files.tokenizer),
            token_bytes=b"".join(pieces),
            token_ends=ends.tobytes(),
            vocabulary_digest=hashlib.sha256(json.dumps(vocabulary).encode()).digest(),
        )


def as_bytes(ids: list[int]) -> bytes:
    """Return ids as they travel."""
    return array.array("i", ids).tobytes()


def decoder_of(full: Tokenizer) -> bytes:
    """Return a ``tokenizer.json`` that makes text from ids as ``full`` does, and no ids from text.

    It is small and quick to read: the daemon, which reads answers, has no merges, no regular expressions and no
    normalisation of a model's.
    """
    state: dict[str, Any] = json.loads(full.to_str())
    _check_decoder(state["decoder"])
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": state["added_tokens"],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": state["decoder"],
            "model": {"type": "WordLevel", "vocab": full.get_vocab(with_added_tokens=True), "unk_token": ""},
        },
        ensure_ascii=False,
    ).encode("utf-8", "surrogatepass")


def _check_decoder(decoder: Mapping[str, Any] | None) -> None:
    """Raise for a decoder that could make much of little: it runs in the daemon, where nothing bounds it."""
    waiting: list[Mapping[str, Any]] = [decoder] if decoder else []
    num_steps, growth, is_fused = 0, 1.0, False
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting[:0] = step["decoders"]
            continue
        num_steps += 1
        if num_steps > MAX_DECODER_STEPS:
            raise UnsupportedTokenizerError(f"The tokenizer's decoder has more than {MAX_DECODER_STEPS} steps.")
        if step["type"] == "Replace":
            pattern = step["pattern"].get("String")
            growth *= max(1.0, len(step["content"]) / len(pattern)) if pattern else math.inf
            if is_fused or growth > MAX_GROWTH:
                raise UnsupportedTokenizerError(
                    "The tokenizer's decoder replaces by an expression, by much more, or in all of a text."
                )
        is_fused = is_fused or step["type"] == "Fuse"


def param_of_grammar(request: InferenceRequest) -> str:
    """Return the parameter that the grammar of ``request`` comes from."""
    return "response_format" if request.tool_choice.mode in {"auto", "none"} else "tools"


def _param(request: InferenceRequest) -> str:
    return "messages" if request.prompt is None else "prompt"


def _guarded(work: Callable[[], _T], error: Callable[[str], ApiError]) -> _T:
    """Return what ``work`` returns; whatever foreign code raises becomes a typed error.

    A panic of Rust code is no ``Exception``.
    """
    try:
        return work()
    except (ApiError, pieces.TooManyTokensError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as foreign:  # noqa: BLE001 (see above)
        words = "it takes more memory than it may" if isinstance(foreign, MemoryError) else str(foreign)[:300]
        raise error(f"{type(foreign).__name__}: {words}") from None
