"""The dialect as a value."""

from cortex.dialects.dialect import Dialect, JsonObject, WholeAnswer
from cortex.dialects.embeddings import request
from cortex.dialects.schema import LIST, OBJECT, TEXT, object_with


class _Embedded(WholeAnswer, frozen=True):
    data: tuple[JsonObject, ...]


EMBEDDINGS = Dialect(
    "openai-embeddings",
    "/v1/embeddings",
    "Embed texts.",
    request.PARAMETERS,
    request.decode,
    object_with(object={"const": "list"}, data=LIST, model=TEXT, usage=OBJECT),
    _Embedded,
    conversation="input",
    streams=False,
    generates=False,
)
