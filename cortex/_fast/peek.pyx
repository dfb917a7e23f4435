"""Finds what routing needs in a JSON body, and proves that the rest of it is JSON, without building any of it.

A gateway reads five fields of a body that may be megabytes of conversation and passes the bytes on as they are.
Refuses what orjson refuses (a node decodes the same bytes with it), documents that are not an object, and those with
more values, members, items or levels than are taken. In the same pass it lists the members that no dialect has.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.math cimport isinf
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, strlen

from cortex._fast.buffer cimport Buffer, put

cdef extern from "Python.h":
    double PyOS_string_to_double(const char* text, char** end, void* overflow) except? -1.0

cdef extern from "json_validate.h":
    enum:
        JSON_ABSENT, JSON_STRING, JSON_TRUE, JSON_FALSE, JSON_NULL
        JSON_MAX_DEPTH, JSON_MAX_NAME, JSON_MAX_REFUSED
    ctypedef struct json_wanted:
        const char* name
        size_t name_length
        int kind
        int escaped
        const uint8_t* start
        const uint8_t* end
    ctypedef struct json_fault:
        const char* reason
        const uint8_t* at
        size_t limit
        int is_depth
    ctypedef struct json_name:
        const char* name
        uint16_t length
        uint16_t object
        uint8_t is_refused
    ctypedef struct json_object:
        uint16_t* by_length
        uint8_t is_open
        uint32_t max_items
    ctypedef struct json_known:
        const json_object* objects
        const json_name* names
        size_t max_values
        size_t max_members
    ctypedef struct json_found:
        int num_unknown
        int is_cut
        int num_refused
        json_name** refused
        size_t length
        char* paths
        char* limited
    ctypedef int (*json_is_finite)(const uint8_t* p, const uint8_t* end) noexcept
    json_fault json_check_object(
        const uint8_t* start, const uint8_t* end, json_is_finite is_finite, json_wanted* wanted, int num_wanted,
        const json_known* known, json_found* found)
    size_t json_unescape(const uint8_t* p, const uint8_t* end, uint8_t* out, size_t room)

MAX_DEPTH = JSON_MAX_DEPTH
MAX_REFUSED = JSON_MAX_REFUSED

cdef enum:
    MODEL, STREAM, PREVIOUS_RESPONSE_ID, PROMPT_CACHE_KEY, STORE, BOUNDS
    NUM_WANTED = BOUNDS + 7

# The members that bound a request's answers, in number and in length, and the prompts of a text completion.
cdef (const char*)[7] BOUND_NAMES = [
    b"max_tokens", b"max_completion_tokens", b"max_output_tokens", b"n_predict", b"n", b"best_of", b"prompt"
]


class PeekError(ValueError):
    """The body is not a JSON object. ``reason`` says what is wrong at byte ``offset``."""

    def __init__(self, reason, offset):
        super().__init__(f"{reason} (at byte {offset})")
        self.reason = reason
        self.offset = offset


class PeekTypeError(PeekError):
    """The body is a JSON object whose ``field`` has the wrong type."""

    def __init__(self, field, reason, offset):
        super().__init__(reason, offset)
        self.field = field


class PeekLimitError(PeekError):
    """The body is JSON as far as it was read, and has more than ``limit`` items at ``path``; empty: in all.

    Of levels, where ``is_depth``.
    """

    def __init__(self, path, limit, reason, offset, is_depth=False):
        super().__init__(reason, offset)
        self.path = path
        self.limit = limit
        self.is_depth = is_depth


@cython.final
cdef class KnownNames:
    """The members that a body and the objects in it may have, and how many values and items it may have.

    ``objects`` has the names of each object in turn, the body's first. A name maps to the place in ``objects`` of what
    its value may be, or of whose items, and to whether a body with it may be refused; ``None`` stands for a value that
    is not checked. An entry of ``objects`` is that mapping, ``None`` where any member may be, and the most items
    that a list in the object's place may have, 0 for any number.
    """

    cdef json_object* objects
    cdef json_name* names
    cdef json_known known
    cdef list kept  # what the names point to

    def __cinit__(self, list objects not None, size_t max_values, size_t max_members):
        cdef Py_ssize_t num_names = 0, at = 0, number, length
        cdef json_object* entry
        cdef bytes text
        for names, _ in objects:
            num_names += len(names or ())
        if len(objects) >= 65535 or num_names >= 65535:
            raise ValueError("too many names")
        self.kept = []
        self.objects = <json_object*>calloc(len(objects) + 1, sizeof(json_object))
        self.names = <json_name*>calloc(num_names + 1, sizeof(json_name))
        if self.objects == NULL or self.names == NULL:
            raise MemoryError
        for number, (names, max_items) in enumerate(objects):
            entry = &self.objects[number + 1]
            entry.is_open = names is None
            entry.max_items = max_items
            encoded = sorted((len(name.encode()), name.encode(), other) for name, other in (names or {}).items())
            for length in range(JSON_MAX_NAME + 2):
                entry.by_length[length] = <uint16_t>(at + sum(1 for size, _, _ in encoded if size < length))
            for size, text, (child, is_refused) in encoded:
                if size > JSON_MAX_NAME:
                    raise ValueError(f"the name {text!r} is too long")
                self.kept.append(text)
                self.names[at].name = PyBytes_AS_STRING(text)
                self.names[at].length = <uint16_t>size
                self.names[at].object = 0 if child is None else <uint16_t>(child + 1)
                self.names[at].is_refused = is_refused
                at += 1
        self.known.objects = self.objects
        self.known.names = self.names
        self.known.max_values = max_values
        self.known.max_members = max_members

    def __dealloc__(self):
        free(self.objects)
        free(self.names)


_ANY = KnownNames([(None, 0)], 1 << 62, (1 << 32) - 1)


@cython.final
@cython.freelist(16)
cdef class Peek:
    """The top-level fields of a body by which it is routed.

    ``model_start`` and ``model_end`` bound the value of ``model``, its quotes included; both are -1 if it is absent.
    ``stores`` is false only where ``store`` is. ``bounds`` is an object of the members that bound the answers, as they
    are. ``unknown`` has the paths of unknown members, each once, in
    plain ASCII; the last is ``...`` where there are more. ``refused`` has the top-level names that may be refused.
    """

    def __repr__(self):
        return (
            f"Peek(model={self.model!r}, stream={self.stream}, previous_response_id={self.previous_response_id!r}, "
            f"prompt_cache_key={self.prompt_cache_key!r}, stores={self.stores}, unknown={self.unknown!r}, "
            f"refused={self.refused!r})"
        )


def peek(bytes body not None, KnownNames known not None=_ANY):
    """Return the fields that route ``body``, and what ``known`` says of the others.

    Of a key given twice the last counts. Raises :exc:`PeekError` unless ``body`` is one JSON object in UTF-8,
    :exc:`PeekLimitError` if it has more values or items than ``known`` takes or levels than ``MAX_DEPTH``, and
    :exc:`PeekTypeError` unless ``model`` is a string, ``stream`` a boolean or null and the other two strings or null,
    where they are present.
    """
    cdef json_wanted wanted[NUM_WANTED]
    cdef const uint8_t* start = <const uint8_t*>PyBytes_AS_STRING(body)
    cdef json_fault fault
    cdef json_found details
    cdef Peek found
    cdef json_wanted* model = &wanted[MODEL]
    cdef json_wanted* stream = &wanted[STREAM]
    cdef int i
    _want(model, b"model", 5)
    _want(stream, b"stream", 6)
    _want(&wanted[PREVIOUS_RESPONSE_ID], b"previous_response_id", 20)
    _want(&wanted[PROMPT_CACHE_KEY], b"prompt_cache_key", 16)
    _want(&wanted[STORE], b"store", 5)
    for i in range(BOUNDS, NUM_WANTED):
        _want(&wanted[i], BOUND_NAMES[i - BOUNDS], strlen(BOUND_NAMES[i - BOUNDS]))
    details.num_unknown = details.is_cut = details.num_refused = 0
    details.length = 0
    fault = json_check_object(
        start, start + len(body), _is_finite, wanted, NUM_WANTED, &known.known, &details)
    if fault.reason != NULL:
        if fault.limit:
            raise PeekLimitError(
                (<bytes>details.limited).decode("ascii"), fault.limit, (<bytes>fault.reason).decode(), fault.at - start,
                bool(fault.is_depth))
        raise PeekError((<bytes>fault.reason).decode(), fault.at - start)
    found = Peek.__new__(Peek)
    found.unknown = found.refused = ()
    if details.num_unknown or details.num_refused:
        _add_details(found, &details)
    found.model_start = found.model_end = -1
    if model.kind != JSON_ABSENT:
        if model.kind != JSON_STRING:
            raise PeekTypeError("model", "model must be a string", model.start - start)
        found.model = _text(model)
        found.model_start = model.start - start
        found.model_end = model.end - start
    if stream.kind not in (JSON_ABSENT, JSON_TRUE, JSON_FALSE, JSON_NULL):
        raise PeekTypeError("stream", "stream must be true or false", stream.start - start)
    found.stream = stream.kind == JSON_TRUE
    found.stores = wanted[STORE].kind != JSON_FALSE
    found.bounds = _bounds(wanted)
    found.previous_response_id = _optional_text(&wanted[PREVIOUS_RESPONSE_ID], start)
    found.prompt_cache_key = _optional_text(&wanted[PROMPT_CACHE_KEY], start)
    return found


def splice(bytes body not None, Peek found not None, str model not None):
    """Return ``body`` with the value of ``model`` replaced; ``found`` is what :func:`peek` found in it.

    Raises ``ValueError`` if the body has no ``model``, or ``found`` is of another body.
    """
    cdef Py_ssize_t start = found.model_start
    cdef Py_ssize_t end = found.model_end
    cdef Py_ssize_t length = len(body)
    cdef const char* text = PyBytes_AS_STRING(body)
    cdef Buffer value
    cdef bytes spliced
    cdef char* out
    if start < 0:
        raise ValueError("the body has no model to replace")
    if end > length or text[start] != c'"' or text[end - 1] != c'"':
        raise ValueError("the model is not where the peek found it: this is another body")
    value = Buffer()
    value.append_json(model)
    spliced = PyBytes_FromStringAndSize(NULL, length - (end - start) + value.size)
    out = PyBytes_AS_STRING(spliced)
    memcpy(out, text, start)
    memcpy(out + start, value.data, value.size)
    memcpy(out + start + value.size, text + end, length - end)
    return spliced


cdef bytes _bounds(json_wanted* wanted):
    """Return the members that bound the answers, as an object."""
    cdef Buffer bounds = None
    cdef json_wanted* member
    cdef int i
    for i in range(BOUNDS, NUM_WANTED):
        member = &wanted[i]
        if member.kind == JSON_ABSENT:
            continue
        if bounds is None:
            bounds = Buffer()
            put(bounds, b'{"', 2)
        else:
            put(bounds, b',"', 2)
        put(bounds, member.name, member.name_length)
        put(bounds, b'":', 2)
        put(bounds, <const char*>member.start, member.end - member.start)
    if bounds is None:
        return b"{}"
    put(bounds, b"}", 1)
    return bounds.slice(0, bounds.size)


cdef int _add_details(Peek found, json_found* details) except -1:
    cdef int i
    names = details.paths[:details.length].decode("ascii").split("\0")[:details.num_unknown]
    if details.is_cut:
        names.append("...")
    found.unknown = tuple(names)
    found.refused = tuple([(<bytes>details.refused[i].name).decode() for i in range(details.num_refused)])
    return 0


cdef inline void _want(json_wanted* wanted, const char* name, size_t length) noexcept:
    wanted.name = name
    wanted.name_length = length
    wanted.kind = JSON_ABSENT


cdef int _is_finite(const uint8_t* p, const uint8_t* end) noexcept:
    # Reads as far as the number goes: a bytes object ends with a NUL, so one at its very end stops the reading too.
    cdef char* stop
    return not isinf(PyOS_string_to_double(<const char*>p, &stop, NULL))


cdef str _optional_text(json_wanted* wanted, const uint8_t* body):
    if wanted.kind == JSON_ABSENT or wanted.kind == JSON_NULL:
        return None
    if wanted.kind != JSON_STRING:
        name = (<bytes>wanted.name).decode()
        raise PeekTypeError(name, f"{name} must be a string or null", wanted.start - body)
    return _text(wanted)


cdef str _text(json_wanted* wanted):
    cdef const uint8_t* start = wanted.start + 1
    cdef const uint8_t* end = wanted.end - 1
    cdef Buffer plain
    if not wanted.escaped:
        return PyUnicode_DecodeUTF8(<const char*>start, end - start, NULL)
    plain = Buffer()
    # json_unescape wants room for one more character than it writes.
    plain.grow(end - start + 4)
    plain.size = json_unescape(start, end, <uint8_t*>plain.data, plain.capacity)
    return PyUnicode_DecodeUTF8(plain.data, plain.size, NULL)
