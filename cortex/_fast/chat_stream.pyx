"""Encoder of inference events to the SSE events of an OpenAI chat stream; a batch of events in, one ``bytes`` out.

Everything of a chunk but its text is known when the stream begins, so a text delta is three copies: the bytes before
the text, the escaped text, the bytes after it. For a request that is not streamed, each choice keeps its output as it
was sent, and the completion joins it.
"""

cimport cython
from cpython.object cimport PyObject

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

from cortex.dialects.openai_errors import error_body
from cortex.wire.custom_tools import custom_input
from cortex.wire.errors import RemoteError, UpstreamError


@cython.final
cdef class _Kept:
    """Output of a choice so far, escaped."""

    cdef Buffer text
    cdef Buffer reasoning
    cdef Buffer logprobs
    cdef list calls             # buffers, each a call up to the end of its arguments or input

    def __init__(self):
        self.text = Buffer()
        self.reasoning = Buffer()
        self.logprobs = Buffer()
        self.calls = []


@cython.final
cdef class _Choice:
    cdef bytes head             # of every chunk, up to the value of "delta"
    cdef bytes text_head        # of a text chunk, up to the text
    cdef bytes reasoning_head
    cdef Py_ssize_t num_calls
    cdef dict inputs            # arguments so far of calls that carry an input, which is sent once it is whole
    cdef _Kept kept             # None in a stream
    cdef object end             # the event

    def __init__(self, bytes head, bint keeps):
        self.kept = _Kept() if keeps else None
        self.head = head
        self.text_head = head + b'{"content":"'
        self.inputs = {}
        self.reasoning_head = head + b'{"reasoning_content":"'


