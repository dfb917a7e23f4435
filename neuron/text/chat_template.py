"""Chat templates: compiled in the environment they are written for, and what of their own text they hold.

The environment is that of the field's reference implementation: blocks trimmed, loop controls, a sandbox, ``tojson``
that does not escape for HTML, ``raise_exception``, ``strftime_now``, and ``{% generation %}``, which marks what a model
is trained on and renders as what it encloses.
"""

import datetime
import json
import re
from collections.abc import Callable
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from neuron.errors import TemplateError

NONCHARACTERS: Final = "".join(map(chr, range(0xFDD0, 0xFDF0)))
"""Code points that Unicode keeps for use within a program. ``tojson`` leaves them as they are, always."""


class ChatTemplate:
    """A compiled chat template. ``literals`` is the text that it may write itself, in pieces separated by ``NUL``."""

    def __init__(self, source: str) -> None:
        """Compile it. Raises :class:`TemplateError`."""
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"The chat template has a syntax error in line {error.lineno}: {error.message}."
            ) from None
        written = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
        written |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        self.literals = "\0".join(sorted(written))

    def render(self, **arguments: Any) -> str:
        """Render it; what it raises is up to its author."""
        return self._template.render(**arguments)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``, which is its body."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without attributes of the interpreter's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} is no name for a template to set")
        super().__setitem__(name, value)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a model to read: jinja's own filter would escape it for HTML."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(_escaped, text) if ensure_ascii else text


_NOT_ASCII: Final = re.compile(rf"[^\x00-\x7f{NONCHARACTERS}]")
_escaped: Final[Callable[[re.Match[str]], str]] = lambda found: json.dumps(found[0])[1:-1]  # noqa: E731


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
