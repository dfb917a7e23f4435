"""Tables of the members of a request body: honoured, refused, without effect, or unknown.

A dialect has one table. Honoured members are those of the struct that bodies are decoded into; the table adds members
without effect, members that are refused unless their value asks for the default, and limits of lists. From it comes
the first reading of every body, by compiled code in one pass: whether it is JSON, whether it is too large, and which
members are unknown. Unknown members are reported to the client, or refused for a strict key.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

from cortex._fast.peek import MAX_REFUSED, KnownNames, Peek, PeekError, PeekLimitError, PeekTypeError, peek
from cortex.dialects import fields
from cortex.wire.errors import (
    InvalidJsonError,
    InvalidTypeError,
    TooDeepError,
    TooManyItemsError,
    UnknownParameterError,
    UnsupportedParameterError,
)
from cortex.wire.headers import IGNORED

Body = TypeVar("Body", bound=msgspec.Struct)


MAX_VALUES = 500_000
"""Values in one body: strings, numbers, objects and lists. A million lists held an event loop for 0.34 s."""

MAX_MEMBERS = 10_000
"""Members of any one object in a body."""

OPEN_SERVERS: Mapping[str, tuple[object, ...]] = {
    # vLLM
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "best_of": (1,),
    "cache_salt": ("",),
    "chat_template": ("",),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "structural_tag": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # SGLang
    "custom_logit_processor": (),
    "custom_params": ({},),
    "input_embeds": (),
    "lora_path": (),
    "return_hidden_states": (False,),
    "separate_reasoning": (True,),
    "session_params": ({},),
    "stop_regex": ([],),
    "stream_reasoning": (True,),
    # llama.cpp
    "cache_prompt": (True,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "image_data": ([],),
    "lora": ([],),
    "min_keep": (0,),
    "mirostat": (0,),
    "n_indent": (0,),
    "n_probs": (0,),
    "penalty_prompt": (),
    "post_sampling_probs": (False,),
    "return_tokens": (False,),
    "samplers": (),
    "system_prompt": (),
    "t_max_predict_ms": (0, -1),
    "tfs_z": (1,),
    "timings_per_token": (False,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "typical": (1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
    # LM Studio
    "draft_model": (),
    "ttl": (),
}
"""Members that other servers of open-weight models honour and this one does not, each with its harmless values; null is
always harmless."""

OPEN_SERVERS_WITHOUT_EFFECT = (
    "dry_allowed_length dry_base dry_penalty_last_n dry_sequence_breakers dynatemp_exponent guided_decoding_backend "
    "id_slot mirostat_eta mirostat_tau n_discard n_keep request_id rid spaces_between_special_tokens xtc_threshold"
)
"""Members of other servers without effect: details of a refused member, or of the computation."""

_INDEX = re.compile(r"\[\d+\]")
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(eq=False)
class _Object:
    """The members that an object may have; ``None`` for a member whose value is not examined."""

    members: dict[str, "_Object | None"] = field(default_factory=dict)
    is_open: bool = False
    max_items: int = 0


class Parameters(Generic[Body]):
    """The table of one dialect."""

    def __init__(
        self,
        body: type[Body],
        *,
        items: Mapping[str, type[msgspec.Struct]] | None = None,
        without_effect: Mapping[str, str] | None = None,
        refused: Mapping[str, tuple[object, ...]] | None = None,
        max_items: Mapping[str, int] | None = None,
        max_values: int = MAX_VALUES,
    ) -> None:
        """Make the table of bodies that are decoded into ``body``.

        Paths have dots and no indices; the empty path is the body. ``items`` gives the types of raw members,
        ``without_effect`` has names by path, separated by spaces, ``refused`` top-level names with their harmless
        values, ``max_items`` the limits of lists.
        """
        self.body = body
        objects: dict[type, _Object] = {}
        self._root = _object_of(msgspec.inspect.type_info(body), objects) or _Object()
        for path, struct in (items or {}).items():
            parent, name = self._parent(path)
            parent.members[name] = _object_of(msgspec.inspect.type_info(struct), objects)
        for path, names in (without_effect or {}).items():
            found = self._find(path)
            assert found is not None, path
            for name in names.split():
                found.members.setdefault(name, None)
        self._refused = dict(refused or {})
        assert len(self._refused) <= MAX_REFUSED, "the compiled reader would drop the last of them"
        for name in self._refused:
            assert name not in self._root.members, name
            self._root.members[name] = None
        for path, most in (max_items or {}).items():
            parent, name = self._parent(path)
            child = parent.members[name]
            if child is None:
                child = parent.members[name] = _Object(is_open=True)
            child.max_items = most
        self.names = self._compile(max_values)

    def read(self, body: bytes) -> Peek:
        """Return the members that a body is routed by, and the unknown members.

        Raises:
            InvalidJsonError: the body is not a JSON object.
            InvalidTypeError: a member for routing has the wrong type.
            TooManyItemsError: the body has too many items or members.
            TooDeepError: the body is nested too deeply.
        """
        try:
            return peek(body, self.names)
        except PeekTypeError as error:
            raise InvalidTypeError(f"Invalid type: {error.reason}.", param=error.field) from None
        except PeekLimitError as error:
            where = f"'{error.path}'" if error.path else "the request body"
            if error.is_depth:
                raise TooDeepError(
                    f"Too deeply nested: more than {error.limit} levels of lists and objects in {where}.",
                    param=error.path or None,
                ) from None
            raise TooManyItemsError(
                f"Too many items in {where}: at most {error.limit} are taken.", param=error.path or None
            ) from None
        except PeekError as error:
            raise InvalidJsonError(f"The request body is not valid JSON: {error}.") from None

    def decode(self, body: bytes) -> tuple[Body, tuple[str, ...]]:
        """Return a body as its struct, and the paths of unknown members.

        Raises:
            InvalidRequestError: as :meth:`read`, :meth:`refuse` and :func:`cortex.dialects.fields.decode`.
        """
        found = self.read(body)
        self.refuse(body, found)
        return fields.decode(body, self.body), found.unknown

    def refuse(self, body: bytes, found: Peek) -> None:
        """Raise :class:`UnsupportedParameterError` for a refused member with a value that is not harmless."""
        if not found.refused:
            return
        given = _FIELDS.decode(body)
        for name in found.refused:
            try:
                value = msgspec.json.decode(given[name])
            except RecursionError:
                value = ...  # no harmless value is so deep
            if value is not None and not any(_is_same(value, neutral) for neutral in self._refused[name]):
                raise UnsupportedParameterError(
                    f"Unsupported parameter: '{name}' is not supported here; leave it out.", param=name
                )

    def unknown(self, path: str) -> UnknownParameterError:
        """Return the refusal of an unknown member, with the closest known name."""
        parent_path, _, name = path.rpartition(".")
        parent = self._find(_INDEX.sub("", parent_path))
        near = difflib.get_close_matches(name, list(parent.members), 1, 0.75) if parent is not None else []
        meant = f" Did you mean '{parent_path}.{near[0]}'?" if near and parent_path else ""
        if near and not parent_path:
            meant = f" Did you mean '{near[0]}'?"
        return UnknownParameterError(f"Unknown parameter: '{path}'.{meant}", param=path)

    def _find(self, path: str) -> _Object | None:
        found: _Object | None = self._root
        for name in path.split(".") if path else ():
            found = None if found is None else found.members.get(name)
        return found

    def _parent(self, path: str) -> tuple[_Object, str]:
        parent_path, _, name = path.rpartition(".")
        parent = self._find(parent_path)
        assert parent is not None, path
        return parent, name

    def _compile(self, max_values: int) -> KnownNames:
        """Number the reachable objects, and encode them for the compiled reader."""
        numbers: dict[int, int] = {}
        order: list[_Object] = []
        waiting = [self._root]
        while waiting:
            one = waiting.pop()
            if id(one) not in numbers:
                numbers[id(one)] = len(order)
                order.append(one)
                waiting += [child for child in one.members.values() if child is not None]
        rows: list[tuple[Mapping[str, tuple[int | None, bool]] | None, int]] = [
            (
                None
                if one.is_open
                else {
                    name: (None if child is None else numbers[id(child)], one is self._root and name in self._refused)
                    for name, child in one.members.items()
                },
                one.max_items,
            )
            for one in order
        ]
        return KnownNames(rows, max_values, MAX_MEMBERS)


def _object_of(kind: msgspec.inspect.Type, known: dict[type, _Object]) -> _Object | None:
    """Return the members of a type, or of a list's items; ``None`` if they are not examined."""
    match kind:
        case msgspec.inspect.StructType():
            if kind.cls not in known:
                known[kind.cls] = entry = _Object()
                entry.members = {field.encode_name: _object_of(field.type, known) for field in kind.fields}
                if kind.tag_field is not None:
                    entry.members[kind.tag_field] = None
            return known[kind.cls]
        case msgspec.inspect.UnionType():
            found = [one for one in (_object_of(each, known) for each in kind.types) if one is not None]
            if any(isinstance(each, msgspec.inspect.DictType | msgspec.inspect.AnyType) for each in kind.types):
                return None
            if len(found) < 2:
                return found[0] if found else None
            merged = _Object()
            for one in found:
                merged.members |= one.members
            return merged
        case msgspec.inspect.CollectionType():
            return _object_of(kind.item_type, known)
    return None


def _is_same(value: object, neutral: object) -> bool:
    """Return whether two JSON values are the same; true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


MAX_NAMES = 16
MAX_NAME_CHARS = 80


def ignored_header(names: Iterable[str]) -> bytes:
    """Return the names as a header value: without repetitions, in printable ASCII, at most ``MAX_NAMES``."""
    shown: list[str] = []
    for name in names:
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "_-.[]=?") else "?" for c in name)[:MAX_NAME_CHARS]
        if plain and plain not in shown:
            shown.append(plain)
    if len(shown) > MAX_NAMES:
        shown[MAX_NAMES:] = ["..."]
    return ", ".join(shown).encode()


def forwarded_header(name: bytes, value: bytes) -> str:
    """Return the value of a node's header as the client gets it: text that cannot end a header."""
    if name == IGNORED:
        return ignored_header(one.strip() for one in value.decode("latin-1").split(",")).decode()
    return value.decode() if value.isdigit() and len(value) < 10 else "0"


def add_header(headers: dict[bytes, bytes], name: bytes, value: bytes) -> None:
    """Set the header ``name`` of an answer; ignored names are added to those that it has."""
    if name == IGNORED and name in headers:
        value = headers[name] + b"," + value
    headers[name] = forwarded_header(name, value).encode()
