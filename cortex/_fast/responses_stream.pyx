"""Encoder of inference events to the SSE events of an OpenAI Responses stream; a batch in, one ``bytes`` out.

A stream is a list of output items. At most one reasoning or message item is open, and text of the other kind closes it;
tool calls stay open to the end, since their pieces may alternate. The arguments of a custom tool are an object around
its one input, which is sent when it is whole. An item's output is kept escaped, as it was sent, and copied into the
events that repeat it: ``done``, the item, the response. The order is the one on which the official clients rely:
created, in_progress, then for each item added, part added, deltas, done, part done, item done, and last the event with
the whole response. One module: items and stream write into each other's buffers, and a call between modules costs more
than an event.
"""

import time

cimport cython

import msgspec

from cortex._fast.buffer cimport Buffer, put, put_bytes, put_literal
from cortex._fast.event_fields cimport (
    FAILED,
    FINISHED,
    REASONING,
    STARTED,
    TEXT,
    TOOL_CALL,
    Delta,
    put_logprobs,
    put_usage_comment,
    read_event,
)

from cortex.dialects.openai_errors import error_object, response_error_code
from cortex.dialects.responses.sealed import seal
from cortex.wire.custom_tools import custom_input
from cortex.wire.errors import RemoteError, UpstreamError
from cortex.wire.events import FinishReason
from cortex.wire.responses_events import ResponsesEvent

cdef object _LENGTH = FinishReason.LENGTH

# Defaults of fields that a request left out: clients of the Open Responses specification accept none of these
# keys absent, and no null where there is a value here.
cdef dict _DEFAULTS = {
    "background": b"false",
    "frequency_penalty": b"0.0",
    "instructions": b"null",
    "max_output_tokens": b"null",
    "max_tool_calls": b"null",
    "metadata": b"{}",
    "parallel_tool_calls": b"true",
    "presence_penalty": b"0.0",
    "previous_response_id": b"null",
    "prompt_cache_key": b"null",
    "reasoning": b"null",
    "safety_identifier": b"null",
    "service_tier": b'"default"',
    "store": b"false",
    "temperature": b"1.0",
    "text": b'{"format":{"type":"text"}}',
    "tool_choice": b'"auto"',
    "tools": b"[]",
    "top_logprobs": b"0",
    "top_p": b"1.0",
    "truncation": b'"disabled"',
}

# Fields that the stream sets.
cdef frozenset _OWN = frozenset({
    "completed_at", "created_at", "error", "id", "incomplete_details", "model", "object", "output", "status", "usage",
})

cdef object _echo_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _head(name):
    """Return the beginning of an event: its name, twice."""
    return f'event: {name}\ndata: {{"type":"{name}"'.encode()


cdef bytes _CREATED = _head(ResponsesEvent.CREATED)
cdef bytes _IN_PROGRESS = _head(ResponsesEvent.IN_PROGRESS)
cdef bytes _ITEM_ADDED = _head(ResponsesEvent.OUTPUT_ITEM_ADDED)
cdef bytes _ITEM_DONE = _head(ResponsesEvent.OUTPUT_ITEM_DONE)
cdef bytes _COMPLETED = _head(ResponsesEvent.COMPLETED)
cdef bytes _INCOMPLETE = _head(ResponsesEvent.INCOMPLETE)
cdef bytes _FAILED = _head(ResponsesEvent.FAILED)
cdef bytes _ERROR = _head(ResponsesEvent.ERROR)

cdef enum ItemKind:
    REASONING_ITEM
    MESSAGE_ITEM
    SUMMARY_ITEM     # reasoning, sent as a summary
    CALL_ITEM        # this one and the next have no parts
    CUSTOM_ITEM

