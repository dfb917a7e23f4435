"""The headers by which our processes and clients are told what a body has no place for."""

import urllib.parse

IGNORED = b"x-cortex-ignored"
"""Of an answer: the paths of what the request has and nobody here knows, and of tools that cannot run here."""

MODEL_NAME = b"x-cortex-model-name"
"""Of a request to a node: the name by which the client asked for the model, percent-encoded; the answer says it."""

MAX_MODEL_NAME_BYTES = 1024
"""Of the header's value; a longer name is not told, and the answer has the model's own."""

OMITTED_PARTS = b"x-cortex-omitted-parts"
"""Of an answer: how many parts of earlier turns the model was told of instead of shown."""


TOLD = (IGNORED, OMITTED_PARTS)
"""Those of a node's answer that go on to the client."""


def model_name_headers(name: str, model: str) -> tuple[tuple[bytes, bytes], ...]:
    """Return the header that tells a node by which ``name`` its ``model`` was asked for; none if that is its own."""
    if name == model:
        return ()
    value = urllib.parse.quote(name, safe="/:@+", errors="replace").encode()
    return ((MODEL_NAME, value),) if len(value) <= MAX_MODEL_NAME_BYTES else ()


def told_model_name(value: bytes | None, model: str) -> str:
    """Return the name that an answer gives to ``model``, from what the header says."""
    if not value or len(value) > MAX_MODEL_NAME_BYTES:
        return model
    return urllib.parse.unquote(value.decode("latin-1")) or model