@cython.final
cdef class ChatStream:
    """Encoder of one chat stream, or of the completion of a request that is not streamed.

    The role is sent when the inference starts; a start is inserted if the first event is a delta. Events of a finished
    choice, and events after the end of the stream, are dropped: a worker may still fail behind its last token.
    ``custom_tools`` are names of tools whose calls carry an input, which is sent in one piece. ``keeps``: keep the
    output, for the completion.
    """

    cdef readonly bint finished
    cdef Buffer out
    cdef list choices
    cdef frozenset custom_tools
    cdef bytes usage_head
    cdef bytes whole_head       # of the completion, up to its choices
    cdef object error
    cdef bint include_usage
    cdef bint report_usage
    cdef bint begun
    cdef Py_ssize_t num_open
    cdef Py_ssize_t prompt_tokens
    cdef Py_ssize_t cached_tokens
    cdef Py_ssize_t output_tokens
    cdef Py_ssize_t reasoning_tokens

    def __init__(
        self,
        str id not None,
        str model not None,
        long long created,
        Py_ssize_t num_choices=1,
        bint include_usage=False,
        bint report_usage=False,
        frozenset custom_tools=frozenset(),
        bint keeps=False,
    ):
        cdef Buffer head = Buffer()
        cdef bytes common
        if num_choices < 1:
            raise ValueError(f"a chat stream has at least one choice, not {num_choices}")
        head.append(b'data: {"id":')
        head.append_json(id)
        head.append(b',"object":"chat.completion.chunk","created":')
        head.put_integer(created)
        head.append(b',"model":')
        head.append_json(model)
        head.append(b',"choices":[')
        common = head.take()
        self.usage_head = common + b'],"usage":'
        self.whole_head = common[6:].replace(b',"object":"chat.completion.chunk"', b',"object":"chat.completion"')
        self.choices = [_Choice(common + b'{"index":%d,"delta":' % index, keeps) for index in range(num_choices)]
        self.custom_tools = custom_tools
        self.num_open = num_choices
        self.include_usage = include_usage
        self.report_usage = report_usage
        self.out = Buffer()

    def sse_events(self, events not None):
        """Return the SSE events of a batch of events, ``b""`` if they make none.

        Raises ``ValueError`` for a choice that the stream does not have and for a tool call that does not begin with
        its id and name.
        """
        for event in events:
            if self.finished:
                break
            self.add(event)
        return self.out.cut()

    def whole(self):
        """Return the completion, for a request that is not streamed.

        Raises :exc:`RemoteError` if the inference failed, :exc:`UpstreamError` if a choice did not come to its end,
        ``ValueError`` if the output was not kept.
        """
        cdef Buffer out = Buffer()
        cdef _Choice choice
        cdef Py_ssize_t index
        if self.error is not None:
            raise RemoteError(self.error)
        if self.num_open:
            raise UpstreamError("The inference ended without a reason: its answer is not complete.")
        if (<_Choice>self.choices[0]).kept is None:
            raise ValueError("a stream does not keep its output")
        put_bytes(out, self.whole_head)
        for index, choice in enumerate(self.choices):
            if index:
                put_literal(out, b",")
            put_literal(out, b'{"index":')
            out.put_integer(index)
            put_message(out, choice.kept)
            put_literal(out, b',"finish_reason":"')
            put_end(out, choice.end)
            put_literal(out, b"}")
        put_literal(out, b'],"usage":')
        self.put_usage(out)
        put_literal(out, b"}")
        return out.cut()

    cdef int add(self, object event) except -1:
        cdef Delta delta
        cdef int kind = read_event(event, &delta)
        if kind == TEXT:
            return self.put_delta(&delta)
        if kind == REASONING:
            return self.put_reasoning(&delta)
        if kind == TOOL_CALL:
            return self.put_tool_call(event)
        if kind == FINISHED:
            return self.put_finish(event)
        if kind == STARTED:
            self.prompt_tokens = event.prompt_tokens
            self.cached_tokens = event.cached_tokens
            return self.begin()
        self.error = event.error
        put_literal(self.out, b"data: ")
        put_bytes(self.out, error_body(event.error))
        put_literal(self.out, b"\n\n")
        self.finished = True
        return 0

    cdef int begin(self) except -1:
        cdef _Choice choice
        if self.begun:
            return 0
        self.begun = True
        for choice in self.choices:
            put_bytes(self.out, choice.head)
            put_literal(self.out, b'{"role":"assistant","content":""},"finish_reason":null}]}\n\n')
        return 0

    cdef _Choice choice(self, Py_ssize_t index):
        """Return a choice, or ``None`` if it has ended."""
        cdef _Choice choice
        if not 0 <= index < len(self.choices):
            raise ValueError(f"an event of choice {index} in a stream of {len(self.choices)}")
        if not self.begun:
            self.begin()
        choice = <_Choice>self.choices[index]
        return choice if choice.end is None else None

    cdef int put_delta(self, Delta* delta) except -1:
        cdef _Choice choice = self.choice(delta.choice)
        cdef str text = <object>delta.text
        cdef tuple logprobs = <object>delta.logprobs
        cdef Py_ssize_t start
        if choice is None or not text and not logprobs:
            return 0
        put_bytes(self.out, choice.text_head)
        start = self.out.size
        self.out.put_text(text)
        if choice.kept is not None:
            put(choice.kept.text, self.out.data + start, self.out.size - start)
        if not logprobs:
            return put_literal(self.out, b'"},"finish_reason":null}]}\n\n')
        put_literal(self.out, b'"},"logprobs":{"content":')
        start = self.out.size
        put_logprobs(self.out, logprobs)
        if choice.kept is not None:
            if choice.kept.logprobs.size:
                put_literal(choice.kept.logprobs, b",")
            put(choice.kept.logprobs, self.out.data + start + 1, self.out.size - start - 2)  # without the brackets
        return put_literal(self.out, b',"refusal":null},"finish_reason":null}]}\n\n')

    cdef int put_reasoning(self, Delta* delta) except -1:
        cdef _Choice choice = self.choice(delta.choice)
        cdef str text = <object>delta.text
        cdef Py_ssize_t start
        if choice is None or not text:
            return 0
        # By both of its names, as servers of open-weight models have written it: each client reads one of them.
        put_bytes(self.out, choice.reasoning_head)
        start = self.out.size
        self.out.put_text(text)
        if choice.kept is not None:
            put(choice.kept.reasoning, self.out.data + start, self.out.size - start)
        put_literal(self.out, b'","reasoning":"')
        self.out.put_text(text)
        return put_literal(self.out, b'"},"finish_reason":null}]}\n\n')

    cdef int put_tool_call(self, object event) except -1:
        cdef _Choice choice = self.choice(event.choice)
        cdef Py_ssize_t call = event.call
        cdef str arguments = event.arguments
        cdef Py_ssize_t start
        if choice is None:
            return 0
        if call < choice.num_calls and not arguments:
            return 0
        if call > choice.num_calls or call == choice.num_calls and not (event.id and event.name):
            raise ValueError(f"tool call {call} does not begin with its id and name, or begins out of turn")
        if call in choice.inputs:
            choice.inputs[call].append(arguments)
            return 0
        if call == choice.num_calls and event.name in self.custom_tools:
            choice.inputs[call] = [arguments]
        put_bytes(self.out, choice.head)
        put_literal(self.out, b'{"tool_calls":[{"index":')
        self.out.put_integer(call)
        if call == choice.num_calls:
            choice.num_calls += 1
            put_literal(self.out, b",")
            start = self.out.size
            put_literal(self.out, b'"id":"')
            self.out.put_text(event.id)
            if call in choice.inputs:
                put_literal(self.out, b'","type":"custom","custom":{"name":"')
                self.out.put_text(event.name)
                put_literal(self.out, b'","input":"')
                arguments = ""
            else:
                put_literal(self.out, b'","type":"function","function":{"name":"')
                self.out.put_text(event.name)
                put_literal(self.out, b'","arguments":"')
            if choice.kept is not None:
                choice.kept.calls.append(Buffer())
        else:
            put_literal(self.out, b',"function":{"arguments":"')
            start = self.out.size
        self.out.put_text(arguments)
        self.keep_call(choice, call, start)
        return put_literal(self.out, b'"}}]},"finish_reason":null}]}\n\n')

    cdef int keep_call(self, _Choice choice, Py_ssize_t call, Py_ssize_t start) except -1:
        """Keep what has been written of a call since ``start``."""
        if choice.kept is None:
            return 0
        return put(<Buffer>choice.kept.calls[call], self.out.data + start, self.out.size - start)

    cdef int put_finish(self, object event) except -1:
        cdef _Choice choice = self.choice(event.choice)
        cdef Py_ssize_t start
        if choice is None:
            return 0
        choice.end = event
        for call, pieces in choice.inputs.items():
            put_bytes(self.out, choice.head)
            put_literal(self.out, b'{"tool_calls":[{"index":')
            self.out.put_integer(call)
            put_literal(self.out, b',"custom":{"input":"')
            start = self.out.size
            self.out.put_text(custom_input("".join(pieces)))
            self.keep_call(choice, call, start)
            put_literal(self.out, b'"}}]},"finish_reason":null}]}\n\n')
        self.output_tokens += event.output_tokens
        self.reasoning_tokens += event.reasoning_tokens
        put_bytes(self.out, choice.head)
        put_literal(self.out, b'{},"finish_reason":"')
        put_end(self.out, event)
        put_literal(self.out, b"}]}\n\n")
        self.num_open -= 1
        if self.num_open:
            return 0
        if self.include_usage:
            put_bytes(self.out, self.usage_head)
            self.put_usage(self.out)
            put_literal(self.out, b"}\n\n")
        if self.report_usage:
            put_usage_comment(self.out, self.prompt_tokens, self.output_tokens, self.cached_tokens)
        put_literal(self.out, b"data: [DONE]\n\n")
        self.finished = True
        return 0

    cdef int put_usage(self, Buffer out) except -1:
        put_literal(out, b'{"prompt_tokens":')
        out.put_integer(self.prompt_tokens)
        put_literal(out, b',"completion_tokens":')
        out.put_integer(self.output_tokens)
        put_literal(out, b',"total_tokens":')
        out.put_integer(self.prompt_tokens + self.output_tokens)
        put_literal(out, b',"prompt_tokens_details":{"cached_tokens":')
        out.put_integer(self.cached_tokens)
        put_literal(out, b'},"completion_tokens_details":{"reasoning_tokens":')
        out.put_integer(self.reasoning_tokens)
        return put_literal(out, b"}}")