# By the kind of an item: the prefix of its id, which part of it an event is about, its delta and its done event, and
# the events of its part.
cdef tuple _ID_PREFIXES = ("rs", "msg", "rs", "fc", "ctc")
cdef tuple _PLACES = (b',"content_index":0', b',"content_index":0', b',"summary_index":0', b"", b"")
cdef tuple _DELTAS = (
    _head(ResponsesEvent.REASONING_TEXT_DELTA),
    _head(ResponsesEvent.OUTPUT_TEXT_DELTA),
    _head(ResponsesEvent.REASONING_SUMMARY_TEXT_DELTA),
    _head(ResponsesEvent.FUNCTION_CALL_ARGUMENTS_DELTA),
    _head(ResponsesEvent.CUSTOM_TOOL_CALL_INPUT_DELTA),
)
cdef tuple _DONES = (
    _head(ResponsesEvent.REASONING_TEXT_DONE),
    _head(ResponsesEvent.OUTPUT_TEXT_DONE),
    _head(ResponsesEvent.REASONING_SUMMARY_TEXT_DONE),
    _head(ResponsesEvent.FUNCTION_CALL_ARGUMENTS_DONE),
    _head(ResponsesEvent.CUSTOM_TOOL_CALL_INPUT_DONE),
)
cdef tuple _PARTS_ADDED = (
    _head(ResponsesEvent.CONTENT_PART_ADDED),
    _head(ResponsesEvent.CONTENT_PART_ADDED),
    _head(ResponsesEvent.REASONING_SUMMARY_PART_ADDED),
)
cdef tuple _PARTS_DONE = (
    _head(ResponsesEvent.CONTENT_PART_DONE),
    _head(ResponsesEvent.CONTENT_PART_DONE),
    _head(ResponsesEvent.REASONING_SUMMARY_PART_DONE),
)


@cython.final
cdef class _Item:
    """Output item: its output so far, escaped, and the constant parts of its events."""

    cdef ItemKind kind
    cdef bytes place            # ,"item_id":...,"output_index":... and for text also which part
    cdef bytes delta_head       # of a delta event, up to the text
    cdef bytes item_head        # of the item object: id, type, name
    cdef bytes output_index
    cdef bytes status
    cdef Buffer content
    cdef Buffer logprobs
    cdef list pieces            # plain output, where it is needed again: custom calls, sealed reasoning
    cdef bytes sealed           # of reasoning: what a client may send back in its place, None if it did not ask

    def __init__(
        self, ItemKind kind, str response_id, Py_ssize_t index, str call_id="", str name="", str namespace=None
    ):
        cdef Buffer out = Buffer()
        cdef str id = f"{_ID_PREFIXES[<int>kind]}_{response_id.removeprefix('resp_')}_{index}"
        self.kind = kind
        self.status = b"in_progress"
        self.content = Buffer()
        self.logprobs = Buffer()
        self.output_index = b',"output_index":%d' % index
        out.append(b',"item_id":')
        out.append_json(id)
        out.append(self.output_index)
        out.append(_PLACES[<int>kind])
        self.place = out.take()
        self.delta_head = _DELTAS[<int>kind] + self.place + b',"delta":"'
        out.append(b'{"id":')
        out.append_json(id)
        if kind == REASONING_ITEM or kind == SUMMARY_ITEM:
            out.append(b',"type":"reasoning"')
        elif kind == MESSAGE_ITEM:
            out.append(b',"type":"message","role":"assistant"')
        else:
            out.append(b',"type":"custom_tool_call"' if kind == CUSTOM_ITEM else b',"type":"function_call"')
            out.append(b',"call_id":')
            out.append_json(call_id)
            out.append(b',"name":')
            out.append_json(name)
            if namespace is not None:
                out.append(b',"namespace":')
                out.append_json(namespace)
        self.item_head = out.take()

    cdef int put_part(self, Buffer out) except -1:
        """Append the content part with its content so far."""
        if self.kind != MESSAGE_ITEM:
            put_bytes(out, b'{"type":"%b_text","text":"' % (b"summary" if self.kind == SUMMARY_ITEM else b"reasoning"))
            put(out, self.content.data, self.content.size)
            return put_literal(out, b'"}')
        put_literal(out, b'{"type":"output_text","text":"')
        put(out, self.content.data, self.content.size)
        put_literal(out, b'","annotations":[],"logprobs":')
        self.put_logprobs(out)
        return put_literal(out, b"}")

    cdef int put_item(self, Buffer out, bint with_content) except -1:
        """Append the item object; ``with_content`` is false where the item is only announced."""
        put_bytes(out, self.item_head)
        if self.kind >= CALL_ITEM:
            put_literal(out, b',"arguments":"' if self.kind == CALL_ITEM else b',"input":"')
            put(out, self.content.data, self.content.size)
            put_literal(out, b'"')
        else:
            if self.kind == REASONING_ITEM:
                put_literal(out, b',"summary":[]')
            put_literal(out, b',"summary":[' if self.kind == SUMMARY_ITEM else b',"content":[')
            if with_content:
                self.put_part(out)
            put_literal(out, b"]")
            if self.sealed is not None:
                put_literal(out, b',"encrypted_content":"')
                put_bytes(out, self.sealed)
                put_literal(out, b'"')
        put_literal(out, b',"status":"')
        put_bytes(out, self.status)
        return put_literal(out, b'"}')

    cdef int put_logprobs(self, Buffer out) except -1:
        put_literal(out, b"[")
        put(out, self.logprobs.data, self.logprobs.size)
        return put_literal(out, b"]")


