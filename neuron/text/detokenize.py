"""Token ids to ``InferenceEvent``s: decoding, stop strings, reasoning and tool calls, for one choice.

What cannot be decided yet is held back: half a character, the beginning of a stop string or of a tag. At the end all of
it comes out. Stop strings apply to the answer, not to reasoning.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from cortex.wire.events import (
    Finished,
    FinishReason,
    InferenceEvent,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)
from cortex.wire.request import Tool
from neuron.device.jobs import SequenceEnd
from neuron.text.forms.form import CallArguments, CallBegins, CallForm, Piece, ReasoningForm
from neuron.text.forms.registry import HERMES
from neuron.text.holdback import held_back
from neuron.text.reasoning import ReasoningSplitter, Section
from neuron.text.tools import ToolCallParser

MAX_UNDECODED: Final = 16
"""More tokens than a character has: what is undecoded then are broken bytes, or tokens that are no text."""


class Detokenizer:
    """Turns the ids of one sequence into the events of one choice.

    ``includes_stop`` has the stop string that ended the answer be part of it.

    ``tools`` are those the request offered, whose calls are looked for in the model's ``call_form``: without them a
    ``<tool_call>`` is just text. Without ``parallel_calls`` the first call ends the choice. ``markers`` gives the text
    of special tokens that mark something here; all others are no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        choice: int = 0,
        stop: Sequence[str] = (),
        includes_stop: bool = False,
        tags: ReasoningForm | None = None,
        starts_in_reasoning: bool = False,
        tools: Sequence[Tool] = (),
        call_form: CallForm = HERMES,
        markers: Mapping[int, str] = {},
        parallel_calls: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._undecoded: list[int] = []
        self._known: list[int] = []
        """A token that is text by itself, so that a restarted stream does not treat its text as a beginning."""
        self._choice = choice
        self._stop = tuple(stop)
        self._includes_stop = includes_stop
        self._stop_pending = ""
        call = HERMES.marker if tools else ""
        self._splitter = ReasoningSplitter(tags, starts_inside=starts_in_reasoning, call=call) if tags else None
        self._tools = ToolCallParser(call_form, tools) if tools else None
        self._markers = markers
        self._parallel_calls = parallel_calls
        self._logprobs: list[TokenLogprob] = []
        self._num_calls = 0
        self._output_tokens = 0
        self._reasoning_tokens = 0
        self.finished = False

    def feed(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> list[InferenceEvent]:
        """Return the events that ``ids`` make certain; a stop string ends the choice (see ``finished``).

        ``logprobs`` are those of ``ids``, or empty. Those of reasoning and of calls are dropped; the others go with the
        next piece of the answer, which may be later than their own text where some was held back.
        """
        events: list[InferenceEvent] = []
        for index, token in enumerate(ids):
            self._output_tokens += 1
            thinking = self._splitter is not None and self._splitter.inside
            calling = self._tools is not None and self._tools.in_call
            self._reasoning_tokens += thinking
            if logprobs:
                self._logprobs.append(logprobs[index])
            text = self._markers.get(token)
            if text is None:
                text = self._decoded(token)
            if text is None:
                continue
            self._undecoded.clear()
            self._split(text, events)
            if thinking or calling:
                self._logprobs.clear()  # those of what closes it among them
            if self.finished:
                break
        return self._with_logprobs(_merge(events))

    def _decoded(self, token: int) -> str | None:
        """Return the text that ``token`` makes certain, ``None`` if there is none yet.

        A stream looks at all that it has not decoded with each token, and raises where bytes that are no character
        change what stood before them.
        """
        self._undecoded.append(token)
        try:
            text = self._decoder.step(self._tokenizer, token)
        except Exception:  # noqa: BLE001 (it has no class of its own)
            return self._restarted() or None
        if text is None:
            return self._restarted() or None if len(self._undecoded) >= MAX_UNDECODED else None
        if len(self._undecoded) == 1:
            self._known = [token]
        return text

    def _restarted(self) -> str:
        """Return what is undecoded as text, with replacements for what is none, and go on with another stream."""
        known = self._tokenizer.decode(self._known, skip_special_tokens=True)
        whole = self._tokenizer.decode([*self._known, *self._undecoded], skip_special_tokens=True)
        text = (
            whole[len(known) :]
            if whole.startswith(known)
            else self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        )
        self._undecoded.clear()
        if text and not self._known and (letter := self._tokenizer.token_to_id("a")) is not None:
            self._known = [letter]
        self._decoder = DecodeStream(ids=self._known, skip_special_tokens=True)
        return text

    def close(self, end: SequenceEnd) -> list[InferenceEvent]:
        """Return what was held back and the ``Finished`` of this choice."""
        if self.finished:
            return []
        events: list[InferenceEvent] = []
        if self._undecoded:
            # Half a character at the end, or only special tokens, which decode to nothing.
            self._split(self._restarted(), events)
        if not self.finished and self._splitter is not None:
            for section, text in self._splitter.close():
                self._route(section, text, events)
        if not self.finished:
            rest, self._stop_pending = self._stop_pending, ""
            self._answer(rest, events)
        if not self.finished:
            self._finish(FinishReason.STOP if end is SequenceEnd.STOP else FinishReason.LENGTH, None, events)
        return self._with_logprobs(_merge(events))

    def _with_logprobs(self, events: list[InferenceEvent]) -> list[InferenceEvent]:
        """Give what was gathered to the first piece of text; at the end to an empty one, if there is none."""
        if not self._logprobs:
            return events
        for index, event in enumerate(events):
            match event:
                case TextDelta():
                    events[index] = TextDelta(event.text, event.choice, tuple(self._logprobs))
                    self._logprobs.clear()
                    break
                case ToolCallDelta():
                    self._logprobs.clear()
                    break
                case Finished():
                    events.insert(index, TextDelta("", self._choice, tuple(self._logprobs)))
                    self._logprobs.clear()
                    break
        return events

    def _split(self, text: str, events: list[InferenceEvent]) -> None:
        if self._splitter is None:
            self._route(Section.ANSWER, text, events)
            return
        for section, piece in self._splitter.feed(text):
            self._route(section, piece, events)
            if self.finished:
                return

    def _route(self, section: Section, text: str, events: list[InferenceEvent]) -> None:
        if section is Section.REASONING:
            events.append(ReasoningDelta(text, self._choice))
            return
        if not self._stop:
            self._answer(text, events)
            return
        text = self._stop_pending + text
        hits = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if hits:
            at, stop = min(hits)
            self._stop_pending = ""
            self._answer(text[: at + len(stop)] if self._includes_stop else text[:at], events)
            if not self.finished:
                self._finish(FinishReason.STOP, stop, events)
            return
        keep = held_back(text, self._stop)
        self._stop_pending = text[len(text) - keep :]
        self._answer(text[: len(text) - keep], events)

    def _answer(self, text: str, events: list[InferenceEvent]) -> None:
        if self._tools is None:
            if text:
                events.append(TextDelta(text, self._choice))
            return
        self._emit(self._tools.feed(text), events)

    def _emit(self, pieces: Sequence[Piece], events: list[InferenceEvent]) -> None:
        for piece in pieces:
            if isinstance(piece, str):
                events.append(TextDelta(piece, self._choice))
            elif isinstance(piece, CallBegins):
                call_id = f"call_{secrets.token_hex(12)}"
                events.append(ToolCallDelta(self._num_calls, call_id, piece.name, "", self._choice))
                self._num_calls += 1
            elif isinstance(piece, CallArguments):
                events.append(ToolCallDelta(self._num_calls - 1, arguments=piece.text, choice=self._choice))
            elif not self._parallel_calls:
                self._end(FinishReason.TOOL_CALLS, None, events)
                return

    def _finish(self, reason: FinishReason, stop: str | None, events: list[InferenceEvent]) -> None:
        if self._tools is not None:
            self._emit(self._tools.close(cut=reason is FinishReason.LENGTH or stop is not None), events)
            if self.finished:
                return
        if self._num_calls and reason is FinishReason.STOP and stop is None:
            reason = FinishReason.TOOL_CALLS
        self._end(reason, stop, events)

    def _end(self, reason: FinishReason, stop: str | None, events: list[InferenceEvent]) -> None:
        events.append(Finished(reason, self._output_tokens, self._reasoning_tokens, stop, self._choice))
        self.finished = True


def _merge(events: list[InferenceEvent]) -> list[InferenceEvent]:
    """Join neighbouring pieces of one text or call: fewer SSE events carry the same."""
    if len(events) < 2:
        return events
    merged = events[:1]
    for event in events[1:]:
        last = merged[-1]
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            merged[-1] = TextDelta(last.text + event.text, event.choice, last.logprobs + event.logprobs)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            merged[-1] = ReasoningDelta(last.text + event.text, event.choice)
        elif isinstance(event, ToolCallDelta) and isinstance(last, ToolCallDelta) and not event.name:
            merged[-1] = ToolCallDelta(last.call, last.id, last.name, last.arguments + event.arguments, event.choice)
        else:
            merged.append(event)
    return merged
