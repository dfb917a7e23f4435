"""The gateway's operations for ``/openapi.json``. A test compares them with the paths that are served."""

from cortex import __version__
from cortex.access.keys import KeyPermissions
from cortex.admin import Acted, DrainAct, FleetReport, ForgetAct, LoadAct, ModelAct, PinAct
from cortex.admin_keys import KeysReport, MadeKey, NewKey, RevokedKey
from cortex.admin_models import FitAct, FitReport, KnownReport, PullAct, Removed
from cortex.admin_usage import UsageReport
from cortex.capture.admin import CaptureReport, NewCapture
from cortex.config import ModelProfile
from cortex.dialects import openapi, registry
from cortex.dialects.openapi import Operation
from cortex.dialects.responses.spec import RESPONSE
from cortex.dialects.schema import COUNT, LIST, OBJECT, TEXT, Schema, object_with
from cortex.fleet.offers import FullOfferList, Offer
from cortex.responses.endpoints import AddItemsBody, CreateBody, UpdateBody
from cortex.wire.node import Health

_DAY: Schema = {"type": "string", "format": "date"}
_PAGE = object_with(object={"const": "list"}, data=LIST, has_more={"type": "boolean"})
_PAGED: dict[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
    "order": {"enum": ["asc", "desc"]},
    "after": TEXT,
}
_DELETED = object_with(id=TEXT, object=TEXT, deleted={"const": True})
_CONVERSATION = object_with(id=TEXT, object={"const": "conversation"}, created_at=COUNT, metadata=OBJECT)
_RESPONSE, _NAMED = "/v1/responses/{response_id}", "/v1/conversations/{conversation_id}"

OPERATIONS = (
    Operation("GET", "/v1/models", "List the models on offer.", object_with(data=LIST)),
    Operation("GET", "/v1/models/{model}", "Describe a model.", Offer),
    Operation(
        "GET",
        _RESPONSE,
        "Return a stored response, or follow one.",
        RESPONSE,
        streams=True,
        query={"stream": {"type": "boolean"}, "starting_after": COUNT},
    ),
    Operation("DELETE", _RESPONSE, "Delete a response.", _DELETED),
    Operation("GET", f"{_RESPONSE}/input_items", "List the input items of a response.", _PAGE, query=_PAGED),
    Operation("POST", f"{_RESPONSE}/cancel", "End a response that is made in the background.", RESPONSE),
    Operation("POST", "/v1/conversations", "Create a conversation.", _CONVERSATION, CreateBody),
    Operation("GET", _NAMED, "Describe a conversation.", _CONVERSATION),
    Operation("POST", _NAMED, "Replace a conversation's metadata.", _CONVERSATION, UpdateBody),
    Operation("DELETE", _NAMED, "Delete a conversation.", _DELETED),
    Operation("GET", f"{_NAMED}/items", "List the items of a conversation.", _PAGE, query=_PAGED),
    Operation("POST", f"{_NAMED}/items", "Add items to a conversation.", _PAGE, AddItemsBody),
    Operation("GET", f"{_NAMED}/items/{{item_id}}", "Return an item.", OBJECT),
    Operation("DELETE", f"{_NAMED}/items/{{item_id}}", "Delete an item.", _CONVERSATION),
    Operation("GET", "/health", "Report the gateway's health.", object_with(state=TEXT, nodes_up=COUNT, nodes=COUNT)),
    Operation("GET", "/version", "Report the version.", openapi.VERSION_ANSWER),
    Operation("GET", "/admin/fleet", "Report the nodes.", FleetReport),
    Operation("GET", "/admin/keys", "Report the keys, their limits and use.", KeysReport),
    Operation("POST", "/admin/keys", "Make a key.", MadeKey, NewKey),
    Operation(
        "PATCH", "/admin/keys/{name}", "Change the permissions and limits of a key.", KeyPermissions, KeyPermissions
    ),
    Operation("DELETE", "/admin/keys/{name}", "Revoke a key.", RevokedKey),
    Operation(
        "GET",
        "/admin/usage",
        "Report the use of each key and model on each day.",
        UsageReport,
        query={"from": _DAY, "to": _DAY, "key": TEXT, "model": TEXT, "by": TEXT},
    ),
    Operation("GET", "/admin/capture", "Report the capture of a key's requests.", CaptureReport),
    Operation("POST", "/admin/capture", "Begin to capture a key's requests.", CaptureReport, NewCapture),
    Operation("DELETE", "/admin/capture", "Remove what was captured.", CaptureReport),
    Operation("POST", "/admin/capture/end", "End the capture, and keep it for a while.", CaptureReport),
    Operation("GET", "/admin/capture/{request_id}", "Return a captured request, whole.", OBJECT),
    Operation("GET", "/admin/models", "List the models, where they are and how they are sampled.", FullOfferList),
    Operation("POST", "/admin/models", "Add a model to the catalogue.", ModelProfile, ModelProfile),
    Operation("GET", "/admin/models/known", "List the models that are known by a short name.", KnownReport),
    Operation("POST", "/admin/models/fit", "Choose a node, and weights that fit there.", FitReport, FitAct),
    Operation("POST", "/admin/models/pull", "Download the files of a model.", Acted, PullAct),
    Operation("DELETE", "/admin/models/{model}", "Remove an added model.", Removed),
    Operation("POST", "/admin/models/load", "Load a model.", Acted, LoadAct),
    Operation("POST", "/admin/models/unload", "Unload a model.", Acted, ModelAct),
    Operation("POST", "/admin/models/forget", "Remove a model from the lists of nodes.", Acted, ForgetAct),
    Operation("POST", "/admin/models/pin", "Pin or unpin a model.", Acted, PinAct),
    Operation("POST", "/admin/nodes/drain", "Drain a node, or end its drain.", Health, DrainAct),
    Operation("POST", "/admin/reload", "Read the configuration again.", OBJECT),
    Operation("GET", openapi.PATH, "Describe the API.", OBJECT),
)


def description() -> bytes:
    """Return the document."""
    return openapi.document("cortex", __version__, (*registry.operations(), *OPERATIONS))
