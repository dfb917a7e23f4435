"""The dialect as a value."""

from cortex.dialects.chat.spec import Chosen
from cortex.dialects.completions import request
from cortex.dialects.dialect import Dialect
from cortex.dialects.schema import COUNT, LIST, OBJECT, TEXT, object_with

COMPLETIONS = Dialect(
    "openai-completions",
    "/v1/completions",
    "Go on with a text.",
    request.PARAMETERS,
    request.decode,
    object_with(id=TEXT, object={"const": "text_completion"}, created=COUNT, model=TEXT, choices=LIST, usage=OBJECT),
    Chosen,
    conversation="prompt",
)
