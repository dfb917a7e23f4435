"""Calls of Kimi K2: in a section, ``functions.NAME:0`` between markers, and the arguments.

The markers are special tokens: a call is forced in the form of Hermes.
"""

import re
from typing import Final

from neuron.text.forms import hermes
from neuron.text.forms.form import CallForm
from neuron.text.forms.marked_json import MarkedReader

SECTION: Final = "<|tool_calls_section_begin|>"
SECTION_END: Final = "<|tool_calls_section_end|>"
CALL: Final = "<|tool_call_begin|>"
CALL_END: Final = "<|tool_call_end|>"
ARGUMENTS: Final = "<|tool_call_argument_begin|>"


class KimiReader(MarkedReader):
    """Reader of a section."""

    head = re.compile(
        rf"\s*(?:{re.escape(CALL)})?\s*(?:functions\.)?(?P<name>[^\s<>:]+)(?::\d+)?\s*{re.escape(ARGUMENTS)}\s*"
    )
    behind = (CALL_END,)
    opening = CALL
    section_end = SECTION_END


FORM: Final = CallForm(
    "kimi",
    lambda template: SECTION in template,
    KimiReader,
    hermes.grammar,
    SECTION,
    (SECTION_END, CALL, CALL_END, ARGUMENTS),
)
