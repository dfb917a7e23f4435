"""Encoder of inference events to the SSE events of an Anthropic Messages stream; a batch in, one ``bytes`` out.

A stream is a list of content blocks, one open at a time: an event of another kind closes the open block and opens the
next. A block's output is kept escaped, as it was sent, and joined for the message of a request that is not streamed, so
that both are the same. The order is ``message_start``, then for each block its start, deltas and stop,
``message_delta`` with the reason and the cumulative usage, ``message_stop``.
"""

cimport cython

import orjson

from cortex._fast.buffer cimport Buffer, put, put_bytes, put_literal
from cortex._fast.event_fields cimport FINISHED, REASONING, STARTED, TEXT, TOOL_CALL, Delta, read_event

from cortex.dialects.messages.errors import error_body
from cortex.wire.errors import RemoteError, UpstreamError
from cortex.wire.events import FinishReason

SIGNATURE = "dW5zaWduZWQ="
"""Ends every thinking block: base64 of "unsigned". Clients drop a block that has none; a replayed one is not checked.
"""

cdef object _LENGTH = FinishReason.LENGTH
cdef object _TOOL_CALLS = FinishReason.TOOL_CALLS
cdef bytes _SIGNATURE = SIGNATURE.encode()

cdef bytes _DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":'

cdef enum BlockKind:
    TEXT_BLOCK
    THINKING_BLOCK
    TOOL_BLOCK

# By the kind of a block: its delta up to the text.
cdef tuple _DELTAS = (
    b'{"type":"text_delta","text":"',
    b'{"type":"thinking_delta","thinking":"',
    b'{"type":"input_json_delta","partial_json":"',
)


@cython.final
cdef class _Block:
    """Content block: its output so far, escaped, and the constant part of its deltas."""

    cdef BlockKind kind
    cdef Py_ssize_t index
    cdef bytes delta_head       # of a delta event, up to the text
    cdef bytes head             # of the block object, up to its text or input
    cdef Buffer content
    cdef list arguments         # of a tool's block: the pieces as they are

    def __init__(self, BlockKind kind, Py_ssize_t index, str id="", str name=""):
        cdef Buffer out
        self.kind = kind
        self.index = index
        self.delta_head = _DELTA % index + <bytes>_DELTAS[<int>kind]
        self.content = Buffer()
        self.arguments = []
        if kind == TEXT_BLOCK:
            self.head = b'{"type":"text","text":"'
        elif kind == THINKING_BLOCK:
            self.head = b'{"type":"thinking","thinking":"'
        else:
            out = Buffer()
            put_literal(out, b'{"type":"tool_use","id":"')
            out.put_text(id)
            put_literal(out, b'","name":"')
            out.put_text(name)
            put_literal(out, b'","input":')
            self.head = out.cut()

    cdef int put_start(self, Buffer out) except -1:
        """Append the block as it is announced: empty."""
        put_bytes(out, self.head)
        if self.kind == TOOL_BLOCK:
            return put_literal(out, b"{}}")
        return put_literal(out, b'","signature":""}' if self.kind == THINKING_BLOCK else b'"}')

    cdef int put_whole(self, Buffer out) except -1:
        """Append the block with its whole content."""
        put_bytes(out, self.head)
        if self.kind == TOOL_BLOCK:
            put_bytes(out, object_text("".join(self.arguments)))
            return put_literal(out, b"}")
        put(out, self.content.data, self.content.size)
        if self.kind == THINKING_BLOCK:
            put_literal(out, b'","signature":"')
            put_bytes(out, _SIGNATURE)
        return put_literal(out, b'"}')


