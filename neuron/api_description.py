"""Description of the API for ``/openapi.json``. A test compares it with the served paths."""

from cortex.dialects import openapi, registry
from cortex.dialects.model_list import ListedModel
from cortex.dialects.openapi import Operation
from cortex.dialects.schema import LIST, OBJECT, object_with
from cortex.wire.node import (
    Discovery,
    DrainRequest,
    Endpoint,
    Fit,
    ForgetRequest,
    Health,
    LoadRequest,
    ModelList,
    ModelSpec,
    ModelStatus,
    PinRequest,
    UnloadRequest,
)
from neuron import __version__

OPERATIONS = (
    Operation("GET", "/v1/models", "List the models.", object_with(data=LIST)),
    Operation("GET", "/v1/models/{model}", "Describe a model.", ListedModel),
    Operation("GET", "/discovery", "Say what this host is.", Discovery),
    Operation("GET", "/health", "Say whether requests are taken.", Health),
    Operation("GET", "/version", "Say which version this is.", openapi.VERSION_ANSWER),
    Operation("GET", "/metrics", "Report figures to Prometheus.", None),
    Operation("GET", "/models", "List the models and their states.", ModelList),
    Operation("POST", "/models/load", "Load a model.", ModelStatus, LoadRequest),
    Operation("POST", "/models/fit", "Choose the weights of a repository that fit this node.", Fit, ModelSpec),
    Operation("POST", "/models/pull", "Download the files of a model.", ModelStatus, ModelSpec),
    Operation("POST", "/models/unload", "Unload a model.", ModelStatus, UnloadRequest),
    Operation("POST", "/models/forget", "Take a model that is not loaded off the list.", ModelStatus, ForgetRequest),
    Operation("POST", "/models/pin", "Pin a model, or let go of it.", ModelStatus, PinRequest),
    Operation("POST", "/drain", "Take no more requests, or take them again.", Health, DrainRequest),
    Operation("GET", "/models/{model}/endpoint", "Say where a model is served.", Endpoint),
    Operation("GET", openapi.PATH, "Describe all this.", OBJECT),
)


def description() -> bytes:
    """Return the document."""
    return openapi.document("neuron", __version__, (*registry.operations(), *OPERATIONS))
