"""The meaning of what a person calls a model: an id, an alias, a name of the known models, a source.

Pure. A source is ``hf:OWNER/NAME[@REVISION][:TAG]``, ``pypi:PACKAGE==VERSION`` or a path on a node.
"""

import difflib
import pathlib
import re
from collections.abc import Mapping

import msgspec

from cortex.config import ModelProfile
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.router import offered_profile
from cortex.fleet.state import FleetState
from cortex.known_models import KnownModel
from cortex.wire.errors import InvalidRequestError, ModelNotFoundError

SCHEMES = ("hf:", "pypi:")
PATHS = ("/", "./", "../", "~")
_HUB = re.compile(r"hf:(?:[\w.-]+)/(?P<name>[\w.-]+)(?:@[\w./-]+)?(?P<choice>:[\w./-]+)?")
_WHEEL = re.compile(r"pypi:(?P<name>[A-Za-z0-9._-]+)==[A-Za-z0-9._+!-]+(?::[\w./-]+)?")
_SUFFIX = re.compile(r"[-_.](?:gguf|ggml)$", re.IGNORECASE)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?::[\w./-]+)?")
MAX_ID = 128
MAX_MATCHES = 3


def find(name: str, catalogue: Catalogue, state: FleetState, known: Mapping[str, KnownModel]) -> ModelProfile | None:
    """Return the model of the catalogue or of a node that a name or a source means; ``None`` if it is a new one.

    An alias with a ``*`` matches what means nothing else, so neither a source nor a known model.
    """
    model = catalogue.resolve(name)
    is_new = name.startswith((*SCHEMES, *PATHS)) or name.partition(":")[0].lower() in known
    if model not in catalogue.profiles and not is_new and (prefixed := catalogue.match(name)) is not None:
        model = prefixed
    if model in catalogue.profiles:
        return catalogue.profiles[model]
    if catalogue.admits(model) and (listed := offered_profile(state, model)) is not None:
        return listed
    return next((each for each in catalogue.profiles.values() if _is_of(each.source, name)), None)


def describe(name: str, known: Mapping[str, KnownModel], new_id: str = "") -> ModelProfile:
    """Return the profile of a new model, whose weights are not chosen yet.

    Raises:
        ModelNotFoundError: it is neither a source nor a known model; the message has what is alike.
        InvalidRequestError: the source has no valid form, or makes no id.
    """
    short, _, tag = name.partition(":")
    if (found := known.get(short.lower())) is not None and not name.startswith(SCHEMES):
        profile = found.profile(tag)
    elif name.startswith((*SCHEMES, *PATHS)):
        profile = ModelProfile(id=_id_of(name), source=name)
    else:
        raise ModelNotFoundError(_unknown(name, known), param="model")
    return msgspec.structs.replace(profile, id=new_id) if new_id else profile


def with_choice(source: str, choice: str) -> str:
    """Return the source that names one choice of a repository; any other source as it is."""
    match = _HUB.fullmatch(source)
    return f"{source}:{choice}" if match and not match["choice"] and choice else source


def repository(source: str) -> str:
    """Return a source without its choice."""
    match = _HUB.fullmatch(source)
    return source.removesuffix(match["choice"]) if match and match["choice"] else source


def _is_of(source: str, name: str) -> bool:
    """Return whether ``name`` is a source, or one without its choice."""
    return name in {source, repository(source)} and name.startswith((*SCHEMES, *PATHS))


def _id_of(source: str) -> str:
    """Return the id of a model that has only a source: the name of the repository, the package or the file."""
    match = _HUB.fullmatch(source) or _WHEEL.fullmatch(source)
    if match is None and source.startswith(SCHEMES):
        raise InvalidRequestError(
            f"'{source}' is neither hf:OWNER/NAME[@REVISION][:TAG or FILE] nor pypi:NAME==VERSION[:FILE].",
            param="model",
        )
    name = match["name"] if match else pathlib.PurePath(source).name
    name = _SUFFIX.sub("", name)
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:MAX_ID]
    if not found:
        raise InvalidRequestError(f"'{source}' makes no name for a model; give it one as 'id'.", param="id")
    return found


def _unknown(name: str, known: Mapping[str, KnownModel]) -> str:
    if _REPOSITORY.fullmatch(name):
        return f"There is no model {name!r} here; for a repository of Hugging Face write hf:{name}."
    alike = difflib.get_close_matches(name.lower(), known, MAX_MATCHES, 0.5)
    hint = f"did you mean {', '.join(alike)}? " if alike else ""
    return (
        f"There is no model {name!r}: {hint}`cortex search` lists what is known; a source is hf:OWNER/NAME, "
        "pypi:NAME==VERSION or a path."
    )