@cython.final
cdef class ResponsesStream:
    """Encoder of one Responses stream, or of the response of a request that is not streamed.

    ``echo`` is a JSON object of the request's fields that every response object repeats, with defaults for the fields
    that clients need. ``custom_tools`` are names of tools whose calls carry an input; ``namespaces`` gives the
    namespace and own name of a tool that the model has under another. Reasoning is sent as text, or as a summary if the
    client asked for one, and sealed if the client wants to send it back. A start is inserted if the first event is not
    one. Events after the end of the stream are dropped: a worker may still fail behind its last token.
    """

    cdef readonly bint finished
    cdef Buffer out
    cdef str id
    cdef bytes response_head
    cdef list items
    cdef list calls
    cdef _Item open_item
    cdef _Item latest
    cdef bytes last_response
    cdef object error
    cdef frozenset custom_tools
    cdef dict namespaces
    cdef ItemKind reasoning_kind
    cdef bint seals
    cdef bint report_usage
    cdef bint begun
    cdef Py_ssize_t sequence_number
    cdef Py_ssize_t prompt_tokens
    cdef Py_ssize_t cached_tokens

    def __init__(
        self,
        str id not None,
        str model not None,
        long long created,
        bytes echo not None,
        bint report_usage=False,
        frozenset custom_tools=frozenset(),
        dict namespaces=None,
        bint summarises=False,
        bint seals=False,
    ):
        """Raises ``ValueError`` if ``echo`` has a field that the stream sets, ``msgspec.DecodeError`` if it is no
        object.
        """
        cdef Buffer head = Buffer()
        cdef dict echoed = _echo_decoder.decode(echo)
        if not _OWN.isdisjoint(echoed):
            raise ValueError(f"not for the request to say: {', '.join(sorted(_OWN & echoed.keys()))}")
        head.append(b'{"id":')
        head.append_json(id)
        head.append(b',"object":"response","created_at":')
        head.put_integer(created)
        head.append(b',"model":')
        head.append_json(model)
        if echoed:
            # Values come as the client sent them, and a line end would end the SSE event's data. In JSON that has been
            # decoded it can only be white space: within a string it would be escaped.
            echo = echo.replace(b"\n", b" ").replace(b"\r", b" ").strip()
            head.append(b"," + echo.removeprefix(b"{").removesuffix(b"}"))
        for name, value in _DEFAULTS.items():
            if name not in echoed:
                head.append(b',"%b":%b' % ((<str>name).encode(), value))
        self.response_head = head.take()
        self.id = id
        self.items = []
        self.calls = []
        self.report_usage = report_usage
        self.custom_tools = custom_tools
        self.namespaces = namespaces or {}
        self.reasoning_kind = SUMMARY_ITEM if summarises else REASONING_ITEM
        self.seals = seals
        self.out = Buffer()

    def sse_events(self, events not None):
        """Return the SSE events of a batch of events, ``b""`` if they make none.

        Raises ``ValueError`` for a second choice, which this dialect does not have, and for a tool call that does not
        begin with its id and name.
        """
        for event in events:
            if self.finished:
                break
            self.add(event)
        return self.out.cut()

    def beginning(self):
        """Return the response object as a stream begins with it."""
        return self.response_object(b"in_progress", b"null", b"null", b"null")

    def whole(self):
        """Return the response object of the last event, for a request that is not streamed.

        Raises :exc:`RemoteError` if the inference failed, :exc:`UpstreamError` if it has not come to its end.
        """
        if self.error is not None:
            raise RemoteError(self.error)
        if self.last_response is None:
            raise UpstreamError("The inference ended without a reason: its answer is not complete.")
        return self.last_response

    cdef int add(self, object event) except -1:
        cdef Delta delta
        cdef int kind = read_event(event, &delta)
        if kind == TEXT:
            return self.add_text(MESSAGE_ITEM, &delta)
        if kind == REASONING:
            delta.logprobs = NULL
            return self.add_text(self.reasoning_kind, &delta)
        if kind == STARTED:
            self.prompt_tokens = event.prompt_tokens
            self.cached_tokens = event.cached_tokens
            return self.begin()
        self.begin()
        if kind == TOOL_CALL:
            return self.add_call(event)
        if kind == FINISHED:
            return self.finish(event)
        return self.fail(event.error)

    cdef int begin(self) except -1:
        if self.begun:
            return 0
        self.begun = True
        for head in (_CREATED, _IN_PROGRESS):
            put_bytes(self.out, head)
            put_literal(self.out, b',"response":')
            put_bytes(self.out, self.response_object(b"in_progress", b"null", b"null", b"null"))
            self.end_event()
        return 0

    cdef int end_event(self) except -1:
        put_literal(self.out, b',"sequence_number":')
        self.out.put_integer(self.sequence_number)
        self.sequence_number += 1
        return put_literal(self.out, b"}\n\n")

    cdef int add_text(self, ItemKind kind, Delta* delta) except -1:
        cdef _Item item = self.open_item
        cdef str text = <object>delta.text
        cdef tuple logprobs = <object>delta.logprobs if delta.logprobs != NULL else ()
        cdef Py_ssize_t start
        check_choice(delta.choice)
        if not text and not logprobs:
            return 0
        if item is None or item.kind != kind:
            self.begin()
            item = self.open_text(kind)
        put_bytes(self.out, item.delta_head)
        start = self.out.size
        self.out.put_text(text)
        put(item.content, self.out.data + start, self.out.size - start)
        put_literal(self.out, b'"')
        if item.pieces is not None:
            item.pieces.append(text)
        if kind == MESSAGE_ITEM:
            put_literal(self.out, b',"logprobs":')
            if logprobs:
                self.add_logprobs(item, logprobs)
            else:
                put_literal(self.out, b"[]")
        return self.end_event()

    cdef int add_logprobs(self, _Item item, tuple logprobs) except -1:
        cdef Py_ssize_t start = self.out.size
        put_logprobs(self.out, logprobs)
        if item.logprobs.size:
            put_literal(item.logprobs, b",")
        # Without the brackets: the item's list goes on with the next delta.
        return put(item.logprobs, self.out.data + start + 1, self.out.size - start - 2)

    cdef _Item open_text(self, ItemKind kind):
        self.close_text(b"completed")
        cdef _Item item = _Item(kind, self.id, len(self.items))
        if self.seals and kind != MESSAGE_ITEM:
            item.pieces = []
        self.announce(item)
        self.open_item = item
        put_bytes(self.out, _PARTS_ADDED[<int>kind])
        put_bytes(self.out, item.place)
        put_literal(self.out, b',"part":')
        item.put_part(self.out)
        self.end_event()
        return item

    cdef int announce(self, _Item item) except -1:
        self.items.append(item)
        self.latest = item
        put_bytes(self.out, _ITEM_ADDED)
        put_bytes(self.out, item.output_index)
        put_literal(self.out, b',"item":')
        item.put_item(self.out, False)
        return self.end_event()

    cdef int close_text(self, bytes status) except -1:
        cdef _Item item = self.open_item
        if item is None:
            return 0
        self.open_item = None
        put_bytes(self.out, _DONES[<int>item.kind])
        put_bytes(self.out, item.place)
        put_literal(self.out, b',"text":"')
        put(self.out, item.content.data, item.content.size)
        put_literal(self.out, b'"')
        if item.kind == MESSAGE_ITEM:
            put_literal(self.out, b',"logprobs":')
            item.put_logprobs(self.out)
        self.end_event()
        put_bytes(self.out, _PARTS_DONE[<int>item.kind])
        put_bytes(self.out, item.place)
        put_literal(self.out, b',"part":')
        item.put_part(self.out)
        self.end_event()
        if item.pieces is not None:
            item.sealed = seal("".join(item.pieces)).encode()
        return self.end_item(item, status)

    cdef int close_call(self, _Item item, bytes status) except -1:
        if item.kind == CUSTOM_ITEM:
            self.put_call_delta(item, custom_input("".join(item.pieces)))
        put_bytes(self.out, _DONES[<int>item.kind])
        put_bytes(self.out, item.place)
        put_literal(self.out, b',"arguments":"' if item.kind == CALL_ITEM else b',"input":"')
        put(self.out, item.content.data, item.content.size)
        put_literal(self.out, b'"')
        self.end_event()
        return self.end_item(item, status)

    cdef int end_item(self, _Item item, bytes status) except -1:
        item.status = status
        put_bytes(self.out, _ITEM_DONE)
        put_bytes(self.out, item.output_index)
        put_literal(self.out, b',"item":')
        item.put_item(self.out, True)
        return self.end_event()

    cdef int add_call(self, object event) except -1:
        cdef Py_ssize_t call = event.call
        cdef str arguments = event.arguments
        cdef _Item item
        check_choice(event.choice)
        if call < len(self.calls):
            item = self.calls[call]
        elif call > len(self.calls) or not (event.id and event.name):
            raise ValueError(f"tool call {call} does not begin with its id and name, or begins out of turn")
        else:
            self.close_text(b"completed")
            item = self.open_call(event.id, event.name)
        self.latest = item
        if item.kind == CUSTOM_ITEM:
            item.pieces.append(arguments)
            return 0
        return self.put_call_delta(item, arguments)

    cdef _Item open_call(self, str id, str name):
        """Open the item of a call, under the client's name of the tool."""
        cdef ItemKind kind = CUSTOM_ITEM if name in self.custom_tools else CALL_ITEM
        cdef _Item item
        namespace, own_name = self.namespaces.get(name, (None, name))
        item = _Item(kind, self.id, len(self.items), id, own_name, namespace)
        if kind == CUSTOM_ITEM:
            item.pieces = []
        self.calls.append(item)
        self.announce(item)
        return item

    cdef int put_call_delta(self, _Item item, str text) except -1:
        cdef Py_ssize_t start
        if not text:
            return 0
        put_bytes(self.out, item.delta_head)
        start = self.out.size
        self.out.put_text(text)
        put(item.content, self.out.data + start, self.out.size - start)
        put_literal(self.out, b'"')
        return self.end_event()

    cdef int finish(self, object event) except -1:
        cdef bint cut = event.reason == _LENGTH
        cdef bytes last_status = b"incomplete" if cut else b"completed"
        cdef _Item item
        check_choice(event.choice)
        for item in self.calls:
            self.close_call(item, last_status if item is self.latest else b"completed")
        self.close_text(last_status if self.open_item is self.latest else b"completed")
        if self.report_usage:
            put_usage_comment(self.out, self.prompt_tokens, event.output_tokens, self.cached_tokens)
        usage = self.usage_object(event)
        if cut:
            details = b'{"reason":"max_output_tokens"}'
            self.last_response = self.response_object(b"incomplete", b"null", details, usage)
        else:
            self.last_response = self.response_object(b"completed", b"null", b"null", usage)
        put_bytes(self.out, _INCOMPLETE if cut else _COMPLETED)
        return self.end_stream()

    cdef int fail(self, object error) except -1:
        cdef _Item item
        cdef bytes inner = error_object(error)
        cdef Buffer reason = Buffer()
        self.error = error
        # Clients differ in where they read an error: flat, nested, or only in the failed response.
        put_bytes(self.out, _ERROR)
        put_literal(self.out, b",")
        put_bytes(self.out, error_members(error))
        put_literal(self.out, b',"error":')
        put_bytes(self.out, inner)
        self.end_event()
        for item in self.items:
            if item.status == b"in_progress":
                item.status = b"incomplete"
        put_literal(reason, b'{"code":"')
        reason.put_text(response_error_code(error))
        put_literal(reason, b'","message":"')
        reason.put_text(error.message)
        put_literal(reason, b'"}')
        self.last_response = self.response_object(b"failed", reason.cut(), b"null", b"null")
        put_bytes(self.out, _FAILED)
        return self.end_stream()

    cdef int end_stream(self) except -1:
        put_literal(self.out, b',"response":')
        put_bytes(self.out, self.last_response)
        self.end_event()
        self.finished = True
        return 0

    cdef bytes response_object(self, bytes status, bytes error, bytes incomplete_details, bytes usage):
        cdef Buffer out = Buffer()
        cdef _Item item
        cdef bint first = True
        put_bytes(out, self.response_head)
        put_literal(out, b',"status":"')
        put_bytes(out, status)
        put_literal(out, b'","completed_at":')
        if status == b"completed":
            out.put_integer(int(time.time()))
        else:
            put_literal(out, b"null")
        put_literal(out, b',"error":')
        put_bytes(out, error)
        put_literal(out, b',"incomplete_details":')
        put_bytes(out, incomplete_details)
        put_literal(out, b',"output":[')
        for item in self.items:
            if not first:
                put_literal(out, b",")
            first = False
            item.put_item(out, True)
        put_literal(out, b'],"usage":')
        put_bytes(out, usage)
        put_literal(out, b"}")
        return out.cut()

    cdef bytes usage_object(self, object finished):
        cdef Buffer out = Buffer()
        put_literal(out, b'{"input_tokens":')
        out.put_integer(self.prompt_tokens)
        put_literal(out, b',"input_tokens_details":{"cached_tokens":')
        out.put_integer(self.cached_tokens)
        put_literal(out, b',"cache_write_tokens":0},"output_tokens":')
        out.put_integer(finished.output_tokens)
        put_literal(out, b',"output_tokens_details":{"reasoning_tokens":')
        out.put_integer(finished.reasoning_tokens)
        put_literal(out, b'},"total_tokens":')
        out.put_integer(self.prompt_tokens + <Py_ssize_t>finished.output_tokens)
        put_literal(out, b"}")
        return out.cut()


cdef int check_choice(Py_ssize_t choice) except -1:
    if choice:
        raise ValueError(f"an event of choice {choice}: a response has one")
    return 0


cdef bytes error_members(object error):
    """Return ``code``, ``message`` and ``param`` of an error as members of an object."""
    cdef Buffer out = Buffer()
    put_literal(out, b'"code":"')
    out.put_text(error.code)
    put_literal(out, b'","message":"')
    out.put_text(error.message)
    put_literal(out, b'","param":')
    if error.param is None:
        put_literal(out, b"null")
    else:
        out.append_json(error.param)
    return out.cut()
