"""Tools of Anthropic's that clients run: ``bash``, the text editor, ``memory`` and ``computer``.

A request names them by a dated type and sends no schema, since Anthropic's models have learned it; here the model
is offered that schema under the tool's own name. Sources: Anthropic's documentation of the tools and the types of its
SDKs. An unknown later date is read as the newest known one.
"""

import re
from collections.abc import Mapping
from typing import Any

from cortex.wire.request import Tool

_DATED = re.compile(r"(?P<kind>bash|text_editor|memory|computer)_(?P<date>20[0-9]{6})")
_TEXT: dict[str, Any] = {"type": "string"}
_INTEGER: dict[str, Any] = {"type": "integer"}
_POINT: dict[str, Any] = {"type": "array", "items": _INTEGER, "minItems": 2, "maxItems": 2}
_FILE: dict[str, Any] = {
    "path": _TEXT,
    "view_range": {"type": "array", "items": _INTEGER},
    "file_text": _TEXT,
    "old_str": _TEXT,
    "new_str": _TEXT,
    "insert_line": _INTEGER,
}
"""Fields of the tools that edit files."""


def client_tool(type: str | None, name: str | None, settings: Mapping[str, Any]) -> Tool | None:
    """Return the tool of a dated type; ``None`` for any other. ``settings`` describes the screen."""
    dated = _DATED.fullmatch(type or "")
    if dated is None:
        return None
    kind, date = dated["kind"], int(dated["date"])
    match kind:
        case "bash":
            return Tool(name or kind, _BASH, _object({"command": _TEXT, "restart": {"type": "boolean"}}))
        case "text_editor":
            default = "str_replace_editor" if date < 20250429 else "str_replace_based_edit_tool"
            return Tool(name or default, _EDITOR, _editor(date))
        case "memory":
            return Tool(name or kind, _MEMORY, _memory())
        case _:
            return Tool(name or kind, _computer_description(settings), _computer(date))


_BASH = (
    "Run a command in a bash session that lasts: its directory, variables and background processes stay from call to "
    "call. `restart` begins a new session."
)
_EDITOR = (
    "View, create and edit text files. `view` shows a file with line numbers, or of `view_range` only, and lists a "
    "folder; `create` writes `file_text`; `str_replace` puts `new_str` in the place of `old_str`, which must be there "
    "exactly once; `insert` puts text behind line `insert_line`, 0 being the beginning."
)
_MEMORY = (
    "Keep notes in files below /memories, which outlast this conversation; look there first. `view` shows a file or "
    "lists a folder, `create` writes `file_text`, `str_replace` puts `new_str` in the place of `old_str`, `insert` "
    "puts `insert_text` behind line `insert_line`, `delete` removes `path`, `rename` moves `old_path` to `new_path`."
)


def _editor(date: int) -> dict[str, Any]:
    commands = ["view", "create", "str_replace", "insert", *(["undo_edit"] if date < 20250429 else [])]
    inserted = {"insert_text": _TEXT} if date >= 20250728 else {}
    return _object({"command": _one_of(commands)} | _FILE | inserted, "command", "path")


def _memory() -> dict[str, Any]:
    commands = ["view", "create", "str_replace", "insert", "delete", "rename"]
    moved = {"insert_text": _TEXT, "old_path": _TEXT, "new_path": _TEXT}
    return _object({"command": _one_of(commands)} | _FILE | moved, "command")


def _computer(date: int) -> dict[str, Any]:
    actions = [
        *("key", "type", "mouse_move", "left_click", "left_click_drag", "right_click", "middle_click", "double_click"),
        *("screenshot", "cursor_position"),
    ]
    fields: dict[str, Any] = {"action": {"type": "string"}, "coordinate": _POINT, "text": _TEXT}
    if date >= 20250124:
        actions += ["left_mouse_down", "left_mouse_up", "scroll", "hold_key", "wait", "triple_click"]
        fields |= {
            "start_coordinate": _POINT,
            "scroll_direction": _one_of(["up", "down", "left", "right"]),
            "scroll_amount": _INTEGER,
            "duration": {"type": "number"},
        }
    if date >= 20251124:
        actions.append("zoom")
        fields["region"] = {"type": "array", "items": _INTEGER, "minItems": 4, "maxItems": 4}
    fields["action"] = _one_of(actions)
    return _object(fields, "action")


def _computer_description(settings: Mapping[str, Any]) -> str:
    width, height = settings.get("display_width_px"), settings.get("display_height_px")
    size = f" The screen is {width} pixels wide and {height} high." if width and height else ""
    return (
        "Use a computer by its screen, mouse and keyboard. `screenshot` shows the screen; clicks and moves take a "
        "`coordinate` of two pixels from the upper left; `key` and `type` take `text`, as `hold_key` does." + size
    )


def _one_of(texts: list[str]) -> dict[str, Any]:
    return {"type": "string", "enum": texts}


def _object(fields: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required)}
