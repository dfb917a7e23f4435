"""JSON schemas of answers, by the members that clients rely on."""

from typing import Any

Schema = dict[str, Any]


def object_with(**fields: Schema) -> Schema:
    """Return the schema of an object with at least these members."""
    return {"type": "object", "required": list(fields), "properties": fields}


TEXT: Schema = {"type": "string"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
LIST: Schema = {"type": "array"}
OBJECT: Schema = {"type": "object"}
