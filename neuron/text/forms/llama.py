"""Calls of Llama: ``{"name": ..., "parameters": {...}}`` where the answer begins, or after ``<|python_tag|>``.

Several are separated by semicolons.
"""

from collections.abc import Sequence
from typing import Final

from neuron.text.forms.form import CallForm, ForcedTool, Piece
from neuron.text.forms.json_calls import START, JsonReader, object_rule

PYTHON_TAG: Final = "<|python_tag|>"


class LlamaReader(JsonReader):
    """Reader of calls without a closing tag."""

    def _between(self, pieces: list[Piece]) -> bool:
        body = self._pending.lstrip()
        if not body:
            return False
        if body[0] in ";,":
            return self._go(self._between, body[1:])
        if body[0] == "{":
            self._opened = ""
            return self._go(self._begin, body)
        return self._end(body)


def grammar(tools: Sequence[ForcedTool], parallel: bool) -> str:
    """See :class:`~neuron.text.forms.form.CallForm`."""
    names, more = " | ".join(f"call_{index}" for index in range(len(tools))), ' ("; " call)*' if parallel else ""
    rules = "".join(f"call_{index}: {object_rule(tool, 'parameters')}" for index, tool in enumerate(tools))
    return f"calls: call{more}\ncall: {names}\n{rules}"


def is_shown(template: str) -> bool:
    """See :class:`~neuron.text.forms.form.CallForm`."""
    return START not in template and (PYTHON_TAG in template or "<|start_header_id|>" in template)


FORM: Final = CallForm("llama", is_shown, LlamaReader, grammar, PYTHON_TAG, bare="{")
