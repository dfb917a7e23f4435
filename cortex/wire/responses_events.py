"""The event names of a Responses stream: OpenAI's, in the order in which a stream may show them.

Reasoning has OpenAI's names too. The Open Responses specification calls the raw ones ``response.reasoning.delta`` and
``response.reasoning.done``, on which OpenAI's own stream helpers give up.
"""

from enum import StrEnum


class ResponsesEvent(StrEnum):
    """The name of an event, which its payload repeats as ``type``."""

    CREATED = "response.created"
    IN_PROGRESS = "response.in_progress"
    OUTPUT_ITEM_ADDED = "response.output_item.added"
    CONTENT_PART_ADDED = "response.content_part.added"
    REASONING_TEXT_DELTA = "response.reasoning_text.delta"
    REASONING_TEXT_DONE = "response.reasoning_text.done"
    REASONING_SUMMARY_PART_ADDED = "response.reasoning_summary_part.added"
    REASONING_SUMMARY_TEXT_DELTA = "response.reasoning_summary_text.delta"
    REASONING_SUMMARY_TEXT_DONE = "response.reasoning_summary_text.done"
    REASONING_SUMMARY_PART_DONE = "response.reasoning_summary_part.done"
    OUTPUT_TEXT_DELTA = "response.output_text.delta"
    OUTPUT_TEXT_DONE = "response.output_text.done"
    FUNCTION_CALL_ARGUMENTS_DELTA = "response.function_call_arguments.delta"
    FUNCTION_CALL_ARGUMENTS_DONE = "response.function_call_arguments.done"
    CUSTOM_TOOL_CALL_INPUT_DELTA = "response.custom_tool_call_input.delta"
    CUSTOM_TOOL_CALL_INPUT_DONE = "response.custom_tool_call_input.done"
    CONTENT_PART_DONE = "response.content_part.done"
    OUTPUT_ITEM_DONE = "response.output_item.done"
    COMPLETED = "response.completed"
    INCOMPLETE = "response.incomplete"
    ERROR = "error"
    FAILED = "response.failed"


DELTAS = frozenset(
    {
        ResponsesEvent.REASONING_TEXT_DELTA,
        ResponsesEvent.REASONING_SUMMARY_TEXT_DELTA,
        ResponsesEvent.OUTPUT_TEXT_DELTA,
        ResponsesEvent.FUNCTION_CALL_ARGUMENTS_DELTA,
        ResponsesEvent.CUSTOM_TOOL_CALL_INPUT_DELTA,
    }
)
"""The events that carry generated content."""

LAST = frozenset({ResponsesEvent.COMPLETED, ResponsesEvent.INCOMPLETE, ResponsesEvent.FAILED})
"""The events that end a stream and carry the whole response."""
