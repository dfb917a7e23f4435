"""Calls of DeepSeek V3: in a section, a name between markers, and the arguments, which V3 and R1 put in a code block.

The markers are special tokens: a call is forced in the form of Hermes.
"""

import re
from typing import Final

from neuron.text.forms import hermes
from neuron.text.forms.form import CallForm
from neuron.text.forms.marked_json import MarkedReader

SECTION: Final = "<｜tool▁calls▁begin｜>"
SECTION_END: Final = "<｜tool▁calls▁end｜>"
CALL: Final = "<｜tool▁call▁begin｜>"
CALL_END: Final = "<｜tool▁call▁end｜>"
SEPARATOR: Final = "<｜tool▁sep｜>"


class DeepSeekReader(MarkedReader):
    """Reader of a section."""

    head = re.compile(rf"\s*(?:{CALL})?\s*(?:function{SEPARATOR})?(?P<name>[^\s<>]+)\s*(?:{SEPARATOR}\s*|```json\s*)")
    behind = ("```", CALL_END)
    opening = CALL
    section_end = SECTION_END


FORM: Final = CallForm(
    "deepseek",
    lambda template: SECTION in template,
    DeepSeekReader,
    hermes.grammar,
    SECTION,
    (SECTION_END, CALL, CALL_END, SEPARATOR),
)