@cython.final
cdef class MessagesStream:
    """Encoder of one Messages stream, or of the message of a request that is not streamed.

    A start is inserted if the first event is not one. Events after the end of the stream are dropped: a worker may
    still fail behind its last token.
    """

    cdef readonly bint finished
    cdef Buffer out
    cdef bytes message_head
    cdef list blocks
    cdef _Block open_block
    cdef Py_ssize_t num_calls
    cdef list waiting           # calls that have begun behind the open one: id, name, pieces of their arguments
    cdef object error
    cdef object end
    cdef bint begun
    cdef Py_ssize_t prompt_tokens
    cdef Py_ssize_t cached_tokens

    def __init__(self, str id not None, str model not None):
        cdef Buffer head = Buffer()
        head.append(b'{"id":')
        head.append_json(id)
        head.append(b',"type":"message","role":"assistant","model":')
        head.append_json(model)
        head.append(b',"content":[')
        self.message_head = head.take()
        self.blocks = []
        self.waiting = []
        self.out = Buffer()

    def sse_events(self, events not None):
        """Return the SSE events of a batch of events, ``b""`` if they make none.

        A call that begins before the arguments of the last one are whole waits until that one's block is closed: some
        servers send the pieces of several calls in turns. Raises ``ValueError`` for a second choice, which this dialect
        does not have, and :exc:`UpstreamError` for a tool call that does not begin with its id and name, or goes on
        when its block is closed.
        """
        for event in events:
            if self.finished:
                break
            self.add(event)
        return self.out.cut()

    def whole(self):
        """Return the whole message, for a request that is not streamed.

        Raises :exc:`RemoteError` if the inference failed, :exc:`UpstreamError` if it has not come to its end.
        """
        cdef Buffer out = Buffer()
        cdef _Block block
        if self.error is not None:
            raise RemoteError(self.error)
        if self.end is None:
            raise UpstreamError("The inference ended without a reason: its answer is not complete.")
        put_bytes(out, self.message_head)
        for block in self.blocks:
            if block.index:
                put_literal(out, b",")
            block.put_whole(out)
        put_literal(out, b"],")
        self.put_stop(out)
        put_literal(out, b',"usage":')
        self.put_usage(out)
        put_literal(out, b"}")
        return out.cut()

    cdef int add(self, object event) except -1:
        cdef Delta delta
        cdef int kind = read_event(event, &delta)
        if kind == TEXT:
            return self.add_text(TEXT_BLOCK, &delta)
        if kind == REASONING:
            return self.add_text(THINKING_BLOCK, &delta)
        if kind == STARTED:
            self.prompt_tokens = event.prompt_tokens
            self.cached_tokens = event.cached_tokens
            return self.begin()
        self.begin()
        if kind == TOOL_CALL:
            return self.add_call(event)
        if kind == FINISHED:
            return self.finish(event)
        self.error = event.error
        put_literal(self.out, b"event: error\ndata: ")
        put_bytes(self.out, error_body(event.error))
        put_literal(self.out, b"\n\n")
        self.finished = True
        return 0

    cdef int begin(self) except -1:
        if self.begun:
            return 0
        self.begun = True
        put_literal(self.out, b'event: message_start\ndata: {"type":"message_start","message":')
        put_bytes(self.out, self.message_head)
        put_literal(self.out, b'],"stop_reason":null,"stop_sequence":null,"usage":')
        self.put_usage(self.out)
        return put_literal(self.out, b"}}\n\n")

    cdef int add_text(self, BlockKind kind, Delta* delta) except -1:
        cdef _Block block = self.open_block
        cdef str text = <object>delta.text
        check_choice(delta.choice)
        if not text:
            return 0
        if block is None or block.kind != kind:
            self.begin()
            self.close()
            block = self.open(_Block(kind, len(self.blocks)))
        return self.put_delta(block, text)

    cdef int add_call(self, object event) except -1:
        cdef Py_ssize_t call = event.call
        cdef str arguments = event.arguments
        cdef _Block block = self.open_block
        cdef Py_ssize_t first_waiting = self.num_calls - len(self.waiting)
        check_choice(event.choice)
        if call == self.num_calls and event.id and event.name:
            self.num_calls += 1
            if self.waiting or (block is not None and block.kind == TOOL_BLOCK
                                and not is_object("".join(block.arguments))):
                self.waiting.append((event.id, event.name, [arguments]))
                return 0
            self.close()
            block = self.open(_Block(TOOL_BLOCK, len(self.blocks), event.id, event.name))
        elif first_waiting <= call < self.num_calls:
            self.waiting[call - first_waiting][2].append(arguments)
            return 0
        elif 0 <= call < self.num_calls and not arguments.strip():
            return 0  # nothing that its block would lack
        elif block is None or block.kind != TOOL_BLOCK or call != first_waiting - 1:
            raise UpstreamError(f"The node's tool call {call} does not begin with its id and name, or goes on out of turn.")
        return self.put_arguments(block, arguments)

    cdef int put_arguments(self, _Block block, str arguments) except -1:
        if not arguments:
            return 0
        block.arguments.append(arguments)
        return self.put_delta(block, arguments)

    cdef int put_delta(self, _Block block, str text) except -1:
        cdef Py_ssize_t start
        put_bytes(self.out, block.delta_head)
        start = self.out.size
        self.out.put_text(text)
        if block.kind != TOOL_BLOCK:
            put(block.content, self.out.data + start, self.out.size - start)
        return put_literal(self.out, b'"}}\n\n')

    cdef _Block open(self, _Block block):
        self.blocks.append(block)
        self.open_block = block
        put_literal(self.out, b'event: content_block_start\ndata: {"type":"content_block_start","index":')
        self.out.put_integer(block.index)
        put_literal(self.out, b',"content_block":')
        block.put_start(self.out)
        put_literal(self.out, b"}\n\n")
        return block

    cdef int close(self) except -1:
        cdef _Block block = self.open_block
        if block is None:
            return 0
        self.open_block = None
        if block.kind == THINKING_BLOCK:
            put_bytes(self.out, _DELTA % block.index)
            put_literal(self.out, b'{"type":"signature_delta","signature":"')
            put_bytes(self.out, _SIGNATURE)
            put_literal(self.out, b'"}}\n\n')
        put_literal(self.out, b'event: content_block_stop\ndata: {"type":"content_block_stop","index":')
        self.out.put_integer(block.index)
        put_literal(self.out, b"}\n\n")
        waiting, self.waiting = self.waiting, []
        for id, name, pieces in waiting:
            block = self.open(_Block(TOOL_BLOCK, len(self.blocks), id, name))
            self.put_arguments(block, "".join(pieces))
            self.close()
        return 0

    cdef int finish(self, object event) except -1:
        check_choice(event.choice)
        self.close()
        self.end = event
        put_literal(self.out, b'event: message_delta\ndata: {"type":"message_delta","delta":{')
        self.put_stop(self.out)
        put_literal(self.out, b'},"usage":')
        self.put_usage(self.out)
        put_literal(self.out, b'}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n')
        self.finished = True
        return 0

    cdef int put_stop(self, Buffer out) except -1:
        """Append ``stop_reason`` and its companions as members of an object."""
        put_literal(out, b'"stop_reason":"')
        if self.end.stop_string is not None:
            put_literal(out, b'stop_sequence","stop_sequence":')
            out.append_json(self.end.stop_string)
            return put_literal(out, b',"stop_details":null')
        if self.end.reason is _LENGTH:
            put_literal(out, b"max_tokens")
        elif self.end.reason is _TOOL_CALLS:
            put_literal(out, b"tool_use")
        else:
            put_literal(out, b"end_turn")
        return put_literal(out, b'","stop_sequence":null,"stop_details":null')

    cdef int put_usage(self, Buffer out) except -1:
        """Append the usage so far. Here the cached part of the prompt is not one of the input tokens but beside them.
        """
        put_literal(out, b'{"input_tokens":')
        out.put_integer(self.prompt_tokens - self.cached_tokens)
        put_literal(out, b',"cache_creation_input_tokens":0,"cache_read_input_tokens":')
        out.put_integer(self.cached_tokens)
        put_literal(out, b',"output_tokens":')
        out.put_integer(self.end.output_tokens if self.end is not None else 0)
        if self.end is not None:
            put_literal(out, b',"output_tokens_details":{"thinking_tokens":')
            out.put_integer(self.end.reasoning_tokens)
            put_literal(out, b"}")
        return put_literal(out, b"}")


cdef bytes object_text(str arguments):
    """Return a call's arguments as the JSON object they are; an empty one if the token limit cut them."""
    return arguments.encode("utf-8", "replace") if is_object(arguments) else b"{}"


cdef bint is_object(str arguments) except *:
    try:
        return isinstance(orjson.loads(arguments.encode("utf-8", "replace")), dict)
    except orjson.JSONDecodeError:
        return False


cdef int check_choice(Py_ssize_t choice) except -1:
    if choice:
        raise ValueError(f"an event of choice {choice}: a message has one")
    return 0
