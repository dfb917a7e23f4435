"""The calls of custom tools, which a model makes as calls of a function with one string, the tool's input."""

import msgspec


class _Arguments(msgspec.Struct):
    input: str


_ARGUMENTS = msgspec.json.Decoder(_Arguments)


def custom_input(arguments: str) -> str:
    """Return the input within the arguments; all of them if the model, or its limit, broke the form."""
    try:
        return _ARGUMENTS.decode(arguments).input
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return arguments