cdef int put_end(Buffer out, object end) except -1:
    """Append the reason for a choice's end, and the stop string that ended it."""
    out.put_text(end.reason.value)
    put_literal(out, b'"')
    if end.stop_string is None:
        return 0
    # Beside OpenAI's own fields, under other servers' name: another dialect needs it.
    put_literal(out, b',"stop_reason":')
    out.append_json(end.stop_string)
    return 0


cdef int put_message(Buffer out, _Kept kept) except -1:
    """Append the message of a choice and its log probabilities."""
    cdef Py_ssize_t index
    put_literal(out, b',"message":{"role":"assistant","content":')
    if kept.calls and not kept.text.size:
        put_literal(out, b"null")
    else:
        put_string(out, kept.text)
    put_literal(out, b',"refusal":null')
    if kept.reasoning.size:
        put_literal(out, b',"reasoning_content":')
        put_string(out, kept.reasoning)
        put_literal(out, b',"reasoning":')
        put_string(out, kept.reasoning)
    for index, call in enumerate(kept.calls):
        put_literal(out, b"," if index else b',"tool_calls":[')
        put_literal(out, b"{")
        put(out, (<Buffer>call).data, (<Buffer>call).size)
        put_literal(out, b'"}}')
    if kept.calls:
        put_literal(out, b"]")
    put_literal(out, b'},"logprobs":')
    if not kept.logprobs.size:
        return put_literal(out, b"null")
    put_literal(out, b'{"content":[')
    put(out, kept.logprobs.data, kept.logprobs.size)
    return put_literal(out, b'],"refusal":null}')


cdef int put_string(Buffer out, Buffer escaped) except -1:
    put_literal(out, b'"')
    put(out, escaped.data, escaped.size)
    return put_literal(out, b'"')
