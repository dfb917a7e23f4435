"""Calls of GLM: ``<tool_call>NAME<arg_key>KEY</arg_key><arg_value>value</arg_value>...</tool_call>``.

GLM 4.5 and 4.6 write each tag on a line, 4.7 writes none.
"""

import re
from collections.abc import Sequence
from typing import Final

from neuron.text.forms.form import CallForm, ForcedTool, Piece
from neuron.text.forms.hermes import TaggedReader
from neuron.text.forms.json_calls import CLOSING_TAG, START, tagged_rules
from neuron.text.forms.tagged_grammar import Writing, bodies
from neuron.text.forms.tagged_values import NAME, Opening, TaggedValuesReader, Tags

KEY: Final = "<arg_key>"
KEY_END: Final = "</arg_key>"
VALUE: Final = "<arg_value>"
VALUE_END: Final = "</arg_value>"
TAGS: Final = Tags(
    function=Opening("", re.compile(NAME)),
    function_end=CLOSING_TAG,
    parameter=Opening(
        KEY,
        re.compile(NAME + KEY_END + r"\s{0,8}"),
        VALUE,
        re.compile(rf"[^<>\n]{{0,256}}(?:</?[a-z_]{{0,7}}|{KEY_END}\s{{0,8}}(?:<[a-z_]{{0,9}})?)?"),
    ),
    parameter_end=VALUE_END,
    call=START,
    call_end=CLOSING_TAG,
    guesses=True,
)
WRITING: Final = Writing("{}\n", "", f"{KEY}{{}}{KEY_END}\n{VALUE}", f"{VALUE_END}\n")
_HEAD: Final = re.compile(r"\s*(?P<name>[\w.:-]{1,256})")


class _Arguments(TaggedValuesReader):
    """Reader of what follows a call's name."""

    tags = TAGS


class GlmReader(TaggedReader):
    """Reader of a call within tags, which may be one in JSON as well."""

    def _begin(self, pieces: list[Piece]) -> bool:
        found = _HEAD.match(self._pending)
        rest = self._pending[found.end() :].lstrip() if found else self._pending.lstrip()
        if not rest or (found and any(tag.startswith(rest) and tag != rest for tag in (KEY, CLOSING_TAG))):
            return False
        if found is None or not rest.startswith((KEY, CLOSING_TAG)):
            return super()._begin(pieces)
        arguments = _Arguments("", self._schemas)
        arguments.open(found["name"], pieces)
        self._inner, self.is_call = arguments, True
        return self._go(self._inside, rest)


def grammar(tools: Sequence[ForcedTool], parallel: bool) -> str:
    """See :class:`~neuron.text.forms.form.CallForm`."""
    return tagged_rules(bodies(tools, WRITING), parallel, newline="")


FORM: Final = CallForm(
    "glm",
    lambda template: KEY in template,
    GlmReader,
    grammar,
    START,
    (CLOSING_TAG, KEY, KEY_END, VALUE, VALUE_END),
)
