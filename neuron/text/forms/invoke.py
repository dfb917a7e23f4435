"""Calls of MiniMax M2 and of DeepSeek V3.2 (DSML): ``<invoke name="NAME"><parameter name="KEY">value</parameter>``.

Several stand within the tags of a section. DeepSeek's tags have a mark of their own, and tell whether a value is text.
Parts of the tags are special tokens: a call is forced in the form of Hermes.
"""

import re
from typing import Final

from neuron.text.forms import hermes
from neuron.text.forms.form import CallForm, Piece
from neuron.text.forms.tagged_values import Opening, TaggedValuesReader, Tags

MINIMAX: Final = "<minimax:tool_call>"
MINIMAX_END: Final = "</minimax:tool_call>"
MARK: Final = "｜DSML｜"
DSML: Final = f"<{MARK}function_calls>"
DSML_END: Final = f"</{MARK}function_calls>"


def _tags(mark: str, section: str, section_end: str) -> Tags:
    return Tags(
        function=Opening(f'<{mark}invoke name="', re.compile(r'(?P<name>[^<>\n"]{1,256})"')),
        function_end=f"</{mark}invoke>",
        parameter=Opening(
            f'<{mark}parameter name="',
            re.compile(r'(?P<name>[^<>\n"]{1,256})"(?: string="(?P<is_text>true|false)")?'),
        ),
        parameter_end=f"</{mark}parameter>",
        call=section,
        call_end=section_end,
    )


class _SectionReader(TaggedValuesReader):
    """Reader of a section of calls."""

    def close(self, *, cut: bool) -> list[Piece]:
        """See :class:`~neuron.text.forms.form.CallReader`."""
        if self.is_call and self._state == self._begin:
            return []
        return super().close(cut=cut)

    def _begin(self, pieces: list[Piece]) -> bool:
        """Read the next function of the section, or its end."""
        tags, rest = self.tags, self._pending.lstrip()
        prefix = tags.function.prefix
        opened = tags.function.read(rest[len(prefix) :]) if rest.startswith(prefix) else ()
        if opened is None or any(tag.startswith(rest) and tag != rest for tag in (prefix, tags.call_end)):
            return False
        if opened:
            found, self._pending = opened
            self._given.clear()
            self.open(found["name"].strip(), pieces)
            return True
        if not self.is_call:
            return self._no_call(pieces)
        return self._end(rest[len(tags.call_end) :] if rest.startswith(tags.call_end) else self._pending)

    def _close_call(self, pieces: list[Piece], rest: str) -> bool:
        super()._close_call(pieces, rest)
        self.ended, self.rest = False, ""
        return self._go(self._begin, rest)


class MiniMaxReader(_SectionReader):
    """Reader of what follows ``<minimax:tool_call>``."""

    tags = _tags("", MINIMAX, MINIMAX_END)


class DsmlReader(_SectionReader):
    """Reader of what follows ``<｜DSML｜function_calls>``."""

    tags = _tags(MARK, DSML, DSML_END)


MINIMAX_FORM: Final = CallForm(
    "minimax", lambda template: MINIMAX in template, MiniMaxReader, hermes.grammar, MINIMAX, (MINIMAX_END,)
)
DSML_FORM: Final = CallForm("dsml", lambda template: MARK in template, DsmlReader, hermes.grammar, DSML, (MARK,))
