"""The headers by which our processes and clients are told what a body has no place for."""

IGNORED = b"x-cortex-ignored"
"""Of an answer: the paths of what the request has and nobody here knows, and of tools that cannot run here."""

MODEL_NAME = b"x-cortex-model-name"
"""Of a request to a node: the name by which the client asked for the model, percent-encoded; the answer says it."""

OMITTED_PARTS = b"x-cortex-omitted-parts"
"""Of an answer: how many parts of earlier turns the model was told of instead of shown."""

TOLD = (IGNORED, OMITTED_PARTS)
"""Those of a node's answer that go on to the client."""
