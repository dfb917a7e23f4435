"""Calls of Qwen3-Coder: ``<function=NAME><parameter=KEY>value</parameter>...</function>``, in ``<tool_call>`` tags."""

import re
from collections.abc import Sequence
from typing import Final

from neuron.text.forms.form import CallForm, ForcedTool
from neuron.text.forms.json_calls import CLOSING_TAG, START, tagged_rules
from neuron.text.forms.tagged_grammar import Writing, bodies
from neuron.text.forms.tagged_values import NAME, Opening, TaggedValuesReader, Tags

FUNCTION: Final = "<function="
TAGS: Final = Tags(
    function=Opening(FUNCTION, re.compile(NAME)),
    function_end="</function>",
    parameter=Opening("<parameter=", re.compile(NAME)),
    parameter_end="</parameter>",
    call=START,
    call_end=CLOSING_TAG,
    on_lines=True,
)
WRITING: Final = Writing("<function={}>\n", "</function>", "<parameter={}>\n", "\n</parameter>\n")


class XmlReader(TaggedValuesReader):
    """Reader of what follows ``<function=``."""

    tags = TAGS


def grammar(tools: Sequence[ForcedTool], parallel: bool) -> str:
    """See :class:`~neuron.text.forms.form.CallForm`."""
    return tagged_rules(bodies(tools, WRITING), parallel)


def is_shown(template: str) -> bool:
    """See :class:`~neuron.text.forms.form.CallForm`."""
    return FUNCTION in template


FORM: Final = CallForm("xml", is_shown, XmlReader, grammar, FUNCTION)
