"""Fuzz chat templates: ``python tests/fuzz/fuzz_template.py [tests/fuzz/corpus/template]``.

An input is a template. A model with it is refused with 422, or a conversation is rendered, or refused as the client's.
"""

import pathlib
import random
import sys

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))

from text_fuzz import Texts

from cortex.wire.errors import ApiError
from cortex.wire.request import InferenceRequest, Message, Role, Tool, ToolCall

PIECES = [
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ messages }}", "{% if tools %}", "{% endif %}",
    "{{ tools | tojson(indent=2) }}", "{% set ns = namespace(a=1) %}", "{% set ns.a = ns.a + 1 %}", "{% generation %}",
    "{% endgeneration %}", "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{% macro f(x) %}",
    "{% endmacro %}", "{{ f(1) }}", "{{ 'a' * 10 ** 9 }}", "{{ range(10 ** 6) | list }}", "{% for i in range(9999) %}",
    "{{ 9 ** 9 ** 9 }}", "{{ ''.__class__.__mro__ }}", "{{ messages[0]['content'].format(messages) }}", "{{ x.y.z }}",
    "{%- break -%}", "{{ '%s' % bos_token }}", "<think>", "<|im_end|>", "{{", "%}", "{#", "\ud7ff", "\x00", "{% raw %}",
    "{{ m.tool_calls | map(attribute='function') | list }}", "{{ 1 / 0 }}", "{% include 'a' %}", "{{ self }}",
    "{{ ('a' * 99999) | replace('', 'b' * 9999) }}", "{{ messages | length }}", "{{ m.content | center(10 ** 9) }}",
]  # fmt: skip
CHAT = InferenceRequest(
    "m",
    messages=(
        Message(Role.SYSTEM, "s"),
        Message(Role.USER, "u"),
        Message(Role.ASSISTANT, "", tool_calls=(ToolCall("c", "f", '{"a": 1}'),)),
        Message(Role.TOOL, "t", tool_call_id="c"),
    ),
    tools=(Tool("f", "d", {"type": "object"}),),
)


def mutate(_data: bytes, max_size: int, seed: int) -> bytes:
    """Return a new template."""
    chance = random.Random(seed)
    return "".join(chance.choices(PIECES, k=chance.randrange(1, 16))).encode()[:max_size]


def one_input(data: bytes) -> None:
    """Check one template."""
    (TEXT.folder / "chat_template.jinja").write_bytes(data)
    try:
        model = TEXT.open()
    except ApiError as error:
        assert error.info().status == 422, error.info()
        return
    TEXT.check(model.build(CHAT, 1 << 14))
    model.close()


if __name__ == "__main__":
    TEXT = Texts()
    atheris.Setup([sys.argv[0], "-max_len=16384", *sys.argv[1:]], one_input, custom_mutator=mutate)
    atheris.Fuzz()
